"""Splittings for the equilibrium v = prox_g(W v + y) of a monotone loop: 0 in (I - W) v - y + dg(v)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive, positive_rule
from firmly.linear.algebra import Identity, Scale, Sum
from firmly.linear.map import LinearMap
from firmly.linear.monotone import loop_resolvent, monotonicity
from firmly.prox.prior import Prior


class EquilibriumForwardBackward(Algorithm):
    """v <- prox_{a g}(v - a (v - W v - y)), 0 < a < 2 m / |I - W|^2, for <(I - W) v, v> >= m |v|^2.

    Its fixed point is the equilibrium v = prox_g(W v + y), and its contraction factor sqrt(1 - 2 a m + a^2 |I - W|^2).
    The default step is m / |I - W|^2, with certified constants. It starts from y.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, algorithm 1.
    """

    learnable = ("step_size", "prior")

    def __init__(self, loop: LinearMap, prior: Prior, step_size: Scalar | None = None):
        super().__init__()
        self.loop = loop
        self.prior = prior
        self.data_shape, self.image_shape = loop.codomain, loop.domain
        self.step_size = 0.5 * self._limit() if step_size is None else positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> EquilibriumState:
        return EquilibriumState(y if x is None else x)

    def step(self, state: EquilibriumState, y: Tensor, k: int) -> EquilibriumState:
        a = self.step_size
        return EquilibriumState(self.prior.prox(state.v - a * (state.v - self.loop(state.v) - y), a))

    def read(self, state: EquilibriumState) -> Tensor:
        return state.v

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        return Rule(0.0, self._limit(), "0 < step_size < 2 m / |I - W|^2", "Winston and Kolter 2020, algorithm 1")

    def _limit(self) -> float:
        monotone = Sum(Identity(self.loop.domain), Scale(-1.0, self.loop))
        return 2 * monotonicity(self.loop) / monotone.norm().upper ** 2

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, self.step_size), monotone_loop(self.loop)]


class EquilibriumState(NamedTuple):
    v: Tensor


class PeacemanRachford(Algorithm):
    """p = (I + a (I - W))^-1 (2 v - u + a y); u <- 2 p - 2 v + u; v <- prox_{a g}(u), for any step a > 0.

    Its fixed point has v = prox_g(W v + y). It converges linearly because I - W is strongly monotone and bounded.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, algorithm 2.
    """

    learnable = ("step_size", "prior")

    def __init__(self, loop: LinearMap, prior: Prior, step_size: Scalar = 1.0):
        super().__init__()
        self.loop = loop
        self.prior = prior
        self.data_shape, self.image_shape = loop.codomain, loop.domain
        self.step_size = positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> PeacemanRachfordState:
        x = y if x is None else x
        return PeacemanRachfordState(x, x)

    def step(self, state: PeacemanRachfordState, y: Tensor, k: int) -> PeacemanRachfordState:
        a = self.step_size
        half = 2.0 * state.v - state.u
        u = 2.0 * loop_resolvent(self.loop, a)(half + a * y) - half
        return PeacemanRachfordState(self.prior.prox(u, a), u)

    def read(self, state: PeacemanRachfordState) -> Tensor:
        return state.v

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        return positive_rule("step_size > 0", "Winston and Kolter 2020, algorithm 2")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, self.step_size), monotone_loop(self.loop)]


class PeacemanRachfordState(NamedTuple):
    v: Tensor
    u: Tensor


def monotone_loop(loop: LinearMap) -> Condition:
    """The condition that the equilibrium exists and is unique: <(I - W) v, v> >= m |v|^2 with m > 0."""
    m = number(monotonicity(loop))
    return Condition(
        name="monotone",
        text=f"<(I - W) v, v> >= m |v|^2 is proved for m = {m:.6g}, and m is positive",
        holds=m > 0,
        margin=m,
        source="docs/theory/loops: a strongly monotone inclusion has one solution",
    )
