"""Diagonal solutions D of D A + A' D > 0: what makes a triangular, say, or masked matrix monotone in another metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.linear.basis import Basis, Dense
from firmly.linear.map import LinearMap
from firmly.linear.symbol import Symbol

NEWTON_STEPS = 200
LARGEST = 512  # rows


class Rescaled(LinearMap):
    """x -> left * M(x / right) for flat x: a map in the coordinates of positive diagonal scalings."""

    left: Tensor
    right: Tensor

    def __init__(self, of: LinearMap, left: Tensor, right: Tensor):
        super().__init__(of.domain, of.codomain)
        self.of = of
        self.hold("left", left)
        self.hold("right", right)

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.left.to(x.dtype) * self.of(x / self.right.to(x.dtype))

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.of.T(y * self.left.to(y.dtype)) / self.right.to(y.dtype)

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, Dense):
            return super()._symbol(basis)
        inner = self.of.symbol(basis)
        value = self.left[:, None] * inner.value / self.right
        error = None
        if inner.error is not None:
            stretch = float(self.left.max() / self.right.min()) * (1 + 1e-15)
            error = stretch * inner.error + 4 * torch.finfo(value.dtype).eps * torch.linalg.vector_norm(value)
        return Symbol(value, error, inner.rows, inner.columns)


@torch.no_grad()
def diagonal_scaling(A: Tensor) -> Tensor | None:
    """s > 0 such that S A S^-1 + (S A S^-1)' is positive definite for S = diag(s), or None.

    A is (n, n). D = S^2 is found by a barrier method on D A + A' D + t I > 0, 0 < D < 1, which lowers t until it is
    negative, or in closed form for triangular A. What is found has to be proved by whoever uses it; None says that the
    search gave up, not that there is no D.
    Source: Boyd et al., Linear matrix inequalities in system and control theory, 1994, section 5.1 (formulation).
    """
    A = A.to(torch.float64)
    if not bool((A.diagonal() > 0).all()) or len(A) > LARGEST:
        return None
    if bool((A.triu(1) == 0).all()):
        return triangular_scaling(A)
    if bool((A.tril(-1) == 0).all()):
        return triangular_scaling(A.flip(0, 1)).flip(0)
    try:
        D = barrier_scaling(A)
    except RuntimeError:  # LinAlgError: a system of the search is singular in floating point
        return None
    return None if D is None else D.sqrt()


def triangular_scaling(A: Tensor) -> Tensor:
    """s for lower triangular A with positive diagonal, row by row.

    With B the scaled matrix of the first rows and P = B + B' > 0, the next row (c', a) has c' / s there, and with its
    own weight w the Schur complement is 2 a - w^2 (c/s)' P^-1 (c/s): w is chosen to leave 3 a / 2 of it.
    """
    n = len(A)
    s, B = torch.ones(n, dtype=A.dtype), torch.diag(A.diagonal())
    for k in range(1, n):
        c = A[k, :k] / s[:k]
        pull = float(c @ torch.linalg.solve(B[:k, :k] + B[:k, :k].mT, c))
        s[k] = min(1.0, math.sqrt(0.5 * float(A[k, k]) / pull)) if pull > 0 else 1.0
        B[k, :k] = s[k] * c
    return s


def barrier_scaling(A: Tensor) -> Tensor | None:
    """D by Newton's method on w t - log det(D A + A' D + t I) - sum log D - sum log(1 - D), w growing, over (D, t).

    With P the inverse of the matrix: the gradient in D is -2 diag(A P), the Hessian 2 (A P) o (A P)' + 2 P o (A P A').
    It goes on below t = 0 for as long as the smallest eigenvalue relative to D grows.
    """
    n = len(A)
    D = torch.full((n,), 0.5, dtype=A.dtype)
    matrix = D[:, None] * A
    t = 1.0 + 2 * float(torch.linalg.matrix_norm(matrix, 2))
    weight, best, found = 1.0, 0.0, None
    eye = torch.eye(n, dtype=A.dtype)

    def value(D: Tensor, t: float, weight: float) -> float:
        if not (bool((D > 0).all()) and bool((D < 1).all())):
            return float("inf")
        factor, info = torch.linalg.cholesky_ex(D[:, None] * A + (D[:, None] * A).mT + t * eye)
        if int(info) > 0:
            return float("inf")
        logs = 2 * factor.diagonal().log().sum() + D.log().sum() + (1 - D).log().sum()
        return weight * t - float(logs)

    for _ in range(NEWTON_STEPS):
        P = torch.linalg.inv(D[:, None] * A + (D[:, None] * A).mT + t * eye)
        AP = A @ P
        gradient = torch.cat([-2 * AP.diagonal() - 1 / D + 1 / (1 - D), (weight - P.trace()).reshape(1)])
        hessian = torch.zeros(n + 1, n + 1, dtype=A.dtype)
        hessian[:n, :n] = 2 * AP * AP.mT + 2 * P * (AP @ A.mT) + torch.diag(1 / D**2 + 1 / (1 - D) ** 2)
        hessian[:n, n] = hessian[n, :n] = 2 * (AP @ P).diagonal()
        hessian[n, n] = P.square().sum()
        step = -torch.linalg.solve(hessian, gradient)
        decrement = float(-gradient @ step)
        if not decrement >= 0:
            break
        length, now = 1.0, value(D, t, weight)
        while length > 1e-12:
            if value(D + length * step[:n], t + length * float(step[n]), weight) <= now - 0.1 * length * decrement:
                break
            length /= 2
        D, t = D + length * step[:n], t + length * float(step[n])
        root = D.sqrt()
        middle = (root[:, None] * A / root) + (root[:, None] * A / root).mT
        margin = float(torch.linalg.eigvalsh(middle)[0])
        if margin > best:
            best, found = margin, D
        elif found is not None and decrement < 1e-6:
            break
        if decrement < 0.1:
            if weight > 1e9:
                break
            weight *= 4
    return found
