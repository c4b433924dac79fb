"""The Euclidean norm of a sample, and its square."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.prox.manifold import Manifold, on_groups, on_support
from firmly.prox.prior import Prior, Slope, largest, over_entries, positive, smallest, sum_over_sample


class L2(Prior):
    """g(x) = weight |x|_2 over all entries of a sample; prox = z max(1 - t weight / |z|_2, 0).

    The prox is the block soft threshold. Source: Parikh and Boyd, Proximal algorithms, 2014, section 6.5.1.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of a norm", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return self.weight * torch.linalg.vector_norm(x.flatten(1), dim=1)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(z.flatten(1), dim=1)
        return z * over_entries(shrink_factor(norm, step * self.weight), z)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a norm", self.weight, allow_zero=True)
        return super().slope_at(step)

    def manifold(self, x: Tensor) -> Manifold:
        return on_groups(x, self.weight, lambda v: v.flatten(1).sum(1), lambda s: over_entries(s, x))


class SquaredL2(Prior):
    """g(x) = sum_i weight / 2 |x_i|^2 (Tikhonov); prox = z / (1 + t weight), whose slope is 1 / (1 + t weight).

    `weight` is a number or a tensor that broadcasts against one sample.
    """

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of a squared norm", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.weight * x.abs() ** 2) / 2

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return z / (1 + step * self.weight)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a squared norm", self.weight, allow_zero=True)
        low = 1 / (1 + largest(step) * largest(self.weight))
        high = 1 / (1 + smallest(positive("the step", step)) * smallest(self.weight))
        return Slope.outward(low, high)

    def manifold(self, x: Tensor) -> Manifold:
        return on_support(torch.ones_like(x), self.weight)


def shrink_factor(norm: Tensor, threshold: float | Tensor) -> Tensor:
    """max(1 - threshold / norm, 0), and 0 where the norm is 0."""
    kept = norm > threshold
    return torch.where(kept, 1 - threshold / torch.where(kept, norm, 1), 0)
