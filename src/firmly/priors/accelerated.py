"""Accelerated proximal gradients on batches."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.linear.dense import Dense
from firmly.priors.duality import Gap
from firmly.priors.problem import Problem

STEPS = 10  # between duality gaps, each of which costs one step


class Accelerated:
    """FISTA, restarted for each problem on its own where its momentum points uphill.

        z_new = prox_{t h}(u + t D'(y - D u)),   u_new = z_new + b (z_new - z),   t = `step_size` <= 1 / |D|^2

    Sources: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; the restart, at
    <u - z_new, z_new - z> > 0: O'Donoghue and Candes, Adaptive restart for accelerated gradient schemes, 2015.
    """

    def __init__(self, problem: Problem, z: Tensor, step_size: float):
        self.problem, self.step_size = problem, step_size
        self.u, self.z, self.t = z, z, z.new_ones(len(z), 1)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these problems only (a mask)."""
        self.problem = self.problem.rows(chosen)
        self.u, self.z, self.t = self.u[chosen], self.z[chosen], self.t[chosen]

    def advance(self, z: Tensor, found: Gap, c: Tensor) -> tuple[Tensor, int]:
        """The codes after a few more steps, and how many. It goes on from where it stands, whatever is passed."""
        for _ in range(STEPS):
            self.step()
        return self.z, STEPS

    def step(self, heavier: Tensor | None = None, restart: bool = True) -> None:
        """One step, with weights multiplied by `heavier` (batch, 1) if given."""
        penalty = self.problem.penalty if heavier is None else self.problem.penalty.heavier(heavier)
        new = penalty.prox(self.problem.ascend(self.u, self.step_size), self.step_size)
        moved, t = new - self.z, self.t
        if restart:
            t = torch.where(((self.u - new) * moved).sum(1, keepdim=True) > 0, 1.0, t)
        following = (1 + (1 + 4 * t.square()).sqrt()) / 2
        self.u, self.z, self.t = torch.addcmul(new, (t - 1) / following, moved), new, following


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
