"""A rate set by feedback: as high as the noise of the steps allows, as low as what they follow demands."""

# pyright: reportPrivateImportUsage=false
# The _foreach_ functions are what PyTorch's own optimisers are made of.

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, SettingsError
from firmly.optim.loss_value import loss_value

CLIMB = math.sqrt(2)  # factor per comparison in the exponential phase


class Balance:
    """Keeps the rate of an optimiser where its parameters predict a new batch as well as their average does.

    Where parameters lag behind, their average over the last steps lags more; where they fluctuate, the average does
    less. So the two errors of a rate, too low and too high, show as the sign of one difference of losses, each taken
    on a batch that neither has learned from:

        climb:   rate <- sqrt(2) rate                                  until the average was the better one for once;
        control: log rate <- log rate + 2 step ([loss < averaged loss] - share);

    the second line is integral control, at rest where the parameters are the better ones in a `share` of batches. The
    rate stays within [`lowest`, `highest`], where it also begins, and all groups keep the ratios of their rates. For a
    scalar regression with a target in random motion, the rate at which both errors are equal is unique (docs).

    After each step of the optimiser call `follow()`; the average forgets with a memory of about `memory` steps. With
    the losses of a new batch call `update(loss, averaged_loss)` where `due()`: at every batch of a climb, later at one
    in `every`, since the comparison costs a forward pass. `averaged()` puts the average in the place of the parameters,
    to predict with; `leads` tells whether the parameters have been the better ones of late. Raises `SettingsError`, and
    `ConditionError` where a parameter group was added later.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lowest: float,
        highest: float,
        memory: float = 5.0,
        step: float = 0.06,
        share: float = 0.4,
        every: int = 4,
    ):
        if not 0 < lowest <= highest < math.inf:
            raise SettingsError(f"0 < lowest <= highest is needed of the rates, given {lowest!r} and {highest!r}")
        if not (1 <= memory < math.inf and 0 <= step < math.inf and 0 < share < 1):
            raise SettingsError(f"memory >= 1, step >= 0 and 0 < share < 1, given {memory!r}, {step!r} and {share!r}")
        if every < 1:
            raise SettingsError(f"every is at least 1 batch, given {every!r}")
        self.optimizer, self.lowest, self.highest = optimizer, lowest, highest
        self.memory, self.step, self.share, self.every = memory, step, share, every
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(0 < rate < math.inf for rate in rates):
            raise SettingsError(f"rates are positive and finite, given {rates}")
        self._ratios = [rate / rates[0] for rate in rates]
        self._average = [p.detach().clone() for p in self._parameters()]
        self.steps, self.climbs = 0, True
        self.lead = 0.0  # recent mean of by how much the parameters predict better than their average
        self._set(rates[0])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def leads(self) -> bool:
        """Have the parameters predicted better than their average of late?"""
        return self.lead > 0

    def due(self) -> bool:
        """Is it time for a comparison?"""
        return self.climbs or self.steps % self.every == 0

    def restart(self) -> None:
        """The law has changed: climb again."""
        self.climbs = True

    def update(self, loss: float | Tensor, averaged_loss: float | Tensor) -> float:
        """Losses on a batch before it is learned, of the parameters and of their average; returns the next rate.

        A loss of the parameters that is not finite counts as the worse one.
        """
        averaged = loss_value(averaged_loss)
        mine = float(loss.detach() if isinstance(loss, Tensor) else loss)
        total = abs(mine) + abs(averaged)
        gained = (averaged - mine) / total if total and math.isfinite(total) else 0.0 if mine == averaged else -1.0
        self.lead += (gained - self.lead) / (2 * self.memory)
        if gained == 0:  # no difference, nothing to learn from it: before the first step
            return self.rate
        self.climbs = self.climbs and gained > 0
        return self._set(
            self.rate * (CLIMB if self.climbs else math.exp(2 * self.step * (float(gained > 0) - self.share)))
        )

    def _set(self, rate: float) -> float:
        if len(self.optimizer.param_groups) != len(self._ratios):
            raise ConditionError("the optimiser has got a group of parameters since Balance was made: add groups first")
        self.rate = min(max(rate, self.lowest), self.highest)
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate * ratio)
            else:
                group["lr"] = self.rate * ratio
        return self.rate

    @torch.no_grad()
    def follow(self) -> None:
        """Takes the parameters after a step into their average."""
        self.steps += 1
        weight = 1 / min(self.steps, self.memory)
        for p, average in zip(self._parameters(), self._average, strict=True):
            average.lerp_(p, weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters hold their average: to predict, not to learn."""
        parameters = self._parameters()
        kept = [p.detach().clone() for p in parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(parameters, self._average)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimiser, whose own state_dict is saved beside it."""
        names = ("rate", "lowest", "highest", "steps", "climbs", "lead")
        return {**{name: getattr(self, name) for name in names}, "average": [a.clone() for a in self._average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, rate included."""
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)
        self.lowest, self.highest = state["lowest"], state["highest"]  # which `hybrid` takes from the first weights
        self.steps, self.climbs, self.lead = state["steps"], state["climbs"], state["lead"]
        self._set(state["rate"])
