"""A gradient step on a ridge regulariser as a proximal map: a learned denoiser that algorithms take as a prior."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ConditionError, NotConverged
from firmly.prox.prior import Prior, Slope, positive
from firmly.prox.ridge import Ridge


class GradientStep(Prior):
    """The prior whose prox is the gradient step D(z) = z - R'(z) on a convex ridge R; prox(z, t) = t D(z / t).

    D has slopes in [1 - kappa, 1]: firmly nonexpansive for kappa <= 1, where it is the prox of
    g(x) = max_z (<x, z> - |z|^2 / 2 + R(z)) - |x|^2 / 2, and nonexpansive for kappa <= 2. The step t is a scale, as for
    `MonotoneSpline`. To a certificate it is one nonlinearity of the whole image, whatever the filters are: so an
    algorithm that has no basis in common with convolutions is certified in that of its operator.
    Sources: Moreau 1965, corollary 10.c, for the prox; Hurault, Leclaire and Papadakis, Gradient step denoiser for
    convergent plug-and-play, 2022, for its use.
    """

    structure = "whole"

    def __init__(self, ridge: Ridge):
        super().__init__()
        if float(ridge.slope.low) < 0:
            raise ConditionError(f"a gradient step is a prior for a convex ridge; its slopes go down to {ridge.slope}")
        self.ridge = ridge

    def value(self, x: Tensor) -> Tensor:
        """g(x), for kappa < 1: R(z) - |z - x|^2 / 2 at the z with D(z) = x, found by z <- x + R'(z)."""
        kappa = float(self.ridge.kappa().detach())
        if not kappa < 1:
            raise ConditionError(f"the function of a gradient step is found for kappa < 1, given {kappa:.6g}")
        z = x
        for _ in range(10_000):
            following = x + self.ridge.gradient(z)
            change, size = (torch.linalg.vector_norm(v.detach().flatten(1), dim=1) for v in (following - z, following))
            z = following
            if bool((change <= 8 * torch.finfo(size.dtype).eps * size).all()):
                break
        else:
            raise NotConverged(f"D(z) = x was not solved in 10,000 steps (kappa = {kappa:.6g})")
        return self.ridge.value(z) - (z - x).abs().square().flatten(1).sum(1) / 2

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return z - step * self.ridge.gradient(z / step)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the step", step)
        return Slope.outward(1.0 - float(self.ridge.kappa().detach()) * (1 + 1e-15), 1.0)
