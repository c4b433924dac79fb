"""The action of a linear map on one invariant block: a small matrix with an error bound.

A map that is diagonalised by a basis (Fourier, singular vectors, or none at all) acts on every
block of coordinates by a small matrix, its *symbol*. Symbols of composed maps are products of
symbols. Each carries a bound on the spectral norm of its own error, so that a certificate built from
symbols holds in exact arithmetic although it was computed in floating point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import NotDiagonal


class Symbol:
    """A family of matrices with per-block error bounds and named coordinate systems.

    `value` has shape (blocks, rows, columns), or (1, rows, columns) when it is the same on every block.
    `error` has shape (blocks,) or (1,): the exact matrix differs from `value` by at most `error` in
    spectral norm. `None` means that errors are not tracked (fast searches; never in a certificate).
    `rows` and `columns` name the coordinates on either side (for example "pixel" and "frequency"). Both are `None`
    for what acts alike in all coordinates, the identity. A product or sum whose coordinates do not meet raises
    `NotDiagonal`: the identity plus a map from pixels to frequencies has no symbol.
    """

    __slots__ = ("value", "error", "rows", "columns")

    def __init__(self, value: Tensor, error: Tensor | None, rows: str | None = None, columns: str | None = None):
        self.value = value  # (blocks, rows, columns)
        self.error = error  # (blocks,) or None
        self.rows = rows
        self.columns = columns

    def frobenius(self) -> Tensor:
        """Frobenius norm of every block, an upper bound of its spectral norm; shape (blocks,)."""
        return torch.linalg.vector_norm(self.value.detach(), dim=(1, 2))

    def size(self) -> Tensor:
        """An upper bound of the spectral norm of every block: sqrt(|.|_1 |.|_inf) (Schur), or Frobenius if smaller.

        Errors are multiplied by it from map to map, so that a Frobenius norm alone would blow them up with the width.
        """
        frobenius = self.frobenius()
        if min(self.value.shape[1:]) == 1:
            return frobenius
        entries = self.value.detach().abs()
        schur = (entries.sum(1).amax(1) * entries.sum(2).amax(1)).sqrt()
        schur = schur * (1 + _gamma(max(entries.shape[1:]), entries.dtype))
        return torch.minimum(frobenius, schur)

    def __matmul__(self, other: Symbol) -> Symbol:
        if self.rows is not None and other.rows is not None:
            meet(self.columns, other.rows)
        if self.value.shape[2] != other.value.shape[1]:
            left, right = tuple(self.value.shape[1:]), tuple(other.value.shape[1:])
            raise NotDiagonal(f"blocks {left} and {right} do not multiply")
        value = _matmul(self.value, other.value)
        error = None
        if self.error is not None and other.error is not None:
            rounding = _gamma(self.value.shape[2], value.dtype) * self.frobenius() * other.frobenius()
            error = self.error * (other.size() + other.error) + self.size() * other.error + rounding
        rows = other.rows if self.rows is None else self.rows
        columns = self.columns if other.columns is None else other.columns
        return Symbol(value, error, rows, columns)

    def __add__(self, other: Symbol) -> Symbol:
        rows, columns = meet_pair(self, other)
        value = self.value + other.value
        error = None
        if self.error is not None and other.error is not None:
            rounding = _gamma(1, value.dtype) * torch.linalg.vector_norm(value.detach(), dim=(1, 2))
            error = self.error + other.error + rounding
        return Symbol(value, error, rows, columns)

    def scale(self, factor: float | Tensor) -> Symbol:
        """factor times this symbol; the factor is a number taken as exact."""
        value = self.value * factor
        error = None
        if self.error is not None:
            size = abs(float(factor.detach() if isinstance(factor, Tensor) else factor))
            error = self.error * size + _gamma(1, value.dtype) * self.frobenius() * size
        return Symbol(value, error, self.rows, self.columns)

    @property
    def H(self) -> Symbol:
        """The adjoint: conjugate transpose of every block."""
        return Symbol(self.value.mH, self.error, self.columns, self.rows)

    def inverse(self) -> Symbol:
        """Inverse of every (square) block; its error from the residual Y X - I, whatever computed Y.

        |Y - X^-1| <= |Y| r / (1 - r) with r >= |Y X - I|, r < 1; infinite where that fails.
        """
        if self.value.shape[1] != self.value.shape[2]:
            raise NotDiagonal(f"blocks {tuple(self.value.shape[1:])} are not square and have no inverse")
        if self.rows != self.columns:
            raise NotDiagonal(f"no inverse between '{self.rows}' and '{self.columns}': they are different coordinates")
        value = 1 / self.value if self.value.shape[1] == 1 else torch.linalg.inv(self.value)
        error = None
        if self.error is not None:
            n = self.value.shape[1]
            exact = self.value.detach()
            size = torch.linalg.vector_norm(value.detach(), dim=(1, 2))
            eye = torch.eye(n, dtype=exact.dtype, device=exact.device)
            residual = torch.linalg.vector_norm(value.detach() @ exact - eye, dim=(1, 2))
            residual = residual + size * (self.error + _gamma(n, value.dtype) * self.frobenius())
            error = torch.where(residual < 0.5, size * residual / (1 - residual) * (1 + 1e-12), torch.inf)
        return Symbol(value, error, self.rows, self.columns)


def meet(left: str | None, right: str | None) -> str | None:
    """The common name of two coordinate systems; two different names do not meet."""
    if left != right:
        raise NotDiagonal(f"coordinates '{left}' and '{right}' do not meet: the maps share no common basis here")
    return left


def meet_pair(first: Symbol, second: Symbol) -> tuple[str | None, str | None]:
    """Rows and columns of a sum: equal in both terms; the identity takes any, the same on its two sides."""
    if first.rows is None and first.columns is None:
        return meet(second.rows, second.columns), second.columns
    if second.rows is None and second.columns is None:
        return meet(first.rows, first.columns), first.columns
    return meet(first.rows, second.rows), meet(first.columns, second.columns)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != right.dtype:
        common = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(common), right.to(common)
    return left * right if left.shape[2] == 1 else left @ right


def _gamma(terms: int, dtype: torch.dtype) -> float:
    """Rounding of an inner product of `terms` products, real or complex: generous, gamma_n of Higham 2002, ch. 3."""
    return 4 * (terms + 3) * torch.finfo(dtype).eps
