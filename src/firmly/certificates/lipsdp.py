"""LipSDP with one multiplier per neuron (M. Fazlyab et al., NeurIPS 2019), at the size of real networks.

With the multipliers divided by rho, mu = rho nu, the inequality is rho >= lambda_max(O S(nu)^-1 O'), where O are the
rows of the output and S(nu) = M(1, nu) without the output: a convex function of nu on the set where S(nu) is positive
definite. It is minimised as a smooth function of log nu by L-BFGS, with one multiplier per layer first. Function and
gradient come from one factorisation of S block by block, which for a chain costs as much as a few products of its
layers, and no matrix is larger than a layer. Newton's method follows, where there are not too many multipliers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firmly.certificates.eclipse import eclipse_multipliers
from firmly.certificates.elimination import SMALLEST, elimination_order, output_response, proof_margin
from firmly.certificates.layered_newton import follow_central_path, image
from firmly.certificates.layers import Layers

MEMORY = 20  # pairs of L-BFGS
NEWTON = 1500  # multipliers up to which a matrix with a row for each is factored
SHALLOW = (6, 400)  # layers and multipliers up to which Newton's method starts from ECLipsE-Fast
ROUGH = 0.1  # tolerance of L-BFGS before Newton's method
LONGEST = 2.0  # step in log nu: a factor of about seven


@dataclass
class LayeredResult:
    """`rho` is what floating point says of the multipliers `mu`, with room for a proof; only that makes it a bound."""

    rho: float
    mu: Tensor
    evaluations: int


def lipsdp_multipliers(found: Layers, tolerance: float = 1e-4, budget_s: float = 60.0) -> LayeredResult:
    """Multipliers with a rho within about `tolerance` of the optimum, or the best that the time allows.

    Newton's method starts where L-BFGS becomes slow, for small and shallow networks at once. Where a deep network makes
    it slow in turn, L-BFGS goes on from there.
    """
    deadline = time.monotonic() + budget_s
    rho, start = eclipse_multipliers(found)
    if not SMALLEST < rho < math.inf or found.multipliers == 0:
        return LayeredResult(rho, rho * start, 0)
    if len(found.rows) <= SHALLOW[0] and found.multipliers <= SHALLOW[1]:
        path = follow_central_path(found, rho, start, tolerance, deadline)
        if path.finished or time.monotonic() > deadline:
            return LayeredResult(path.rho, path.rho * path.nu, path.steps)
    rough = max(ROUGH, tolerance)
    coarse = replace(found, owner=[torch.zeros_like(o) for o in found.owner])
    first = torch.tensor([0, *found.counts[:-1]]).cumsum(0)
    search = Search(coarse, start[first], time.monotonic() + 0.3 * budget_s)
    search.run(2 * rough)
    nu, evaluations = torch.repeat_interleave(search.best_nu, torch.tensor(found.counts)), search.evaluations
    search = Search(found, nu, deadline)
    if found.multipliers > NEWTON:
        search.run(tolerance)
        return LayeredResult(search.best, search.best * search.best_nu, evaluations + search.evaluations)
    while True:
        search.run(rough)
        path = follow_central_path(found, search.best, search.best_nu, tolerance, deadline)
        evaluations += path.steps
        search.best, search.best_nu = path.rho, path.nu
        if path.finished or rough <= tolerance or time.monotonic() > deadline:
            return LayeredResult(path.rho, path.rho * path.nu, evaluations + search.evaluations)
        rough = max(0.1 * rough, tolerance)


class Search:
    """Minimise log lambda_max(R(nu)) through (1/p) log tr R^p, with p increasing; keeps the best nu met."""

    def __init__(self, found: Layers, nu: Tensor, deadline: float):
        self.found = found
        self.deadline = deadline
        self.order = elimination_order(found)
        self.margin = proof_margin(found, self.order)
        self.best, self.best_nu, self.evaluations = math.inf, nu, 0

    def run(self, tolerance: float) -> None:
        excess = math.log(self.found.outputs + 1)  # p-th of it is how far the smoothed maximum can be above the maximum
        p, last = min(8.0, excess / tolerance), excess / tolerance
        theta = self.best_nu.log()
        while True:
            theta = self.descend(theta, p, 0.02 * max(excess / p, tolerance))
            if p >= last or time.monotonic() > self.deadline:
                return
            p = min(4 * p, last)

    def descend(self, theta: Tensor, p: float, least: float) -> Tensor:
        """L-BFGS until five steps in turn gain less than `least`."""
        value, gradient = self.smoothed(theta, p)
        pairs: list[tuple[Tensor, Tensor]] = []
        stalled = 0
        while stalled < 5 and time.monotonic() < self.deadline and math.isfinite(value):
            direction = -inverse_hessian(pairs, gradient)
            if not float(direction @ gradient) < 0:
                pairs, direction = [], -gradient
            length = min(1.0, (LONGEST if pairs else 0.5) / max(float(direction.abs().max()), 1e-300))
            slope = float(direction @ gradient)
            for _ in range(25):
                trial = theta + length * direction
                new, new_gradient = self.smoothed(trial, p)
                if new <= value + 1e-4 * length * slope or time.monotonic() > self.deadline:
                    break
                length /= 2
            if not new < value:
                break
            step, change = trial - theta, new_gradient - gradient
            if float(step @ change) > 1e-12 * float(step.norm() * change.norm()):
                pairs = [*pairs[1 - MEMORY :], (step, change)]
            stalled = stalled + 1 if value - new < least else 0
            theta, value, gradient = trial, new, new_gradient
        return theta

    def smoothed(self, theta: Tensor, p: float) -> tuple[float, Tensor]:
        """(1/p) log tr R^p and its gradient in log nu; infinite where S is not positive definite.

        With an eigenvector u of R and x = S^-1 O' u, the derivative of its eigenvalue in the multiplier of an entry is
        -(|v|^2 - (a+b) v z + ab |z|^2) at x.
        """
        self.evaluations += 1
        nu = theta.exp()
        response = output_response(self.found, nu, self.order, self.margin)
        if response is None:
            return math.inf, torch.zeros_like(nu)
        R, factor, Y = response
        eigenvalues, U = torch.linalg.eigh(R)
        largest = float(eigenvalues[-1])
        if not largest > 0:
            return math.inf, torch.zeros_like(nu)
        if largest < self.best:
            self.best, self.best_nu = largest, nu
        relative = (eigenvalues / largest).clamp(min=0)
        total = float((relative**p).sum())
        kept = relative**p > 1e-12
        directions = U[:, kept] * (relative[kept] ** (p - 1) / (total * largest)).sqrt()
        X = factor.solve_adjoint({i: y @ directions for i, y in Y.items()})
        parts = []
        for i, (row, (low, high)) in enumerate(zip(self.found.rows, self.found.slopes)):
            v = X[self.found.inputs + i]
            z = sum((image(block, X[j]) for j, block in row.items()), torch.zeros_like(v))
            parts.append((((low * z - v) * (v - high * z).conj()).real + self.margin * v.abs().square()).sum(1))
        return math.log(largest) + math.log(total) / p, nu * self.found.collected(parts)


def inverse_hessian(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The L-BFGS approximation of H^-1 gradient (J. Nocedal, Math. Comp. 35, 1980)."""
    q, factors = gradient.clone(), []
    for step, change in reversed(pairs):
        factors.append(float(step @ q) / float(step @ change))
        q = q - factors[-1] * change
    if pairs:
        step, change = pairs[-1]
        q = q * (float(step @ change) / float(change @ change))
    for (step, change), factor in zip(pairs, reversed(factors)):
        q = q + (factor - float(change @ q) / float(step @ change)) * step
    return q
