"""Entropies of the eigenvalues of a positive matrix: von Neumann's, and the log-determinant behind additive noise."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.prox.prior import Prior, Slope, positive, sum_over_sample
from firmly.prox.spectral import SpectralMap, square

STEPS = 100


class VonNeumann(Prior):
    """g(X) = weight tr(X log X) for symmetric (Hermitian) X >= 0 on the last two dimensions, else infinity.

    prox: an eigenvalue s becomes the root x of x + t weight (log x + 1) = s, that is t weight W(exp(s / (t weight) -
    1) / (t weight)) with Lambert's W, found by Newton's method in log x, where nothing overflows. Source: Benfenati,
    Chouzenoux and Pesquet, Proximal approaches for matrix optimization problems: application to robust precision
    matrix estimation, 2020.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of a von Neumann entropy", weight))

    def value(self, x: Tensor) -> Tensor:
        values, outside = spectrum(x)
        rounding = -1e3 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
        outside = outside | (values < rounding).flatten(1).any(1)
        values = values.clamp(min=0)
        return torch.where(outside, torch.inf, self.weight * sum_over_sample(torch.special.xlogy(values, values)))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        square(z)
        symmetric = (z + z.mH) / 2
        values, vectors = torch.linalg.eigh(symmetric.detach())
        gamma = torch.as_tensor(step * self.weight, dtype=values.dtype, device=values.device)
        u = lambert(values, gamma.detach())
        for _ in range(2):  # attached to gamma, from the solution
            u = u - (gamma * (u + 1) + u.exp() - values) / (gamma + u.exp())
        mapped = u.exp()
        slopes = (mapped / (mapped + gamma)).detach()
        return SpectralMap.apply(symmetric, values, vectors, mapped, slopes)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a von Neumann entropy", self.weight)
        return super().slope_at(step)


class NoisyLogDet(Prior):
    """g(X) = weight log det(X^-1 + noise_variance I) for symmetric (Hermitian) X > 0, else infinity; convex.

    The log-likelihood term of a precision matrix X whose samples were seen in white noise; LogDet at noise variance 0.
    prox: an eigenvalue s becomes the root c > 0 of c - s = t weight / (c (1 + noise_variance c)), by a monotone
    Newton's method between two roots of LogDet. Source: Benfenati, Chouzenoux and Pesquet 2020; the Newton
    method is ours.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor = 1.0, noise_variance: float = 0.0):
        super().__init__()
        self._hold("weight", positive("the weight of a log-determinant", weight))
        self.noise_variance = float(positive("the noise variance", noise_variance, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        values, outside = spectrum(x)
        outside = outside | (values <= 0).flatten(1).any(1)
        safe = torch.where(values > 0, values, 1)
        logarithms = (self.noise_variance * safe).log1p() - safe.log()
        return torch.where(outside, torch.inf, self.weight * sum_over_sample(logarithms))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        square(z)
        symmetric = (z + z.mH) / 2
        values, vectors = torch.linalg.eigh(symmetric.detach())
        gamma = torch.as_tensor(step * self.weight, dtype=values.dtype, device=values.device)
        noise, plain = self.noise_variance, gamma.detach()
        c = log_det_root(values, plain / (1 + noise * log_det_root(values, plain)))
        for _ in range(STEPS):
            new = torch.maximum(self._newton(c, values, plain), c)  # monotone, up to rounding
            settled, c = bool((new - c <= 1e-15 * c).all()), new
            if settled:
                break
        for _ in range(2):
            c = self._newton(c, values, gamma)
        inner = c * (1 + noise * c)
        slopes = (inner**2 / (inner**2 + gamma * (1 + 2 * noise * c))).detach()
        return SpectralMap.apply(symmetric, values, vectors, c, slopes)

    def _newton(self, c: Tensor, s: Tensor, gamma: Tensor) -> Tensor:
        """One step for c - s - gamma / (c (1 + noise c)) = 0."""
        inner = c * (1 + self.noise_variance * c)
        return c - (c - s - gamma / inner) / (1 + gamma * (1 + 2 * self.noise_variance * c) / inner**2)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a log-determinant", self.weight)
        return super().slope_at(step)


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (batch, ..., n) of the symmetric part, and which samples (batch,) are not symmetric."""
    square(x)
    skew = (x - x.mH).abs().flatten(1).amax(1) > 1e3 * torch.finfo(x.dtype).eps * x.abs().flatten(1).amax(1)
    return torch.linalg.eigvalsh((x + x.mH) / 2), skew


def log_det_root(s: Tensor, gamma: Tensor) -> Tensor:
    """The positive root of c - s = gamma / c, by Vieta where s is negative."""
    root = (s**2 + 4 * gamma).sqrt()
    return torch.where(s >= 0, (s + root) / 2, 2 * gamma / (root - s))


def lambert(s: Tensor, gamma: Tensor) -> Tensor:
    """u with gamma u + exp(u) = s - gamma: convex and increasing, so that Newton's method is monotone from above."""
    target = s - gamma
    u = torch.minimum(target / gamma, target.clamp(min=1).log())  # two upper bounds; nothing overflows at the smaller
    for _ in range(STEPS):
        change = (gamma * u + u.exp() - target) / (gamma + u.exp())
        u = u - change.clamp(min=0)
        if bool((change <= 4 * torch.finfo(s.dtype).eps * (1 + u.abs())).all()):
            break
    return u
