"""Entrywise products: diagonal maps and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.map import Bracket, LinearMap, outward
from firmly.linear.symbol import Symbol


class Diagonal(LinearMap):
    """x -> weight * x, entry by entry, for a real or complex weight that broadcasts to `shape` (default: its own).

    The weight may be a learnable parameter. A weight that is constant along the spatial axes is diagonal in Fourier.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, shape: Sequence[int] | None = None):
        shape = tuple(weight.shape) if shape is None else tuple(shape)
        if len(weight.shape) > len(shape) or torch.broadcast_shapes(weight.shape, shape) != torch.Size(shape):
            raise ShapeError(f"a weight of shape {tuple(weight.shape)} does not broadcast to {shape}")
        super().__init__(shape, shape)
        self.hold("weight", weight)

    @property
    def is_complex(self) -> bool:
        return self.weight.is_complex()

    def _apply_map(self, x: Tensor) -> Tensor:
        return self._like(x) * x

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._like(y).conj() * y

    def _like(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype.to_complex() if self.is_complex else x.dtype)

    def gram_diagonal(self) -> Tensor:
        weight = self.weight.to(torch.complex128 if self.is_complex else torch.float64)
        return weight.abs() ** 2

    def _norm(self) -> Bracket:
        top = float(self.weight.to(torch.complex128 if self.is_complex else torch.float64).abs().max())
        return outward(top, top) if self.is_complex else Bracket(top, top)

    def _symbol(self, basis: Basis) -> Symbol:
        weight = self.weight.to(basis.device, torch.complex128 if self.is_complex else torch.float64)
        weight = weight.reshape([1] * (len(self.domain) - weight.dim()) + list(weight.shape))
        if isinstance(basis, DenseBasis):
            return basis.exact(torch.diag(weight.expand(self.domain).flatten())[None])
        if isinstance(basis, Fourier) and weight[0].numel() == 1 and len(self.domain) == len(basis.spatial) + 1:
            factors = weight.expand(basis.channels(self.domain), *weight.shape[1:])
            return basis.exact(torch.diag(factors.flatten())[None])
        return super()._symbol(basis)


class Mask(Diagonal):
    """x -> mask * x with entries 0 or 1: an orthogonal projection. `DataError` for other entries."""

    def __init__(self, mask: Tensor, shape: Sequence[int] | None = None):
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError("a mask has entries 0 and 1 only; use Diagonal for other weights")
        super().__init__(mask, shape)
