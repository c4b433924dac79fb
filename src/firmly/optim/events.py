"""Events that decide whether work is worth doing: another pass over a chunk of data, or a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.optim.loss_value import loss_value


class EventPasses:
    """Leave a chunk of data when its loss has stopped falling: the event-based number of epochs.

    `done(loss)` after each pass is true when the line fitted to the last `window` values of L / L0 rises faster than
    `slope` while more than `reserve` of all `limit` passes are left. `restart()` begins a chunk; L0 and the count of
    passes stay. Source: Zhao, Cerf, Robu, Marchand, L-CSS 4(4), 2020.
    """

    def __init__(self, limit: int, slope: float = -1e-3, window: int = 5, reserve: int = 10):
        if window < 2 or limit < 1 or reserve < 0:
            raise SettingsError(f"window >= 2, limit >= 1 and reserve >= 0, given {window}, {limit} and {reserve}")
        self.limit, self.slope, self.window, self.reserve = limit, slope, window, reserve
        self.first_loss: float | None = None
        self.passes = 0
        self._losses: list[float] = []

    def restart(self) -> None:
        """A new chunk."""
        self._losses = []

    def done(self, loss: float | Tensor) -> bool:
        """The loss of one more completed pass: is it time for the next chunk?"""
        value = loss_value(loss)
        if self.first_loss is None:
            if value <= 0:
                raise DataError(f"losses are measured against the first, which has to be positive, given {value}")
            self.first_loss = value
        self.passes += 1
        self._losses = [*self._losses, value / self.first_loss][-self.window :]
        return (
            len(self._losses) == self.window
            and slope(self._losses) > self.slope
            and self.limit - self.passes > self.reserve
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from."""
        return {"first_loss": self.first_loss, "passes": self.passes, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.first_loss, self.passes = state["first_loss"], state["passes"]
        self._losses = list(state["losses"])


class LossEvent:
    """Is this loss worth a backward pass? Yes where it is at least `threshold` times the mean loss of before.

    The mean forgets exponentially with a memory of about `memory` batches and takes in every loss, skipped or not, so
    that the fraction of skipped batches follows the spread of the losses, not their level. `threshold=0` never skips.
    Raises `DataError` for a negative loss, of which "small" says nothing.
    """

    def __init__(self, threshold: float = 0.5, memory: float = 100.0):
        if not (0 <= threshold <= 1 and memory >= 1):
            raise SettingsError(f"threshold lies in [0, 1] and memory is at least 1, given {threshold} and {memory}")
        self.threshold, self.memory = threshold, memory
        self.restart()

    def restart(self) -> None:
        """Forgets the mean: the next loss is an event."""
        self.mean, self.seen = 0.0, 0

    def happens(self, loss: float | Tensor) -> bool:
        """Compares with the mean of the losses before this one, then takes this one into it."""
        value = loss_value(loss)
        if value < 0:
            raise DataError(f"a loss that is compared with its mean is not negative, given {value}")
        event = self.seen == 0 or value >= self.threshold * self.mean
        self.seen += 1
        self.mean += (value - self.mean) / min(self.seen, self.memory)
        return event

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from."""
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.mean, self.seen = state["mean"], state["seen"]


def slope(values: Sequence[float]) -> float:
    """Of the least-squares line through (0, values[0]), (1, values[1]), ..."""
    middle = (len(values) - 1) / 2
    return sum((i - middle) * v for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(len(values)))
