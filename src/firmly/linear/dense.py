"""A linear map given by its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.map import LinearMap
from firmly.linear.symbol import Symbol


class Dense(LinearMap):
    """x -> M x for flat features: (batch, columns) -> (batch, rows).

    `weight` is the matrix M, (rows, columns), real or complex; it may be a learnable parameter. Any other shape raises
    `ShapeError`.
    """

    weight: Tensor

    def __init__(self, weight: Tensor):
        if weight.dim() != 2:
            raise ShapeError(f"Dense takes a matrix (rows, columns), given a tensor of shape {tuple(weight.shape)}")
        super().__init__(weight.shape[1:], weight.shape[:1])
        self.hold("weight", weight)

    @property
    def is_complex(self) -> bool:
        return self.weight.is_complex()

    def matrix(self) -> Tensor:
        return self.weight.to(torch.complex128 if self.is_complex else torch.float64)

    def _apply_map(self, x: Tensor) -> Tensor:
        x, weight = matched(x, self.weight)
        return x @ weight.mT

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        y, weight = matched(y, self.weight)
        return y @ weight.conj()

    def _symbol(self, basis: Basis) -> Symbol:
        if isinstance(basis, DenseBasis):
            return basis.exact(self.matrix().to(basis.device)[None])
        return super()._symbol(basis)


def matched(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision of x, and both complex if one of them is."""
    dtype = x.dtype.to_complex() if weight.is_complex() else x.dtype
    return x.to(dtype), weight.to(dtype)
