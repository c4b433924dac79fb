"""The mixed norm of source localisation: few sources, each with a free time course and orientation."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.prox.manifold import Manifold, on_groups
from firmly.prox.norms import shrink_factor
from firmly.prox.prior import Prior, Slope, positive, sum_over_sample


class MixedNorm(Prior):
    """g(x) = sum over sources i of weight_i |x_i|_F for x of shape (batch, time, sources * orientations).

    x_i, the course of source i, has all times and the `orientations` neighbouring columns that belong to the source.
    prox: z_i max(1 - t weight_i / |z_i|_F, 0). `weight` is a number or one for every source, (sources,).
    Source: Gramfort, Kowalski and Hamalainen, Mixed-norm estimates for the M/EEG inverse problem, 2012.
    """

    structure = "whole"  # a source is neither one entry nor one pixel: one multiplier for the whole sample is sound

    def __init__(self, weight: float | Tensor = 1.0, orientations: int = 1):
        super().__init__()
        if orientations < 1:
            raise ShapeError(f"a source has at least one orientation, given {orientations}")
        self.orientations = orientations
        self._hold("weight", positive("the weight of a mixed norm", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.weight * self.amplitudes(x))

    def amplitudes(self, x: Tensor) -> Tensor:
        """|x_i|_F of every source: (batch, sources). Its gradient is 0 where it vanishes."""
        if x.dim() != 3 or x.shape[2] % self.orientations:
            raise ShapeError(f"a mixed norm takes (batch, time, sources * {self.orientations}), given {tuple(x.shape)}")
        power = x.abs().square().sum(1).unflatten(1, (-1, self.orientations)).sum(2)
        return torch.where(power > 0, torch.where(power > 0, power, 1).sqrt(), 0)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        factor = shrink_factor(self.amplitudes(z), step * self.weight)
        return z * factor.repeat_interleave(self.orientations, 1)[:, None]

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a mixed norm", self.weight, allow_zero=True)
        return super().slope_at(step)

    def manifold(self, x: Tensor) -> Manifold:
        count = self.orientations
        return on_groups(
            x, self.weight, lambda v: v.sum(1).unflatten(1, (-1, count)).sum(2),
            lambda s: s.repeat_interleave(count, 1)[:, None],
        )  # fmt: skip
