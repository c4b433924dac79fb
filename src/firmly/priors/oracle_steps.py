"""ISTA with the largest step that the support of the code allows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, convexity
from firmly.errors import ShapeError
from firmly.linear.dense import Dense
from firmly.prox.l1 import L1, soft_threshold


class OracleIstaState(NamedTuple):
    x: Tensor


class OracleIsta(Algorithm):
    """x <- prox_{s g}(x - s D'(D x - y)) with s = 1 / |D_S|^2, S the support of x, if the new support lies in S.

    Else, and where S is empty, the step is 1 / |D|^2. So every step lowers 1/2 |D x - y|^2 + g(x), g = weight |x|_1,
    for each element of the batch: on codes with support in S the smooth part has a gradient of constant |D_S|^2. Near
    the solution S is that of the solution, and the step much longer than 1 / |D|^2 if the solution is sparse.
    `D` is a matrix map m x n, the start the zero code. A step takes a singular value of D_S for each element: this is
    an oracle that shows what learned step sizes can reach, not a fast solver (`lasso` is one).
    Source: Ablin, Moreau, Massias and Gramfort, Learning step sizes for unfolded sparse coding, 2019, section 3.
    """

    def __init__(self, D: Dense, prior: L1):
        super().__init__()
        if not isinstance(D, Dense) or D.is_complex or not isinstance(prior, L1):
            raise ShapeError(
                "oracle steps are for a real matrix (firmly.linear.Dense) and an l1 norm (firmly.prox.L1), given "
                f"{type(D).__name__} and {type(prior).__name__}"
            )
        self.D, self.prior = D, prior
        self.data_shape, self.image_shape = D.codomain, D.domain
        self.register_buffer("shortest", 1 / torch.linalg.matrix_norm(D.weight.detach()[None], 2).square())  # (1,)

    def start(self, y: Tensor, x: Tensor | None = None) -> OracleIstaState:
        return OracleIstaState(y.new_zeros(len(y), *self.image_shape) if x is None else x)

    def step(self, state: OracleIstaState, y: Tensor, k: int) -> OracleIstaState:
        x = state.x
        gradient = self.D.T(self.D(x) - y)
        safe = self.descend(x, gradient, self.shortest.to(x.dtype))
        bold = self.descend(x, gradient, self.steps(x))
        inside = ((bold == 0) | (x != 0)).all(1, keepdim=True)
        return OracleIstaState(torch.where(inside, bold, safe))

    def steps(self, x: Tensor) -> Tensor:
        """1 / |D_S|^2 for the support S of every code, 1 / |D|^2 if it is empty: (batch, n) -> (batch,)."""
        columns = self.D.weight.to(x.dtype) * (x != 0)[:, None, :]
        norm = torch.linalg.matrix_norm(columns, 2)
        return torch.where(norm > 0, 1 / norm.square(), self.shortest.to(x.dtype))

    def descend(self, x: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        step = step[:, None]
        return soft_threshold(x - step * gradient, step * self.prior.weight)

    def read(self, state: OracleIstaState) -> Tensor:
        return state.x

    def conditions(self) -> list[Condition]:
        return [convexity(self.prior, 1.0)]
