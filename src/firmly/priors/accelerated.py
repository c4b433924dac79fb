"""Accelerated proximal gradients on batches: for dictionaries without columns at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.linear.dense import Dense
from firmly.priors.problem import Problem

STEPS = 10  # between duality gaps, each of which costs one step


class Accelerated:
    """FISTA, restarted for each problem on its own where its momentum points uphill.

        z_new = prox_{h / L}(u + D'(y - D u) / L),   u_new = z_new + b (z_new - z),   L >= |D|^2 (certified)

    Sources: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; the restart, at
    <u - z_new, z_new - z> > 0: O'Donoghue and Candes, Adaptive restart for accelerated gradient schemes, 2015.
    """

    def __init__(self, problem: Problem, z: Tensor):
        self.problem = problem
        self.step_size = 1 / largest_eigenvalue(problem)
        self.u, self.previous, self.t = z, z, z.new_ones(len(z), 1)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these problems only (a mask)."""
        self.problem = self.problem.rows(chosen)
        self.u, self.previous, self.t = self.u[chosen], self.previous[chosen], self.t[chosen]

    def advance(self, z: Tensor, c: Tensor) -> tuple[Tensor, int]:
        """Codes after a few more steps, and how many; `c` = D'(y - D z) is not needed."""
        problem, u, z, t = self.problem, self.u, self.previous, self.t
        for _ in range(STEPS):
            r = problem.y - problem.apply(u)
            new = problem.penalty.prox(u + self.step_size * problem.correlate(r), self.step_size)
            moved = new - z
            t = torch.where(((u - new) * moved).sum(1, keepdim=True) > 0, 1.0, t)
            following = (1 + (1 + 4 * t.square()).sqrt()) / 2
            u, z, t = new + (t - 1) / following * moved, new, following
        self.u, self.previous, self.t = u, z, t
        return z, STEPS


def largest_eigenvalue(problem: Problem) -> float:
    """An upper bound of |D|^2, or 1 for a dictionary of zeros."""
    D = problem.D
    if isinstance(D, Dense):
        weight = D.weight.detach().double()
        gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
        bound = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-12)
    else:
        bound = D.norm().upper ** 2
    return bound if bound > 0 else 1.0
