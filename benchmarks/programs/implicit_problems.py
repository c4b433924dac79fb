"""Hold-out problems whose hypergradient every package computes, and the truth by a closed form.

    b(lam) = argmin_b  loss(X b, y) + lam penalty(b),      outer(lam) = validation loss of b(lam),

with loss |X b - y|^2 / (2 n), or the mean logistic loss for labels of +-1, and the penalty |b|_1, an elastic net
lam |b|_1 + CURVATURE / 2 |b|^2, or groups of GROUP neighbouring features lam sum_g |b_g|.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("lasso", "elastic net", "logistic", "group")
CURVATURE = 0.1  # of the elastic net
GROUP = 5
FRACTION = 0.1  # of the largest weight at which something is active


@dataclass(frozen=True)
class HoldOut:
    kind: str
    X: Tensor  # (n, p)
    y: Tensor  # (n,)
    X_val: Tensor
    y_val: Tensor
    weight: float  # lam

    @property
    def curvature(self) -> float:
        return CURVATURE if self.kind == "elastic net" else 0.0

    @property
    def group(self) -> int:
        return GROUP if self.kind == "group" else 1

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """The smooth part of the inner objective, from X b."""
        if self.kind == "logistic":
            return torch.nn.functional.softplus(-y * prediction).mean()
        return (prediction - y).square().mean() / 2

    def outer(self, b: Tensor) -> Tensor:
        """The validation loss of coefficients (p,); the products leave out features that are zero."""
        active = b.detach().nonzero()[:, 0]
        prediction = self.X_val[:, active] @ b[active]
        if self.kind == "logistic":
            return self.loss(prediction, self.y_val)
        return (prediction - self.y_val).square().mean()

    def truth(self, b: Tensor) -> tuple[tuple[float, float], int]:
        """(outer, d outer / d log lam) at the solution near b, by Newton's method on the active features; their number.

        Raises `ArithmeticError` unless the optimality conditions hold, on all features, to 1e-10 of the weight.
        """
        active = (b.reshape(-1, self.group) != 0).any(1).repeat_interleave(self.group).nonzero()[:, 0]
        A, logs = self.X[:, active], torch.tensor(self.weight, dtype=b.dtype).log()

        def objective(u: Tensor, logs: Tensor) -> Tensor:
            sizes = u.reshape(-1, self.group).norm(dim=1) if self.group > 1 else u.abs()
            return self.loss(A @ u, self.y) + logs.exp() * sizes.sum() + self.curvature / 2 * u.square().sum()

        u, slope = b[active], torch.func.grad(objective)
        for _ in range(10):
            hessian = torch.func.hessian(objective)(u, logs)
            u = u - torch.linalg.solve(hessian, slope(u, logs))
        full = torch.zeros_like(b).index_copy(0, active, u)
        pull = torch.func.grad(lambda z: self.loss(self.X @ z, self.y))(full).reshape(-1, self.group).norm(dim=1)
        idle = (full.reshape(-1, self.group) == 0).all(1)
        if float(slope(u, logs).abs().max()) > 1e-10 * self.weight or bool((pull[idle] > self.weight).any()):
            raise ArithmeticError("the reference is no solution")
        moved = -torch.linalg.solve(hessian, torch.func.jacrev(slope, argnums=1)(u, logs))
        outer = torch.func.grad(self.outer)(full)[active]
        return (float(self.outer(full)), float(outer @ moved)), len(active)


def random_problem(kind: str, n: int, p: int, active: int) -> HoldOut:
    """Gaussian features, `active` coefficients of one, noise 0.3 (or labels drawn with the logistic model)."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X, b = numbers(n, p), torch.zeros(p, dtype=torch.float64)
    b[:active] = 1.0
    X_val = numbers(max(n // 2, 50), p)

    def answers(features: Tensor) -> Tensor:
        if kind == "logistic":
            chance = torch.rand(len(features), generator=generator, dtype=torch.float64)
            return torch.where(chance < torch.sigmoid(features @ b), 1.0, -1.0).double()
        return features @ b + 0.3 * numbers(len(features))

    return with_weight(kind, X, answers(X), X_val, answers(X_val))


def diabetes(degree: int) -> HoldOut:
    """The diabetes data of scikit-learn: 442 patients, all monomials of 10 features up to `degree`, standardised; the
    even patients train and the odd ones validate."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    features, target = load_diabetes(return_X_y=True)
    wide = PolynomialFeatures(degree, include_bias=False).fit_transform(StandardScaler().fit_transform(features))
    wide = torch.tensor(StandardScaler().fit(wide[::2]).transform(wide))
    y = torch.tensor(target)
    y = (y - y[::2].mean()) / y[::2].std()
    return with_weight("lasso", wide[::2], y[::2], wide[1::2], y[1::2])


def with_weight(kind: str, X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> HoldOut:
    made = HoldOut(kind, X.contiguous(), y, X_val.contiguous(), y_val, 1.0)
    zero = torch.zeros(X.shape[1], dtype=X.dtype)
    pull = torch.func.grad(lambda b: made.loss(X @ b, y))(zero).reshape(-1, made.group).norm(dim=1)
    return HoldOut(kind, made.X, made.y, made.X_val, made.y_val, FRACTION * float(pull.max()))


def problem(text: str) -> HoldOut:
    """From "KIND:n:p:active" or "diabetes:degree"."""
    warnings.simplefilter("ignore")
    kind, *sizes = text.split(":")
    return diabetes(int(sizes[0])) if kind == "diabetes" else random_problem(kind, *map(int, sizes))
