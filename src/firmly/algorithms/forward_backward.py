"""Forward-backward splitting, the proximal gradient method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class ForwardBackwardState(NamedTuple):
    x: Tensor


class ForwardBackward(Algorithm):
    """x <- prox_{t g}(x - t A*(A x - y)) for min 1/2 |A x - y|^2 + g(x), with 0 < t < 2 / |A|^2.

    The default step is 1 / |A|^2 with the certified upper bound of |A|. The start is A* y.
    Source: Combettes and Wajs, Signal recovery by proximal forward-backward splitting, 2005, theorem 3.4.
    """

    learnable = ("step_size", "prior")

    def __init__(self, A: LinearMap, prior: Prior, step_size: float | Tensor | None = None):
        super().__init__()
        self.A = A
        self.prior = prior
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.step_size = 1.0 / A.norm().upper ** 2 if step_size is None else step_size

    def start(self, y: Tensor, x: Tensor | None = None) -> ForwardBackwardState:
        return ForwardBackwardState(self.A.T(y) if x is None else x)

    def step(self, state: ForwardBackwardState, y: Tensor, k: int) -> ForwardBackwardState:
        t = self.step_size
        gradient = self.A.T(self.A(state.x) - y)
        return ForwardBackwardState(self.prior.prox(state.x - t * gradient, t))

    def read(self, state: ForwardBackwardState) -> Tensor:
        return state.x

    def conditions(self) -> list[Condition]:
        limit = 2.0 / self.A.norm().upper ** 2
        step = float(torch.as_tensor(self.step_size).max())
        return [
            Condition(
                name="step_size",
                text=f"the step size {step:.6g} lies in (0, 2 / |A|^2) = (0, {limit:.6g})",
                holds=0 < step < limit,
                margin=min(step, limit - step),
                source="Combettes and Wajs 2005, theorem 3.4",
            )
        ]
