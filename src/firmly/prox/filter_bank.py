"""Frequency response of a bank of filters from one channel to many: on a grid, and bounded at every frequency.

For filters k_i and weights h_i >= 0 the power at frequency w is kap(w) = sum_i h_i |k_i(w)|^2, a trigonometric
polynomial whose coefficients are the weighted autocorrelation of the filters. Transforms are taken by explicit matrices
of sines and cosines, whose rounding error has a simple bound at every single frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from firmly.errors import ShapeError

_CORRELATE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def fourier_matrix(size: int, first: int, terms: int, half: bool, device: torch.device) -> Tensor:
    """exp(-2 pi i f d / size) for f = 0 .. (size - 1, or size // 2) and d = first .. first + terms - 1; complex128."""
    frequencies = torch.arange(size // 2 + 1 if half else size, device=device)
    places = torch.arange(first, first + terms, device=device)
    turns = torch.remainder(frequencies[:, None] * places, size).double() / size  # reduced in integers: no loss
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)


def response(values: Tensor, sizes: Sequence[int], first: Sequence[int], half: bool) -> Tensor:
    """Discrete Fourier transform of values (channels, *k) placed at `first` on a periodic grid: (channels, *grid).

    `half` keeps the frequencies of `rfftn`. Values that do not fit on the grid are wrapped.
    """
    result = values.to(torch.complex128)
    for axis, size in enumerate(sizes):
        last = half and axis == len(sizes) - 1
        matrix = fourier_matrix(size, first[axis], values.shape[axis + 1], last, values.device)
        result = torch.tensordot(result, matrix, dims=([1], [1]))  # the transformed axis moves to the end
    return result


def power(kernel: Tensor, weight: Tensor, sizes: Sequence[int], half: bool) -> tuple[Tensor, Tensor]:
    """sum_i h_i |k_i(f)|^2 on a grid of frequencies, for kernel (C, 1, *k), weight (C,), and a bound of its rounding.

    Returns (*grid,) and a scalar, in float64; the first is differentiable, and negative by no more than the second.
    """
    degrees = [k - 1 for k in kernel.shape[2:]]
    channels = kernel.double().transpose(0, 1)  # (1, C, *k)
    weighted = channels * weight.reshape(1, -1, *[1] * len(degrees))
    correlation = _CORRELATE[len(degrees)](channels, weighted, padding=degrees)[0]
    size = (weight * channels[0].abs().flatten(1).sum(1) ** 2).sum()  # bounds the power at every frequency
    error = rounding(kernel) * size.detach() + 1e-200  # never 0, also for filters that vanish
    return response(correlation, sizes, [-n for n in degrees], half)[0].real, error


def rounding(kernel: Tensor) -> float:
    """Twice the first-order rounding of the sums in `power`, relative to sum_i h_i |k_i|_1^2 (Higham 2002, ch. 3)."""
    terms = kernel.numel() + 2 * sum(2 * k - 1 for k in kernel.shape[2:])
    return (terms + 64) * torch.finfo(torch.float64).eps


def gain(kernel: Tensor, weight: Tensor, sizes: Sequence[int], half: bool) -> tuple[Tensor, Tensor]:
    """The square root of `power` on a grid, with a bound of its error at every frequency; both (*grid,), float64."""
    values, error = power(kernel, weight, sizes, half)
    root = values.maximum(error).sqrt()  # differentiable where the filters vanish, too
    return root, (2 * error / root + 4 * torch.finfo(torch.float64).eps * root).detach()


def peak_power(kernel: Tensor, weight: Tensor, refinement: int = 32) -> Tensor:
    """An upper bound, within about half a percent, of max_w sum_i h_i |k_i(w)|^2 over ALL frequencies w.

    It holds for images of every size, and is differentiable in kernel (C, 1, *k) and weight (C,); scalar, float64.
    A real trigonometric polynomial T of degree n with |T| <= 1 satisfies T(w) >= cos(n (w - w*)) near a point w* with
    T(w*) = 1 (M. Riesz, 1914). Applied to 2 kap / max kap - 1, with the nearest of N grid points within pi / N of w*:
    max kap <= max over the grid / cos(pi n / (2 N))^2, and one such factor for each dimension.
    """
    degrees = [k - 1 for k in kernel.shape[2:]]
    sizes = [2 ** math.ceil(math.log2(refinement * max(n, 1))) for n in degrees]
    values, error = power(kernel, weight, sizes, half=True)
    factor = math.prod(math.cos(math.pi * n / (2 * size)) ** 2 for n, size in zip(degrees, sizes))
    return (values.amax() + error) / factor


def dct_filters(size: int, count: int | None = None, dims: int = 2) -> Tensor:
    """The orthonormal cosine basis of a patch without the constant, lowest frequencies first: (count, 1, *k)."""
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
            raise ShapeError(f"a patch of {size}^{dims} has {len(chosen)} filters but the constant, asked for {count}")
        chosen = chosen[:count]
    return chosen.reshape(-1, 1, *[size] * dims).float()
