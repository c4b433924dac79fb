"""Has the level of a loss risen for good? The Page-Hinkley test."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from firmly.errors import SettingsError
from firmly.optim.loss_value import loss_value


class PageHinkley:
    """Alarms when the mean of a loss rises: m_t = max(0, m_{t-1} + z_t - `slack`) > `threshold`.

    z_t is the loss less its mean so far, in units of its standard deviation so far, both with a memory of `memory`
    values, so that the settings do not depend on the scale of the loss; for independent normal losses the mean time
    between false alarms grows like exp(2 slack threshold). `happens` is false during the first `warm_up` values, and
    after an alarm everything starts over. Falling losses never alarm.

    Source: E. S. Page, Continuous inspection schemes, Biometrika 1954; D. V. Hinkley, 1971; standardised by us.
    """

    def __init__(self, threshold: float = 25.0, slack: float = 0.25, warm_up: int = 30, memory: float = 1000.0):
        if not (0 < threshold < math.inf and 0 <= slack < math.inf and warm_up >= 2 and memory >= warm_up):
            raise SettingsError(
                "threshold > 0, slack >= 0, warm_up >= 2 and memory >= warm_up are needed, given "
                f"{threshold}, {slack}, {warm_up} and {memory}"
            )
        self.threshold, self.slack, self.warm_up, self.memory = threshold, slack, warm_up, memory
        self.restart()

    def restart(self) -> None:
        """Forgets everything."""
        self.seen, self.mean, self.variance, self.excess = 0, 0.0, 0.0, 0.0

    def happens(self, loss: float | Tensor) -> bool:
        """One more loss: has its level risen?"""
        value = loss_value(loss)
        deviation = value - self.mean
        if self.seen >= self.warm_up:
            scale = math.sqrt(self.variance)
            # a loss that was constant so far has no scale: any rise is infinitely many of them
            z = deviation / scale if scale else math.copysign(math.inf, deviation) if deviation else 0.0
            self.excess = max(0.0, self.excess + z - self.slack)
            if self.excess > self.threshold:
                self.restart()
                return True
        self.seen += 1
        weight = 1 / min(self.seen, self.memory)
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation * deviation)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from."""
        return {name: getattr(self, name) for name in ("seen", "mean", "variance", "excess")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.seen, self.mean = state["seen"], state["mean"]
        self.variance, self.excess = state["variance"], state["excess"]
