"""Sparse codes with a guarantee: batches of Lasso problems, solved to a duality gap."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.priors.accelerated import Accelerated, largest_eigenvalue
from firmly.priors.active_set import ActiveSet
from firmly.priors.duality import Gap, gap_at
from firmly.priors.penalty import Penalty, as_penalty, entries
from firmly.priors.problem import Problem

CHUNK = 512  # problems at a time, so that they stay in the cache
PATIENCE = 100  # checks without a smaller gap ...
FLOOR = 1000  # ... that is below so many units of rounding of |y|^2 / 2: rounding is all that moves


class SparseCodingStatus(Enum):
    """How a batch of problems ended; the value is the sentence for the user."""

    CONVERGED = "converged: every duality gap is within the tolerance"
    LIMIT = (
        "stopped at the iteration limit before every duality gap was within the tolerance: raise max_iterations or tol"
    )
    PRECISION = "stopped where rounding ends the progress, above the tolerance: pass float64 data or raise tol"

    def __str__(self) -> str:
        return self.value


class SparseCode(NamedTuple):
    """What `lasso` returns. All but `code` and `status` have shape (batch,); `gap` and `objective` are float64."""

    code: Tensor  # (batch, *domain of D)
    gap: Tensor
    objective: Tensor
    converged: Tensor
    iterations: Tensor
    status: SparseCodingStatus


@torch.no_grad()
def lasso(
    D: Tensor | LinearMap,
    y: Tensor,
    penalty: float | Tensor | Penalty,
    tol: float = 1e-6,
    absolute_tol: float = 0.0,
    max_iterations: int = 100_000,
    start: Tensor | None = None,
) -> SparseCode:
    """min over z of F(z) = 1/2 |D z - y|^2 + h(z), for every y of a batch, to a duality gap.

    `D` is a matrix (m, n) or any linear map (a convolutional dictionary, say), `y` is (batch, m) or (batch, *codomain),
    and `penalty` is w for h(z) = w |z|_1, with w a number or a tensor that broadcasts against (batch, n), or a
    `Penalty`: elastic net, groups, non-negative codes. A problem is finished, and leaves the batch, when

        gap <= max(absolute_tol, tol |y|^2 / 2),      gap >= F(z) - min F      (`duality_gap`, in float64).

    `start` are codes to start from. Runs on the device and in the precision of y; what float32 cannot reach has the
    status PRECISION. Codes are not differentiable here.

    Raises `ShapeError` for misfit shapes, `DataError` for data that are not finite real numbers, `SettingsError` for
    senseless tolerances and weights.
    """
    if not (0 <= tol < math.inf and 0 <= absolute_tol < math.inf):
        raise SettingsError(f"tol and absolute_tol are finite and at least 0, given {tol} and {absolute_tol}")
    if max_iterations < 1:
        raise SettingsError(f"max_iterations is at least 1, given {max_iterations}")
    problem = Problem.of(D, y, as_penalty(penalty))
    z = None if start is None else problem.penalty.upward(problem.flat_code("start", start).to(y.dtype))
    exact = problem.to(torch.float64)
    largest, gram = largest_eigenvalue(exact), None
    if isinstance(problem.D, Dense) and problem.penalty.group == 1:
        atoms = problem.D.weight
        gram = atoms.mT @ atoms
    parts = []
    for rows in torch.arange(len(y), device=y.device).split(CHUNK):
        part, part64 = problem.rows(rows), exact.rows(rows)
        first = (
            torch.zeros(len(rows), entries(problem.D.domain), dtype=y.dtype, device=y.device) if z is None else z[rows]
        )
        if gram is not None:
            solver = ActiveSet(part, first, largest, gram, z is None)
        else:
            solver = Accelerated(part, first, 1 / largest)
        goal = (part64.y.square().sum(1) * (tol / 2)).clamp(min=absolute_tol)
        parts.append(run(solver, part64, first, goal, max_iterations))
    code, gap, objective, iterations, stalled, goal = (torch.cat(p) for p in zip(*parts))
    converged = gap <= goal
    if bool(converged.all()):
        status = SparseCodingStatus.CONVERGED
    elif bool((~converged & ~stalled).any()):
        status = SparseCodingStatus.LIMIT
    else:
        status = SparseCodingStatus.PRECISION
    return SparseCode(code.unflatten(1, problem.D.domain), gap, objective, converged, iterations, status)


def run(solver: Accelerated | ActiveSet, exact: Problem, z: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, ...]:
    """Advance until every gap is within its goal, stands still, or the limit is reached: the best codes, their gaps,
    objectives and iterations, and which ones stand still."""
    code, gap, objective = z.clone(), torch.full_like(goal, math.inf), torch.full_like(goal, math.inf)
    iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    stalled = iterations.clone()
    floor = exact.y.square().sum(1) * (FLOOR / 2 * torch.finfo(z.dtype).eps)
    rows, done = torch.arange(len(z), device=z.device), 0
    while True:
        z64 = z.double()
        r = exact.residual(z64)
        c = exact.correlate(r)
        found = gap_at(exact.penalty, z64, r, c)
        better = found.gap < gap[rows]
        improved = rows[better]
        code[improved], gap[improved], objective[improved] = z[better], found.gap[better], found.objective[better]
        iterations[rows] = done
        stalled[rows] = torch.where(better | (gap[rows] > floor[rows]), 0, stalled[rows] + 1)
        unfinished = (gap[rows] > goal[rows]) & (stalled[rows] < PATIENCE)
        if done >= limit or not bool(unfinished.any()):
            return code, gap, objective, iterations, stalled >= PATIENCE, goal
        if not bool(unfinished.all()):
            rows, z, c, exact = rows[unfinished], z[unfinished], c[unfinished], exact.rows(unfinished)
            found = Gap(found.objective[unfinished], found.gap[unfinished])
            solver.keep(unfinished)
        z, steps = solver.advance(z, found, c.to(z.dtype))
        done += steps
