"""The l1 norm and its soft threshold."""

from __future__ import annotations

from torch import Tensor

from firmly.prox.manifold import Manifold, on_support
from firmly.prox.prior import Prior, Slope, positive, sum_over_sample


class L1(Prior):
    """g(x) = sum_i weight_i |x_i|; prox = soft threshold z max(1 - t weight / |z|, 0), also for complex z.

    `weight` is a non-negative number, or a tensor that broadcasts against one sample (weighted l1); a tensor may be a
    learnable parameter.
    Source: Combettes and Pesquet, Proximal splitting methods in signal processing, 2011, table 10.2.
    """

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of L1", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.weight * x.abs())

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return soft_threshold(z, step * self.weight)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of L1", self.weight, allow_zero=True)  # it may have been learned since
        return super().slope_at(step)

    def manifold(self, x: Tensor) -> Manifold:
        return on_support(x != 0)


def soft_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    """z max(1 - threshold / |z|, 0): shrinks the magnitude of every entry, real or complex."""
    return z.sgn() * (z.abs() - threshold).clamp(min=0)
