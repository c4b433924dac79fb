"""Forward-backward splitting on the dual: denoising with an analysis prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, positive
from firmly.algorithms.certified import norm
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class DualForwardBackwardState(NamedTuple):
    u: Tensor
    x: Tensor


class DualForwardBackward(Algorithm):
    """u <- prox_{t g*}(u + t D x); x <- z - D*u, for min 1/2 |x - z|^2 + g(D x), 0 < t < 2 / |D|^2; z is the data.

    The start is u = 0 and x = z, or the image given, which the first dual step then sees. Default step: 1 / |D|^2.
    Source: Combettes, Dung, Vu, Dualization of signal recovery problems, 2010, theorem 3.7.
    """

    learnable = ("step_size", "prior")

    def __init__(self, D: LinearMap, prior: Prior, step_size: Scalar | None = None):
        super().__init__()
        self.D = D
        self.prior = prior
        self.data_shape = self.image_shape = D.domain
        size = positive("|D|", norm(D))
        self.step_size = 1.0 / size**2 if step_size is None else positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> DualForwardBackwardState:
        x = y if x is None else x
        return DualForwardBackwardState(0.0 * self.D(x), x)

    def step(self, state: DualForwardBackwardState, y: Tensor, k: int) -> DualForwardBackwardState:
        t = self.step_size
        u = self.prior.conjugate_prox(state.u + t * self.D(state.x), t)
        return DualForwardBackwardState(u, y - self.D.T(u))

    def read(self, state: DualForwardBackwardState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        limit = 2 / norm(self.D) ** 2
        return Rule(0.0, limit, "0 < step_size < 2 / |D|^2", "Combettes, Dung, Vu 2010, theorem 3.7")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, 1.0 / self.step_size)]
