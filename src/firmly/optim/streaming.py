"""Learning from a stream: predict first, then learn if there is something to learn, at a rate set by feedback."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from firmly.errors import SettingsError
from firmly.optim.a_posteriori import APosteriori
from firmly.optim.change_detection import PageHinkley
from firmly.optim.events import LossEvent
from firmly.optim.feedback import Feedback
from firmly.optim.loss_value import loss_value
from firmly.optim.presets import nesterov


class Learned(NamedTuple):
    """What happened to one batch: predictions and loss before learning, and was it learned from, did a change show?"""

    outputs: Tensor
    loss: float
    learned: bool
    changed: bool


class StreamLearner:
    """Any optimiser on a stream, in a loop with three parts, each of which can be left out.

    For every batch: outputs and loss (scored before anything is learned); a backward pass and a step, unless `event`
    finds the loss small; at the end of every `window` batches `feedback` gets their mean loss and sets the rate; where
    `change` finds that the level of the loss rose, feedback and event start over, that is, the rate climbs
    exponentially again, from the gain that the feedback had found. The model runs in the mode that it is in.

    `backwards` and `skipped` count what was spent and saved, `changes` are the batches of the alarms. Optimisers whose
    `step` takes the loss (`APosteriori`, `PolyakStep`) get it. `state_dict` holds all but model and optimiser. Raises
    `DataError` for a loss that is not finite, before anything is learned from it.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        optimizer: Optimizer,
        feedback: Feedback | None = None,
        event: LossEvent | None = None,
        change: PageHinkley | None = None,
        window: int = 100,
    ):
        if window < 1:
            raise SettingsError(f"window is at least 1, given {window!r}")
        if feedback is not None and feedback.optimizer is not optimizer:
            raise SettingsError("feedback controls another optimiser than the one that takes the steps")
        self.model, self.criterion, self.optimizer, self.window = model, criterion, optimizer, window
        self.feedback, self.event, self.change = feedback, event, change
        self.batches = self.backwards = 0
        self.changes: list[int] = []
        self._window_sum, self._window_count = 0.0, 0
        self._takes_loss = "loss" in inspect.signature(optimizer.step).parameters

    @classmethod
    def hybrid(
        cls,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        lr: float = 1e-2,
        window: int = 20,
        threshold: float = 0.0,
        ceiling: float = 1.0,
    ) -> StreamLearner:
        """All parts together: a-posteriori steps through Nesterov's filter, feedback, events and alarms.

        The filter has momentum 1/2, the most that is positive real; the steps survive a rate that the exponential phase
        has made too large. `lr` is the rate that a constant gradient sees, and `ceiling` that of the exponential phase.
        `threshold` is that of `LossEvent`; by default every batch is learned from. The criterion is not negative.
        """
        gain = nesterov(0.5).gain
        optimizer = APosteriori(model.parameters(), lr / gain.dc_gain(), gain)
        feedback = Feedback(optimizer, ceiling=ceiling / gain.dc_gain())
        event = LossEvent(threshold) if threshold else None
        return cls(model, criterion, optimizer, feedback, event, PageHinkley(), window)

    @property
    def skipped(self) -> int:
        """Backward passes saved."""
        return self.batches - self.backwards

    def learn(self, inputs: Tensor, targets: Tensor) -> Learned:
        """Predicts one batch, scores it, and learns from it."""
        outputs = self.model(inputs)
        loss = self.criterion(outputs, targets)
        value = loss_value(loss)
        changed = self.change is not None and self.change.happens(value)
        if changed:
            self.changes.append(self.batches)
            self._restart()
        worth = self.event is None or self.event.happens(value)
        if worth:
            self.optimizer.zero_grad()
            loss.backward()
            step: Any = self.optimizer.step
            step(loss=loss.detach()) if self._takes_loss else step()
            self.backwards += 1
        self.batches += 1
        self._window_sum, self._window_count = self._window_sum + value, self._window_count + 1
        if self._window_count == self.window:
            if self.feedback is not None:
                self.feedback.update(self._window_sum / self.window)
            self._window_sum, self._window_count = 0.0, 0
        return Learned(outputs.detach(), value, worth, changed)

    def _restart(self) -> None:
        if self.feedback is not None:
            # the gain that worked before is a better place to begin than the first guess
            self.feedback.restart(self.feedback.proportional)
        if self.event is not None:
            self.event.restart()
        self._window_sum, self._window_count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The counts and the state of the parts; model and optimiser are saved beside it."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        counts = {name: getattr(self, name) for name in ("batches", "backwards")}
        return {**counts, "changes": list(self.changes), "window": (self._window_sum, self._window_count), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.batches, self.backwards, self.changes = state["batches"], state["backwards"], list(state["changes"])
        self._window_sum, self._window_count = state["window"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"feedback": self.feedback, "event": self.event, "change": self.change}
        return {name: part for name, part in parts.items() if part is not None}
