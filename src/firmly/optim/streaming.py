"""Learning from a stream: predict first, then learn if there is something to learn, at a rate set by feedback."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from firmly.errors import SettingsError
from firmly.optim.a_posteriori import APosteriori, wide
from firmly.optim.balance import Balance
from firmly.optim.change_detection import PageHinkley
from firmly.optim.events import LossEvent
from firmly.optim.feedback import Feedback
from firmly.optim.loss_value import loss_value
from firmly.optim.presets import nesterov

LOWEST, HIGHEST = 0.02, 0.18  # rates of the hybrid, in units of the root mean square of the weights
COUNTS = ("batches", "forwards", "backwards", "compared")
MEMORY = 100.0  # steps over which the hybrid averages the squares of gradients


class Learned(NamedTuple):
    """What happened to one batch: predictions and loss before learning, and was it learned from, did a change show?"""

    outputs: Tensor
    loss: float
    learned: bool
    changed: bool


class StreamLearner:
    """Any optimiser on a stream, in a loop with three parts, each of which can be left out.

    For every batch: outputs and loss (scored before anything is learned); a backward pass and a step, unless `event`
    finds the loss small. `feedback` sets the rate: a `Feedback` from the mean loss of every `window` batches, a
    `Balance` from the losses of the parameters and of their average, for which some batches are predicted twice: their
    outputs and loss are those of the two that predicted better of late. Where `change` finds that the level of the loss
    rose, feedback and event start over, that is, the rate climbs exponentially again, for `Feedback` from the gain that
    it had found. The model runs in the mode that it is in.

    `forwards`, `backwards` and `skipped` count what was spent and saved, `changes` are the batches of the alarms.
    Optimisers whose `step` takes the loss (`APosteriori`, `PolyakStep`) get it. `state_dict` holds all but model and
    optimiser. Raises `DataError` for a loss that is not finite, before anything is learned from it.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        optimizer: Optimizer,
        feedback: Feedback | Balance | None = None,
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
        self.batches = self.forwards = self.backwards = 0
        self.changes: list[int] = []
        self._window_sum, self._window_count = 0.0, 0
        self.compared = -1  # steps taken at the last comparison: while batches are skipped there is nothing to compare
        self._takes_loss = "loss" in inspect.signature(optimizer.step).parameters

    @classmethod
    def hybrid(
        cls,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        lr: float = 1e-2,
        threshold: float = 0.0,
    ) -> StreamLearner:
        """All parts together, in one configuration that is not meant to be tuned.

        A-posteriori steps with a diagonal gain, through Nesterov's filter with momentum 1/2, the most that is positive
        real; `Balance` keeps the rate between 2% and 18% of `weight_size(model)`, so that `lr`, the rate that a
        constant gradient sees at first, matters little; alarms. `threshold` is that of `LossEvent`; by default every
        batch is learned from. The criterion is not negative.
        """
        gain = nesterov(0.5).gain
        optimizer = APosteriori(model.parameters(), lr / gain.dc_gain(), gain, memory=MEMORY)
        unit = weight_size(model.parameters()) / gain.dc_gain()
        balance = Balance(optimizer, LOWEST * unit, HIGHEST * unit)
        event = LossEvent(threshold) if threshold else None
        return cls(model, criterion, optimizer, balance, event, PageHinkley())

    @property
    def skipped(self) -> int:
        """Backward passes saved."""
        return self.batches - self.backwards

    def learn(self, inputs: Tensor, targets: Tensor) -> Learned:
        """Predicts one batch, scores it, and learns from it."""
        balance = self.feedback if isinstance(self.feedback, Balance) else None
        averaged = None
        if balance is not None and balance.due() and balance.steps != self.compared:
            # before the pass that is differentiated: it replaces parameters
            self.compared = balance.steps
            with torch.no_grad(), balance.averaged(), restored(self.model.buffers()):
                averaged = self._forward(inputs, targets)
        found = self._forward(inputs, targets)
        loss_value(found[1])  # what is learned from; the average may still be well where the parameters are not
        outputs, scored = found if averaged is None or (balance and balance.leads) else averaged
        value = loss_value(scored)
        changed = self.change is not None and self.change.happens(value)
        if changed:
            self.changes.append(self.batches)
            self._restart()
        worth = self.event is None or self.event.happens(value)
        if worth:
            if balance is not None and averaged is not None:
                balance.update(found[1], averaged[1])
            self._step(found[1])
        self.batches += 1
        if isinstance(self.feedback, Feedback):
            self._count(self.feedback, value)
        return Learned(outputs.detach(), value, worth, changed)

    def predicting(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that predict: those that learn, or their average."""
        balance = self.feedback
        return balance.averaged() if isinstance(balance, Balance) and not balance.leads else nullcontext()

    def _forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        outputs = self.model(inputs)
        return outputs, self.criterion(outputs, targets)

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        step: Any = self.optimizer.step
        step(loss=loss.detach()) if self._takes_loss else step()
        self.backwards += 1
        if isinstance(self.feedback, Balance):
            self.feedback.follow()

    def _count(self, feedback: Feedback, value: float) -> None:
        self._window_sum, self._window_count = self._window_sum + value, self._window_count + 1
        if self._window_count == self.window:
            feedback.update(self._window_sum / self.window)
            self._window_sum, self._window_count = 0.0, 0

    def _restart(self) -> None:
        if isinstance(self.feedback, Feedback):
            # the gain that worked before is a better place to begin than the first guess
            self.feedback.restart(self.feedback.proportional)
        elif self.feedback is not None:
            self.feedback.restart()
        if self.event is not None:
            self.event.restart()
        self._window_sum, self._window_count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The counts and the state of the parts; model and optimiser are saved beside it."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        counts = {name: getattr(self, name) for name in COUNTS}
        return {**counts, "changes": list(self.changes), "window": (self._window_sum, self._window_count), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.changes = list(state["changes"])
        self._window_sum, self._window_count = state["window"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"feedback": self.feedback, "event": self.event, "change": self.change}
        return {name: part for name, part in parts.items() if part is not None}


@contextmanager
def restored(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Within, buffers may change; afterwards they are as before, so that batch statistics count each batch once."""
    pairs = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, kept in pairs:
            buffer.copy_(kept)


def weight_size(parameters: Iterable[Tensor]) -> float:
    """Root mean square over the weights: the parameters of two dimensions or more, or all where there are none.

    A weight that is zero everywhere counts with the size that PyTorch's layers begin with, 1 / sqrt(3 fan_in).
    """
    everything = [p.detach() for p in parameters if p.numel()]
    weights = [p for p in everything if p.ndim > 1] or everything
    if not weights:
        raise SettingsError("there are no parameters to learn")
    squares = [float(wide(p).square().mean()) or len(p) / (3 * p.numel()) for p in weights]
    total = sum(p.numel() * square for p, square in zip(weights, squares, strict=True))
    return math.sqrt(total / sum(p.numel() for p in weights))
