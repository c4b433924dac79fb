"""The Huber function, quadratic near zero and linear far away."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.prox.prior import Prior, Slope, largest, positive, sum_over_sample


class Huber(Prior):
    """g(x) = weight sum_i h(|x_i|), h(s) = s^2 / 2 for s <= knee, else knee s - knee^2 / 2.

    With a = t weight the prox keeps the direction and shrinks |z| to max(|z| / (1 + a), |z| - a knee);
    slopes in [1 / (1 + a), 1].
    Source: Huber, Robust estimation of a location parameter, 1964; Combettes and Pesquet 2011, table 10.2.
    """

    def __init__(self, knee: float | Tensor = 1.0, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("knee", positive("the knee of a Huber function", knee))
        self._hold("weight", positive("the weight of a Huber function", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        size = x.abs()
        inside = size.minimum(torch.as_tensor(self.knee, dtype=size.dtype, device=size.device))
        return sum_over_sample(self.weight * inside * (size - inside / 2))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        size, a = z.abs(), step * self.weight
        return z.sgn() * torch.maximum(size / (1 + a), size - a * self.knee)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the knee of a Huber function", self.knee)
        positive("the weight of a Huber function", self.weight, allow_zero=True)
        return Slope.outward(1 / (1 + largest(positive("the step", step)) * largest(self.weight)), 1.0)
