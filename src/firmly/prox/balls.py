"""Projections on the balls of the l2 and l1 norms."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.prox.prior import Prior, indicator, over_entries, positive
from firmly.prox.simplex import onto_simplex


class L2Ball(Prior):
    """g(x) = 0 if |x|_2 <= radius over all entries of a sample, else infinity; prox = z min(1, radius / |z|_2).

    Source: Parikh and Boyd, Proximal algorithms, 2014, section 6.5.1.
    """

    structure = "whole"

    def __init__(self, radius: float = 1.0):
        super().__init__()
        self.radius = positive("the radius of a ball", radius)

    def value(self, x: Tensor) -> Tensor:
        return indicator(torch.linalg.vector_norm(x.flatten(1), dim=1) / self.radius - 1)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(z.flatten(1), dim=1)
        return z * over_entries(self.radius / norm.clamp(min=self.radius), z)

    def extra_repr(self) -> str:
        return f"radius={self.radius}"


class L1Ball(Prior):
    """g(x) = 0 if sum |x_i| <= radius over all entries of a sample, else infinity; prox = a soft threshold, by sorting.

    Outside the ball the magnitudes of the projection are the projection of the magnitudes on a simplex.
    Source: Duchi et al., Efficient projections onto the l1-ball for learning in high dimensions, 2008.
    """

    structure = "whole"

    def __init__(self, radius: float = 1.0):
        super().__init__()
        self.radius = positive("the radius of a ball", radius)

    def value(self, x: Tensor) -> Tensor:
        return indicator((x.abs().flatten(1).sum(1) / self.radius - 1) / x[0].numel())

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        size = z.abs().flatten(1)
        nearest = torch.where(size.sum(1, keepdim=True) > self.radius, onto_simplex(size, self.radius, 1), size)
        return z.sgn() * nearest.reshape(z.shape)

    def extra_repr(self) -> str:
        return f"radius={self.radius}"
