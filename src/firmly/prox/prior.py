"""What every prior is: a function g with a proximal map, and what is known of that map's slope."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import ConditionError

Structure = Literal["separable", "channel", "group", "whole"]


class Slope(NamedTuple):
    """R has slopes in [low, high]: <dv - low dz, high dz - dv> >= 0 for all increments dv = R(z + dz) - R(z)."""

    low: float
    high: float


class Prior(nn.Module):
    """A function g with g.prox(z, t) = argmin_x 1/2 |x - z|^2 + t g(x).

    A subclass gives `value` and `_prox`. A convex g has a firmly nonexpansive prox, slope (0, 1); a subclass whose
    prox is smoother (`low > 0`, strongly convex) or steeper (`high > 1`, weakly convex) overrides `slope_at`.
    `structure` says on which pieces the prox acts independently: every entry ("separable"), groups of channels at one
    pixel ("group"), or not at all ("whole").
    """

    structure: Structure = "separable"

    def value(self, x: Tensor) -> Tensor:  # (batch, *shape) -> (batch,)
        """g(x), one number for each element of the batch."""
        raise NotImplementedError

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        raise NotImplementedError

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        """The slope interval of z -> prox(z, step)."""
        return Slope(0.0, 1.0)

    @property
    def slope(self) -> Slope:
        """The slope interval of the prox with unit step."""
        return self.slope_at(1.0)

    def prox(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """argmin_x 1/2 |x - z|^2 + step g(x), for each element of the batch; the step is positive."""
        return proximal(self, z, step)

    def conjugate_prox(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The prox of step g*, the convex conjugate, by Moreau: z - step prox_{g / step}(z / step)."""
        return z - step * self.prox(z / step, 1.0 / step)

    def forward(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return self.prox(z, step)


def proximal(prior: Prior, z: Tensor, step: float | Tensor) -> Tensor:
    """prior.prox(z, step), open to `__torch_function__` so that a traced input records the prior instead."""
    if has_torch_function((z,)):
        return handle_torch_function(proximal, (z,), prior, z, step)
    if not isinstance(step, Tensor) and not step > 0:
        raise ConditionError(f"the step of a proximal map is positive, given {step}")
    return prior._prox(z, step)


def sum_over_sample(values: Tensor) -> Tensor:
    """The sum over all dimensions but the batch."""
    return values.flatten(1).sum(1)


class Zero(Prior):
    """g = 0, whose prox is the identity."""

    def value(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], dtype=x.real.dtype, device=x.device)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return z

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        return Slope(1.0, 1.0)
