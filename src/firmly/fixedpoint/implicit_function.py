"""The implicit function theorem as autograd functions: reverse and forward mode, any number of times, under vmap too.

x = T(x, p) gives dx = (I - J)^-1 B dp with J = dT/dx, B = dT/dp at the solution: `Solution` applies it to tangents and
its transpose to cotangents. The linear solves are functions with derivatives of their own, `LinearSolve`, so that
gradients of gradients solve further systems of the same kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from firmly.errors import NotConverged, SettingsError
from firmly.fixedpoint.adjoints import Adjoint, AdjointWarning, Implicit, Neumann, OneStep
from firmly.fixedpoint.gmres import gmres
from firmly.fixedpoint.state import norms

LOOSE = 1e-3  # a gradient that is wrong by more is worth a warning, whatever was asked for

Map = Callable[..., Tensor]  # (x (batch, entries), *parameters) -> (batch, entries)


class Problem:
    """A map with its parameters, how its fixed points are found, and how they are differentiated.

    `residuals` lists the relative residual of every linear solve that a derivative has taken.
    """

    def __init__(self, T: Map, find: Callable[[Tensor, tuple[Tensor, ...]], Tensor], adjoint: Adjoint):
        self.T, self.find, self.adjoint = T, find, adjoint
        self.residuals: list[float] = []

    def pull(self, x: Tensor, parameters: tuple[Tensor, ...], u: Tensor) -> Tensor:
        """J^T u."""
        return torch.func.vjp(lambda z: self.T(z, *parameters), x)[1](u)[0]

    def push(self, x: Tensor, parameters: tuple[Tensor, ...], w: Tensor) -> Tensor:
        """J w, by transposing J^T: no forward-mode rules of T are needed."""
        return torch.func.vjp(lambda u: self.pull(x, parameters, u), torch.zeros_like(x))[1](w)[0]

    def linear(self, transposed: bool, x: Tensor, parameters: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """u -> J^T u if transposed, else u -> J u, with one evaluation of T for all u."""

        def pulled(u: Tensor) -> Tensor:
            return torch.func.vjp(lambda z: self.T(z, *parameters), x)[1](u)[0]

        if not transposed:
            push = torch.func.vjp(pulled, torch.zeros_like(x))[1]
            return lambda w: push(w)[0]
        if not plain_autograd():
            pull = torch.func.vjp(lambda z: self.T(z, *parameters), x)[1]
            return lambda u: pull(u)[0]
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            image = self.T(z, *(p.detach() for p in parameters))
        if not image.requires_grad:
            return torch.zeros_like
        return lambda u: torch.autograd.grad(image, z, u, retain_graph=True, materialize_grads=True)[0]

    def pull_parameters(self, x: Tensor, parameters: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        """B^T u."""
        if plain_autograd():
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_(p.is_floating_point() or p.is_complex()) for p in parameters]
                image = self.T(x.detach(), *leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if not image.requires_grad:
                return tuple(torch.zeros_like(p) for p in parameters)
            found = iter(torch.autograd.grad(image, wanted, u, materialize_grads=True))
            return tuple(next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in leaves)
        return torch.func.vjp(lambda *p: self.T(x, *p), *parameters)[1](u)

    def push_parameters(self, x: Tensor, parameters: tuple[Tensor, ...], dp: tuple[Tensor, ...]) -> Tensor:
        """B dp."""
        return torch.func.vjp(lambda u: self.pull_parameters(x, parameters, u), torch.zeros_like(x))[1](dp)[0]

    def solve_linear(self, transposed: bool, x: Tensor, v: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """(I - J)^-T v or (I - J)^-1 v, with its residual measured."""
        size = v.abs().amax(1, keepdim=True)
        size = torch.where((size > 0) & torch.isfinite(size), size, 1)
        return size * self.solve_scaled(transposed, x, v / size, parameters)  # squares of v do not vanish

    def solve_scaled(self, transposed: bool, x: Tensor, v: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        apply = self.linear(transposed, x, parameters)

        def system(u: Tensor) -> Tensor:
            return u - apply(u)

        adjoint = self.adjoint
        if isinstance(adjoint, (Neumann, OneStep)):
            u = power = v.clone()
            for _ in range(adjoint.terms if isinstance(adjoint, Neumann) else 0):
                power = apply(power)
                u = u + power
            return self.judged(u, v, system, adjoint.tol)
        tol = adjoint.tol if isinstance(adjoint, Implicit) and adjoint.tol is not None else default_tol(v)
        kind = adjoint.solver if isinstance(adjoint, Implicit) else "gmres"
        if callable(kind):
            u = kind(transposed, x, v, parameters, tol)
        elif kind == "dense":
            u = solve_dense(system, v)
        elif kind == "manifold":
            raise SettingsError(
                "Implicit('manifold') needs to know the prior: use firmly.implicit(algorithm), or a "
                "firmly.fixedpoint.ProximalGradient as the map of fixed_point"
            )
        elif kind == "normal-cg":
            other = self.linear(not transposed, x, parameters)
            u = normal_cg(system, lambda w: w - other(w), v, tol)
        else:
            u = gmres(system, v, tol)[0]
        return self.judged(u, v, system, tol)

    def judged(self, u: Tensor, v: Tensor, system: Callable[[Tensor], Tensor], tol: float) -> Tensor:
        """u, once its residual is known; raises or warns above the tolerance."""
        size = norms(v)
        relative = torch.where(size > 0, norms(system(u) - v) / torch.where(size > 0, size, 1), norms(u))
        residual = float(relative.max())
        self.residuals.append(residual)
        if residual <= tol:
            if isinstance(self.adjoint, Implicit) and residual > LOOSE:
                warnings.warn(
                    f"the system of an implicit derivative is solved to the relative residual {residual:.3g} only, as "
                    f"its tolerance {tol:.3g} allows: the gradient is wrong by about as much, or more",
                    AdjointWarning,
                    stacklevel=2,
                )
            return u
        text = (
            f"the system of an implicit derivative has the relative residual {residual:.3g}, the tolerance is {tol:.3g}"
        )
        if isinstance(self.adjoint, (Neumann, OneStep)) and residual < 1:
            warnings.warn(f"{text}: use Implicit(), or more terms", AdjointWarning, stacklevel=2)
            return u
        reason = (
            "powers of J grow: the map is no contraction here, and a Neumann series does not converge; use Implicit()"
            if isinstance(self.adjoint, (Neumann, OneStep))
            else "I - J is singular or nearly so, where the solution has no derivative, or the tolerance is too small"
        )
        if isinstance(self.adjoint, Implicit) and callable(self.adjoint.solver):
            reason += "; or the solution lies at a kink, or the linear solver does not fit the map there"
        raise NotConverged(f"{text}: {reason}")


def plain_autograd() -> bool:
    """Whether a derivative is taken once, outside of `torch.func`: then plain autograd takes those of T, which is
    faster, and which functions understand that are written for nothing else."""
    return not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


class FixedPointFunction(torch.autograd.Function):
    """(problem, start, *parameters) -> x = T(x, *parameters), (batch, entries)."""

    @staticmethod
    def forward(problem: Problem, start: Tensor, *parameters: Tensor) -> Tensor:
        with without_autocast(start):
            return problem.find(start, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        problem, _, *parameters = inputs
        ctx.problem = problem
        ctx.save_for_backward(output, *parameters)
        ctx.save_for_forward(output, *parameters)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        with without_autocast(x):
            u = LinearSolve.apply(ctx.problem, True, x, v, *parameters)
            gradients = ctx.problem.pull_parameters(x, tuple(parameters), u)
        needed = ctx.needs_input_grad[2:]
        return (None, None, *(g if need else None for g, need in zip(gradients, needed)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, *parameters = ctx.saved_tensors
        changes = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(parameters, tangents[2:]))
        with without_autocast(x):
            b = ctx.problem.push_parameters(x, tuple(parameters), changes)
            return LinearSolve.apply(ctx.problem, False, x, b, *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: Problem, *tensors: Tensor) -> tuple[Tensor, int]:
        return one_by_one(FixedPointFunction, info.batch_size, in_dims[1:], (problem,), tensors)


class LinearSolve(torch.autograd.Function):
    """(problem, transposed, x, v, *parameters) -> (I - J)^-T v if transposed, else (I - J)^-1 v."""

    @staticmethod
    def forward(problem: Problem, transposed: bool, x: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return problem.solve_linear(transposed, x, v, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        problem, transposed, x, _, *parameters = inputs
        ctx.problem, ctx.transposed = problem, transposed
        ctx.save_for_backward(output, x, *parameters)
        ctx.save_for_forward(output, x, *parameters)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        solved, x, *parameters = ctx.saved_tensors
        problem, transposed = ctx.problem, ctx.transposed
        other = LinearSolve.apply(problem, not transposed, x, cotangent, *parameters)
        u, w = (solved, other) if transposed else (other, solved)
        # moving x and p changes the solution by (I - J)^-1 dJ solved, whose product with the cotangent is <dJ w, u>
        bend = torch.func.vjp(lambda z, *p: problem.pull(z, p, u), x, *parameters)[1](w)
        return (None, None, bend[0], other, *bend[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        solved, x, *parameters = ctx.saved_tensors
        problem, transposed = ctx.problem, ctx.transposed
        apply = problem.pull if transposed else problem.push
        changes = [
            torch.zeros_like(p) if t is None else t for p, t in zip((x, *parameters), (tangents[2], *tangents[4:]))
        ]
        moved = torch.func.jvp(lambda z, *p: apply(z, p, solved), (x, *parameters), tuple(changes))[1]
        right = moved if tangents[3] is None else moved + tangents[3]
        return LinearSolve.apply(problem, transposed, x, right, *parameters)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, transposed: bool, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        return one_by_one(LinearSolve, info.batch_size, in_dims[2:], (problem, transposed), tensors)


def one_by_one(
    function: Any, count: int, dims: tuple[int | None, ...], fixed: tuple[Any, ...], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, int]:
    """A loop in the place of a batch: iterations end after different numbers of steps."""
    found = []
    for k in range(count):
        found.append(function.apply(*fixed, *(t if d is None else t.select(d, k) for t, d in zip(tensors, dims))))
    return torch.stack(found), 0


def solve_dense(system: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """The solution of every row's system from its matrix, column by column; not finite where that is singular."""
    columns = []
    for k in range(v.shape[1]):
        unit = torch.zeros_like(v)
        unit[:, k] = 1
        columns.append(system(unit))
    return torch.linalg.solve_ex(torch.stack(columns, 2), v).result


def normal_cg(
    system: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor], v: Tensor, tol: float
) -> Tensor:
    """Conjugate gradients on the normal equations (CGNE): rows alone, until the residual is within tol |v|."""
    u = torch.zeros_like(v)
    left = v.clone()
    goal = tol * norms(v)
    direction = transpose(left)
    power = left.square().sum(1)
    for _ in range(10 * v.shape[1] + 100):
        if bool((norms(left) <= 0.5 * goal).all()):
            break
        size = direction.square().sum(1)
        length = torch.where(size > 0, power / torch.where(size > 0, size, 1), 0)
        u = u + length[:, None] * direction
        left = left - length[:, None] * system(direction)
        now = left.square().sum(1)
        ratio = torch.where(power > 0, now / torch.where(power > 0, power, 1), 0)
        direction = transpose(left) + ratio[:, None] * direction
        power = now
    return u


def default_tol(v: Tensor) -> float:
    return torch.finfo(v.dtype).eps ** 0.75


def without_autocast(x: Tensor) -> Any:
    """Half precision would put the residual of a fixed point above any tolerance worth having."""
    return torch.autocast(x.device.type, enabled=False)
