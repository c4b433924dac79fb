"""Learned scalars that cannot leave the range of their rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from firmly.algorithms.algorithm import Algorithm, Rule, number, positive_rule
from firmly.errors import ConditionError

MARGIN = 1e-6  # of the interval's width at each end, so that rounding cannot put a scalar onto the end


class Within(nn.Module):
    """The parametrisation of a scalar by an unconstrained number, for `torch.nn.utils.parametrize`.

    low + (high - low) (MARGIN + (1 - 2 MARGIN) sigmoid(raw)) in a bounded interval, low + exp(raw) in an unbounded one.
    The interval is the rule of the layer at the time of reading: it follows whatever it depends on.
    """

    def __init__(self, layer: Algorithm, name: str, free: tuple[str, ...], waived: bool):
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: the layer contains this module
        self.name = name
        self.free = free
        self.waived = waived

    def rule(self) -> Rule:
        return positive_rule("waived", "") if self.waived else self.layer.rule(self.name, self.free)

    def forward(self, raw: Tensor) -> Tensor:
        low, high = self.rule()[:2]
        raw = raw.double()
        if isinstance(high, float) and high == math.inf:
            return low + raw.exp()
        return low + (high - low) * (MARGIN + (1 - 2 * MARGIN) * raw.sigmoid())

    def right_inverse(self, value: Tensor) -> Tensor:
        low, high, text, _ = self.rule()
        low, high = number(low), number(high)
        place = value.detach().double() - low
        if high < math.inf:
            place = (place / (high - low) - MARGIN) / (1 - 2 * MARGIN)
        if not (place > 0 and (high == math.inf or place < 1)):
            raise ConditionError(
                f"{self.name} = {number(value):.6g} cannot be learned inside ({low:.6g}, {high:.6g}), "
                f"by the rule: {text}; start further inside, or waive=['{self.name}']"
            )
        return (place.log() if high == math.inf else torch.logit(place)).to(value.dtype)


class Positive(nn.Module):
    """exp(raw), entry by entry: the weights of priors."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        if not bool((value > 0).all()):
            raise ConditionError(f"only positive weights can be learned, given {value.detach().flatten().tolist()[:5]}")
        return value.detach().log()
