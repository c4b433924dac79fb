"""Robust precision matrices: spectral terms, a sparsity prior and noise, by Douglas-Rachford splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, positive, positive_rule
from firmly.errors import DataError, NotConverged, SettingsError
from firmly.fixedpoint import solve
from firmly.prox.prior import Prior
from firmly.prox.spectral_entropy import NoisyLogDet


class PrecisionState(NamedTuple):
    z: Tensor
    x: Tensor


class SpectralDouglasRachford(Algorithm):
    """min over X of spectral(X) + <S, X> + prior(X), for symmetric X and data S (batch, n, n).

        p = prox_{t spectral}(z - t S);  x <- prox_{t prior}(2 p - z);  z <- z + relaxation (x - p)

    With `spectral = LogDet()` and `prior = L1(weight)` it is the graphical Lasso; `VonNeumann` and `NoisyLogDet` are
    other entropies. Any step t > 0, relaxation in (0, 2).
    Sources: Lions and Mercier 1979; Benfenati, Chouzenoux and Pesquet, Proximal approaches for matrix optimization
    problems: application to robust precision matrix estimation, 2020.
    """

    learnable = ("step_size", "relaxation", "spectral", "prior")

    def __init__(
        self, spectral: Prior, prior: Prior, size: int, step_size: Scalar = 1.0, relaxation: Scalar = 1.0
    ) -> None:
        super().__init__()
        self.spectral, self.prior = spectral, prior
        self.data_shape = self.image_shape = (size, size)
        self.step_size = positive("step_size", step_size)
        self.relaxation = positive("relaxation", relaxation)

    def start(self, y: Tensor, x: Tensor | None = None) -> PrecisionState:
        x = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y) if x is None else x
        return PrecisionState(x, x)

    def step(self, state: PrecisionState, y: Tensor, k: int) -> PrecisionState:
        p, x = self._resolve(state.z, y)
        return PrecisionState(state.z + self.relaxation * (x - p), x)

    def undamped(self, state: PrecisionState, y: Tensor, k: int) -> PrecisionState:
        """The map with relaxation 1."""
        p, x = self._resolve(state.z, y)
        return PrecisionState(state.z + (x - p), x)

    def _resolve(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = self.spectral.prox(z - self.step_size * y, self.step_size)
        return p, self.prior.prox(2.0 * p - z, self.step_size)

    def read(self, state: PrecisionState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        if name == "relaxation":
            return Rule(0.0, 2.0, "0 < relaxation < 2", "Combettes and Pesquet 2011, algorithm 10.15")
        return positive_rule("step_size > 0", "Lions and Mercier 1979")

    def conditions(self) -> list[Condition]:
        spectral = replace(convexity(self.spectral, self.step_size), name="spectral")
        return [*super().conditions(), spectral, convexity(self.prior, self.step_size)]


class Precision(NamedTuple):
    """A precision matrix (batch, n, n) and the objective (batch,) before every majorisation and at the end."""

    matrix: Tensor
    objectives: list[Tensor]


def robust_precision(
    covariance: Tensor, prior: Prior, noise_variance: float = 0.0, tol: float = 1e-6, max_iterations: int = 50
) -> Precision:
    """The precision matrix C > 0 that minimises

        F(C) = log det(C^-1 + v I) + tr(S C (I + v C)^-1) + prior(C),

    the negative log-likelihood of samples of covariance C^-1 that were seen in white noise of variance v, and a prior.
    The first term is convex, the second concave: it is replaced by its tangent (majorise), the rest is minimised by
    `SpectralDouglasRachford`, and so on; F never increases. At v = 0 one pass is exact.

    `covariance` S is (batch, n, n), symmetric. Raises `NotConverged` when an inner problem or F has not settled to
    `tol`. Source: Benfenati, Chouzenoux and Pesquet 2020.
    """
    if not noise_variance >= 0:
        raise SettingsError(f"the noise variance is not negative, given {noise_variance}")
    square = covariance.dim() == 3 and covariance.shape[1] == covariance.shape[2]
    if not square or not bool(torch.isclose(covariance, covariance.mT, atol=1e-6).all()):
        raise DataError(f"covariances are symmetric (batch, n, n), given {tuple(covariance.shape)}")
    spectral, size = NoisyLogDet(1.0, noise_variance), covariance.shape[-1]
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)

    def shrink(C: Tensor) -> Tensor:
        return torch.linalg.inv(eye + noise_variance * C)

    def objective(C: Tensor) -> Tensor:
        return spectral.value(C) + (covariance * (C @ shrink(C))).sum((1, 2)) + prior.value(C)

    C = torch.linalg.inv(covariance + eye * covariance.diagonal(dim1=1, dim2=2).mean(1).reshape(-1, 1, 1))
    objectives = [objective(C)]
    for _ in range(max_iterations):
        inverse = shrink(C)
        algorithm = SpectralDouglasRachford(spectral, prior, size)
        found = solve(algorithm, inverse @ covariance @ inverse, tol=tol / 100, start=C)
        if not found.converged:
            raise NotConverged(f"the convex part of a robust precision matrix: {found.status}")
        C = (found.x + found.x.mT) / 2
        objectives.append(objective(C))
        fall = objectives[-2] - objectives[-1]
        if noise_variance == 0 or bool((fall <= tol * objectives[-1].abs().clamp(min=1)).all()):
            return Precision(C, objectives)
    raise NotConverged(f"the objective still falls after {max_iterations} majorisations; raise max_iterations or tol")
