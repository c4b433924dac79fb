"""The Radon transform followed by the square root of the ramp filter: its adjoint is filtered back projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import NotCertifiable
from firmly.linear.dense import Dense
from firmly.linear.norms import EPS, krylov_vector
from firmly.linear.radon import Radon

LARGEST_GRAM = 8192  # rays up to which the norm is proved by a factorisation


class FilteredRadon(Radon):
    """B = F^(1/2) R: the Radon transform R of `Radon`, each projection weighted by the root of the ramp filter.

    F is pi / angles times the Toeplitz matrix of the band-limited ramp h[0] = 1/4, h[k] = -1 / (pi k)^2 for odd k, else
    0, so that R* F is filtered back projection for angles spread evenly over half a turn; it is positive definite.
    Data y of R become B's by `weighted(y)` = F^(1/2) y, and B.T(weighted(y)) is their filtered back projection. B*B is
    near the identity on what the angles resolve, where R*R is a strong blur: least squares in the weighted data need
    few iterations. The norm of B is proved by one factorisation for at most 8192 rays; beyond, it is the product of the
    norms of F^(1/2) and R, which is far from tight.
    Source of the filter: Ramachandran and Lakshminarayanan, Three-dimensional reconstruction from radiographs and
    electron micrographs, 1971; Kak and Slaney, Principles of computerized tomographic imaging, 1988, equation 3.61.
    """

    root: Tensor

    def __init__(self, shape: Sequence[int], angles: Tensor | Sequence[float], detectors: int | None = None):
        super().__init__(shape, angles, detectors)
        values, vectors = torch.linalg.eigh(math.pi / self.codomain[1] * ramp(self.codomain[2]))
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        self.hold("root", (root + root.mT) / 2)

    def weighted(self, y: Tensor) -> Tensor:
        """F^(1/2) y for data y (batch, 1, angles, detectors); its norm is that of `Dense(root)`."""
        return y @ self.root.to(y.dtype)

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.weighted(super()._apply_map(x))

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return super()._apply_adjoint(self.weighted(y))

    def _upper(self) -> float:
        """The root of a bound of the largest eigenvalue of B B*, proved by Cholesky (`norms.norm_of_blocks`)."""
        rays = math.prod(self.codomain)
        if rays > LARGEST_GRAM:
            return Dense(self.root).norm().upper * super()._upper() * (1 + 1e-15)
        gram, error = self._gram_of_rays()
        vector = krylov_vector(self, steps=40)
        guess = float(self(vector).square().sum() / vector.square().sum())
        if not math.isfinite(guess):
            raise NotCertifiable(f"{self} has entries that are not finite numbers; check its tensors")
        slack = 1e-4
        while True:
            bound = guess * (1 + slack)
            shifted = -gram
            shifted.diagonal().add_(bound)
            if not bool(torch.linalg.cholesky_ex(shifted).info):
                return math.sqrt(bound + (rays + 4) * EPS * rays * bound + error) * (1 + 4 * EPS)
            slack *= 8

    def _gram_of_rays(self) -> tuple[Tensor, float]:
        """B B* (rays, rays) in float64 and a bound of the norm of its rounding error."""
        from scipy.sparse import csr_array

        _, angles, detectors = self.codomain
        rays = angles * detectors
        parts = (self.values.double(), self.columns, self.starts)
        matrix = csr_array(tuple(part.cpu().numpy() for part in parts), shape=(rays, math.prod(self.domain)))
        root = self.root.double().cpu()
        gram = torch.from_numpy((matrix @ matrix.T).toarray())
        gram = (gram.reshape(-1, detectors) @ root).reshape(rays, rays)
        gram = (gram.mT.reshape(-1, detectors) @ root).reshape(rays, rays)
        # |rounding| is entry by entry below (terms EPS) |root| |R| |R*| |root|, for sums of so many products in all
        terms = 2 * (2 * detectors + 2 * sum(self.domain[1:]) + 8)
        size = float(torch.linalg.matrix_norm(root)) ** 2 * super()._upper() ** 2
        return (gram + gram.mT) / 2, terms * EPS * size


def ramp(detectors: int) -> Tensor:
    """The Toeplitz matrix of the band-limited ramp filter for detectors of size one, in float64."""
    distance = torch.arange(detectors, dtype=torch.float64)
    filter_ = torch.where(distance % 2 == 1, -1 / (math.pi * distance.clamp(min=1)) ** 2, 0.0)
    filter_[0] = 0.25
    places = torch.arange(detectors)
    return filter_[(places[:, None] - places).abs()]
