"""The loop of sparse coding: advance, measure duality gaps, let finished problems go."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.priors.duality import Gap, gap_at
from firmly.priors.problem import Problem

PATIENCE = 30  # checks without a smaller gap ...
FLOOR = 1000  # ... that is below so many units of rounding of |y|^2 / 2: rounding is all that moves


class Solver(Protocol):
    """An iteration on the problems of a batch that are still open."""

    def keep(self, chosen: Tensor) -> None:
        """Go on with these problems only (a mask)."""

    def advance(self, z: Tensor, found: Gap, c: Tensor) -> tuple[Tensor, int]:
        """The next codes to measure and the steps that they took, from codes z with their gaps and c = D'(y - D z)."""
        ...


class Found(NamedTuple):
    """The best codes (batch, n) and, of each, gap, objective, iterations, and whether rounding ended its progress."""

    code: Tensor
    gap: Tensor
    objective: Tensor
    iterations: Tensor
    stalled: Tensor


def run(solver: Solver, exact: Problem, z: Tensor, goal: Tensor, limit: int) -> Found:
    """Advance from z until every gap is within its goal or stands still, or the limit; `exact` is in float64."""
    code, gap, objective = z.clone(), torch.full_like(goal, math.inf), torch.full_like(goal, math.inf)
    iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    waited = iterations.clone()
    floor = rounding_floor(exact, z.dtype)
    rows, done = torch.arange(len(z), device=z.device), 0
    while True:
        found, c = measure(exact, z)
        better = found.gap < gap[rows]
        improved = rows[better]
        code[improved], gap[improved], objective[improved] = z[better], found.gap[better], found.objective[better]
        iterations[rows] = done
        waited[rows] = torch.where(better | (gap[rows] > floor[rows]), 0, waited[rows] + 1)
        unfinished = (gap[rows] > goal[rows]) & (waited[rows] < PATIENCE)
        if done >= limit or not bool(unfinished.any()):
            return Found(code, gap, objective, iterations, waited >= PATIENCE)
        if not bool(unfinished.all()):
            rows, z, c, exact = rows[unfinished], z[unfinished], c[unfinished], exact.rows(unfinished)
            found = Gap(found.objective[unfinished], found.gap[unfinished])
            solver.keep(unfinished)
        z, steps = solver.advance(z, found, c.to(z.dtype))
        done += steps


def measure(exact: Problem, z: Tensor) -> tuple[Gap, Tensor]:
    """Objectives and gaps of codes, and c = D'(y - D z), in the precision of the problem."""
    z = z.to(exact.y.dtype)
    r = exact.residual(z)
    c = exact.correlate(r)
    return gap_at(exact.penalty, z, r, c), c


def rounding_floor(exact: Problem, dtype: torch.dtype) -> Tensor:
    """The gaps (batch,) below which rounding in `dtype` can end the progress."""
    return exact.y.square().sum(1) * (FLOOR / 2 * torch.finfo(dtype).eps)
