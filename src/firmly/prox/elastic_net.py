"""The elastic net, an l1 norm made strongly convex."""

from __future__ import annotations

from torch import Tensor

from firmly.prox.l1 import soft_threshold
from firmly.prox.manifold import Manifold, on_support
from firmly.prox.prior import Prior, Slope, positive, smallest, sum_over_sample


class ElasticNet(Prior):
    """g(x) = sum_i weight |x_i| + curvature / 2 |x_i|^2; prox = soft(z, t weight) / (1 + t curvature).

    Slopes in [0, 1 / (1 + t curvature)]. Numbers, or tensors that broadcast against one sample and may be learnable.
    Source: Zou and Hastie, Regularization and variable selection via the elastic net, 2005; Parikh and Boyd,
    Proximal algorithms, 2014, section 6.5.
    """

    def __init__(self, weight: float | Tensor = 1.0, curvature: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of an elastic net", weight, allow_zero=True))
        self._hold("curvature", positive("the curvature of an elastic net", curvature, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        size = x.abs()
        return sum_over_sample(self.weight * size + self.curvature / 2 * size**2)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return soft_threshold(z, step * self.weight) / (1 + step * self.curvature)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of an elastic net", self.weight, allow_zero=True)
        positive("the curvature of an elastic net", self.curvature, allow_zero=True)
        return Slope.outward(0.0, 1 / (1 + smallest(positive("the step", step)) * smallest(self.curvature)))

    def manifold(self, x: Tensor) -> Manifold:
        return on_support(x != 0, self.curvature)
