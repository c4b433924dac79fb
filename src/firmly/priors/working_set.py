"""Few problems with many atoms: most atoms are only looked at, a growing working set is solved for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from firmly.linear.dense import Dense
from firmly.priors.active_set import ActiveSet
from firmly.priors.duality import gap_at
from firmly.priors.problem import Problem
from firmly.priors.run import Found, rounding_floor, run

FIRST = 100  # atoms in the first working set
JOINING = 8  # atoms that join a face in the first round
PATIENCE = 3  # rounds without a smaller gap where rounding is all that moves
INNER = 0.1  # gap of a working set, relative to that of the whole problem


def solve_on_working_sets(exact: Problem, z: Tensor, goal: Tensor, limit: int) -> Found:
    """The code of one problem, (1, n), whose dictionary is a matrix; z has the precision to compute in.

    The atoms that violate their optimality condition most join the working set, which at most doubles; the problem on
    the working set is solved by `ActiveSet` to a tenth of the gap of the whole problem, and so on until that is within
    its goal. Each round costs one product with the whole dictionary; Gram matrices grow with the set.
    Sources: Johnson and Guestrin, Blitz: a principled meta-algorithm for scaling sparse optimization, 2015; Massias,
    Gramfort and Salmon, Celer: a fast solver for the Lasso with dual extrapolation, 2018.
    """
    floor, atoms = rounding_floor(exact, z.dtype), exact.D.weight
    inside, u = torch.nonzero(z[0])[:, 0], z[z != 0][None]
    rows = atoms.index_select(1, inside).mT.contiguous()  # the atoms of the working set
    gram = rows @ rows.mT
    best = Found(z, *(torch.full_like(goal, math.inf) for _ in range(2)), torch.zeros_like(goal).long(), goal < 0)
    done = waited = 0
    while True:
        r = exact.y - u.double() @ rows
        c = exact.correlate(r)
        found = gap_at(exact.penalty, z.double(), r, c)
        if bool(found.gap < best.gap):
            best, waited = best._replace(code=z, gap=found.gap, objective=found.objective), 0
        elif bool(best.gap <= floor):
            waited += 1
        if done >= limit or bool(best.gap <= goal) or waited == PATIENCE:
            stalled = torch.full_like(goal, waited == PATIENCE).bool()
            return best._replace(iterations=best.iterations + done, stalled=stalled)
        violation = (exact.penalty.pull(c) / exact.penalty.weight)[0]
        violation[inside] = 0
        new = violation.topk(min(max(FIRST, len(inside)), len(violation) - len(inside))).indices
        new = new[violation[new] > 1]
        if len(new):
            more = atoms.index_select(1, new).mT
            cross = rows @ more.mT
            gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.mT, more @ more.mT], 1)])
            inside, rows = torch.cat([inside, new]), torch.cat([rows, more])
            u = torch.nn.functional.pad(u, (0, len(new)))
        part = replace(exact, D=Dense(rows.mT), penalty=exact.penalty.atoms(inside))
        aim = (found.gap * INNER).clamp(min=0.5 * goal) if len(new) else 0.1 * goal
        inner = run(ActiveSet(part.to(z.dtype), u, gram.to(z.dtype), joining=JOINING), part, u, aim, limit - done)
        done += int(inner.iterations) + 1
        u = inner.code
        z = torch.zeros_like(z).index_copy(1, inside, u)
