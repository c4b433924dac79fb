"""Accelerated forward-backward splitting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive
from firmly.algorithms.smooth import SmoothTerm, convex_term, gradient, smoothness
from firmly.errors import ConditionError
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class FistaState(NamedTuple):
    x: Tensor
    previous: Tensor


class Fista(Algorithm):
    """z = x + b_j (x - previous); x <- prox_{t g}(z - t (A*(A z - y) + r'(z))), with b_j = max(j - 1, 0) / (j + 3).

    Solves min 1/2 |A x - y|^2 + r(x) + g(x) for 0 < t < 1 / (|A|^2 + kappa). j counts iterations since the last
    restart; restarts come every `restart` iterations (None: never), so that no decision depends on data.
    Sources: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; this momentum, under which the
    iterates converge: Chambolle and Dossal, On the convergence of the iterates of FISTA, 2015 (with a = 3).
    """

    learnable = ("step_size", "prior", "ridge")

    def __init__(
        self,
        A: LinearMap,
        prior: Prior,
        step_size: Scalar | None = None,
        ridge: SmoothTerm | None = None,
        restart: int | None = None,
    ):
        super().__init__()
        if restart is not None and not (isinstance(restart, int) and restart > 0):
            raise ConditionError(f"restart is a positive number of iterations or None, given {restart}")
        self.A = A
        self.prior = prior
        self.ridge = ridge
        self.restart = restart
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.step_size = 0.99 / number(smoothness(A, ridge)) if step_size is None else positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> FistaState:
        x = self.A.T(y) if x is None else x
        return FistaState(x, x)

    def step(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        j = k if self.restart is None else k % self.restart
        momentum = max(j - 1, 0) / (j + 3)
        return FistaState(self._descend(state.x + momentum * (state.x - state.previous), y), state.x)

    def undamped(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        """The forward-backward map at x, as if the iteration rested there."""
        return FistaState(self._descend(state.x, y), state.x)

    def _descend(self, z: Tensor, y: Tensor) -> Tensor:
        t = self.step_size
        return self.prior.prox(z - t * gradient(self.A, self.ridge, z, y), t)

    def read(self, state: FistaState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        limit = 1 / smoothness(self.A, self.ridge)
        return Rule(0.0, limit, "0 < step_size < 1 / (|A|^2 + kappa)", "Chambolle and Dossal 2015")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, self.step_size), *convex_term(self.ridge)]
