"""x = T(x, p) as a differentiable function of p."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from firmly.errors import DataError, NotConverged, SettingsError
from firmly.fixedpoint.adjoints import Adjoint, Checkpointed, Implicit, Unrolled
from firmly.fixedpoint.implicit_function import FixedPointFunction, Problem
from firmly.fixedpoint.kinks import kinks
from firmly.fixedpoint.proximal_gradient import ProximalGradient, ProximalGradientSolver
from firmly.fixedpoint.solve import Status
from firmly.fixedpoint.solvers import Found, Picard, Solver, iterate
from firmly.fixedpoint.state import Layout, norms, relative_residual, wants_derivative


@dataclass
class FixedPoint:
    """A solution of x = T(x, p) with its account.

    `state` is x, as the map returns it. `residual` (batch,) is |T(x) - x| / max(|T(x)|, |x|) at exactly this x and
    `iterations` (batch,) what every element took. `backward_residuals` grows with every linear system that a
    derivative of `state` solves, and with `Implicit("manifold")` so does `least_curvatures`, the smallest curvature
    found on the active manifold over the largest.
    """

    state: Any
    status: Status
    residual: Tensor
    iterations: Tensor
    modulus: Callable[[], float | None] | float | None = field(default=None, repr=False)
    backward_residuals: list[float] = field(default_factory=list, repr=False)
    least_curvatures: list[float] = field(default_factory=list, repr=False)
    plain_map: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)  # on rows, for `doubts`

    @property
    def converged(self) -> bool:
        return self.status is Status.CONVERGED

    @property
    def error_bound(self) -> Tensor | None:
        """A bound (batch,) of |x - x*|, where I - T is known to be strongly monotone (with its `modulus`), else None.

        It is computed when it is asked for, in double precision, for the tensors of the map as they are then.
        """
        modulus = self.modulus() if callable(self.modulus) else self.modulus
        if modulus is None or self.plain_map is None:
            return None
        with torch.no_grad():
            x = Layout(self.state).flat(self.state)
            away = self.plain_map(x) - x
            away = away.to(torch.complex128 if away.is_complex() else torch.float64)
            size = away.abs().amax(1, keepdim=True)  # the squares of small numbers vanish
            return size[:, 0] * norms(away / torch.where(size > 0, size, 1)) / modulus

    @property
    def degenerate(self) -> bool:
        """Whether a derivative found a direction without curvature: x is not unique, and what was returned is the
        derivative of least norm, right for what is unique (predictions)."""
        return any(c <= self._finest for c in self.least_curvatures)

    @property
    def _finest(self) -> float:
        dtype = (self.state if isinstance(self.state, Tensor) else self.state[0]).dtype
        return torch.finfo(dtype).eps ** 0.75

    def doubts(self) -> list[str]:
        """What speaks against derivatives of this solution, in sentences; seven more evaluations of the map.

        A solution that is not reached; derivatives already taken whose linear system was not solved; a solution that
        is not unique, or ill-conditioned on its active manifold; a kink of the map near the solution (`kinks`, a
        heuristic: within ten residuals, or within eps^(1/3)), where the derivative is one element of a set or the
        active entries are not yet identified; a solution of zero near which the map does not move.
        """
        found = [] if self.converged else [str(self.status)]
        worst = max(self.backward_residuals, default=0.0)
        if worst > self._finest:
            found.append(f"a derivative has been taken whose linear system has the relative residual {worst:.3g}")
        curvature = min(self.least_curvatures, default=1.0)
        if self.degenerate:
            found.append("the solution is not unique: its derivative is that of least norm, right for predictions")
        elif curvature < self._finest**0.5:
            found.append(
                f"ill-conditioned: curvatures along the active manifold differ by a factor of {1 / curvature:.1g}"
            )
        if self.plain_map is not None:
            layout = Layout(self.state)
            x = layout.flat(self.state).detach()
            sharp, still = kinks(self.plain_map, x, 10 * self.residual)
            still = still & (x == 0).all(1)
            sharp, still = sharp.nonzero()[:, 0].tolist(), still.nonzero()[:, 0].tolist()
            if sharp:
                found.append(
                    f"the map has a kink near the solution, elements {sharp}: a breakpoint, where the derivative is "
                    "one element of a set, or entries whose activity is not identified yet: lower tol, or move the "
                    "parameters"
                )
            if still:
                found.append(
                    f"the solution is zero and the map constant near it, elements {still}: nothing is active, and the "
                    "derivative in a penalty above its largest useful weight is exactly zero"
                )
        return found


def fixed_point(
    T: Callable[..., Any],
    start: Any,
    *parameters: Tensor,
    solver: Solver = Picard(),  # noqa: B008
    adjoint: Adjoint = Implicit(),  # noqa: B008
    tol: float | None = None,
    max_iterations: int = 1000,
    contraction: float | None = None,
    strong_monotonicity: float | None = None,
) -> FixedPoint:
    """The x with x = T(x, *parameters), from `start`, differentiable in the parameters as `adjoint` says.

    A state is a tensor (batch, ...) or a (named) tuple of them; T treats every element of the batch alone. All tensors
    that T depends on and that may require gradients are among the parameters: one that T holds on to otherwise would
    get no gradient, and is refused. `tol` bounds the relative residual |T(x) - x| / max(|T(x)|, |x|) of every element;
    None is eps^(3/4) of the precision.

    `error_bound` is |T(x) - x| / (1 - r) >= |x - x*| with a `contraction` factor r < 1 of T. With a modulus m > 0 of
    `strong_monotonicity`, <d - (T(x + d) - T(x)), d> >= m |d|^2 for all x and d, it is |T(x) - x| / m, because
    m |x - x*|^2 <= <x - T(x), x - x*>; a contraction has the modulus 1 - r, and maps that expand may have one, too. The
    bound is that of the residual as it is computed: rounding in T itself is not covered.

    Gradients of a state that has not converged are refused (`NotConverged`), as they belong to no solution; so are
    those whose linear system is not solved to its tolerance. Derivatives can be taken again, forward or backward, and
    inside `torch.func` transforms. Under autocast, map and solves run in the precision of the state.

    Raises `ShapeError` and `DataError` for states that do not fit, `SettingsError` for settings out of range.
    """
    layout = Layout(start)
    flat = layout.flat(start).detach()
    if not all(isinstance(p, Tensor) for p in parameters):
        raise SettingsError("the parameters of a fixed point are tensors; bind everything else into the map")
    tol = float(torch.finfo(flat.dtype).eps ** 0.75) if tol is None else tol
    if not (tol >= 0 and math.isfinite(tol)) or max_iterations < 1:
        raise SettingsError(f"tol is finite and at least 0, max_iterations at least 1; given {tol}, {max_iterations}")
    modulus = modulus_of(contraction, strong_monotonicity)

    def step(x: Tensor, *p: Tensor) -> Tensor:
        return layout.flat(T(layout.state(x), *p))

    if torch.compiler.is_exporting():
        return exported(step, layout, flat, parameters, tol, max_iterations)
    refuse_empty(flat)
    refuse_hidden_parameters(step, flat, parameters)
    wanted = torch.is_grad_enabled() and any(map(wants_derivative, parameters))
    if isinstance(adjoint, (Unrolled, Checkpointed)):
        return unrolled(step, layout, flat, parameters, solver, adjoint, tol, max_iterations, modulus)
    manifold = None
    if isinstance(adjoint, Implicit) and adjoint.solver == "manifold" and isinstance(T, ProximalGradient):
        manifold = ProximalGradientSolver(T, tuple(layout.shapes[0]))
        adjoint = replace(adjoint, solver=manifold)
    accounts: list[Found] = []

    def find(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        refuse_not_finite(x)
        found = iterate(lambda z: step(z, *p), x, solver, tol, max_iterations)
        accounts.append(found)
        if found.status is not Status.CONVERGED and wanted:
            raise NotConverged(
                f"the fixed point was not reached: {found.status} (largest residual {float(found.residual.max()):.3g}, "
                f"tolerance {tol:.3g}); a derivative belongs to a solution: raise max_iterations or tol, take another "
                "solver, or call it under torch.no_grad()"
            )
        return found.x.clone()  # autograd refuses an input as output

    problem = Problem(step, find, adjoint)
    x = FixedPointFunction.apply(problem, flat, *parameters)
    account = accounts[-1]
    curvatures = [] if manifold is None else manifold.least_curvatures
    return report(step, layout, x, parameters, account, modulus, problem.residuals, curvatures)


def modulus_of(contraction: float | None, strong_monotonicity: float | None) -> float | None:
    """The best known modulus of strong monotonicity of I - T."""
    if contraction is not None and not 0 <= contraction < 1:
        raise SettingsError(f"a contraction factor lies in [0, 1), given {contraction}")
    if strong_monotonicity is not None and not 0 < strong_monotonicity < math.inf:
        raise SettingsError(f"a modulus of strong monotonicity is positive and finite, given {strong_monotonicity}")
    known = [m for m in (None if contraction is None else 1 - contraction, strong_monotonicity) if m is not None]
    return max(known, default=None)


def report(
    step: Callable[..., Tensor], layout: Layout, x: Tensor, parameters: tuple[Tensor, ...], found: Found,
    modulus: float | None, residuals: list[float], curvatures: list[float],
) -> FixedPoint:  # fmt: skip
    fixed = tuple(p.detach() for p in parameters)

    def plain(z: Tensor) -> Tensor:
        return step(z, *fixed)

    return FixedPoint(
        layout.state(x), found.status, found.residual, found.iterations, modulus, residuals, curvatures, plain
    )


def unrolled(
    step: Callable[..., Tensor], layout: Layout, start: Tensor, parameters: tuple[Tensor, ...], solver: Solver,
    adjoint: Unrolled | Checkpointed, tol: float, max_iterations: int, modulus: float | None,
) -> FixedPoint:  # fmt: skip
    """Plain iterations that autograd records; without a number of them, as many as the tolerance needs."""
    if not isinstance(solver, Picard) or solver.damping != 1:
        raise SettingsError(
            f"unrolling differentiates plain iterations, solver=Picard(); given {solver}: accelerated iterations may "
            "have derivatives that diverge although the iterates converge. Use adjoint=Implicit() with this solver"
        )
    refuse_not_finite(start)
    count = adjoint.iterations
    if count is None:
        with torch.no_grad():
            count = int(iterate(lambda z: step(z, *parameters), start, solver, tol, max_iterations).iterations.max())
    every = adjoint.every if isinstance(adjoint, Checkpointed) else 0

    def run(x: Tensor, number: int, *p: Tensor) -> Tensor:
        for _ in range(number):
            x = step(x, *p)
        return x

    x = start
    if every:
        for first in range(0, count, every):
            x = checkpoint(run, x, min(every, count - first), *parameters, use_reentrant=False)
    else:
        x = run(x, count, *parameters)
    with torch.no_grad():
        residual = relative_residual(step(x, *parameters), x)
    status = Status.CONVERGED if bool((residual <= tol).all()) else Status.LIMIT
    iterations = torch.full((len(x),), count, device=x.device)
    found = Found(x.detach(), residual, iterations, status)
    return report(step, layout, x, parameters, found, modulus, [], [])


def exported(
    step: Callable[..., Tensor], layout: Layout, start: Tensor, parameters: tuple[Tensor, ...], tol: float, limit: int
) -> FixedPoint:
    """Plain iterations as one `while_loop`, for `torch.export`: forward only."""

    def going_on(k: Tensor, x: Tensor, image: Tensor) -> Tensor:
        return (k < limit) & (relative_residual(image, x) > tol).any()

    def body(k: Tensor, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k + 1, image.clone(), step(image, *parameters)

    first = (torch.zeros((), dtype=torch.int64), start, step(start, *parameters))
    _, x, image = torch._higher_order_ops.while_loop(going_on, body, first)
    residual = relative_residual(image, x)
    iterations = torch.zeros(len(x), dtype=torch.int64)
    return FixedPoint(layout.state(x), Status.LIMIT, residual, iterations, None)


def refuse_not_finite(flat: Tensor) -> None:
    if not bool(torch.isfinite(flat).all()):
        raise DataError("the start has entries that are NaN or infinite")


def refuse_empty(flat: Tensor) -> None:
    if flat.shape[0] == 0 or flat.shape[1] == 0:
        raise DataError(f"a start has at least one element with one entry, given {tuple(flat.shape)}")


def refuse_hidden_parameters(step: Callable[..., Tensor], flat: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """Raise if T depends on tensors that want derivatives and are not parameters: these would be silently zero."""
    with torch.enable_grad():
        image = step(flat, *(p.detach() for p in parameters))
    if wants_derivative(image):
        raise SettingsError(
            "the map holds on to tensors that require gradients: pass them as parameters, fixed_point(T, start, "
            "*tensors) with T(x, *tensors), or detach them; use firmly.implicit for modules"
        )
