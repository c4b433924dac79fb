"""Multinomial logistic regression on laws, as a differentiable function of the laws and of its ridge."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from firmly.errors import DataError, NotConverged, ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import positive

STEPS, HALVINGS = 100, 34
BLOCK = 1 << 18  # numbers at once, which a cache holds


def logistic_regression(
    features: Tensor, laws: Tensor, ridge: Tensor | float, start: Tensor | None = None, tol: float = 1e-10
) -> Tensor:
    """The minimiser of mean CE(laws, softmax(X W + b)) + sum_j r_j |W_j|^2 / 2: (features + 1, classes), b last.

    Rows X (n, features), laws (n, classes) that sum to one, and ridges r > 0, one number or (features,); in float64, by
    Newton's method from `start` until no entry of the gradient is above `tol` (`NotConverged` where rounding forbids
    it). The bias is not penalised; its sum over the classes, which no law depends on, is 0. Gradients reach laws and
    ridges, by the implicit function theorem with the exact Hessian; second derivatives are refused.
    """
    if features.dim() != 2 or laws.dim() != 2 or len(features) != len(laws) or laws.shape[1] < 2 or not len(laws):
        raise ShapeError(
            f"features are (n, features) and laws (n, classes), n >= 1, two classes at least; given "
            f"{tuple(features.shape)} and {tuple(laws.shape)}"
        )
    if features.requires_grad:
        raise DataError("no gradient goes through the features: detach them")
    if not bool(features.isfinite().all()):
        raise DataError("a feature is NaN or infinite")
    wide = laws.double()
    if not bool((wide >= 0).all()) or not bool(((wide.sum(1) - 1).abs() <= 1e-5).all()):
        raise DataError("laws are not negative and sum to one over the classes")
    wide = wide / wide.sum(1, keepdim=True)  # of single precision sums are not one: no bias would be stationary
    positive("the ridge", ridge)
    penalty = torch.as_tensor(ridge, dtype=torch.float64, device=features.device)
    if penalty.dim() > 1 or penalty.numel() not in (1, features.shape[1]):
        raise ShapeError(f"the ridge is one number, or {(features.shape[1],)}; given {tuple(penalty.shape)}")
    rows = torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], 1)
    first = rows.new_zeros(rows.shape[1], laws.shape[1]) if start is None else start.detach().to(rows)
    if first.shape != (rows.shape[1], laws.shape[1]):
        raise ShapeError(f"a start is {(rows.shape[1], laws.shape[1])}, given {tuple(first.shape)}")
    first = torch.cat([first[:-1], first[-1:] - first[-1].mean()])  # steps keep the sum of the bias
    return _Minimiser.apply(wide, penalty.expand(features.shape[1]), rows, first, tol)


class Newton(NamedTuple):
    """Where Newton's method ended, the largest entry of the gradient there, the objective, the number of steps."""

    weights: Tensor
    slope: float
    value: float
    steps: int


def newton(rows: Tensor, laws: Tensor, ridge: Tensor, start: Tensor, tol: float, steps: int = STEPS) -> Newton:
    """Until no entry of the gradient is above `tol`, for so many steps, or as long as rounding lets a step gain.

    Rows (n, features + 1) end with 1; laws (n, classes), ridge (features,), start (features + 1, classes), in float64.
    """
    here, taken = objective(rows, laws, ridge, start), 0
    while here.slope > tol and taken < steps:
        ahead = next_point(rows, laws, ridge, here)
        if ahead is None:
            break
        here, taken = ahead, taken + 1
    return Newton(here.weights, here.slope, here.value, taken)


class Point(NamedTuple):
    """Weights, the laws that they give the rows, the objective, its gradient and the largest entry of that."""

    weights: Tensor
    p: Tensor
    value: float
    gradient: Tensor
    slope: float


def objective(rows: Tensor, laws: Tensor, ridge: Tensor, weights: Tensor) -> Point:
    log_p = log_softmax(rows @ weights, 1)
    penalised = ridge[:, None] * weights[:-1]
    value = -(laws * log_p).sum() / len(rows) + (penalised * weights[:-1]).sum() / 2
    p = log_p.exp()
    gradient = rows.mT @ (p - laws) / len(rows)
    gradient[:-1] += penalised
    return Point(weights, p, float(value), gradient, float(gradient.abs().max()))


def next_point(rows: Tensor, laws: Tensor, ridge: Tensor, here: Point) -> Point | None:
    """By a Newton step that is halved until the objective falls, or the gradient where rounding hides that; or None."""
    cholesky, failed = torch.linalg.cholesky_ex(hessian(rows, ridge, here.p))
    if int(failed):
        return None
    direction = solved(cholesky, here.gradient)
    descent = float((direction * here.gradient).sum())
    hidden = descent <= 1e-10 * max(1.0, abs(here.value))
    for halvings in range(HALVINGS):
        ahead = objective(rows, laws, ridge, here.weights - direction / 2**halvings)
        if ahead.value <= here.value - 1e-4 * descent / 2**halvings or (hidden and ahead.slope < here.slope):
            return ahead
    return None


def hessian(rows: Tensor, ridge: Tensor, p: Tensor) -> Tensor:
    """(classes * rows, the same), class by class, with curvature 1 along the direction without effect.

    Blocks j, k off the diagonal are -X' diag(p_j p_k) X / n, and those of a row of blocks sum to the ridge.
    """
    count, classes = rows.shape[1], p.shape[1]
    j, k = torch.triu_indices(classes, classes, 1, device=rows.device)
    products = rows.new_zeros(count, len(j) * count)
    for x, q in zip(*(t.split(max(64, BLOCK // products.shape[1])) for t in (rows, p)), strict=True):
        weighted = (q[:, j] * q[:, k])[:, :, None] * x[:, None]
        products.addmm_(x.mT, weighted.flatten(1))
    blocks = rows.new_zeros(classes, classes, count, count)
    blocks[j, k] = blocks[k, j] = -products.unflatten(1, (len(j), count)).movedim(1, 0) / len(rows)
    own = torch.arange(classes, device=rows.device)
    blocks[own, own] = torch.cat([ridge, ridge.new_zeros(1)]).diag() - blocks.sum(1)
    blocks[:, :, -1, -1] += 1
    return blocks.movedim(2, 1).reshape(classes * count, classes * count)


def solved(cholesky: Tensor, right: Tensor) -> Tensor:
    """The Hessian's inverse times (rows, classes)."""
    return torch.cholesky_solve(right.mT.reshape(-1, 1), cholesky).reshape(right.mT.shape).mT


@once_differentiable
class _Minimiser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laws: Tensor, ridge: Tensor, rows: Tensor, start: Tensor, tol: float) -> Tensor:
        found = newton(rows, laws, ridge, start, tol)
        if not found.slope <= tol:
            raise NotConverged(
                f"logistic regression: a gradient of {found.slope:.3g} after {found.steps} steps of Newton's method, "
                f"asked for {tol:.3g}; enlarge the ridge or tol"
            )
        ctx.save_for_backward(found.weights, rows, ridge)
        return found.weights

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        weights, rows, ridge = ctx.saved_tensors
        u = solved(torch.linalg.cholesky(hessian(rows, ridge, (rows @ weights).softmax(1))), cotangent)
        return rows @ u / len(rows), -(u[:-1] * weights[:-1]).sum(1), None, None, None
