"""What an algorithm is: `start`, `step`, `read` and the conditions under which it converges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from firmly.errors import ConditionError


@dataclass(frozen=True)
class Condition:
    """One rule that an algorithm relies on, evaluated on certified constants.

    `name` is what a caller waives it by, `text` the rule with its numbers, `margin` the signed distance to its
    boundary (negative: violated), `source` where it is proved.
    """

    name: str
    text: str
    holds: bool
    margin: float
    source: str


class Algorithm(nn.Module):
    """One iteration of an optimisation algorithm, written once.

    `data_shape` and `image_shape` are the shapes of the data y and of the solution x, without the batch.
    The state is a NamedTuple of tensors. Loops, stopping, unrolling and differentiation live elsewhere.
    """

    data_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    learnable: tuple[str, ...] = ()  # what `unroll(learn=...)` may name, e.g. ("step_size", "prior")

    def start(self, y: Tensor, x: Tensor | None = None) -> Any:
        """The first state for data y (batch, *data_shape), from the image x if given, else from a default."""
        raise NotImplementedError

    def step(self, state: Any, y: Tensor, k: int) -> Any:
        """One iteration; `k` counts from 0."""
        raise NotImplementedError

    def read(self, state: Any) -> Tensor:
        """The image (batch, *image_shape) that a state stands for."""
        raise NotImplementedError

    def conditions(self) -> list[Condition]:
        """The rules for convergence, with certified constants."""
        raise NotImplementedError


def check(conditions: Iterable[Condition], waive: Iterable[str] = ()) -> None:
    """Raise `ConditionError` for every condition that does not hold and is not waived by its name."""
    conditions, waived = list(conditions), set(waive)
    unknown = waived - {c.name for c in conditions}
    if unknown:
        raise ConditionError(f"cannot waive {sorted(unknown)}: the conditions are {[c.name for c in conditions]}")
    broken = [c for c in conditions if not c.holds and c.name not in waived]
    if broken:
        lines = [f"- {c.text} (margin {c.margin:.3g}; {c.source}; waive='{c.name}' to go on all the same)" for c in broken]
        raise ConditionError("the conditions for convergence do not hold:\n" + "\n".join(lines))
