"""Frequency response of a bank of filters from one channel to many: on a grid, and bounded at every frequency.

For filters k_i and weights h_i >= 0 the gain at frequency w is kap(w) = sum_i h_i |k_i(w)|^2, a trigonometric polynomial
whose coefficients are the weighted autocorrelation of the filters. Transforms are taken by explicit matrices of
sines and cosines, whose rounding error has a simple bound at every single frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from firmly.errors import ShapeError

_CORRELATE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def correlate(x: Tensor, kernel: Tensor, padding: Sequence[int] | int = 0) -> Tensor:
    """torch's convolution (a cross-correlation) in the number of dimensions of the kernel."""
    return _CORRELATE[kernel.dim() - 2](x, kernel, padding=padding)


def wrap(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Circular padding of the last dimensions of x."""
    sizes = x.shape[-len(before) :]
    if any(max(b, a) > n for b, a, n in zip(before, after, sizes)):
        raise ShapeError(f"an image of size {tuple(sizes)} is too small to be wrapped by {tuple(before)} and {tuple(after)}")
    return functional.pad(x, [p for pair in zip(reversed(before), reversed(after)) for p in pair], mode="circular")


def rounding(kernel: Tensor) -> float:
    """Relative rounding bound, generous, of every computation of this file in float64: gamma_n of Higham 2002, ch. 3."""
    terms = math.prod(kernel.shape[2:]) + kernel.shape[0]
    return 16 * (terms + 32) * torch.finfo(torch.float64).eps


def size_bound(kernel: Tensor, weight: Tensor) -> Tensor:
    """sum_i h_i |k_i|_1^2, the simplest bound of the gain at every frequency; scalar."""
    return (weight * kernel.abs().flatten(1).sum(1) ** 2).sum()


def fourier_matrix(size: int, first: int, terms: int, half: bool, device: torch.device) -> Tensor:
    """exp(-2 pi i f d / size) for f = 0 .. (size - 1, or size // 2) and d = first .. first + terms - 1; complex128."""
    frequencies = torch.arange(size // 2 + 1 if half else size, device=device)
    places = torch.arange(first, first + terms, device=device)
    turns = torch.remainder(frequencies[:, None] * places, size).double() / size  # reduced in integers: no loss
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)


def response(values: Tensor, sizes: Sequence[int], first: Sequence[int], half: bool) -> Tensor:
    """Discrete Fourier transform of values (channels, *k) placed at `first` on a grid of `sizes`: (channels, *grid)."""
    result = values.to(torch.complex128)
    for axis, size in enumerate(sizes):
        last = half and axis == len(sizes) - 1
        matrix = fourier_matrix(size, first[axis], values.shape[axis + 1], last, values.device)
        result = torch.tensordot(result, matrix, dims=([1], [1]))  # the transformed axis moves to the end
    return result


def gain_on_grid(kernel: Tensor, weight: Tensor, spatial: Sequence[int], half: bool) -> Tensor:
    """sqrt(sum_i h_i |k_i(f)|^2) at every frequency of a grid, for kernel (C, 1, *k), weight (C,): (*grid,), float64."""
    frequencies = response(kernel[:, 0], spatial, [0] * len(spatial), half)
    weighted = torch.view_as_real(frequencies) * weight.sqrt().reshape(-1, *[1] * (len(spatial) + 1))
    return torch.linalg.vector_norm(weighted, dim=(0, -1))


def peak_gain(kernel: Tensor, weight: Tensor, refinement: int = 32) -> Tensor:
    """An upper bound, within about half a percent, of max_w sum_i h_i |k_i(w)|^2 over ALL frequencies w.

    It holds for images of every size, and is differentiable in kernel (C, 1, *k) and weight (C,); scalar, float64.
    A real trigonometric polynomial T of degree n with |T| <= 1 satisfies T(w) >= cos(n (w - w*)) near a point w* with
    T(w*) = 1 (M. Riesz, 1914). Applied to 2 kap / max kap - 1, with the nearest of N grid points within pi / N of w*:
    max kap <= max over the grid / cos(pi n / (2 N))^2, and one such factor for each dimension.
    """
    degrees = [k - 1 for k in kernel.shape[2:]]
    grid = [2 ** math.ceil(math.log2(refinement * max(n, 1))) for n in degrees]
    channels = kernel.transpose(0, 1)  # (1, C, *k)
    correlation = correlate(channels, channels * weight.reshape(1, -1, *[1] * len(degrees)), padding=degrees)[0]
    values = response(correlation, grid, [-n for n in degrees], half=True).real
    sampled = values.amax() + rounding(kernel) * size_bound(kernel, weight).detach()
    factor = math.prod(math.cos(math.pi * n / (2 * size)) ** 2 for n, size in zip(degrees, grid))
    return sampled / factor


def dct_filters(size: int, count: int | None = None, dims: int = 2) -> Tensor:
    """The orthonormal discrete cosine basis of a patch, lowest frequencies first, without the constant: (count, 1, *k)."""
    places, orders = torch.arange(size).double() + 0.5, torch.arange(size).double()
    basis = torch.cos(math.pi / size * orders[:, None] * places) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    filters = torch.ones(1, dtype=torch.float64)
    order = torch.zeros(1)
    for _ in range(dims):
        filters = torch.einsum("a...,bk->ab...k", filters, basis).flatten(0, 1)
        order = (order[:, None] + orders).flatten()
    chosen = filters[torch.argsort(order, stable=True)[1:]]
    if count is not None:
        if not 1 <= count <= len(chosen):
            raise ShapeError(f"a patch of {size}^{dims} has {len(chosen)} cosine filters without the constant, asked for {count}")
        chosen = chosen[:count]
    return chosen.reshape(-1, 1, *[size] * dims).float()
