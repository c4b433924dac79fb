"""Sparse codes as differentiable functions of dictionary, data and penalty: solved once, differentiated where active.

Atoms that are proved to be inactive at the solution may be left out of the problem: the solution and its derivatives
stay the same. What is left is small, and `firmly.implicit` differentiates it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from firmly.errors import NotConverged, SettingsError
from firmly.fixedpoint.adjoints import Implicit
from firmly.fixedpoint.fixed_point import fixed_point
from firmly.fixedpoint.proximal_gradient import ProximalGradient
from firmly.fixedpoint.solvers import Anderson
from firmly.linear.dense import Dense
from firmly.priors.accelerated import largest_eigenvalue
from firmly.priors.duality import gap_at
from firmly.priors.lasso import lasso
from firmly.priors.penalty import Penalty
from firmly.priors.problem import Problem
from firmly.prox.elastic_net import ElasticNet
from firmly.prox.mixed_norm import MixedNorm

FINE = 50  # units of rounding: the relative duality gap that is asked of the solver
POLISH = 1000  # iterations on the small problem, whose start is a solution already


def implicit_lasso(
    D: Tensor, y: Tensor, weight: float | Tensor, curvature: float | Tensor = 0.0, group: int = 1,
    tol: float | None = None,
) -> Tensor:  # fmt: skip
    """z(D, y, weight, curvature) = argmin_z 1/2 |D z - y|^2 + sum_g weight_g |z_g|_2 + curvature / 2 |z|^2, with
    gradients in all four.

    `D` is (m, n), `y` (batch, m) and the result (batch, n); `weight` and `group` are as in `Penalty`, and `curvature`
    needs groups of one entry. The problem is solved by `lasso`. With its duality gap G and residual r every group with

        |D_g' r| + |D_g| sqrt(2 G) < weight_g

    is zero at the solution (as |D z - D z*|^2 <= 2 G) and stays so nearby. The others make a small problem that is
    handed to `fixed_point` with the solution found as start: the relative residual of its proximal gradient step
    (`tol`, None: eps^(3/4)) and of every linear system, on its active manifold, is measured. What is refused there is
    refused here (`NotConverged`). Derivatives may be taken again, forward or backward; their time and memory depend on
    the number of active atoms, and not on n or on the iterations of the solver.
    Sources: Ndiaye et al., Gap safe screening rules for sparsity enforcing penalties, 2017 (the test); Bertrand et al.,
    Implicit differentiation for fast hyperparameter selection in non-smooth convex learning, 2022 (the restriction).
    """
    if not isinstance(D, Tensor):
        raise SettingsError(
            f"implicit_lasso takes a matrix, given {type(D).__name__}; for other linear maps take "
            "firmly.implicit(ForwardBackward(A, prior), Implicit('manifold')) and a code of `lasso` as start"
        )
    D = D.to(y)
    tensors = [t if isinstance(t, Tensor) else torch.tensor(t, dtype=y.dtype) for t in (weight, curvature)]
    weight, curvature = (t.to(y) for t in tensors)
    if curvature.numel() != 1:
        raise SettingsError(f"the curvature is one number, given a tensor of shape {tuple(curvature.shape)}")
    if group > 1 and (curvature.requires_grad or float(curvature) != 0):
        raise SettingsError("a curvature is for groups of one entry; give group=1 or curvature=0")
    with torch.no_grad():
        penalty = Penalty(weight, float(curvature), group)
        eps = torch.finfo(y.dtype).eps
        code = lasso(D, y, penalty, FINE * eps).code
        exact = Problem(Dense(D.double()), y.double(), penalty.on(y, D.shape[1]))
        groups = undecided(exact, code)
    inside = (groups[:, None] * group + torch.arange(group, device=y.device)).flatten()
    A, start = D.index_select(1, inside), code[:, inside]
    weights = weight if weight.dim() == 0 or weight.shape[-1] == 1 else weight.index_select(-1, groups)
    step_size = 1 / largest_eigenvalue(replace(exact, D=Dense(A.detach())))
    if group == 1:
        T = ProximalGradient(slope, lambda A, y, w, c: ElasticNet(w, c), step_size)
    else:  # a mixed norm takes (batch, time, sources)
        T = ProximalGradient(slope, lambda A, y, w, c: MixedNorm(w, group), step_size)
        start, y = start[:, None], y[:, None]
    found = fixed_point(
        T, start, A, y, weights, curvature, solver=Anderson(10), adjoint=Implicit("manifold"), tol=tol,
        max_iterations=POLISH,
    )  # fmt: skip
    if not found.converged:
        raise NotConverged(
            f"the sparse code was not reached: {found.status} (largest residual {float(found.residual.max()):.3g}): "
            "raise tol, or pass float64 data"
        )
    return torch.zeros_like(code).index_copy(1, inside, found.state.flatten(1))


def slope(z: Tensor, D: Tensor, y: Tensor, *penalty: Tensor) -> Tensor:
    """D'(D z - y)."""
    return (z @ D.mT - y) @ D


def undecided(problem: Problem, z: Tensor) -> Tensor:
    """The groups of which the duality gap of z (batch, n) does not prove that they vanish in all solutions of the
    batch, at least one: indices."""
    z, penalty, weight = z.double(), problem.penalty, problem.D.matrix()
    used = z.any(0).nonzero()[:, 0]
    codes, atoms = z[:, used], weight[:, used].mT
    r = problem.y - codes @ atoms
    c = problem.correlate(r)
    objective, gap = gap_at(penalty, z, r, c)
    eps = torch.finfo(r.dtype).eps
    rounding = (len(weight) + len(used) + 2) * eps * (problem.y.abs() + codes.abs() @ atoms.abs()).norm(dim=1)
    radius = (2 * gap.clamp(min=0) + 100 * eps * objective).sqrt() + rounding
    margin = penalty.weight - penalty.norms(c)
    reach = margin / radius[:, None].clamp(min=torch.finfo(r.dtype).tiny)
    reach = reach.amin(0)  # groups of a smaller norm vanish
    every = weight.reshape(-1)  # no group is larger than all of them together
    near = (reach <= torch.dot(every, every).sqrt()).nonzero()[:, 0]
    sizes = torch.linalg.vector_norm(weight.unflatten(1, (-1, penalty.group))[:, near], dim=(0, 2))
    kept = near[reach[near] <= sizes]
    return kept if len(kept) else reach.argmin()[None]
