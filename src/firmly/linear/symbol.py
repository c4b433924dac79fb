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
    `rows` and `columns` name the coordinates on either side (for example "pixels" and "frequencies");
    `None` fits any. A product of symbols whose coordinates do not meet raises `NotDiagonal`.
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

    def __matmul__(self, other: Symbol) -> Symbol:
        columns = meet(self.columns, other.rows)
        value = _matmul(self.value, other.value)
        error = None
        if self.error is not None and other.error is not None:
            left, right = self.frobenius(), other.frobenius()
            rounding = _gamma(self.value.shape[2], value.dtype) * left * right
            error = self.error * (right + other.error) + left * other.error + rounding
        del columns
        return Symbol(value, error, self.rows, other.columns)

    def __add__(self, other: Symbol) -> Symbol:
        value = self.value + other.value
        error = None
        if self.error is not None and other.error is not None:
            rounding = _gamma(1, value.dtype) * torch.linalg.vector_norm(value.detach(), dim=(1, 2))
            error = self.error + other.error + rounding
        return Symbol(value, error, meet(self.rows, other.rows), meet(self.columns, other.columns))

    def scale(self, factor: float | Tensor) -> Symbol:
        """factor times this symbol; the factor is a number taken as exact."""
        value = self.value * factor
        error = None
        if self.error is not None:
            size = abs(float(factor))
            error = self.error * size + _gamma(1, value.dtype) * self.frobenius() * size
        return Symbol(value, error, self.rows, self.columns)

    @property
    def H(self) -> Symbol:
        """The adjoint: conjugate transpose of every block."""
        return Symbol(self.value.mH, self.error, self.columns, self.rows)

    def inverse(self) -> Symbol:
        """Inverse of every (square) block, with the error bound |X^-1| |E| |X^-1| / (1 - |X^-1| |E|)."""
        value = 1 / self.value if self.value.shape[1] == 1 else torch.linalg.inv(self.value)
        error = None
        if self.error is not None:
            size = torch.linalg.vector_norm(value.detach(), dim=(1, 2))
            n = self.value.shape[1]
            conditioned = size * (self.error + 8 * _gamma(n, value.dtype) * n * self.frobenius())
            error = torch.where(conditioned < 0.5, 2 * size * conditioned, torch.inf)
        return Symbol(value, error, self.columns, self.rows)


def meet(left: str | None, right: str | None) -> str | None:
    """The common name of two coordinate systems; `None` fits any, two different names do not meet."""
    if left is not None and right is not None and left != right:
        raise NotDiagonal(f"coordinates '{left}' and '{right}' do not meet: the maps share no common basis here")
    return left if left is not None else right


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != right.dtype:
        common = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(common), right.to(common)
    return left * right if left.shape[2] == 1 else left @ right


def _gamma(terms: int, dtype: torch.dtype) -> float:
    """Rounding of an inner product of `terms` products, real or complex: generous, gamma_n of Higham 2002, ch. 3."""
    return 4 * (terms + 3) * torch.finfo(dtype).eps
