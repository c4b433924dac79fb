"""Equilibria v = prox_g(W v + w) of monotone loops as differentiable functions of w, W and the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from firmly.algorithms.algorithm import check
from firmly.algorithms.equilibrium import EquilibriumForwardBackward, PeacemanRachford
from firmly.errors import NotConverged, NotDifferentiable
from firmly.fixedpoint.gmres import gmres
from firmly.fixedpoint.solve import Status, batch_norm, refuse_bad, solve
from firmly.fixedpoint.state import carries_tangent
from firmly.linear.blocks import reversed_axes, turn
from firmly.linear.map import Adjoint, LinearMap
from firmly.linear.monotone import loop_resolvent, monotonicity
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import Prior, smallest

Splitting = EquilibriumForwardBackward | PeacemanRachford

HALF = torch.float16, torch.bfloat16
ADJOINT = 10  # times the tolerance is asked of the gradient, which rounds more often

_errors: ContextVar[list[float] | None] = ContextVar("errors of equilibria", default=None)


def equilibrium(splitting: Splitting, w: Tensor, tol: float | None = None, max_iterations: int = 10_000) -> Tensor:
    """The v with v = prox_g(W v + w) for every w of a batch, found by iterating `splitting` from w.

    `tol` bounds the relative change by one iteration, as in `solve`; None is eps^(3/4) of the precision of w. The
    gradient solves the transposed system (I - J)^T u = gradient, J the derivative of v -> prox_g(W v + w) at the
    equilibrium, to a relative residual of at most 10 tol: by the splitting for a prox that acts entry by entry, else by
    GMRES. It can be taken once. Raises `ConditionError` for loops that are not proved monotone and `NotConverged` where
    either iteration ends above its tolerance. A traced w records the loop instead of solving it; half precision is
    raised to single, and autocast is off inside.
    Source: Bai, Kolter and Koltun, Deep equilibrium models, 2019 (implicit differentiation).
    """
    if has_torch_function((w,)):
        return handle_torch_function(equilibrium, (w,), splitting, w, tol, max_iterations)
    with torch.autocast(w.device.type, enabled=False):
        return attached(splitting, w.float() if w.dtype in HALF else w, tol, max_iterations)


def attached(splitting: Splitting, w: Tensor, tol: float | None, max_iterations: int) -> Tensor:
    """The equilibrium with its gradient."""
    check(splitting.conditions())
    refuse_bad("the input of an equilibrium", w, splitting.data_shape)
    tensors = (w, *splitting.parameters(), *splitting.buffers())
    if any(map(carries_tangent, tensors)):
        raise NotDifferentiable("an equilibrium is differentiated backwards only: torch.func.vjp or jacrev, not jvp")
    w = reversed_axes(turn(w))  # the layout of the products; sums of tensors in two layouts are slow
    errors, finest = _errors.get(), torch.finfo(w.dtype).eps ** 0.75
    tol = finest if tol is None or errors is not None else tol
    v, reached = iterated(splitting, splitting.loop, splitting.prior, w.detach(), tol, max_iterations)
    if reached.status is not Status.CONVERGED:
        raise NotConverged(
            f"the equilibrium was not reached: {reached.status} (residual {reached.residual:.3g}, tolerance "
            f"{tol:.3g}, {reached.iterations} iterations)"
        )
    diagonal = splitting.prior.structure in ("separable", "channel") and not v.is_complex()
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        image = splitting.prior.prox(splitting.loop(v) + w, 1.0)
        if errors is not None:
            errors.append(relative_error(splitting, v, image))
        return image.contiguous()
    entering = splitting.loop(v.requires_grad_(not diagonal)) + w
    image = splitting.prior.prox(entering, 1.0)
    if errors is not None:
        errors.append(relative_error(splitting, v.detach(), image.detach()))
    if diagonal:
        return Attached.apply(image, lambda u: by_splitting(splitting, entering, u, tol, max_iterations), ADJOINT * tol)
    return Attached.apply(
        image,
        lambda u: by_krylov(lambda g: torch.autograd.grad(image, v, g, retain_graph=True)[0], u, tol),
        ADJOINT * tol,
    )


@torch.no_grad()
def relative_error(splitting: Splitting, v: Tensor, image: Tensor) -> float:
    """A bound of |image - v*| / |image|, over the batch, for image = prox_g(W v + w) and the equilibrium v* of w.

    The image is itself the equilibrium of w + W (v - image), and w -> v* is 1/m-Lipschitz.
    """
    away = batch_norm((splitting.loop(v - image),)) / monotonicity(splitting.loop)
    return float((away / batch_norm((image,)).clamp(min=torch.finfo(image.dtype).tiny)).max())


@contextmanager
def finest_equilibria() -> Iterator[list[float]]:
    """While it is open, equilibria are solved as finely as their precision allows, whatever their tolerance, and bounds
    of their relative errors are added to the list that it gives."""
    found: list[float] = []
    token = _errors.set(found)
    try:
        yield found
    finally:
        _errors.reset(token)


@torch.no_grad()
def by_splitting(
    splitting: Splitting, entering: Tensor, gradient: Tensor, tol: float, max_iterations: int
) -> tuple[Tensor, float]:
    """u = (I - J)^-T gradient for J = D W with a diagonal D, the derivative of the prox, and a relative residual.

    y = D u solves y = D (W^T y + gradient): an equilibrium of the transposed loop with the linear activation D, so that
    the splitting itself finds it. The residual is |D u - y| / |u| with u = W^T y + gradient.
    Source: Winston and Kolter, 2020, theorem 2.
    """
    with torch.enable_grad():
        z = entering.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(splitting.prior.prox(z, 1.0).sum(), z)
    linear, gradient = Slopes(slopes), reversed_axes(turn(gradient))
    transposed, a = splitting.loop.T, splitting.step_size
    finer = max(tol * min(1.0, smallest(a)), 8 * torch.finfo(gradient.dtype).eps)  # short steps change little
    y, _ = iterated(splitting, transposed, linear, gradient, min(tol, finer), max_iterations)
    u = gradient + transposed(y)
    away, size = last_norms(reversed_axes(slopes * u - y)), last_norms(reversed_axes(u))
    return u, float((away / size.clamp(min=torch.finfo(size.dtype).tiny)).max())


class Reached(NamedTuple):
    status: Status
    residual: float
    iterations: int


@torch.no_grad()
def iterated(
    splitting: Splitting, loop: LinearMap, prior: Prior, w: Tensor, tol: float, max_iterations: int
) -> tuple[Tensor, Reached]:
    """v = prox_g(W v + w) by the splitting's iteration for this loop and prior, as far as it came.

    Peaceman-Rachford is u <- C (2 prox_{a g}(u) - u) + a (C + I) w with the reflected resolvent C, carried out in the
    layout in which C is fastest: one product, one prox and three sums.
    """
    if isinstance(splitting, EquilibriumForwardBackward) or w.is_complex():
        found = solve(type(splitting)(loop, prior, splitting.step_size), w, tol, max_iterations)
        return found.x, Reached(found.status, found.residual, found.iterations)
    a, adjoint = splitting.step_size, isinstance(loop, Adjoint)
    reflection = loop_resolvent(loop.T if adjoint else loop, a).reflection
    turned = turn(w)
    offset = reflection.product(turned, adjoint).add_(turned).mul_(a)
    u = offset
    for k in range(max_iterations + 1):
        v = turn(prior.prox(reversed_axes(u), a))
        image = reflection.product(v.mul(2.0).sub_(u), adjoint).add_(offset)
        residual = relative_change(image, u)
        if residual <= tol or k == max_iterations or not math.isfinite(residual):
            break
        u = image
    status = Status.CONVERGED if residual <= tol else Status.LIMIT if math.isfinite(residual) else Status.NON_FINITE
    return reversed_axes(v), Reached(status, residual, k)


def relative_change(new: Tensor, old: Tensor) -> float:
    """max over the batch, the last axis, of |new - old| / max(|new|, |old|), 0 where both vanish."""
    change, *sizes = (last_norms(t) for t in (new - old, new, old))
    size = torch.maximum(*sizes)
    return float(torch.where(size > 0, change / size, size).max())


def last_norms(x: Tensor) -> Tensor:
    """The Euclidean norm for every index of the last axis; a product with ones is much faster than a reduction."""
    squares = x.flatten(0, -2).square()
    return (squares.new_ones(1, len(squares)) @ squares)[0].sqrt()


class Slopes(Prior):
    """g(x) = 1/2 <(1/d - 1) x, x> for d in [0, 1], whose prox with unit step is d z; d = 0 keeps x at 0."""

    def __init__(self, d: Tensor):
        super().__init__()
        self.d = d
        self._factor: tuple[float | Tensor, Tensor] = (1.0, d)

    def value(self, x: Tensor) -> Tensor:
        terms = torch.where((self.d == 0) & (x == 0), 0.0, (1 / self.d - 1) * x.square())
        return 0.5 * terms.flatten(1).sum(1)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        if self._factor[0] is not step and self._factor[0] != step:
            self._factor = (step, self.d / (self.d + step * (1 - self.d)))
        return self._factor[1] * z


def by_krylov(transposed: Callable[[Tensor], Tensor], gradient: Tensor, tol: float) -> tuple[Tensor, float]:
    """u with u - transposed(u) = gradient, and |u - transposed(u) - gradient| / |gradient|."""
    return gmres(lambda u: u - transposed(u), gradient, ADJOINT * tol)


@once_differentiable
class Attached(torch.autograd.Function):
    """The image T(v) of a fixed point v, with the gradient (I - T'(v))^-T of the fixed point."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, adjoint: Callable[[Tensor], tuple[Tensor, float]], tol: float) -> Tensor:
        ctx.adjoint, ctx.tol = adjoint, tol
        return image.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        u, residual = ctx.adjoint(gradient)
        if not residual <= ctx.tol:
            raise NotConverged(
                f"the gradient of an equilibrium was not reached: the transposed linear system is solved to a relative "
                f"residual of {residual:.3g}, the tolerance is {ctx.tol:.3g}; a larger margin or tolerance helps"
            )
        return u, None, None
