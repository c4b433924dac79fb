"""Equilibria v = prox_g(W v + w) of monotone loops as differentiable functions of w, W and the prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from firmly.algorithms.equilibrium import EquilibriumForwardBackward, PeacemanRachford
from firmly.errors import NotConverged
from firmly.fixedpoint.gmres import gmres
from firmly.fixedpoint.solve import batch_norm, solve
from firmly.linear.monotone import monotonicity

Splitting = EquilibriumForwardBackward | PeacemanRachford

ADJOINT = 10  # times the tolerance is asked of the gradient, which rounds more often

_errors: ContextVar[list[float] | None] = ContextVar("errors of equilibria", default=None)


def equilibrium(splitting: Splitting, w: Tensor, tol: float | None = None, max_iterations: int = 10_000) -> Tensor:
    """The v with v = prox_g(W v + w) for every w of a batch, found by iterating `splitting` from w.

    `tol` bounds the residual as in `solve`; None is eps^(3/4) of the precision of w. The gradient solves the transposed
    system (I - J)^T u = gradient, J the derivative of v -> prox_g(W v + w) at the equilibrium, by GMRES to a relative
    residual of at most 10 tol; it can be taken once. Raises `ConditionError` for loops that are not proved monotone and
    `NotConverged` where either iteration ends above its tolerance. A traced w records the loop instead of solving it.
    Source: Bai, Kolter and Koltun, Deep equilibrium models, 2019 (implicit differentiation).
    """
    if has_torch_function((w,)):
        return handle_torch_function(equilibrium, (w,), splitting, w, tol, max_iterations)
    errors, finest = _errors.get(), torch.finfo(w.dtype).eps ** 0.75
    tol = finest if tol is None or errors is not None else tol
    solution = solve(splitting, w.detach(), tol, max_iterations)
    if not solution.converged:
        raise NotConverged(
            f"the equilibrium was not reached: {solution.status} (residual {solution.residual:.3g}, tolerance "
            f"{tol:.3g}, {solution.iterations} iterations)"
        )
    tensors = (w, *splitting.parameters(), *splitting.buffers())
    v = solution.x.requires_grad_(torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    image = splitting.prior.prox(splitting.loop(v) + w, 1.0)
    if errors is not None:
        errors.append(relative_error(splitting, solution.x, image.detach()))
    if not v.requires_grad:
        return image
    return Attached.apply(image, lambda u: torch.autograd.grad(image, v, u, retain_graph=True)[0], ADJOINT * tol)


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


class Attached(torch.autograd.Function):
    """The image T(v) of a fixed point v, with the gradient (I - T'(v))^-T of the fixed point."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, transposed: Callable[[Tensor], Tensor], tol: float) -> Tensor:
        ctx.transposed, ctx.tol = transposed, tol
        return image.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        u, residual = gmres(lambda u: u - ctx.transposed(u), gradient, ctx.tol)
        if not residual <= ctx.tol:
            raise NotConverged(
                f"the gradient of an equilibrium was not reached: the transposed linear system is solved to a relative "
                f"residual of {residual:.3g}, the tolerance is {ctx.tol:.3g}; a larger margin or tolerance helps"
            )
        return u, None, None
