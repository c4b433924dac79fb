"""Douglas-Rachford splitting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, positive, positive_rule
from firmly.algorithms.quadratic import data_prox
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class DouglasRachfordState(NamedTuple):
    z: Tensor
    x: Tensor


class DouglasRachford(Algorithm):
    """p = prox_{t f}(z); x <- prox_{t g}(2 p - z); z <- z + relaxation (x - p), for min f(x) + g(x).

    The data term is f(x) = 1/2 |A x - y|^2. Any step t > 0 and relaxation in (0, 2). If f is mu-strongly convex and
    L-smooth, t = 1 / sqrt(mu L) is the fastest.
    Sources: Lions and Mercier 1979; Combettes and Pesquet 2011, algorithm 10.15; Giselsson and Boyd, Linear convergence
    and metric selection for Douglas-Rachford splitting and ADMM, 2017.
    """

    learnable = ("step_size", "relaxation", "prior")

    def __init__(self, A: LinearMap, prior: Prior, step_size: Scalar = 1.0, relaxation: Scalar = 1.0):
        super().__init__()
        self.A = A
        self.prior = prior
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.step_size = positive("step_size", step_size)
        self.relaxation = positive("relaxation", relaxation)

    def start(self, y: Tensor, x: Tensor | None = None) -> DouglasRachfordState:
        x = self.A.T(y) if x is None else x
        return DouglasRachfordState(x, x)

    def step(self, state: DouglasRachfordState, y: Tensor, k: int) -> DouglasRachfordState:
        p, x = self._resolve(state.z, y)
        return DouglasRachfordState(state.z + self.relaxation * (x - p), x)

    def undamped(self, state: DouglasRachfordState, y: Tensor, k: int) -> DouglasRachfordState:
        """The map with relaxation 1."""
        p, x = self._resolve(state.z, y)
        return DouglasRachfordState(state.z + (x - p), x)

    def _resolve(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = data_prox(self.A, y, z, 1.0 / self.step_size)
        return p, self.prior.prox(2.0 * p - z, self.step_size)

    def read(self, state: DouglasRachfordState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        if name == "relaxation":
            return Rule(0.0, 2.0, "0 < relaxation < 2", "Combettes and Pesquet 2011, algorithm 10.15")
        return positive_rule("step_size > 0", "Lions and Mercier 1979")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, self.step_size)]
