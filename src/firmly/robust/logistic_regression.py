"""Multinomial logistic regression on laws, as a differentiable function of the laws and of its ridge."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from firmly.errors import DataError, NotConverged, ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import positive

STEPS = 100


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


def objective(rows: Tensor, laws: Tensor, ridge: Tensor, weights: Tensor) -> Tensor:
    return (
        -(laws * log_softmax(rows @ weights, 1)).sum() / len(rows) + (ridge[:, None] * weights[:-1].square()).sum() / 2
    )


def gradient(rows: Tensor, laws: Tensor, ridge: Tensor, weights: Tensor) -> Tensor:
    slope = rows.mT @ ((rows @ weights).softmax(1) - laws) / len(rows)
    slope[:-1] += ridge[:, None] * weights[:-1]
    return slope


def factor(rows: Tensor, ridge: Tensor, weights: Tensor) -> Tensor:
    """Of the Hessian (classes * rows, the same) by Cholesky, with curvature 1 along the direction without effect."""
    count, classes = weights.shape
    p = (rows @ weights).softmax(1)
    hessian = rows.new_empty(classes, count, classes, count)
    for j in range(classes):
        for k in range(j + 1):
            curvature = p[:, j] * (float(j == k) - p[:, k]) / len(rows)
            hessian[j, :, k] = hessian[k, :, j] = rows.mT @ (curvature[:, None] * rows)
    penalised = torch.cat([ridge, ridge.new_zeros(1)])
    hessian += torch.einsum("jk,ab->jakb", torch.eye(classes).to(rows), penalised.diag())
    hessian[:, -1, :, -1] += 1
    return torch.linalg.cholesky(hessian.reshape(classes * count, classes * count))


def solved(cholesky: Tensor, right: Tensor) -> Tensor:
    """The Hessian's inverse times (rows, classes)."""
    return torch.cholesky_solve(right.mT.reshape(-1, 1), cholesky).reshape(right.mT.shape).mT


@once_differentiable
class _Minimiser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laws: Tensor, ridge: Tensor, rows: Tensor, start: Tensor, tol: float) -> Tensor:
        weights, value = start.clone(), objective(rows, laws, ridge, start)
        for _ in range(STEPS):
            slope = gradient(rows, laws, ridge, weights)
            cholesky = factor(rows, ridge, weights)
            if float(slope.abs().max()) <= tol:
                ctx.save_for_backward(weights, rows, cholesky)
                return weights
            step = solved(cholesky, slope)
            descent = float((step * slope).sum())
            length = 1.0
            while True:  # backtracking, by the slope where the objective no longer tells
                tried = weights - length * step
                after = objective(rows, laws, ridge, tried)
                small = descent <= 1e-10 * max(1.0, abs(float(value)))
                if float(after) <= float(value) - 1e-4 * length * descent or small:
                    break
                length /= 2
                if length < 1e-10 or not math.isfinite(descent):
                    raise NotConverged("logistic regression: Newton's method finds no step; enlarge the ridge")
            weights, value = tried, after
        raise NotConverged(
            f"logistic regression: a gradient of {float(slope.abs().max()):.3g} after {STEPS} steps, asked for "
            f"{tol:.3g}; enlarge the ridge or tol"
        )

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        weights, rows, cholesky = ctx.saved_tensors
        u = solved(cholesky, cotangent)
        return rows @ u / len(rows), -(u[:-1] * weights[:-1]).sum(1), None, None, None
