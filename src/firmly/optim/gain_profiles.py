"""How the matrix gain of recursive least squares evolves: decreasing, forgetting, constant trace, constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError


class Weights(NamedTuple):
    """F+ = (1 / keep) (F - F phi phi' F / (ratio + phi' F phi)); keep None: whatever leaves trace F as it is."""

    keep: float | None
    ratio: float = 1.0


class Profile(Protocol):
    """The weights of step t = 0, 1, ..."""

    def weights(self, t: int) -> Weights: ...


@dataclass(frozen=True)
class Decreasing:
    """keep = 1: least squares over all data, each with the same weight; F never grows."""

    def weights(self, t: int) -> Weights:
        return Weights(1.0)


@dataclass(frozen=True)
class Forgetting:
    """keep = factor: an observation of age a has the weight factor^a."""

    factor: float = 0.99

    def __post_init__(self) -> None:
        _require_fraction(factor=self.factor)

    def weights(self, t: int) -> Weights:
        return Weights(self.factor)


@dataclass(frozen=True)
class VariableForgetting:
    """keep(t) = growth keep(t-1) + 1 - growth, from `start` up to 1: forgets the initial guess, then nothing."""

    start: float = 0.97
    growth: float = 0.97

    def __post_init__(self) -> None:
        _require_fraction(start=self.start, growth=self.growth)

    def weights(self, t: int) -> Weights:
        return Weights(1 - (1 - self.start) * self.growth**t)


@dataclass(frozen=True)
class ConstantTrace:
    """Forgets just as much as keeps trace F where it is, after `decreasing` steps of a decreasing gain."""

    ratio: float = 1.0
    decreasing: int = 0

    def __post_init__(self) -> None:
        if not (self.ratio > 0.5 and self.decreasing >= 0):
            raise SettingsError(f"ratio > 1/2 and decreasing >= 0, given {self.ratio} and {self.decreasing}")

    def weights(self, t: int) -> Weights:
        return Weights(1.0) if t < self.decreasing else Weights(None, self.ratio)


@dataclass(frozen=True)
class Constant:
    """F stays as it is."""

    def weights(self, t: int) -> Weights:
        return Weights(1.0, math.inf)


class MatrixGain:
    """F = S S', updated through its factor S, so that rounding cannot make it indefinite.

    F+ = (1 / keep) (F - F phi phi' F / (ratio + phi' F phi)), in terms of information F+^-1 = keep F^-1 +
    (keep / ratio) phi phi'. Where nothing excites it, forgetting winds a gain up without limit: here a step forgets
    only as far as trace F+ <= `ceiling`, by default the trace at the start. So trace F, and with it every eigenvalue,
    never exceeds the larger of the two, whatever the regressors.

    Raises `ShapeError` and `SettingsError` unless `start` is a positive definite matrix, `DataError` for a regressor
    that is not finite. Source: Landau, Lozano, M'Saad, Karimi, Adaptive Control, ch. 3 (the family); Potter's update of
    the factor, in Bierman, Factorization Methods for Discrete Sequential Estimation, 1977; the ceiling is ours.
    """

    def __init__(self, start: Tensor, profile: Profile | None = None, ceiling: float | None = None):
        if start.ndim != 2 or start.shape[0] != start.shape[1] or not start.is_floating_point():
            raise ShapeError(f"a gain is a real matrix (n, n), given {start.dtype} of shape {tuple(start.shape)}")
        factor, failed = torch.linalg.cholesky_ex(start)
        if failed or not torch.equal(start, start.mT):
            raise SettingsError("a gain is symmetric and positive definite")
        if ceiling is not None and not (math.isfinite(ceiling) and ceiling > 0):
            raise SettingsError(f"ceiling, a bound on the trace, is positive and finite, given {ceiling!r}")
        self.profile: Profile = Decreasing() if profile is None else profile
        self.factor, self.t = factor, 0
        self.ceiling = self.trace() if ceiling is None else ceiling

    @property
    def matrix(self) -> Tensor:
        """F."""
        return self.factor @ self.factor.mT

    def trace(self) -> float:
        """Of F."""
        return float(torch.linalg.vector_norm(self.factor)) ** 2

    def direction(self, phi: Tensor) -> Tensor:
        """F phi, for phi (..., n)."""
        return (phi @ self.factor) @ self.factor.mT

    @torch.no_grad()
    def update(self, phi: Tensor, others: float = 0.0) -> None:
        """Takes in one regressor (n,); `others` adds to phi' F phi what it is in other blocks of a block-diagonal F."""
        if phi.shape != self.factor.shape[:1]:
            raise ShapeError(f"a regressor has shape {tuple(self.factor.shape[:1])}, given {tuple(phi.shape)}")
        f = phi @ self.factor
        size = float(f @ f)
        if not math.isfinite(size):
            raise DataError("phi' F phi is not finite: the regressor has entries that are not finite, or too large")
        keep, ratio = self.profile.weights(self.t)
        limit = self.trace() if keep is None else self.ceiling
        if size and math.isfinite(ratio):
            total = ratio + others + size
            scale = total + math.sqrt((ratio + others) * total)
            self.factor.addr_(self.factor @ f, f, alpha=-1 / scale)
        # forgetting may be undone, but an update is never: keep <= 1
        keep = min(1.0, max(keep or 0.0, self.trace() / limit))
        if keep < 1:
            self.factor.mul_(1 / math.sqrt(keep))
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """The factor, the step and the ceiling; the profile is made anew."""
        return {"factor": self.factor.clone(), "t": self.t, "ceiling": self.ceiling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.factor, self.t, self.ceiling = state["factor"].clone(), state["t"], state["ceiling"]


def _require_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise SettingsError(f"{name} lies in (0, 1], given {value!r}")
