"""E/PD: the learning rate of any optimiser, set by feedback from the loss, with a stability flag."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim.loss_value import loss_value


class LoopModel(NamedTuple):
    """A loss that falls by b times the rate, under the PD law: p = b K_P / L0, q = b eta0 K_D / L0."""

    b: float
    p: float
    q: float
    stable: bool


class Stability(NamedTuple):
    """The loop if the loss answers in the same pass, and if it answers one pass late."""

    immediate: LoopModel
    delayed: LoopModel

    @property
    def stable(self) -> bool:
        """In both models."""
        return self.immediate.stable and self.delayed.stable


class Feedback:
    """Doubles the rate until the loss rises, then makes it proportional to the loss, with a derivative term.

    Call `update(loss)` after each pass over the data at hand, with its mean training or validation loss. With eta0 the
    rate that the optimiser came with, L_j the loss of pass j over this chunk of data and L0 that of the very first
    pass, the rate of pass k is

        E:   eta0 2^k, until L_{k-1} > L_{k-2} (k > 1) or eta0 2^k > `ceiling`; then K_P = eta0 2^(k-2), and it is K_P;
        PD:  K_P L_{k-1} / L0 - eta0 K_D (L_{k-1} - L_{k-2}) / L0, without the second term where that were negative;

    K_D is `derivative`. `restart()` begins a new chunk of data: the E phase again, which raises the rate, with L0 kept.
    With `hold` the event-based rate: in the PD phase the rate stays as it is while the loss falls. Groups keep the
    ratios of their rates. Raises `SettingsError` unless the first group's rate lies in (0, `ceiling`], and `DataError`
    for a loss that is negative, not finite, or zero in the first pass.

    Source: Z. Zhao, S. Cerf, B. Robu, N. Marchand, CCTA 2019 (arXiv 1911.07710); L-CSS 4(4), 2020 (arXiv 2003.09503).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        derivative: float = 5.0,
        ceiling: float = 4.0,
        hold: bool = False,
        forgetting: float = 0.9,
    ):
        if not (math.isfinite(derivative) and derivative >= 0):
            raise SettingsError(f"derivative (K_D) is finite and not negative, given {derivative!r}")
        if not 0 < forgetting <= 1:
            raise SettingsError(f"forgetting lies in (0, 1], given {forgetting!r}")
        self.optimizer, self.derivative, self.ceiling, self.hold = optimizer, derivative, ceiling, hold
        self.forgetting = forgetting
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not 0 < self.base_rates[0] <= ceiling:
            raise SettingsError(f"the first group's rate lies in (0, {ceiling}], given {self.base_rates[0]!r}")
        self.rate = self.base_rates[0]
        self.first_loss: float | None = None
        self._answers = [[0.0, 0.0], [0.0, 0.0]]  # sums of eta * fall of the loss and of eta^2, for each loop model
        self._begin(self.rate)

    def _begin(self, rate: float) -> None:
        self.start = rate
        self.passes = 0
        self.proportional: float | None = None  # K_P; None in the E phase
        self._losses: list[float] = []  # the last two of this chunk
        self._rates: list[float] = []  # those that they were reached with

    def restart(self, rate: float | None = None) -> float:
        """A new chunk of data, or a change in it: the E phase begins again at `rate`, by default eta0; returns it."""
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise SettingsError(f"an exponential phase begins at a positive, finite rate, given {rate!r}")
        self._begin(self.base_rates[0] if rate is None else rate)
        return self._apply(self.start)

    def update(self, loss: float | Tensor) -> float:
        """The loss of a completed pass; sets the rate of the next one and returns it (of the first group)."""
        value = loss_value(loss)
        if value < 0:
            raise DataError(f"a loss that the rate follows is not negative, given {value}")
        if self.first_loss is None:
            if value == 0:
                raise DataError("the loss of the first pass is 0: there is nothing to control")
            self.first_loss = value
        self._losses, self._rates = [*self._losses, value][-2:], [*self._rates, self.rate][-2:]
        self.passes += 1
        if len(self._losses) == 2:
            for sums, rate in zip(self._answers, reversed(self._rates), strict=True):
                sums[0] = self.forgetting * sums[0] + rate * (self._losses[0] - self._losses[1])
                sums[1] = self.forgetting * sums[1] + rate * rate
        return self._apply(self._next_rate())

    def _next_rate(self) -> float:
        assert self.first_loss is not None
        last = self._losses[-1]
        fall = self._losses[0] - last
        if self.proportional is None:
            doubled = self.start * 2**self.passes
            if fall >= 0 and doubled <= self.ceiling:
                return doubled
            self.proportional = doubled / 4
            return doubled / 4
        if self.hold and fall > 0:
            return self.rate
        proportional = self.proportional * last / self.first_loss
        rate = proportional + self.base_rates[0] * self.derivative * fall / self.first_loss
        return rate if rate >= 0 else proportional

    def _apply(self, rate: float) -> float:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_rates):
            raise ConditionError(
                f"the optimiser has {len(groups)} groups and had {len(self.base_rates)} when Feedback was made: add "
                "groups first"
            )
        self.rate = rate
        for group, base in zip(groups, self.base_rates, strict=True):
            scaled = rate * (base / self.base_rates[0])
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled
        return rate

    def stability(self) -> Stability | None:
        """Is the PD loop stable around here, if the loss falls by b eta? None before the PD phase.

        b is a least-squares estimate with `forgetting` from all falls of the loss within chunks. The flag is that of a
        linear model with this b: a warning, not a proof about the network. With `hold` the loop is another one
        whenever the event holds the rate.
        """
        if self.proportional is None or self.first_loss is None:
            return None
        models = []
        for (product, square), is_stable in zip(self._answers, (stable_immediate, stable_delayed), strict=True):
            b = product / square if square else 0.0
            p, q = b * self.proportional / self.first_loss, b * self.base_rates[0] * self.derivative / self.first_loss
            models.append(LoopModel(b, p, q, is_stable(p, q)))
        return Stability(*models)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimiser, whose own state_dict is saved beside it."""
        names = ("base_rates", "rate", "first_loss", "passes", "start", "proportional", "_losses", "_rates")
        state = {name.lstrip("_"): getattr(self, name) for name in names}
        state = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
        return {**state, "answers": [list(sums) for sums in self._answers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, rate included."""
        self.base_rates = list(state["base_rates"])
        self.first_loss, self.passes, self.proportional = state["first_loss"], state["passes"], state["proportional"]
        self.start = state["start"]
        self._losses, self._rates = list(state["losses"]), list(state["rates"])
        self._answers = [list(sums) for sums in state["answers"]]
        self._apply(state["rate"])


def stable_immediate(p: float, q: float) -> bool:
    """L_k = L_{k-1} - b eta_k: both roots of z^2 - (1 - p + q) z + q inside the unit circle (derived in the docs)."""
    return abs(q) < 1 and 0 < p < 2 * (1 + q)


def stable_delayed(p: float, q: float) -> bool:
    """L_{k+1} = L_k - b eta_k: all roots of z^3 - z^2 + (p - q) z + q inside the unit circle (derived in the docs)."""
    return abs(q) < 1 and 0 < p < 1 - q * q
