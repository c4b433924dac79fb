"""Linear scores of pixels that minimise a smooth objective, differentiable in its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from firmly.errors import DataError, NotConverged, SettingsError
from firmly.once_differentiable import once_differentiable

Objective = Callable[..., Tensor]  # (scores (pixels, classes), labels, **hyperparameters) -> one number

ITERATIONS, HALVINGS = 100, 40
ARMIJO = 1e-4
LEAST_CURVATURE = 1e-12  # of the largest, below which a minimum is not isolated in double precision
ALLOWED = 1e-8  # relative residual of a derivative's linear system


class LinearMinimum:
    """argmin over W of objective(Phi W', labels, **hyperparameters) + ridge / 2 |W without bias|^2.

    `features` Phi is (pixels, features), to which a constant one is joined; W is (classes, features + 1), its last
    column the bias, whose sum over the classes is zero: what losses of softmax(scores) and of differences of scores
    leave open. The objective is twice differentiable. Where it is not convex, W is a local minimum: the one that
    Newton's method comes to from `start`.

    `solve` returns W with its derivative in ridge and hyperparameters by the implicit function theorem: H dW =
    -d(gradient), with the Hessian H by automatic differentiation, factored. `residuals` grows by the relative residual
    of every such system. Raises `NotConverged` where the gradient does not vanish, as at the kinks of a hinge loss, or
    where the Hessian is not positive definite, and `NotDifferentiable` for a second derivative.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, objective: Objective):
        if not bool(torch.isfinite(features).all()):
            raise DataError("features contain NaN or infinite values")
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        self.features = torch.cat([features.detach().double(), ones], 1)
        self.labels, self.classes, self.objective = labels.detach(), classes, objective
        self.residuals: list[float] = []

    def zero(self) -> Tensor:
        return self.features.new_zeros(self.classes, self.features.shape[1])

    def value(self, W: Tensor, ridge: Tensor, hyperparameters: Mapping[str, Tensor]) -> Tensor:
        found = self.objective(self.features @ W.mT, self.labels, **hyperparameters)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise SettingsError("a training objective returns one number, a tensor with one entry")
        return found.reshape(()) + ridge / 2 * W[:, :-1].square().sum() + W[:, -1].sum().square() / 2

    def gradient(self, W: Tensor, ridge: Tensor, hyperparameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The value and its gradient in W, both with a graph."""
        value = self.value(W, ridge, hyperparameters)
        if not value.requires_grad:
            raise SettingsError("the training objective does not depend on the scores")
        (slope,) = torch.autograd.grad(value, W, create_graph=True)
        return value, slope

    def hessian(self, W: Tensor, slope: Tensor) -> Tensor:
        """(entries, entries), symmetric."""
        columns = []
        for unit in torch.eye(W.numel(), dtype=W.dtype, device=W.device):
            (column,) = torch.autograd.grad(slope, W, unit.reshape(W.shape), retain_graph=True)
            columns.append(column.flatten())
        full = torch.stack(columns)
        return (full + full.mT) / 2

    def solve(
        self,
        ridge: Tensor,
        hyperparameters: Mapping[str, Tensor],
        start: Tensor | None = None,
        tol: float = 1e-10,
    ) -> Tensor:
        """W (classes, features + 1), at a gradient of at most `tol` times that at W = 0."""
        fixed = {name: p.detach() for name, p in hyperparameters.items()}
        with torch.enable_grad():
            W, factor, hessian = self.newton(ridge.detach(), fixed, start, tol)
            held = W.clone().requires_grad_()
            _, slope = self.gradient(held, ridge, hyperparameters)
        return _Solution.apply(slope, W, factor, hessian, self.residuals)

    def newton(
        self, ridge: Tensor, hyperparameters: Mapping[str, Tensor], start: Tensor | None, tol: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W, the Cholesky factor of its Hessian, and the Hessian; negative curvatures are turned round on the way."""
        scale = float(self.gradient(self.zero().requires_grad_(), ridge, hyperparameters)[1].detach().abs().max())
        W, size = self.zero() if start is None else start.detach().clone(), float("inf")
        for _ in range(ITERATIONS):
            W = W.detach().requires_grad_()
            value, slope = self.gradient(W, ridge, hyperparameters)
            hessian, size = self.hessian(W, slope), float(slope.detach().abs().max())
            if not (torch.isfinite(hessian).all() and torch.isfinite(value)):
                raise NotConverged("the training objective or its second derivatives are not finite")
            curvatures, axes = torch.linalg.eigh(hessian)
            if size <= tol * scale:
                if float(curvatures[0]) <= LEAST_CURVATURE * float(curvatures[-1]):
                    raise NotConverged(
                        f"the weights are stationary, but no isolated minimum: curvatures are from "
                        f"{float(curvatures[0]):.3g} to {float(curvatures[-1]):.3g}; raise the ridge"
                    )
                return W.detach(), torch.linalg.cholesky(hessian), hessian
            size_of = curvatures.abs().clamp(min=LEAST_CURVATURE * float(curvatures.abs().max()))
            step = -(axes @ ((axes.mT @ slope.detach().flatten()) / size_of)).reshape(W.shape)
            W = self.lower(W.detach(), step, float(value.detach()), slope.detach(), ridge, hyperparameters)
        raise NotConverged(
            f"the gradient of the training objective is {size:.3g} after {ITERATIONS} steps of Newton's method, asked "
            f"for {tol * scale:.3g}: an objective with kinks has no derivative in its hyperparameters here"
        )

    @torch.no_grad()
    def lower(
        self, W: Tensor, step: Tensor, value: float, slope: Tensor, ridge: Tensor, hyperparameters: Mapping[str, Tensor]
    ) -> Tensor:
        """W after the longest of the steps 1, 1/2, 1/4 ... that lowers the objective; rounding counts as lower."""
        promised, length = float((slope * step).sum()), 1.0
        for _ in range(HALVINGS):
            new = float(self.value(W + length * step, ridge, hyperparameters))
            if new <= value + ARMIJO * length * promised + 1e-14 * abs(value):
                return W + length * step
            length /= 2
        raise NotConverged("no step lowers the training objective: it is not smooth, or its gradient is wrong")


@once_differentiable
class _Solution(torch.autograd.Function):
    """(gradient at W, W) -> W, with dW = -H^-1 d(gradient)."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, W: Tensor, factor: Tensor, hessian: Tensor, residuals: list[float]) -> Tensor:
        ctx.save_for_backward(factor, hessian)
        ctx.residuals = residuals
        return W.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        factor, hessian = ctx.saved_tensors
        v = cotangent.flatten()[:, None]
        u = torch.cholesky_solve(v, factor)
        size = float(v.norm())
        residual = float((hessian @ u - v).norm()) / size if size > 0 else 0.0
        ctx.residuals.append(residual)
        if not residual <= ALLOWED:
            raise NotConverged(
                f"the derivative of the weights has a relative residual of {residual:.3g}, allowed {ALLOWED:.0e}: "
                "raise the ridge, or scale the features alike"
            )
        return -u.reshape(cotangent.shape), None, None, None, None
