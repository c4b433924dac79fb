"""Forward-backward splitting, the proximal gradient method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive
from firmly.algorithms.smooth import SmoothTerm, convex_term, gradient, smoothness
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class ForwardBackwardState(NamedTuple):
    x: Tensor


class ForwardBackward(Algorithm):
    """x <- prox_{t g}(x - t (A*(A x - y) + r'(x))) for min 1/2 |A x - y|^2 + r(x) + g(x), 0 < t < 2 / (|A|^2 + kappa).

    The ridge r is optional, kappa the Lipschitz constant of its gradient. The default step is 1 / (|A|^2 + kappa), with
    certified upper bounds. The start is A* y.
    Source: Combettes and Wajs, Signal recovery by proximal forward-backward splitting, 2005, theorem 3.4.
    """

    learnable = ("step_size", "prior", "ridge")

    def __init__(self, A: LinearMap, prior: Prior, step_size: Scalar | None = None, ridge: SmoothTerm | None = None):
        super().__init__()
        self.A = A
        self.prior = prior
        self.ridge = ridge
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.step_size = 1 / number(smoothness(A, ridge)) if step_size is None else positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> ForwardBackwardState:
        return ForwardBackwardState(self.A.T(y) if x is None else x)

    def step(self, state: ForwardBackwardState, y: Tensor, k: int) -> ForwardBackwardState:
        t = self.step_size
        return ForwardBackwardState(self.prior.prox(state.x - t * gradient(self.A, self.ridge, state.x, y), t))

    def read(self, state: ForwardBackwardState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        limit = 2 / smoothness(self.A, self.ridge)
        return Rule(0.0, limit, "0 < step_size < 2 / (|A|^2 + kappa)", "Combettes and Wajs 2005, theorem 3.4")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, self.step_size), *convex_term(self.ridge)]
