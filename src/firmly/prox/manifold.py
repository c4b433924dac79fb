"""What a prior knows near a point: the directions in which it is smooth, and its curvature along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Manifold(NamedTuple):
    """The active manifold of a prior g at a point x = prox(z, t), as linear maps of (batch, *shape) to itself.

    `project` is the orthogonal projection P onto the tangent space, the range of the derivative M of the prox, and
    `hessian` the Hessian of g along the manifold: P M^+ P = P + t hessian, away from the kinks of the prox.
    Source: Lewis, Active sets, nonsmoothness, and sensitivity, 2002.
    """

    project: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


def on_support(active: Tensor, curvature: float | Tensor = 0.0) -> Manifold:
    """The entries that are `active`, with a curvature that broadcasts against one sample."""
    return Manifold(lambda v: v * active, lambda v: curvature * (v * active))


def on_groups(
    x: Tensor, weight: float | Tensor, gather: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]
) -> Manifold:
    """sum_G weight_G |x_G|: the groups that do not vanish, with Hessian weight / |x_G| (I - x_G x_G' / |x_G|^2).

    `gather` sums entries over every group, `spread` gives every entry the number of its group.
    """
    power = gather(x.square())
    active = power > 0
    power = torch.where(active, power, 1)
    curvature = torch.where(active, weight / power.sqrt(), 0)

    def hessian(v: Tensor) -> Tensor:
        return spread(curvature) * (v - x * spread(gather(x * v) / power))

    return Manifold(lambda v: v * spread(active), hessian)
