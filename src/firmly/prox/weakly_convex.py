"""Weakly convex penalties, MCP and SCAD: less bias than l1, paid for by a prox with slope above 1."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ConditionError
from firmly.prox.prior import Prior, Slope, largest, positive, sum_over_sample


class MCP(Prior):
    """The minimax concave penalty: weight s - s^2 / (2 concavity) for s = |x_i| <= concavity weight, then constant.

    It is (1 / concavity)-weakly convex, so that the prox is single-valued only for steps t < concavity; then
    |z| -> 0 up to t weight, (|z| - t weight) / (1 - t / concavity) up to concavity weight, |z| beyond: the firm
    threshold. Slopes in [0, 1 / (1 - t / concavity)], ABOVE 1. Longer steps are refused.
    Source: Zhang, Nearly unbiased variable selection under minimax concave penalty, 2010; Gao and Bruce 1997.
    """

    def __init__(self, weight: float | Tensor = 1.0, concavity: float = 3.0):
        super().__init__()
        self._hold("weight", positive("the weight of MCP", weight, allow_zero=True))
        self.concavity = positive("the concavity of MCP", concavity)

    def value(self, x: Tensor) -> Tensor:
        size = x.abs().minimum(x.abs().new_tensor(self.concavity) * self.weight)
        return sum_over_sample(self.weight * size - size**2 / (2 * self.concavity))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        below(step, self.concavity, "MCP")
        size = z.abs()
        firm = (size - step * self.weight).clamp(min=0) / (1 - step / self.concavity)
        return z.sgn() * torch.where(size <= self.concavity * self.weight, firm, size)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of MCP", self.weight, allow_zero=True)
        return Slope.outward(0.0, 1 / (1 - below(step, self.concavity, "MCP") / self.concavity))

    def extra_repr(self) -> str:
        return f"concavity={self.concavity}"


class SCAD(Prior):
    """Smoothly clipped absolute deviation: weight s for s = |x_i| <= weight, constant beyond a weight (a > 2), and
    (2 a weight s - s^2 - weight^2) / (2 (a - 1)) between.

    It is 1 / (a - 1)-weakly convex, so that the prox is single-valued only for steps t < a - 1; its slopes lie in
    [0, (a - 1) / (a - 1 - t)], ABOVE 1. Longer steps are refused.
    Source: Fan and Li, Variable selection via nonconcave penalized likelihood, 2001, equation 2.8 (unit step).
    """

    def __init__(self, weight: float | Tensor = 1.0, a: float = 3.7):
        super().__init__()
        self._hold("weight", positive("the weight of SCAD", weight, allow_zero=True))
        if not a > 2:
            raise ConditionError(f"SCAD needs a > 2, given a = {a}")
        self.a = a

    def value(self, x: Tensor) -> Tensor:
        w, a = self.weight, self.a
        size = x.abs().minimum(x.abs().new_tensor(a) * w)
        between = (2 * a * w * size - size**2 - w**2) / (2 * (a - 1))
        return sum_over_sample(torch.where(size <= w, w * size, between))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        below(step, self.a - 1, "SCAD")
        w, a, size = self.weight, self.a, z.abs()
        between = ((a - 1) * size - a * step * w) / (a - 1 - step)
        near = torch.where(size <= (1 + step) * w, (size - step * w).clamp(min=0), between)
        return z.sgn() * torch.where(size <= a * w, near, size)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of SCAD", self.weight, allow_zero=True)
        return Slope.outward(0.0, (self.a - 1) / (self.a - 1 - below(step, self.a - 1, "SCAD")))

    def extra_repr(self) -> str:
        return f"a={self.a}"


def below(step: float | Tensor, limit: float, name: str) -> float:
    """The largest step, once it is known to leave the prox single-valued."""
    positive("the step", step)
    if not largest(step) < limit:
        raise ConditionError(f"the prox of this {name} is single-valued for steps below {limit}, given {largest(step)}")
    return largest(step)
