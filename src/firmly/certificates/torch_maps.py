"""Linear maps behind torch operations: reshapes, selections, entrywise products, general convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from firmly.linear.basis import Basis, Dense, Fourier
from firmly.linear.map import Bracket, LinearMap, Shape
from firmly.linear.memo import Memo
from firmly.linear.norms import norm_bracket, norm_of_blocks
from firmly.linear.symbol import Symbol

SYMBOL_ENTRIES = 2**23  # of the blocks that the norm of a convolution is computed from


class Rearrange(LinearMap):
    """A reshape, permutation, selection or repetition of entries: `codomain[i] = domain[index[i]]`, -1 for a zero."""

    def __init__(self, domain: Sequence[int], index: Tensor):
        super().__init__(domain, index.shape)
        self.register_buffer("index", index.flatten())

    def _apply_map(self, x: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(x.flatten(1), (0, 1))
        return flat[:, self.index].reshape(-1, *self.codomain)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        size = math.prod(self.domain)
        index = torch.where(self.index < 0, size, self.index)
        flat = torch.zeros(len(y), size + 1, dtype=y.dtype, device=y.device).index_add(1, index, y.flatten(1))
        return flat[:, :size].reshape(-1, *self.domain)

    def _norm(self) -> Bracket:
        repeats = int(torch.bincount(self.index[self.index >= 0], minlength=1).max())
        return Bracket(math.sqrt(repeats) * (1 - 1e-15), math.sqrt(repeats) * (1 + 1e-15))

    def keeps_pixels(self) -> bool:
        """Whether it only adds or removes channels of size one in front of unchanged entries."""
        size = math.prod(self.domain)
        return len(self.index) == size and bool((self.index == torch.arange(size)).all())

    def _symbol(self, basis: Basis) -> Symbol:
        if isinstance(basis, Dense):
            return super()._symbol(basis)
        if self.keeps_pixels() and basis.channels(self.domain) == basis.channels(self.codomain):
            return basis.identity(self.codomain)
        if isinstance(basis, Fourier) and basis.channels(self.domain) and basis.channels(self.codomain):
            source = self.channels(math.prod(basis.spatial))
            if source is not None:
                selection = torch.nn.functional.one_hot(source.clamp(min=0), basis.channels(self.domain)).double()
                return basis.exact(torch.where(source[:, None] < 0, 0.0, selection)[None])
        return super()._symbol(basis)

    def channels(self, pixels: int | None = None) -> Tensor | None:
        """The channel that each channel of the result is, -1 for zeros; None unless whole channels are taken."""
        pixels = math.prod(self.domain[1:]) if pixels is None else pixels
        if len(self.index) % pixels:
            return None
        rows = self.index.reshape(-1, pixels)
        source = torch.div(rows[:, 0], pixels, rounding_mode="floor")  # -1 for a blank
        whole = (rows == source[:, None] * pixels + torch.arange(pixels)).all(1)
        return source if bool((whole | (rows == -1).all(1)).all()) else None


def rearrange(domain: Sequence[int], function: Callable[[Tensor], Tensor]) -> Rearrange:
    """The `Rearrange` that does what `function` does to a batch of one."""
    numbers = torch.arange(math.prod(domain)).reshape(1, *domain)
    return Rearrange(domain, function(numbers)[0])


class TorchConvolution(LinearMap):
    """`torch.nn.functional.conv{1,2,3}d` without bias: zero padding, stride, dilation, groups.

    With the input embedded in a large enough torus, it is a circular convolution followed by a selection of pixels, so
    that the largest singular value over the frequencies of that torus bounds its norm.
    """

    def __init__(
        self, weight: Tensor, spatial: Sequence[int], stride: Shape, padding: Shape, dilation: Shape, groups: int
    ):
        self_domain = (weight.shape[1] * groups, *spatial)
        sizes = zip(spatial, weight.shape[2:], stride, padding, dilation)
        output = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        super().__init__(self_domain, (weight.shape[0], *output))
        self.hold("weight", weight)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self._remembered: Memo[Bracket] = Memo()

    def _apply_map(self, x: Tensor) -> Tensor:
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.stride) - 1]
        return convolve(x, self.weight.to(x.dtype), None, self.stride, self.padding, self.dilation, self.groups)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        zeros = torch.zeros(len(y), *self.domain, dtype=y.dtype, device=y.device)
        return torch.func.vjp(self._apply_map, zeros)[1](y)[0]

    def _norm(self) -> Bracket:
        return self._remembered.get(self, lambda: norm_bracket(self))

    def full_kernel(self) -> Tensor:
        """The kernel (out, in, *k) of an ungrouped, undilated convolution that does the same."""
        weight = self.weight.double()
        out, per_group = weight.shape[:2]
        sizes = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], self.dilation)]
        kernel = weight.new_zeros(out, per_group * self.groups, *sizes)
        spread = tuple(slice(None, None, d) for d in self.dilation)
        for group in range(self.groups):
            rows = slice(group * out // self.groups, (group + 1) * out // self.groups)
            columns = slice(group * per_group, (group + 1) * per_group)
            kernel[(rows, columns, *spread)] = weight[rows]
        return kernel

    def _upper(self) -> float:
        kernel, stride = self.full_kernel(), self.stride
        grid, factor = frequency_grid(self.domain[1:], kernel.shape, stride)
        if not math.isfinite(factor):  # Young: the matrix of sums of |kernel|
            sums = kernel.abs().flatten(2).sum(2)
            rounding = 4 * torch.finfo(torch.float64).eps * kernel[0, 0].numel() * torch.linalg.vector_norm(sums)
            return norm_of_blocks(Symbol(sums[None], rounding.reshape(1))).upper
        strided = math.prod(stride) > 1
        response, error = Fourier(grid, full=strided).response(kernel, [0] * len(grid))
        if strided:
            response = aliased(response.unflatten(2, grid), stride)
        symbol = Symbol(response.permute(2, 0, 1), torch.linalg.vector_norm(error).reshape(1))
        return factor * norm_of_blocks(symbol).upper


def frequency_grid(spatial: Sequence[int], kernel: Sequence[int], stride: Shape) -> tuple[list[int], float]:
    """Frequencies that bound a convolution with zero padding, and the factor by which they do.

    Those of a torus as large as image and kernel have factor 1. Where they are too many, a coarse grid of N does for
    images of any size: a trigonometric polynomial of degree r is at most 1 / cos(pi r / N) times its largest value
    there, along each axis (H. Ehlich and K. Zeller, 1964; from M. Riesz' T(x) >= |T| cos(r (x - x0))). The factor is
    infinite where no grid is small enough.
    """
    sizes = [-(-(n + k - 1) // s) * s for n, k, s in zip(spatial, kernel[2:], stride)]
    degree = [k // 2 for k in kernel[2:]]
    least = [-(-8 * max(r, 1) // s) * s for r, s in zip(degree, stride)]
    grid, kept = sizes, kernel[0] * kernel[1] / (1 if math.prod(stride) > 1 else 2)  # half of the frequencies
    while math.prod(grid) * kept > SYMBOL_ENTRIES:
        axis = max(range(len(grid)), key=lambda a: grid[a] / least[a])
        if grid[axis] <= least[axis]:
            return grid, math.inf
        smaller = max(grid[axis] // 2 // stride[axis] * stride[axis], least[axis])
        grid = [smaller if a == axis else n for a, n in enumerate(grid)]
    coarse = [math.cos(math.pi * r / n) for r, n, size in zip(degree, grid, sizes) if n < size]
    return grid, (1 + 1e-14) / math.prod(coarse) if coarse else 1.0


def aliased(response: Tensor, stride: Shape) -> Tensor:
    """Blocks of a circular convolution that keeps every s-th pixel: the frequencies f + k N / s, k < s, meet in one.

    Response (out, in, *grid) to (out, in * aliases, blocks): Y(f) = sum_k H(f + k N / s) X(f + k N / s) / sqrt(s), in
    unitary coordinates, along each axis.
    """
    for axis, s in enumerate(stride):
        size = response.shape[2 + axis]
        response = response.unflatten(2 + axis, (s, size // s)).movedim(2 + axis, 1).flatten(1, 2)
    return response.flatten(2) / math.sqrt(math.prod(stride))


class AxisMaps(LinearMap):
    """A matrix along every axis, one after the other: y = (M_1 x ... x M_k) x as a Kronecker product, None for 1.

    Pooling, interpolation, sums over axes and matrices along the last axis are of this kind. The norm is the product
    of the norms of the matrices. Their entries are taken as computed in double precision.
    """

    def __init__(self, domain: Sequence[int], matrices: Sequence[Tensor | None]):
        pairs = [(n if m is None else len(m)) for n, m in zip(domain, matrices, strict=True)]
        super().__init__(domain, pairs)
        self.axes = tuple(axis for axis, m in enumerate(matrices) if m is not None)
        for axis in self.axes:
            self.hold(f"matrix{axis}", matrices[axis])

    def _along(self, x: Tensor, axis: int, transposed: bool) -> Tensor:
        matrix = getattr(self, f"matrix{axis}").to(x.dtype)
        return torch.tensordot(x, matrix, dims=([axis + 1], [0 if transposed else 1])).movedim(-1, axis + 1)

    def _apply_map(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = self._along(x, axis, transposed=False)
        return x

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        for axis in self.axes:
            y = self._along(y, axis, transposed=True)
        return y

    def _blocks(self, axis: int) -> Symbol:
        matrix = getattr(self, f"matrix{axis}").double()
        rounding = 64 * torch.finfo(torch.float64).eps * torch.linalg.vector_norm(matrix.detach())
        return Symbol(matrix[None], rounding.reshape(1))

    def _norm(self) -> Bracket:
        factors = [norm_of_blocks(self._blocks(axis)) for axis in self.axes]
        rounding = 1e-15 * (len(factors) + 1)
        lower, upper = (math.prod(f[end] for f in factors) for end in (0, 1))
        return Bracket(lower * (1 - rounding), upper * (1 + rounding))

    def _symbol(self, basis: Basis) -> Symbol:
        channels_only = isinstance(basis, Fourier) and self.axes == (0,) and len(self.domain) == len(basis.spatial) + 1
        if channels_only and self.domain[1:] == basis.spatial:
            symbol = self._blocks(0)
            return basis.bounded(symbol.value, symbol.error)
        return super()._symbol(basis)


class Einsum(LinearMap):
    """x -> einsum(equation, weight, x) with an equation such as "oi,bti->bto"; the batch comes first in x and result.

    Ordered by the indices that weight, x and result share, the weight is a family of matrices from what is summed to
    what is new, and the norm is their largest. Every index of x stands in the weight or in the result.
    """

    def __init__(self, equation: str, weight: Tensor, domain: Sequence[int]):
        trial = torch.empty(1, *domain, device="meta", dtype=weight.dtype)
        super().__init__(domain, torch.einsum(equation, weight.to("meta"), trial).shape[1:])
        self.equation = equation
        self.hold("weight", weight)

    @property
    def is_complex(self) -> bool:
        return self.weight.is_complex()

    def indices(self) -> tuple[str, str, str]:
        left, _, result = self.equation.partition("->")
        weight, _, x = left.partition(",")
        return weight, x, result

    def _apply_map(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, self.weight.to(x.dtype), x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        weight, x, result = self.indices()
        return torch.einsum(f"{weight},{result}->{x}", self.weight.to(y.dtype).conj(), y)

    def _norm(self) -> Bracket:
        weight, x, result = self.indices()
        shared = [i for i in weight if i in x and i in result]
        new, summed = [i for i in weight if i in result and i not in x], [i for i in weight if i not in result]
        value = torch.einsum(
            f"{weight}->{''.join([*shared, *new, *(i for i in summed if i in x)])}", self.weight.detach()
        )
        rows = math.prod(value.shape[len(shared) : len(shared) + len(new)])
        blocks = value.reshape(math.prod(value.shape[: len(shared)]), rows, -1)
        rounding = 4 * torch.finfo(torch.float64).eps * self.weight.numel() * torch.linalg.vector_norm(blocks)
        return norm_of_blocks(Symbol(blocks, rounding.reshape(1)))
