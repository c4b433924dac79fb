"""Sparse codes along a falling weight, each from the one before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.linear.map import LinearMap
from firmly.priors.lasso import SparseCode, lasso
from firmly.priors.penalty import Penalty, as_penalty
from firmly.priors.problem import Problem


class LassoPath(NamedTuple):
    """The codes of a path, from the largest weight down: factors (steps,), codes one `SparseCode` for each."""

    factors: Tensor  # of `weight_max`
    codes: list[SparseCode]


@torch.no_grad()
def weight_max(D: Tensor | LinearMap, y: Tensor, penalty: float | Tensor | Penalty = 1.0) -> Tensor:
    """The smallest factor of the penalty for which the zero code is optimal, for every problem: (batch,), float64.

        max over groups g of |D_g' y|_2 / weight_g         (of the positive part, for non-negative codes)

    With the default penalty it is the weight itself that is usually called lambda_max. Shapes as in `lasso`.
    """
    problem = Problem.of(D, y, as_penalty(penalty))
    return (problem.penalty.pull(problem.correlate(problem.y)) / problem.penalty.weight).amax(1)


def lasso_path(
    D: Tensor | LinearMap,
    y: Tensor,
    penalty: float | Tensor | Penalty = 1.0,
    factors: Tensor | None = None,
    tol: float = 1e-6,
    max_iterations: int = 100_000,
) -> LassoPath:
    """`lasso` with the weights of `penalty` multiplied by `factors` x `weight_max`, from warm starts.

    `factors` fall from at most 1; the default are 20 of them from 1 to 0.01 in equal ratios. `penalty` says only which
    atoms weigh more than others, and what kind of penalty it is; a `curvature` stays as it is. Each step stops at the
    gap tol |y|^2 / 2. Raises `SettingsError` for factors that are not positive and falling, and what `lasso` raises.
    """
    factors = torch.logspace(0, -2, 20, dtype=torch.float64) if factors is None else torch.as_tensor(factors).double()
    positive = factors.dim() == 1 and len(factors) > 0 and bool((factors > 0).all() & (factors <= 1).all())
    if not positive or not bool((factors.diff() < 0).all()):
        raise SettingsError("factors is a falling sequence of numbers in (0, 1]")
    penalty = as_penalty(penalty)
    top = weight_max(D, y, penalty)[:, None]
    top = torch.where(top > 0, top, 1)  # data that no atom explains: any weight gives the zero code
    codes: list[SparseCode] = []
    for factor in factors.tolist():
        weights = penalty.weight.to(top) * top * factor
        start = codes[-1].code if codes else None
        codes.append(lasso(D, y, penalty.weighing(weights), tol, max_iterations=max_iterations, start=start))
    return LassoPath(factors, codes)
