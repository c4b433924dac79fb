"""What an algorithm is: `start`, `step`, `read` and the conditions under which it converges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError
from firmly.prox.prior import Prior

Scalar = float | Tensor  # a number, or a tensor of one number that may be learned


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


class Rule(NamedTuple):
    """The open interval (low, high) that a scalar has to lie in; `text` is the formula of its ends."""

    low: Scalar
    high: Scalar
    text: str
    source: str


class Algorithm(nn.Module):
    """One iteration of an optimisation algorithm, written once.

    `data_shape` and `image_shape` are the shapes of the data y and of the solution x, without the batch.
    The state is a NamedTuple of tensors. Loops, stopping, unrolling and differentiation live elsewhere.

    `learnable` names what `unroll(learn=...)` may make independent in every layer: scalars, each with a `rule`, and
    modules (priors and other terms) in the order in which scalars settle: a rule may depend on the scalars before.
    """

    data_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    learnable: tuple[str, ...] = ()

    def start(self, y: Tensor, x: Tensor | None = None) -> Any:
        """The first state for data y (batch, *data_shape), from the image x if given, else from a default."""
        raise NotImplementedError

    def step(self, state: Any, y: Tensor, k: int) -> Any:
        """One iteration; `k` counts from 0."""
        raise NotImplementedError

    def undamped(self, state: Any, y: Tensor, k: int) -> Any:
        """The plain map, without momentum or relaxation: `solve` measures its residual with it."""
        return self.step(state, y, k)

    def read(self, state: Any) -> Tensor:
        """The image (batch, *image_shape) that a state stands for."""
        raise NotImplementedError

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        """The interval for the scalar `name`, given all other scalars but those in `free`, which adapt to it.

        Written for every scalar in `learnable`: `conditions` tests it, and `unroll` keeps what is learned inside.
        """
        raise NotImplementedError(f"{type(self).__name__} can learn {name!r} but gives no rule for it")

    def scalars(self) -> tuple[str, ...]:
        """The learnable names that are numbers."""
        return tuple(n for n in self.learnable if isinstance(getattr(self, n), int | float | Tensor))

    def conditions(self) -> list[Condition]:
        """The rules for convergence, with certified constants: of every scalar, given those before it."""
        names = self.scalars()
        return [inside(n, getattr(self, n), self.rule(n, names[i + 1 :])) for i, n in enumerate(names)]

    def forward(self, state: Any, y: Tensor, k: int) -> Any:
        """`step`, called as a module so that hooks see which layer runs."""
        return self.step(state, y, k)


def number(value: Scalar) -> float:
    """The value outside of the autograd graph."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def positive_rule(text: str, source: str) -> Rule:
    return Rule(0.0, math.inf, text, source)


def inside(name: str, value: Scalar, rule: Rule) -> Condition:
    """The condition that a scalar lies in the open interval of its rule."""
    given, low, high = number(value), number(rule.low), number(rule.high)
    return Condition(
        name=name,
        text=f"{name} = {given:.6g} lies in ({low:.6g}, {high:.6g}), by the rule: {rule.text}",
        holds=low < given < high,
        margin=min(given - low, high - given),
        source=rule.source,
    )


def convexity(prior: Prior, step: Scalar) -> Condition:
    """The condition that the prox of `prior` with this step is firmly nonexpansive: slopes in [0, 1]."""
    low, high = (number(end) for end in prior.slope_at(step))
    return Condition(
        name="prior",
        text=f"{type(prior).__name__} is convex: the slopes [{low:.6g}, {high:.6g}] of its prox lie in [0, 1]",
        holds=low >= 0 and high <= 1 + 1e-12,  # priors round their slopes outward
        margin=min(low, 1 - high),
        source="Moreau 1965: the prox of g is firmly nonexpansive if g is convex",
    )


def positive(name: str, value: Scalar) -> Scalar:
    """The value, refused unless it is one finite positive number."""
    given = torch.as_tensor(value).detach()
    if given.numel() != 1 or given.is_complex() or not (math.isfinite(float(given)) and float(given) > 0):
        raise ConditionError(f"{name} must be one finite positive number, given {value}")
    return value


def check(conditions: Iterable[Condition], waive: Iterable[str] = ()) -> None:
    """Raise `ConditionError` for every condition that does not hold and is not waived by its name."""
    conditions, waived = list(conditions), set(waive)
    unknown = waived - {c.name for c in conditions}
    if unknown:
        raise ConditionError(f"cannot waive {sorted(unknown)}: the conditions are {[c.name for c in conditions]}")
    broken = [c for c in conditions if not c.holds and c.name not in waived]
    if broken:
        lines = [f"- {c.text}: no (margin {c.margin:.3g}; {c.source}; waive=['{c.name}'] to go on)" for c in broken]
        raise ConditionError("the conditions for convergence do not hold:\n" + "\n".join(lines))
