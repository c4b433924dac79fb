"""Generalised linear models with an l1 penalty: Newton's method on the active face, and derivatives in the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, NotConverged, SettingsError, ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.priors.losses import Loss

ROUNDS = 500  # of Newton's method, each with a fallback
JOINING = 10  # features that join the face at once, or as many as it has
SHRINKING = 10
HALVINGS = (1.0, 0.5, 0.25, 0.0625)
RIDGE = 1e-11  # of the mean curvature
ARMIJO = 1e-4
ROUGH, LOWERING = 1e-2, 0.3
PLAIN_STEPS = 20  # of forward-backward splitting where Newton's step does not lower the objective
ROUNDING = 1e-14  # of the objective: what its rounding may hide
LEAST = 1e-13  # tolerance that rounding allows
LINEAR = 1e-8  # relative residual of a derivative's linear system above which it is refused


class Point(NamedTuple):
    """Coefficients with the objective, the gradient of the mean loss, and the scores of all samples."""

    B: Tensor
    objective: Tensor
    slope: Tensor
    scores: Tensor


class SparseLinear:
    """min over B, c of mean_i loss(x_i B + c, y_i) + sum_jk weight_jk |B_jk|.

    `X` is (n, p), `target` (n, K), `loss` one of `Squared`, `Logistic` (K = 1) and `Softmax`. `solve` returns B with
    the intercept c, which is not penalised, as its last row: (p + 1, K), differentiable in the weights by the linear
    system of the active face. `residuals` grows by the relative residual of every such system.

    `pull`, (p, K), is the gradient at B = 0 without its sign: B = 0 for weights above it; `largest` is its maximum.
    Raises `ShapeError` and `DataError` for data that do not fit.
    Sources: Andrew and Gao, Scalable training of L1-regularized log-linear models, 2007 (steps that keep the orthant);
    Bertsekas, Projected Newton methods, 1982 (features at zero that a step would push out are left out of its face);
    the derivative: Bertrand et al., Implicit differentiation of Lasso-type models, 2020.
    """

    def __init__(self, X: Tensor, target: Tensor, loss: Loss, intercept: bool = True):
        if X.dim() != 2 or target.dim() != 2 or len(X) != len(target) or 0 in X.shape:
            raise ShapeError(f"X is (n, p) and target (n, K), given {tuple(X.shape)} and {tuple(target.shape)}")
        if X.requires_grad or target.requires_grad:
            raise SettingsError("the solution is differentiated in the weights alone: detach X and target")
        if not bool(torch.isfinite(X).all() & torch.isfinite(target).all()):
            raise DataError("X and target are finite")
        loss.check(target)
        ones = X.new_ones(len(X), 1) if intercept else X.new_zeros(len(X), 1)
        self.A, self.target, self.loss, self.intercept = torch.cat([X, ones], 1), target, loss, intercept
        self.residuals: list[float] = []
        self.scale = float(self.at(self.zero(), self.zero()).slope.abs().max())
        self.step = self.plain_step()
        self.origin = self.zero()
        if intercept:
            self.origin = self.minimise(self.padded(torch.full_like(self.origin[:-1], torch.inf)), self.origin, LEAST)
        self.pull = self.at(self.origin, self.zero()).slope[:-1].abs()
        self.largest = float(self.pull.max())

    def solve(self, weight: Tensor, start: Tensor | None = None, tol: float = 1e-10) -> Tensor:
        """(p + 1, K), to optimality conditions that hold within `tol` of the largest gradient at B = 0.

        `weight` is a positive number, one for every feature (p,), or one for every coefficient (p, K). Where a
        solution is not unique, as with a column twice, it is one whose active columns are linearly independent. Raises
        `NotConverged` where rounding or the limit of iterations ends the progress above `tol`.
        """
        p, K = len(self.A[0]) - 1, self.target.shape[1]
        if weight.dim() == 1:
            weight = weight[:, None]
        if weight.dim() > 2 or any(a not in (1, b) for a, b in zip(weight.shape, (p, K))):
            raise ShapeError(f"the weight is a number, ({p},) or ({p}, {K}), given {tuple(weight.shape)}")
        if not bool(((weight > 0) & torch.isfinite(weight)).all()):
            raise ConditionError("the weights are positive and finite: without a penalty there may be no solution")
        return Solution.apply(self, weight.expand(p, K), start, max(tol, LEAST))

    def zero(self) -> Tensor:
        return self.A.new_zeros(self.A.shape[1], self.target.shape[1])

    def padded(self, weight: Tensor) -> Tensor:
        """The weights (p, K) with that of the intercept: none, or one that keeps it at zero."""
        last = weight.new_zeros(1, weight.shape[1]) if self.intercept else torch.full_like(weight[:1], torch.inf)
        return torch.cat([weight, last])

    def at(self, B: Tensor, W: Tensor) -> Point:
        scores = self.A @ B
        penalty = torch.where(B == 0, 0, W * B.abs()).sum()
        slope = self.A.mT @ self.loss.slope(scores, self.target) / len(self.A)
        return Point(B, self.loss.value(scores, self.target).mean() + penalty, slope, scores)

    def minimise(self, W: Tensor, start: Tensor | None, tol: float) -> Tensor:
        if start is None:  # from the weight where features begin to matter
            level, start = self.largest / float(W[:-1].min()), self.origin
            while (level := LOWERING * level) > 1:
                start = self.minimise(level * W, start, ROUGH)
        point = self.at(start, W)
        joining = JOINING
        for _ in range(ROUNDS):
            worst = float(violation(point, W).max())
            if worst <= tol * self.scale:
                return point.B
            new = self.newton(point, W, joining)
            joining = max(JOINING, int((point.B != 0).sum())) if new is not None else max(1, joining // 4)
            point = self.plain(point, W) if new is None else new
        raise NotConverged(
            f"the optimality conditions of a sparse linear model hold within {worst / self.scale:.3g} of the largest "
            f"gradient, asked for {tol:.3g}: scale the features alike, or raise tol"
        )

    def newton(self, point: Point, W: Tensor, joining: int) -> Point | None:
        """Newton's step on the face of the signs, with the features that violate their condition most; None if no step
        that keeps the signs lowers the objective.
        """
        B, slope, free = point.B, point.slope, W == 0
        excess = torch.where((B == 0) & ~free, slope.abs() - W, 0).flatten()
        sign = torch.where(free, 0, B.sign())
        room = max(1, self.target.numel() - int((sign != 0).sum()))  # beyond that the Hessian is singular
        top = excess.topk(min(joining, room, len(excess))).indices
        top = top[excess[top] > 0]
        sign.view(-1)[top] = -slope.view(-1)[top].sign()
        face = free | (sign != 0)
        descent = torch.where(face, slope + torch.where(sign == 0, 0, W) * sign, 0)
        d = torch.zeros_like(B)
        for _ in range(SHRINKING):
            d = torch.zeros_like(B)
            d[face] = -self.factor(point.scores, face, RIDGE).solve(descent[face])
            out = face & ~free & (B == 0) & (d * sign <= 0)
            if not bool(out.any()):
                break
            face = face & ~out
        crossing = torch.where((B != 0) & (sign != 0) & ((B + d) * sign < 0), -B / d, 1).min()
        for t in (*HALVINGS, crossing):  # where the Hessian is singular, to the first change of a sign
            moved = B + t * d
            moved = torch.where(free | (moved * sign > 0), moved, 0)
            new, promised = self.at(moved, W), (descent * (moved - B)).sum()
            change = new.objective - point.objective
            hidden = change.abs() <= ROUNDING * point.objective.abs()
            if bool(change <= ARMIJO * promised) and bool(promised < 0) and not bool(hidden):
                return new
            if bool(hidden) and float(violation(new, W).max()) < 0.9 * float(violation(point, W).max()):
                return new
        return None

    def independent(self, B: Tensor) -> Tensor:
        """Coefficients with the same scores and penalty whose active columns are linearly independent: along the kernel
        of the Hessian until one vanishes.
        """
        while True:
            face = self.face(B)
            kernel = self.factor(self.A @ B, face).kernel
            if kernel is None:
                return B
            way = torch.zeros_like(B)
            way[face] = kernel
            steps = torch.where((B != 0) & (way.abs() > 1e-6 * way.abs().max()), -B / way, torch.inf)
            steps[-1] = torch.inf  # the intercept is free
            first = steps.abs().argmin()
            t = steps.flatten()[first]
            if not bool(torch.isfinite(t)):
                return B
            B = B + t * way
            B.view(-1)[first] = 0

    def face(self, B: Tensor) -> Tensor:
        """The coefficients that are not zero, and the intercept."""
        face = B != 0
        face[-1] |= self.intercept
        return face

    def plain_step(self) -> float:
        gram = self.A.mT @ self.A if self.A.shape[0] > self.A.shape[1] else self.A @ self.A.mT
        curvature = self.loss.bend * float(torch.linalg.eigvalsh(gram)[-1]) / len(self.A)
        return 0.999 / curvature if curvature > 0 else 1.0

    def plain(self, point: Point, W: Tensor) -> Point:
        for _ in range(PLAIN_STEPS):
            z = point.B - self.step * point.slope
            point = self.at(z.sign() * (z.abs() - self.step * W).clamp(min=0), W)
        return point

    def factor(self, scores: Tensor, face: Tensor, ridge: float = 0.0) -> Factor:
        """The Hessian of the mean loss on a face, a mask (p + 1, K), factorised with a ridge relative to its mean."""
        C, (j, k) = self.loss.curvature(scores) / len(self.A), face.mT.nonzero().unbind(1)[::-1]
        order = (face.mT.flatten().cumsum(0) - 1).reshape(face.mT.shape).mT[face]  # from rows first to classes first
        columns = [self.A[:, j[k == a]] for a in range(face.shape[1])]
        H = torch.cat([torch.cat([columns[a].mT @ (C[:, a, b, None] * columns[b]) for b in range(len(columns))], 1)
                       for a in range(len(columns))])[order][:, order]  # fmt: skip
        idle = None
        if self.loss.shifted and self.intercept:  # the same number for all intercepts
            last = torch.zeros_like(face)
            last[-1] = True
            idle = last[face].to(H)
        return Factor(H, idle, ridge)


class Factor:
    """Solves H u = v for a positive semidefinite H, for the least u; `idle` is a direction in the kernel of H."""

    def __init__(self, H: Tensor, idle: Tensor | None, ridge: float):
        self.H = H
        size = H.diagonal().mean() if len(H) else H.new_ones(())
        full = H if idle is None else H + size * idle[:, None] * idle
        full = full + torch.diag_embed((ridge * size).expand(len(H)))
        self.root, failed = torch.linalg.cholesky_ex(full)
        self.inverse = self.kernel = None
        pivots = self.root.diagonal()
        if len(H) and (bool(failed) or (ridge == 0 and not float(pivots.min()) > 1e-7 * float(pivots.max()))):
            values, vectors = torch.linalg.eigh(full)
            kept = values > len(H) * torch.finfo(H.dtype).eps * values[-1].abs()
            self.kernel = None if bool(kept[0]) else vectors[:, 0]
            self.inverse = (vectors * torch.where(kept, 1 / values, 0)) @ vectors.mT

    def solve(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[:, None], self.root)[:, 0] if self.inverse is None else self.inverse @ v


def violation(point: Point, W: Tensor) -> Tensor:
    """The distance of minus the gradient to the subdifferential of the penalty, entry by entry."""
    inside = (point.slope.abs() - W).clamp(min=0)
    return torch.where(point.B == 0, inside, (point.slope + torch.where(W > 0, W, 0) * point.B.sign()).abs())


@once_differentiable
class Solution(torch.autograd.Function):
    """(problem, weight (p, K), start, tol) -> (p + 1, K)."""

    @staticmethod
    def forward(ctx: Any, problem: SparseLinear, weight: Tensor, start: Tensor | None, tol: float) -> Tensor:  # type: ignore[override]
        B = problem.independent(problem.minimise(problem.padded(weight), start, tol))
        ctx.problem = problem
        ctx.save_for_backward(B)
        return B

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """db_S = -H_SS^-1 sgn(b_S) dw: the reduced system on the support, and on the intercept."""
        (B,), problem = ctx.saved_tensors, ctx.problem
        face = problem.face(B)
        factor = problem.factor(problem.A @ B, face)
        u = factor.solve(v[face])
        size = float(v[face].norm())
        residual = float((factor.H @ u - v[face]).norm()) / size if size > 0 else 0.0
        problem.residuals.append(residual)
        if not residual <= LINEAR:
            raise NotConverged(
                f"the system of a derivative has the relative residual {residual:.3g}: columns of the active features "
                "are linearly dependent, so that the coefficients are not unique, and the objective depends on which"
            )
        full = torch.zeros_like(B)
        full[face] = u
        return None, -(full * B.sign())[:-1], None, None
