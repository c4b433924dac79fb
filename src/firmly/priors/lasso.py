"""Sparse codes with a guarantee: batches of Lasso problems, solved to a duality gap."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.priors.accelerated import Accelerated, largest_eigenvalue
from firmly.priors.active_set import ActiveSet
from firmly.priors.penalty import Penalty, as_penalty
from firmly.priors.problem import Problem
from firmly.priors.run import Found, run
from firmly.priors.working_set import solve_on_working_sets

CHUNK = {"cpu": 512, "cuda": 2**15}  # problems at a time: so that they stay in the cache, or in memory
# what a problem costs on working sets, in multiplications of Gram matrices, measured: in all, and for each entry of D
ALONE, ALONE_EACH = 3e7, 150
WIDEST = 10_000  # atoms whose Gram matrix is too large to keep


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
    exact = Problem.of(D, y, as_penalty(penalty))
    first = torch.zeros(len(y), math.prod(exact.D.domain), dtype=y.dtype, device=y.device)
    if start is not None:
        first = exact.penalty.upward(exact.flat_code("start", start).to(y.dtype))
    energy = exact.y.square().sum(1)
    if not bool(torch.isfinite(energy).all()):
        raise DataError("the squared norm of y overflows in float64; scale the data")
    goal = (energy * (tol / 2)).clamp(min=absolute_tol)
    found = solve(exact, first, goal, max_iterations)
    converged = found.gap <= goal
    if bool(converged.all()):
        status = SparseCodingStatus.CONVERGED
    elif bool((~converged & ~found.stalled).any()):
        status = SparseCodingStatus.LIMIT
    else:
        status = SparseCodingStatus.PRECISION
    code = found.code.unflatten(1, exact.D.domain)
    return SparseCode(code, found.gap, found.objective, converged, found.iterations, status)


def solve(exact: Problem, z: Tensor, goal: Tensor, limit: int) -> Found:
    """Newton's method where D is a matrix and groups have one entry, else accelerated steps; in the precision of z."""
    n, every = z.shape[1], torch.arange(len(z), device=z.device)
    atoms = exact.D.weight if isinstance(exact.D, Dense) and exact.penalty.group == 1 else None
    if atoms is not None and (n > WIDEST or n * atoms.numel() > len(z) * (ALONE + ALONE_EACH * atoms.numel())):
        parts = [solve_on_working_sets(exact.rows(i), z[i], goal[i], limit) for i in every.split(1)]
    else:
        problem, step_size = exact.to(z.dtype), 1 / largest_eigenvalue(exact)
        gram = None if atoms is None else (atoms.mT @ atoms).to(z.dtype)
        parts = []
        for rows in every.split(CHUNK.get(z.device.type, CHUNK["cuda"])):
            part, first = problem.rows(rows), z[rows]
            solver = Accelerated(part, first, step_size) if gram is None else ActiveSet(part, first, gram, step_size)
            parts.append(run(solver, exact.rows(rows), first, goal[rows], limit))
    return Found(*(torch.cat(p) for p in zip(*parts)))
