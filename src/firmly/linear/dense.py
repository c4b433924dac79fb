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
    `ShapeError`. With `copies` the same matrix acts on each of that many vectors of a sample, such as the time points
    of a recording: (batch, copies, columns) -> (batch, copies, rows).
    """

    weight: Tensor

    def __init__(self, weight: Tensor, copies: int | None = None):
        if weight.dim() != 2:
            raise ShapeError(f"Dense takes a matrix (rows, columns), given a tensor of shape {tuple(weight.shape)}")
        if copies is not None and copies < 1:
            raise ShapeError(f"a matrix acts on at least one vector of a sample, given copies={copies}")
        front = () if copies is None else (copies,)
        super().__init__((*front, weight.shape[1]), (*front, weight.shape[0]))
        self.copies = copies
        self.hold("weight", weight)

    @property
    def is_complex(self) -> bool:
        return self.weight.is_complex()

    def matrix(self) -> Tensor:
        weight = self.weight.to(torch.complex128 if self.is_complex else torch.float64)
        return weight if self.copies is None else torch.kron(torch.eye(self.copies).to(weight), weight)

    def same_spectrum(self) -> LinearMap:
        return self if self.copies is None else Dense(self.weight)

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
