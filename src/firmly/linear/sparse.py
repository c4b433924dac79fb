"""A linear map given by a sparse matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.linear_function import apply_linear
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.memo import Memo
from firmly.linear.norms import norm_bracket, positive_upper_bound
from firmly.linear.symbol import Symbol


class Sparse(LinearMap):
    """x -> M x on flattened tensors, for a scipy sparse matrix M of shape (entries of codomain, entries of domain).

    `domain` and `codomain` default to flat features. The matrix and its transpose are both kept by rows, so that either
    product is fast and the adjoint is exact. The entries are data, not learnable. `ShapeError` if the sizes do not fit.
    """

    values: Tensor

    def __init__(self, matrix: Any, domain: Sequence[int] | None = None, codomain: Sequence[int] | None = None):
        rows, columns = matrix.shape
        super().__init__((columns,) if domain is None else domain, (rows,) if codomain is None else codomain)
        if (math.prod(self.codomain), math.prod(self.domain)) != (rows, columns):
            raise ShapeError(f"a matrix {rows} x {columns} does not map {self.domain} to {self.codomain}")
        for prefix, part in (("", matrix.tocsr()), ("adjoint_", matrix.conj().T.tocsr())):
            part.sum_duplicates()
            values = torch.as_tensor(part.data.copy())
            values = values if values.is_floating_point() or values.is_complex() else values.double()
            self.hold(prefix + "starts", torch.as_tensor(part.indptr.astype("int64")))
            self.hold(prefix + "columns", torch.as_tensor(part.indices.astype("int64")))
            self.hold(prefix + "values", values)
        self._remembered: Memo[Bracket] = Memo()

    @property
    def is_complex(self) -> bool:
        return self.values.is_complex()

    def _apply_map(self, x: Tensor) -> Tensor:
        return apply_linear(x.flatten(1), self._forward, self._backward).reshape(-1, *self.codomain)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return apply_linear(y.flatten(1), self._backward, self._forward).reshape(-1, *self.domain)

    def _forward(self, x: Tensor) -> Tensor:
        return self._product("", math.prod(self.codomain), x)

    def _backward(self, y: Tensor) -> Tensor:
        return self._product("adjoint_", math.prod(self.domain), y)

    def _product(self, prefix: str, rows: int, x: Tensor, positive: bool = False) -> Tensor:
        starts, columns, values = (getattr(self, prefix + name) for name in ("starts", "columns", "values"))
        values = values.abs() if positive else values
        dtype = x.dtype.to_complex() if values.is_complex() else x.dtype
        size = (rows, x.shape[1])
        with warnings.catch_warnings():  # torch announces once that CSR tensors are in beta
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            matrix = torch.sparse_csr_tensor(starts, columns, values.to(dtype), size=size, check_invariants=False)
        return (matrix @ x.to(dtype).mT).mT

    def _norm(self) -> Bracket:
        return self._remembered.get(self, lambda: norm_bracket(self))

    def _upper(self) -> float:
        """The positive-vector bound of |M|, exact in the limit for non-negative matrices."""
        rows, columns = math.prod(self.codomain), math.prod(self.domain)
        terms = max(int(self.get_buffer(prefix + "starts").diff().max()) for prefix in ("", "adjoint_"))
        return positive_upper_bound(
            lambda x: self._product("", rows, x, positive=True),
            lambda y: self._product("adjoint_", columns, y, positive=True),
            torch.ones(1, columns, dtype=torch.float64, device=self.values.device),
            terms=terms,
            steps=60,
        )

    def _symbol(self, basis: Basis) -> Symbol:
        if isinstance(basis, DenseBasis):
            return basis.exact(self.matrix().to(basis.device)[None])
        return super()._symbol(basis)
