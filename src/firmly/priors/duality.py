"""Duality gaps: how far from optimal a code can be, without knowing the optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.linear.map import LinearMap
from firmly.priors.penalty import Penalty, as_penalty
from firmly.priors.problem import Problem


class Gap(NamedTuple):
    """F(z) and an upper bound of F(z) - min F, each (batch,) in float64."""

    objective: Tensor
    gap: Tensor


@torch.no_grad()
def duality_gap(D: Tensor | LinearMap, y: Tensor, penalty: float | Tensor | Penalty, code: Tensor) -> Gap:
    """F(z) = 1/2 |D z - y|^2 + h(z) and a bound of F(z) - min F, for codes from anywhere: a solver, a network.

    With the residual r = y - D z and the dual point nu = s r,

        gap = 1/2 |r - nu|^2 + h(z) + h*(D' nu) - <D' nu, z>    >= F(z) - min F,

    where s is the best factor for which D' nu satisfies the dual constraint. Both halves are sums of terms that are
    not negative (Fenchel and Young), so nothing cancels and a gap of 1e-15 is as meaningful as one of 1. Shapes as in
    `lasso`. A code that is negative under a constraint has the gap infinity.
    Sources: Bonnefoy et al., Dynamic screening, 2015; Fercoq, Gramfort and Salmon, Mind the duality gap, 2015.
    """
    problem = Problem.of(D, y, as_penalty(penalty))
    z = problem.flat_code("code", code).double()
    r = problem.residual(z)
    return gap_at(problem.penalty, z, r, problem.correlate(r))


def gap_at(penalty: Penalty, z: Tensor, r: Tensor, c: Tensor) -> Gap:
    """The same from the residual r = y - D z and c = D' r, in the precision of these."""
    energy, along, value = r.square().sum(1), (c * z).sum(1), penalty.value(z)
    # without curvature nu = s r has to satisfy |D_g' nu| <= weight_g; the dual objective is a parabola in s
    limit = 1 / (penalty.pull(c) / penalty.weight).amax(1).clamp(min=torch.finfo(r.dtype).tiny)
    best = torch.where(energy > 0, 1 + along / energy, 1.0).clamp(min=0)
    s = torch.minimum(best, limit)
    gap = (1 - s).square() / 2 * energy + value - s * along
    if penalty.curvature:  # then every nu is feasible, and the residual itself is the best one near the solution
        gap = torch.minimum(gap, value + penalty.conjugate(c) - along)
    if penalty.nonnegative:
        gap = torch.where((z < 0).any(1), torch.inf, gap)
    return Gap(energy / 2 + value, gap)
