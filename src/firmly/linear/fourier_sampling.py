"""Sampling of frequencies, the forward model of magnetic resonance imaging."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol


class FourierSampling(LinearMap):
    """x -> mask * F x with the unitary discrete Fourier transform F over the spatial axes, for each channel.

    `mask` is (*spatial), boolean or real, in the order of `torch.fft` (frequency 0 first; apply `torch.fft.ifftshift`
    to a centred mask). Data have the shape of the image, 0 where nothing is sampled. This is a map of *complex* images:
    real input is taken as complex, data and `A.T(y)` are complex, and <A x, y> = <x, A.T y> holds in the complex inner
    product.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, channels: int = 1):
        if mask.is_complex() or mask.dim() not in (1, 2, 3):
            raise ShapeError(
                f"FourierSampling takes a real or boolean mask (*spatial), given {tuple(mask.shape)} of {mask.dtype}"
            )
        super().__init__((channels, *mask.shape), (channels, *mask.shape))
        self.hold("mask", mask)

    @property
    def is_complex(self) -> bool:
        return True

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.mask.to(x.real.dtype) * torch.fft.fftn(x, dim=self._axes, norm="ortho")

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifftn(self.mask.to(y.real.dtype) * y, dim=self._axes, norm="ortho")

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(2, len(self.domain) + 1))

    def _norm(self) -> Bracket:
        top = float(self.mask.to(torch.float64).abs().max())
        return Bracket(top, top)

    def _symbol(self, basis: Basis) -> Symbol:
        mask = self.mask.to(basis.device, torch.float64)
        if isinstance(basis, DenseBasis):
            size = math.prod(self.domain)
            spread = mask.detach().abs().max() * math.sqrt(size)  # of the errors of the transforms of all unit vectors
            error = 16 * torch.finfo(torch.float64).eps * math.log2(size + 2) * spread
            return basis.bounded(self.matrix().to(basis.device)[None], error.reshape(1))
        if not isinstance(basis, Fourier) or basis.spatial != self.domain[1:]:
            return super()._symbol(basis)
        mirrored = mask.flip(tuple(range(mask.dim()))).roll([1] * mask.dim(), tuple(range(mask.dim())))
        if not basis.full and not torch.equal(mask, mirrored):
            raise NotDiagonal(
                "a mask that differs at f and -f makes complex images of real ones, and half of the frequencies do not "
                "describe it; use the basis with full=True"
            )
        eye = torch.eye(self.domain[0], dtype=torch.float64, device=basis.device)
        return basis.exact(basis.sample(mask)[:, None, None] * eye, rows="frequency", columns="pixel")
