"""Polyak's heavy ball for smooth objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, number, positive
from firmly.algorithms.smooth import SmoothTerm, Tikhonov, convex_term, gradient, smoothness
from firmly.linear.map import LinearMap


class HeavyBallState(NamedTuple):
    x: Tensor
    previous: Tensor


class HeavyBall(Algorithm):
    """x <- x - t (A*(A x - y) + r'(x)) + b (x - previous) for min 1/2 |A x - y|^2 + r(x), with L = |A|^2 + kappa.

    Quadratic objectives (no ridge, or `Tikhonov`): 0 < b < 1 and 0 < t < 2 (1 + b) / L. Other ridges:
    0 < t < 2 (1 - b) / L, since the larger steps may cycle (Lessard, Recht, Packard 2016). The default step is half the
    limit; the fastest choice for a Hessian with spectrum in [mu, L] is t = 4 / (sqrt L + sqrt mu)^2 and
    sqrt b = (sqrt L - sqrt mu) / (sqrt L + sqrt mu).
    Sources: Polyak, Introduction to optimization, 1987, section 3.2.1; Ghadimi, Feyzmahdavian, Johansson, Global
    convergence of the heavy-ball method for convex optimization, 2015, theorem 1.
    """

    learnable = ("momentum", "step_size", "ridge")

    def __init__(
        self,
        A: LinearMap,
        ridge: SmoothTerm | None = None,
        step_size: Scalar | None = None,
        momentum: Scalar = 0.5,
    ):
        super().__init__()
        self.A = A
        self.ridge = ridge
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.momentum = positive("momentum", momentum)
        step_size = number(self.rule("step_size").high) / 2 if step_size is None else step_size
        self.step_size = positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> HeavyBallState:
        x = self.A.T(y) if x is None else x
        return HeavyBallState(x, x)

    def step(self, state: HeavyBallState, y: Tensor, k: int) -> HeavyBallState:
        x, previous = state
        descent = self.step_size * gradient(self.A, self.ridge, x, y)
        return HeavyBallState(x - descent + self.momentum * (x - previous), x)

    def undamped(self, state: HeavyBallState, y: Tensor, k: int) -> HeavyBallState:
        """The gradient step at x, as if the iteration rested there."""
        return HeavyBallState(state.x - self.step_size * gradient(self.A, self.ridge, state.x, y), state.x)

    def read(self, state: HeavyBallState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        L = smoothness(self.A, self.ridge)
        quadratic = self.ridge is None or isinstance(self.ridge, Tikhonov)
        sign, source = (1, "Polyak 1987, section 3.2.1") if quadratic else (-1, "Ghadimi et al. 2015, theorem 1")
        text = f"0 < momentum < 1 and 0 < step_size < 2 (1 {'+' if quadratic else '-'} momentum) / (|A|^2 + kappa)"
        if name == "step_size":
            return Rule(0.0, 2 * (1 + sign * self.momentum) / L, text, source)
        if "step_size" in free:
            return Rule(0.0, 1.0, text, source)
        turn = sign * (number(self.step_size * L) / 2 - 1)  # the momentum at which the given step is the limit
        return Rule(max(0.0, turn), 1.0, text, source) if quadratic else Rule(0.0, min(1.0, turn), text, source)

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), *convex_term(self.ridge)]
