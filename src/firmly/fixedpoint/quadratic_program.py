"""Convex quadratic programs as differentiable functions of all their data: small, dense, in batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, NotConverged, ShapeError
from firmly.fixedpoint.adjoints import Implicit
from firmly.fixedpoint.implicit_function import FixedPointFunction, Problem
from firmly.fixedpoint.interior_point import interior_point
from firmly.fixedpoint.state import norms

NEWTON_STEPS = 5  # on the optimality conditions, after the interior-point method: one is enough on the right active set


@dataclass
class QuadraticProgram:
    """A solution with its account: `x` (batch, n), `inequality` (batch, m) and `equality` (batch, p), the multipliers.

    `residual` (batch,) is the largest violation of the optimality conditions K of `quadratic_program`, relative to the
    largest term of the slope, or to the point. `complementarity` (batch,) is the smallest over the inequalities of
    max(l_i / |l|, slack_i / max(|x|, |h_i|)), in the maximum norm: at 0 a constraint is active with a multiplier of
    zero, and the derivative is one element of a set. `backward_residuals` grows with every linear system that a
    derivative solves.
    """

    x: Tensor
    inequality: Tensor
    equality: Tensor
    residual: Tensor
    complementarity: Tensor
    backward_residuals: list[float] = field(default_factory=list, repr=False)

    @property
    def degenerate(self) -> Tensor:
        """Where strict complementarity fails, to half the digits: (batch,)."""
        return self.complementarity <= torch.finfo(torch.float64).eps ** 0.5


class Data(NamedTuple):
    """Q (batch, n, n) symmetric, q (batch, n), G (batch, m, n), h (batch, m), A (batch, p, n), b (batch, p)."""

    Q: Tensor
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor


def quadratic_program(
    Q: Tensor, q: Tensor, G: Tensor | None = None, h: Tensor | None = None, A: Tensor | None = None,
    b: Tensor | None = None, max_iterations: int = 60,
) -> QuadraticProgram:  # fmt: skip
    """argmin_x 1/2 x'Q x + q'x with G x <= h and A x = b, and its multipliers l >= 0 and nu, differentiable in all six.

    Q (n, n), q (n,), G (m, n), h (m,), A (p, n), b (p,), each with or without a batch in front; everything is computed
    in float64. A primal-dual interior-point method finds the active set, Newton's method on

        K(x, l, nu) = ( Q x + q + G'l + A'nu,  l - max(l + G x - h, 0),  A x - b ) = 0

    the solution. Derivatives, of any order, solve the linear system of K, whose residual is measured. Where strict
    complementarity holds they are those of Amos and Kolter, OptNet, 2017, section 3; where it fails (`degenerate`) one
    element of a set. Where x is not unique the derivative has least norm: right for what is unique, such as Q x.

    Raises `ShapeError` and `DataError` for data that do not fit, `ConditionError` for a Q that is not positive
    semidefinite, `NotConverged` for programs that are not solved (infeasible or unbounded ones), and in the backward
    pass for derivatives that do not exist.
    Source of the method: Mehrotra, On the implementation of a primal-dual interior point method, 1992.
    """
    data, batched = prepared(Q, q, G, h, A, b)
    units = units_of(data)
    scaled = in_units(data, units)

    def find(start: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return solved(Data(*(p.detach() for p in parameters)), max_iterations)

    problem = Problem(plain_map, find, Implicit(solve_optimality))
    start = torch.cat([torch.zeros_like(scaled.q), torch.zeros_like(scaled.h), torch.zeros_like(scaled.b)], 1)
    z = FixedPointFunction.apply(problem, start, *scaled)
    with torch.no_grad():
        residual, complementarity = relative(z, scaled), complementarity_of(z, scaled)
    x, inequality, equality = parts(z, scaled)
    objective, rows, equations = units
    inequality, equality = objective * inequality / rows, objective * equality / equations
    found = [t.to(q.dtype) if batched else t[0].to(q.dtype) for t in (x, inequality, equality)]
    return QuadraticProgram(*found, residual, complementarity, problem.residuals)


def prepared(
    Q: Tensor, q: Tensor, G: Tensor | None, h: Tensor | None, A: Tensor | None, b: Tensor | None
) -> tuple[Data, bool]:
    """The data in float64 with a common batch, and whether one was given."""
    if (G is None) != (h is None) or (A is None) != (b is None):
        raise ShapeError("G and h are given together, and so are A and b")
    n = q.shape[-1] if q.dim() else 0
    G, h = (q.new_zeros(0, n), q.new_zeros(0)) if G is None or h is None else (G, h)
    A, b = (q.new_zeros(0, n), q.new_zeros(0)) if A is None or b is None else (A, b)
    given = Data(Q, q, G, h, A, b)
    wanted = Data((n, n), (n,), (h.shape[-1:] + (n,)), h.shape[-1:], (b.shape[-1:] + (n,)), b.shape[-1:])
    batches = {len(t) for t, shape in zip(given, wanted) if t.dim() == len(shape) + 1}
    fits = all(tuple(t.shape[t.dim() - len(s) :]) == tuple(s) and t.dim() - len(s) in (0, 1)
               for t, s in zip(given, wanted))  # fmt: skip
    if n == 0 or not fits or len(batches) > 1 or 0 in batches:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given._asdict().items())
        raise ShapeError(
            f"a quadratic program has Q (n, n), q (n,), G (m, n), h (m,), A (p, n), b (p,), each with the same batch "
            f"in front or none; given {shapes}"
        )
    for name, t in given._asdict().items():
        if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
            raise DataError(f"{name} has to have real and finite entries; a bound that does not bind is left out")
    count = max(batches, default=1)
    wide = Data(*(t.double().expand(count, *shape) for t, shape in zip(given, wanted)))
    wide = wide._replace(Q=(wide.Q + wide.Q.mT) / 2)
    values = torch.linalg.eigvalsh(wide.Q.detach())
    if bool((values[:, 0] < -(torch.finfo(Q.dtype).eps ** 0.6) * values.abs().amax(1)).any()):
        raise ConditionError(
            f"Q is positive semidefinite in a convex program; its smallest eigenvalue is {float(values.min()):.3g}"
        )
    return wide, bool(batches)


def units_of(data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """The size of the objective (batch, 1), and the norms of the rows of G and A; 1 where they vanish."""
    with torch.no_grad():
        sizes = (
            torch.maximum(data.Q.abs().amax((1, 2)), data.q.abs().amax(1))[:, None],
            torch.linalg.vector_norm(data.G, dim=2),
            torch.linalg.vector_norm(data.A, dim=2),
        )
        objective, rows, equations = (torch.where(size > 0, size, 1) for size in sizes)
    return objective, rows, equations


def in_units(data: Data, units: tuple[Tensor, Tensor, Tensor]) -> Data:
    objective, rows, equations = units
    return Data(
        data.Q / objective[:, :, None], data.q / objective, data.G / rows[:, :, None], data.h / rows,
        data.A / equations[:, :, None], data.b / equations,
    )  # fmt: skip


def parts(z: Tensor, data: Data) -> tuple[Tensor, ...]:
    return z.split([data.q.shape[1], data.h.shape[1], data.b.shape[1]], 1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


def conditions(z: Tensor, data: Data) -> Tensor:
    """K(x, l, nu): (batch, n + m + p)."""
    x, inequality, equality = parts(z, data)
    slope = times(data.Q, x) + data.q + times(data.G.mT, inequality) + times(data.A.mT, equality)
    active = inequality - torch.relu(inequality + times(data.G, x) - data.h)
    return torch.cat([slope, active, times(data.A, x) - data.b], 1)


def plain_map(z: Tensor, *data: Tensor) -> Tensor:
    return z - conditions(z, Data(*data))


def relative(z: Tensor, data: Data) -> Tensor:
    """The largest violation of K(z) = 0, relative to the terms of its kind: (batch,).

    Multipliers and slopes are measured by the largest term of the slope, points and constraints by the point: one size
    for both would let a point that runs away to infinity hide a slope that is not zero.
    """
    x, inequality, equality = parts(z, data)
    terms = (data.q, times(data.Q, x), times(data.G.mT, inequality), times(data.A.mT, equality))
    tiny = torch.finfo(z.dtype).eps
    slope_size = torch.stack([t.abs().amax(1) for t in terms]).amax(0).clamp(min=tiny)[:, None]
    point_size = torch.cat([x, data.b], 1).abs().amax(1, keepdim=True).clamp(min=tiny)
    slope, kept, equations = parts(conditions(z, data).abs(), data)
    active = inequality + times(data.G, x) - data.h > 0
    kept = kept / torch.where(active, point_size, slope_size)
    return torch.cat([slope / slope_size, kept, equations / point_size], 1).amax(1)


def complementarity_of(z: Tensor, data: Data) -> Tensor:
    x, inequality, _ = parts(z, data)
    if not data.h.shape[1]:
        return torch.ones_like(z[:, 0])
    tiny = torch.finfo(z.dtype).tiny
    size = torch.maximum(x.abs().amax(1, keepdim=True), data.h.abs()).clamp(min=tiny)
    slack = (data.h - times(data.G, x)) / size
    return torch.maximum(inequality / inequality.amax(1, keepdim=True).clamp(min=tiny), slack).amin(1)


def matrix_of(z: Tensor, data: Data) -> Tensor:
    """The derivative of K at z, the one that autograd takes."""
    x, inequality, _ = parts(z, data)
    active = (inequality + times(data.G, x) - data.h > 0).to(z.dtype)
    count, n, m, p = len(z), data.q.shape[1], data.h.shape[1], data.b.shape[1]
    matrix = z.new_zeros(count, n + m + p, n + m + p)
    matrix[:, :n] = torch.cat([data.Q, data.G.mT, data.A.mT], 2)
    matrix[:, n : n + m, :n] = -active[:, :, None] * data.G
    matrix[:, n : n + m, n : n + m] = torch.diag_embed(1 - active)
    matrix[:, n + m :, :n] = data.A
    return matrix


@torch.no_grad()
def solve_optimality(transposed: bool, z: Tensor, v: Tensor, parameters: tuple[Tensor, ...], tol: float) -> Tensor:
    """The solution of the linear system of K; that of least norm where the matrix is singular."""
    matrix = matrix_of(z, Data(*parameters))
    matrix = matrix.mT if transposed else matrix
    found = torch.linalg.solve_ex(matrix, v[:, :, None]).result[:, :, 0]
    bad = ~(norms(times(matrix, found) - v) <= 0.1 * tol * norms(v))
    if bool(bad.any()):
        found[bad] = times(torch.linalg.pinv(matrix[bad], rtol=1e-12), v[bad])
    return found


@torch.no_grad()
def solved(data: Data, max_iterations: int) -> Tensor:
    """z = (x, l, nu) with K(z) = 0 to rounding."""
    z = interior_point(*data, max_iterations)
    tol = torch.finfo(z.dtype).eps ** 0.75
    best, residual = z, relative(z, data)
    for _ in range(NEWTON_STEPS):
        z = best - solve_optimality(False, best, conditions(best, data), tuple(data), 1e-8)
        now = relative(z, data)
        better = now < residual
        if not bool(better.any()):
            break
        best, residual = torch.where(better[:, None], z, best), torch.where(better, now, residual)
    if not bool((residual <= tol).all()):
        raise NotConverged(
            f"the quadratic program is not solved: the relative residual of its optimality conditions is "
            f"{float(residual.max()):.3g}, the tolerance {tol:.3g}, in the element {int(residual.argmax())} of the "
            "batch; is it feasible, with an interior, and bounded from below?"
        )
    return best
