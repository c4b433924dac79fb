"""Convolutions (cross-correlations, as everywhere in deep learning) with circular, zero or reflecting borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.errors import NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.memo import Memo
from firmly.linear.norms import EPS, exact_symbol, norm_bracket, norm_of_blocks, positive_upper_bound
from firmly.linear.symbol import Symbol

Padding = Literal["circular", "zero", "reflect"]

LARGEST_SUM = 64  # taps

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Convolution(LinearMap):
    """(A x)_o[i] = sum_c sum_j kernel[o, c, j] x_c[i + j - centre], with centre = size // 2 along each axis.

    This is torch's cross-correlation with an output as large as the input. `shape` is the domain (channel, *spatial),
    with one to three spatial axes. The real kernel is (out, in, *size), or (*size) to filter every channel alike; it
    may be a learnable parameter. `padding` says what lies beyond the border: the other side ("circular"), nothing
    ("zero") or the mirror image without the border pixel repeated ("reflect"). Shapes that do not fit raise
    `ShapeError`.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, shape: Sequence[int], padding: Padding = "circular"):
        axes = len(shape) - 1
        if axes not in _CONVOLVE:
            raise ShapeError(f"Convolution takes a domain (channel, *spatial) with 1 to 3 axes, given {tuple(shape)}")
        if kernel.is_complex() or not kernel.is_floating_point():
            raise ShapeError(f"Convolution takes a real floating-point kernel, given {kernel.dtype}")
        if padding not in get_args(Padding):
            raise ValueError(f"unknown padding {padding!r}: choose one of {get_args(Padding)}")
        per_channel = kernel.dim() == axes
        if not per_channel and (kernel.dim() != axes + 2 or kernel.shape[1] != shape[0]):
            raise ShapeError(
                f"for a domain {tuple(shape)} the kernel is (out, {shape[0]}, *size) or (*size) with {axes} axes of "
                f"size, given {tuple(kernel.shape)}"
            )
        super().__init__(shape, (shape[0] if per_channel else kernel.shape[0], *shape[1:]))
        self.padding: Padding = padding
        self.per_channel = per_channel
        self.hold("kernel", kernel)
        self._remembered: Memo[Bracket] = Memo()

    @property
    def centre(self) -> tuple[int, ...]:
        """The tap that lies on the pixel itself."""
        return tuple(k // 2 for k in self.kernel.shape[-len(self.domain) + 1 :])

    def _apply_map(self, x: Tensor) -> Tensor:
        if self._is_fast_by_frequency():
            return self._by_frequency(x, self._transform(x).conj())
        return self._correlate(x, self.kernel)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        if self._is_fast_by_frequency():
            response = self._transform(y)
            return self._by_frequency(y, response if self.per_channel else response.transpose(0, 1))
        return self._correlate_adjoint(y, self.kernel)

    def matrix(self) -> Tensor:
        size = math.prod(self.domain)
        eye = torch.eye(size, dtype=torch.float64, device=self.kernel.device).reshape(size, *self.domain)
        return self._correlate(eye, self.kernel).reshape(size, -1).T  # by sums: every entry is a tap, without rounding

    def _correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        batch, weight, convolve = x.shape[0], self._weight(kernel, x.dtype), _CONVOLVE[len(self.domain) - 1]
        x, size = x.reshape(-1, weight.shape[1], *self.domain[1:]), weight.shape[2:]
        if self.padding == "zero" and all(k % 2 for k in size):  # without a padded copy
            return convolve(x, weight, padding=[k // 2 for k in size]).reshape(batch, *self.codomain)
        return convolve(self._pad(x, size), weight).reshape(batch, *self.codomain)

    def _correlate_adjoint(self, y: Tensor, kernel: Tensor) -> Tensor:
        batch, weight = y.shape[0], self._weight(kernel, y.dtype)
        full = _TRANSPOSE[len(self.domain) - 1](y.reshape(-1, weight.shape[0], *self.domain[1:]), weight)
        return self._fold(full, weight.shape[2:]).reshape(batch, *self.domain)

    def _is_fast_by_frequency(self) -> bool:
        """Whether sums over the taps are slower than Fourier transforms (measured on CPU)."""
        return self.padding == "circular" and math.prod(self.kernel.shape[-len(self.domain) + 1 :]) > LARGEST_SUM

    def _transform(self, x: Tensor) -> Tensor:
        """Fourier transform of the kernel with its centre at the origin, wrapped onto the grid of x."""
        spatial, size = self.domain[1:], self.kernel.shape[-len(self.domain) + 1 :]
        index = torch.zeros(1, dtype=torch.long, device=x.device)
        for n, k in zip(spatial, size):
            index = (index[:, None] * n + (torch.arange(k, device=x.device) - k // 2) % n).flatten()
        taps = self.kernel.to(x.real.dtype).flatten(-len(size))
        grid = taps.new_zeros(*taps.shape[:-1], math.prod(spatial)).index_add(-1, index, taps)
        transform = torch.fft.fftn if x.is_complex() else torch.fft.rfftn
        return transform(grid.unflatten(-1, spatial), dim=tuple(range(-len(spatial), 0)))

    def _by_frequency(self, x: Tensor, response: Tensor) -> Tensor:
        spatial, axes = self.domain[1:], tuple(range(2, x.dim()))
        frequencies = torch.fft.fftn(x, dim=axes) if x.is_complex() else torch.fft.rfftn(x, dim=axes)
        if self.per_channel:
            product = response * frequencies
        else:
            product = torch.einsum("oi...,bi...->bo...", response, frequencies)
        return torch.fft.ifftn(product, dim=axes) if x.is_complex() else torch.fft.irfftn(product, s=spatial, dim=axes)

    def _weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        return (kernel[None, None] if self.per_channel else kernel).to(dtype)

    def _pad(self, x: Tensor, size: Sequence[int]) -> Tensor:
        for axis, k in enumerate(size, start=2):
            before, after = k // 2, k - 1 - k // 2
            if k == 1:
                continue
            if self.padding == "zero":
                x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [before, after])
            else:
                x = x.index_select(axis, self._sources(x.shape[axis], before, after, x.device))
        return x

    def _fold(self, x: Tensor, size: Sequence[int]) -> Tensor:
        for axis, k in enumerate(size, start=2):
            before, after, n = k // 2, k - 1 - k // 2, self.domain[axis - 1]
            if k == 1:
                continue
            if self.padding == "zero":
                x = x.narrow(axis, before, n)
            else:
                target = x.new_zeros([*x.shape[:axis], n, *x.shape[axis + 1 :]])
                x = target.index_add(axis, self._sources(n, before, after, x.device), x)
        return x

    def _sources(self, n: int, before: int, after: int, device: torch.device | str = "cpu") -> Tensor:
        index = torch.arange(-before, n + after, device=device)
        if self.padding == "circular" or n == 1:
            return index % n
        index = index % (2 * n - 2)
        return torch.where(index < n, index, 2 * n - 2 - index)

    def _norm(self) -> Bracket:
        return self._remembered.get(self, lambda: norm_bracket(self))

    def _upper(self) -> float:
        """The least of three bounds, with padding a map of known norm followed by a part of a circular convolution.

        (1) The circular convolution on the padded grid. (2) Young's inequality: the norm of the matrix (out, in) of
        the sums of |kernel|. (3) For mirrored borders, the positive-vector bound of the map with |kernel|.
        """
        size = self.kernel.shape[-len(self.domain) + 1 :]
        grid = [n + k - 1 if self.padding != "circular" else n for n, k in zip(self.domain[1:], size)]
        sums = self._weight(self.kernel.to("cpu", torch.float64), torch.float64).abs().flatten(2).sum(2)
        error = 4 * EPS * self.kernel.numel() * torch.linalg.vector_norm(sums)
        bounds = [norm_of_blocks(Symbol(sums[None], error.reshape(1))).upper]
        if self.padding != "circular":
            wide = Convolution(self.kernel, (self.domain[0], *grid), "circular")
            if exact := exact_symbol(wide):
                bounds.append(norm_of_blocks(exact).upper)
        bounds = [b * self._padding_norm() for b in bounds]
        if self.padding == "reflect":
            kernel = self.kernel.to("cpu", torch.float64).abs()
            bounds.append(
                positive_upper_bound(
                    lambda x: self._correlate(x, kernel),
                    lambda y: self._correlate_adjoint(y, kernel),
                    torch.ones(1, *self.domain, dtype=torch.float64),
                    terms=kernel.numel() * 4,
                    steps=20,
                )
            )
        return min(bounds)

    def _padding_norm(self) -> float:
        """The norm of padding: the root of how often a pixel is repeated, along each axis."""
        norm = 1.0
        for n, k in zip(self.domain[1:], self.kernel.shape[-len(self.domain) + 1 :]):
            if self.padding == "reflect":
                norm *= math.sqrt(int(torch.bincount(self._sources(n, k // 2, k - 1 - k // 2)).max())) * (1 + 1e-15)
        return norm

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, Fourier):
            return super()._symbol(basis)
        if self.padding != "circular" or basis.spatial != self.domain[1:]:
            raise NotDiagonal(
                f"a convolution on {self.domain} with {self.padding} padding is not diagonal in Fourier on "
                f"{basis.spatial}; use padding='circular', or a mask around a circular convolution on a larger grid"
            )
        response, error = basis.response(self.kernel, self.centre)
        if self.per_channel:
            eye = torch.eye(self.domain[0], dtype=torch.float64, device=basis.device)
            return basis.bounded(response[:, None, None] * eye, error.reshape(1))
        return basis.bounded(response.permute(2, 0, 1), torch.linalg.vector_norm(error).reshape(1))
