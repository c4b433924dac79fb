"""HyperLISTA: threshold, momentum and support selection from the data, with three numbers to tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.algorithm import Algorithm, Condition
from firmly.algorithms.fista import FistaState
from firmly.errors import NotCertifiable, ShapeError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.networks.lista_layers import zeros
from firmly.networks.lista_variants import Parts, Problem
from firmly.networks.positive import Positive
from firmly.networks.support_selection import hard_selection
from firmly.networks.whitening import analytic_whitening, weights_of

START = (5e-3, 1e-3, 10.0)


class HyperConstants(nn.Module):
    """The positive numbers c1 (threshold), c2 (momentum) and c3 (support) of all layers: `c` (3,), a parameter."""

    def __init__(self, values: Tensor):
        super().__init__()
        if values.shape != (3,):
            raise ShapeError(f"HyperLISTA has three constants (3,), given {tuple(values.shape)}")
        self.c = nn.Parameter(values.detach().clone())
        parametrize.register_parametrization(self, "c", Positive())


class HyperLayer(Algorithm):
    """z <- R(z + W*(y - D z) + beta (z - z_previous)) with, for every sample,

        e = |D^+ (y - D z)|_1,  theta = c1 e,  beta = c2 |z|_0,  q = clip(c3 log(|D^+ y|_1 / e), 0, n),

    where R soft-thresholds by theta all but the q (rounded) largest entries above theta. The step is g = 1.
    Source: Chen, Liu, Wang and Yin, Hyperparameter tuning is all you need for LISTA, 2021, equations 13 to 16, without
    the ground truth that their released code takes e and beta from unless told otherwise.
    """

    def __init__(self, D: LinearMap, W: LinearMap, inverse: LinearMap, constants: HyperConstants):
        super().__init__()
        self.D = D
        self.W = W
        self.inverse = inverse
        self.constants = constants
        self.data_shape, self.image_shape = D.codomain, D.domain

    def start(self, y: Tensor, x: Tensor | None = None) -> FistaState:
        x = zeros(self, y) if x is None else x
        return FistaState(x, x)

    def step(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        if not isinstance(y, Tensor) or not isinstance(state.x, Tensor):
            raise NotCertifiable(
                "HyperLISTA computes its threshold, momentum and number of entries from the data, by products "
                "and quotients of values that depend on them, and its support selection is discontinuous: it has no "
                "Lipschitz constant; use variant='alista' with selection=Selection(ramp=1.0) or None"
            )
        z, (c1, c2, c3) = state.x, self.constants.c
        residual = y - self.D(z)
        error = self.inverse(residual).abs().sum(1, keepdim=True)
        scale = self.inverse(y).abs().sum(1, keepdim=True)
        tiny = torch.finfo(z.dtype).tiny
        count = (c3 * (scale.clamp(min=tiny) / error.clamp(min=tiny)).log()).clamp(0, z.shape[1]).round()
        momentum = c2 * (z != 0).sum(1, keepdim=True)
        u = z + self.W.T(residual) + momentum * (z - state.previous)
        return FistaState(hard_selection(u, c1 * error, count[:, 0]), z)

    def undamped(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        """The layer at rest: z is its own predecessor."""
        return self.step(FistaState(state.x, state.x), y, k)

    def read(self, state: FistaState) -> Tensor:
        return state.x

    def conditions(self) -> list[Condition]:
        return []


def hyper(problem: Problem, whitening: Tensor | LinearMap | None) -> Parts:
    """HyperLISTA, with constants in the range that its authors search."""
    C = analytic_whitening(problem.D) if whitening is None else whitening
    shared = {
        "W": weights_of(problem.D, Dense(C) if isinstance(C, Tensor) else C),
        "inverse": Dense(torch.linalg.pinv(problem.values.double()).to(problem.values)),
        "constants": HyperConstants(problem.values.new_tensor(START)),
    }
    return [HyperLayer(problem.D, *shared.values()) for _ in range(problem.depth)], shared
