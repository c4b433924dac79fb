"""A-posteriori steps of a linear regression through a dynamic adaptation gain: stable for every constant rate."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.optim.adaptation_gain import AdaptationGain

ROUNDING = 1e-6  # of phi' F phi, beside |phi| |F phi|


class PredictionErrors(NamedTuple):
    """y - phi' theta, with the parameters as they were extrapolated (prior) and as they are now (posterior)."""

    prior: Tensor
    posterior: Tensor


class Direction(Protocol):
    """A matrix F that is known by its products, such as `gain_profiles.MatrixGain`."""

    def direction(self, phi: Tensor) -> Tensor:
        """F phi, for phi (..., n)."""
        ...


class ImplicitStep:
    """Estimates theta in y = phi' theta, one observation at a time.

    The step is implicit: the update filters v(t) = F phi eps with the error eps of the parameters *after* it. With
    s(t) = v(t) + d1 s(t-1) + d2 s(t-2) the filtered corrections, everything but v(t) is known beforehand:

        theta0 = (1 - leakage) theta + (d1 + c1) s(t-1) + (d2 + c2) s(t-2),
        eps0 = y - phi' theta0,   eps = eps0 / (1 + phi' F phi),   theta = theta0 + F phi eps.

    Without leakage, if `gain.pr()`, sum eps^2 is bounded for every constant positive definite F and every sequence of
    regressors, and if not, for a number F = f where f max|phi|^2 gain.shortage() < 1 (data without noise; proofs in
    the docs). Leading dimensions of `theta` (..., n) are a batch. Two more vectors are kept, `filtered` and
    `filtered_before`. Raises `SettingsError` for a leakage outside [0, 1) and for unstable poles, `DataError`
    for observations that are not finite and for phi' F phi < 0. Source: Landau, Airimitoaie, Vau, Buche, arXiv
    2404.12672.
    """

    def __init__(self, theta: Tensor, gain: AdaptationGain | None = None, leakage: float = 0.0):
        self.gain = AdaptationGain() if gain is None else gain
        if not 0 <= leakage < 1:
            raise SettingsError(f"a leakage lies in [0, 1), given {leakage!r}")
        if not self.gain.stable:
            raise SettingsError(f"the filter needs |d2| < 1 and |d1| < 1 - d2, given poles {self.gain.poles}")
        if theta.ndim == 0 or not theta.is_floating_point():
            raise ShapeError(f"theta is a real tensor (..., n), given {theta.dtype} of shape {tuple(theta.shape)}")
        self.theta, self.leakage = theta.detach().clone(), leakage
        self.filtered, self.filtered_before = torch.zeros_like(theta), torch.zeros_like(theta)

    def predict(self, phi: Tensor) -> Tensor:
        """phi' theta, for phi (..., n)."""
        return (phi * self.theta).sum(-1)

    @torch.no_grad()
    def update(self, phi: Tensor, y: Tensor | float, rate: float | Tensor | Direction) -> PredictionErrors:
        """One observation: phi (..., n), y (...), and F: a positive number, a positive definite matrix (..., n, n), or
        an object with `direction(phi)` = F phi.

        With a `MatrixGain` that takes in phi afterwards (`gain.update(phi)`) it is recursive least squares through the
        filter, in O(n^2); F then changes, which the bound above does not allow for.
        """
        if phi.shape != self.theta.shape:
            raise ShapeError(f"phi has the shape {tuple(self.theta.shape)} of theta, given {tuple(phi.shape)}")
        direction = _direction(rate, phi)  # F phi
        (c1, c2), (d1, d2) = self.gain.zeros, self.gain.poles
        known = d1 * self.filtered + d2 * self.filtered_before
        theta = (1 - self.leakage) * self.theta + known + c1 * self.filtered + c2 * self.filtered_before
        prior = y - (phi * theta).sum(-1)
        if prior.shape != phi.shape[:-1]:
            raise ShapeError(
                f"y has the shape {tuple(phi.shape[:-1])} of the batch, given {tuple(torch.as_tensor(y).shape)}"
            )
        size = (phi * direction).sum(-1)
        if not bool(size.isfinite().all() and torch.as_tensor(y).isfinite().all()):
            raise DataError("y or phi' F phi is not finite: nothing was learned from this observation")
        if not bool((size >= -ROUNDING * phi.norm(dim=-1) * direction.norm(dim=-1)).all()):
            raise DataError(f"phi' F phi is {float(size.min()):.3g}: F is not positive definite")
        posterior = prior / (1 + size)
        correction = direction * posterior.unsqueeze(-1)
        self.theta = theta + correction
        self.filtered, self.filtered_before = known + correction, self.filtered
        return PredictionErrors(prior, posterior)


def _direction(rate: float | Tensor | Direction, phi: Tensor) -> Tensor:
    if not isinstance(rate, float | int | Tensor):
        found = rate.direction(phi)
        if found.shape != phi.shape:
            raise ShapeError(f"a direction has the shape {tuple(phi.shape)} of phi, given {tuple(found.shape)}")
        return found
    if isinstance(rate, Tensor) and rate.ndim:
        n = phi.shape[-1]
        if rate.shape[-2:] != (n, n):
            raise ShapeError(f"the rate is a number or a matrix (..., {n}, {n}), given shape {tuple(rate.shape)}")
        return (rate @ phi.unsqueeze(-1)).squeeze(-1)
    if not 0 < rate < math.inf:
        raise SettingsError(f"the rate is positive and finite, given {float(rate)}")
    return rate * phi
