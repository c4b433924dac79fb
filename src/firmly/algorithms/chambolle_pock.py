"""The primal-dual hybrid gradient method of Chambolle and Pock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive, positive_rule
from firmly.algorithms.certified import norm
from firmly.algorithms.quadratic import data_prox
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class ChambollePockState(NamedTuple):
    x: Tensor
    u: Tensor


class ChambollePock(Algorithm):
    """x+ = prox_{t f}(x - t K*u); u <- prox_{s g*}(u + s K(2 x+ - x)), for min f(x) + g(K x) with f = 1/2 |A x - y|^2.

    The rule is t s |K|^2 < 1. Defaults: t = s = 0.99 / |K|, and s = 0.98 / (t |K|^2) for a given t.
    Source: Chambolle and Pock, A first-order primal-dual algorithm for convex problems, 2011, theorem 1.
    """

    learnable = ("step_size", "dual_step", "prior")

    def __init__(
        self,
        A: LinearMap,
        prior: Prior,
        K: LinearMap,
        step_size: Scalar | None = None,
        dual_step: Scalar | None = None,
    ):
        super().__init__()
        self.A = A
        self.prior = prior
        self.K = K
        self.data_shape, self.image_shape = A.codomain, A.domain
        size = positive("|K|", norm(K))
        self.step_size = 0.99 / size if step_size is None else positive("step_size", step_size)
        fitting = 0.98 / (number(self.step_size) * size**2)
        self.dual_step = fitting if dual_step is None else positive("dual_step", dual_step)

    def start(self, y: Tensor, x: Tensor | None = None) -> ChambollePockState:
        x = self.A.T(y) if x is None else x
        return ChambollePockState(x, 0.0 * self.K(x))

    def step(self, state: ChambollePockState, y: Tensor, k: int) -> ChambollePockState:
        t, s = self.step_size, self.dual_step
        x = data_prox(self.A, y, state.x - t * self.K.T(state.u), 1.0 / t)
        return ChambollePockState(x, self.prior.conjugate_prox(state.u + s * self.K(2.0 * x - state.x), s))

    def read(self, state: ChambollePockState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        text, source = "step_size * dual_step * |K|^2 < 1", "Chambolle and Pock 2011, theorem 1"
        if name == "step_size" and "dual_step" in free:
            return positive_rule(text, source)
        other = self.dual_step if name == "step_size" else self.step_size
        return Rule(0.0, 1.0 / (other * norm(self.K) ** 2), text, source)

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, 1.0 / self.dual_step)]
