"""Bounds on every entry: a box, and the nonnegative entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ConditionError
from firmly.prox.manifold import Manifold, on_support
from firmly.prox.prior import Prior, indicator


class Box(Prior):
    """g(x) = 0 if low <= x_i <= high for all i, else infinity; prox = clamp(z, low, high), for real data.

    Source: Parikh and Boyd, Proximal algorithms, 2014, section 6.2.4.
    """

    real_only = True

    def __init__(self, low: float = 0.0, high: float = 1.0):
        super().__init__()
        if not low <= high:
            raise ConditionError(f"a box needs low <= high, given low = {low}, high = {high}")
        self.low, self.high = low, high

    def value(self, x: Tensor) -> Tensor:
        size = max([1.0, *(abs(end) for end in (self.low, self.high) if math.isfinite(end))])
        return indicator((x - x.clamp(self.low, self.high)).abs().flatten(1).amax(1) / size)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return z.clamp(self.low, self.high)

    def manifold(self, x: Tensor) -> Manifold:
        return on_support((x > self.low) & (x < self.high))

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"


class NonNegative(Prior):
    """g(x) = 0 if x_i >= 0 for all i, else infinity; prox = max(z, 0), for real data."""

    real_only = True

    def value(self, x: Tensor) -> Tensor:
        return indicator((-x).flatten(1).amax(1))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return torch.relu(z)

    def manifold(self, x: Tensor) -> Manifold:
        return on_support(x > 0)
