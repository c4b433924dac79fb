"""Averages, sums and interpolation along axes (linear), and maxima, sorting and the like (nonexpansive)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.certificates.activations import activation
from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.system import Nonlinear
from firmly.certificates.torch_maps import AxisMaps
from firmly.prox.prior import Slope

# -- linear: one matrix along each axis ----------------------------------------------------------------------------


def along_axes(x: Signal, function: Callable[[Tensor], Tensor], matrices: dict[int, Tensor]) -> Signal:
    """`function` as matrices along axes (axis 0 is the first after the batch), checked on one random input."""
    linear_map = AxisMaps(x.shape[1:], [matrices.get(axis) for axis in range(x.dim() - 1)])
    trial = torch.randn(1, *linear_map.domain, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = function(trial)
    if expected.shape[1:] != linear_map.codomain or not torch.allclose(expected, linear_map(trial), 1e-10, 1e-10):
        raise x.tracer.refuse(f"an operation from {tuple(x.shape)} to {tuple(expected.shape)} that mixes its axes")
    return x.linear(linear_map)


def axis_of_image(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The matrix (out, in) of a linear operation on images (1, 1, size, 2) that leaves their columns apart.

    Two columns, because torch 2.13 interpolates images of width one wrongly with antialias.
    """
    images = torch.eye(size, dtype=torch.float64)[:, None, :, None].repeat(1, 1, 1, 2)
    return function(images)[:, 0, :, 0].T.contiguous()


def spatial_rank(x: Signal, rank: int) -> range:
    if x.dim() != rank + 2:
        raise x.tracer.refuse(f"pooling of {rank} axes of a value of shape {tuple(x.shape)} without batch or channels")
    return range(rank)


def per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    """One entry for each axis, of a number or of a list with one number for all."""
    if not isinstance(value, (tuple, list)):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def average_pool(rank: int, function: Callable[..., Tensor]) -> Callable:
    def rule(
        tracer: Tracer,
        x: Signal,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Signal:
        """Along each axis, the averages over its windows, or their sums if the divisor is given."""
        size, padding = per_axis(kernel_size, rank), per_axis(padding, rank)
        stride = size if stride is None or stride == [] else per_axis(stride, rank)
        divisor = None if divisor_override is None else 1
        matrices = {}
        for a in spatial_rank(x, rank):
            window = ((size[a], 1), (stride[a], 1), (padding[a], 0), ceil_mode, count_include_pad, divisor)
            matrices[a + 1] = axis_of_image(lambda t, w=window: F.avg_pool2d(t, *w), x.shape[2 + a])
        if divisor_override is not None:
            matrices[1] = matrices[1] / divisor_override
        given = (size, stride, padding, ceil_mode, count_include_pad, *([divisor_override] if rank > 1 else []))
        return along_axes(x, lambda t: function(t, *given), matrices)

    return rule


handles(F.avg_pool1d)(average_pool(1, F.avg_pool1d))
handles(F.avg_pool2d)(average_pool(2, F.avg_pool2d))
handles(F.avg_pool3d)(average_pool(3, F.avg_pool3d))


def adaptive_average_pool(rank: int, function: Callable[..., Tensor]) -> Callable:
    def rule(tracer: Tracer, x: Signal, output_size: Any) -> Signal:
        given = per_axis(output_size, rank)
        size = [x.shape[2 + a] if given[a] is None else given[a] for a in spatial_rank(x, rank)]
        matrices = {
            a + 1: axis_of_image(lambda t, s=s: F.adaptive_avg_pool2d(t, (s, 2)), x.shape[2 + a])
            for a, s in enumerate(size)
        }
        return along_axes(x, lambda t: function(t, size), matrices)

    return rule


handles(F.adaptive_avg_pool1d)(adaptive_average_pool(1, F.adaptive_avg_pool1d))
handles(F.adaptive_avg_pool2d)(adaptive_average_pool(2, F.adaptive_avg_pool2d))
handles(F.adaptive_avg_pool3d)(adaptive_average_pool(3, F.adaptive_avg_pool3d))


@handles(F.interpolate)
def interpolate(
    tracer: Tracer,
    x: Signal,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Signal:
    """Linear in the image, a matrix along each axis."""
    rank = x.dim() - 2
    mode_2d = {"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode)
    options = (align_corners, recompute_scale_factor, antialias)
    matrices = {}
    for a in range(rank):
        new = None if size is None else (per_axis(size, rank)[a], 2)
        factor = None if scale_factor is None else (float(per_axis(scale_factor, rank)[a]), 1.0)
        matrices[a + 1] = axis_of_image(
            lambda t, n=new, f=factor: F.interpolate(t, n, f, mode_2d, *options), x.shape[2 + a]
        )
    return along_axes(x, lambda t: F.interpolate(t, size, scale_factor, mode, *options), matrices)


def axes_of(x: Signal, dim: Any) -> list[int] | None:
    """The axes named by `dim`, in order, or None if the batch is among them."""
    dims = range(x.dim()) if dim is None or dim in ((), []) else dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = sorted({int(d) % x.dim() for d in dims})
    return None if 0 in axes else axes


def squeezed(x: Signal, axes: Sequence[int], keepdim: bool) -> Any:
    return x if keepdim else x.reshape([n for axis, n in enumerate(x.shape) if axis not in axes])


def reduction(weight: Callable[[int], float], function: Callable[..., Tensor]) -> Callable:
    def rule(tracer: Tracer, x: Signal, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        axes = axes_of(x, dim)
        if axes is None or dtype is not None:
            return NotImplemented
        matrices = {a - 1: torch.full((1, x.shape[a]), weight(x.shape[a]), dtype=torch.float64) for a in axes}
        return squeezed(along_axes(x, lambda t: function(t, axes, keepdim=True), matrices), axes, keepdim)

    return rule


handles(torch.sum, torch.Tensor.sum)(reduction(lambda n: 1.0, torch.sum))
handles(torch.mean, torch.Tensor.mean)(reduction(lambda n: 1.0 / n, torch.mean))


@handles(torch.cumsum, torch.Tensor.cumsum)
def running_sum(tracer: Tracer, x: Signal, dim: int) -> Any:
    axis = dim % x.dim()
    if axis == 0:
        return NotImplemented
    lower = torch.ones(x.shape[axis], x.shape[axis], dtype=torch.float64).tril()
    return along_axes(x, lambda t: t.cumsum(axis), {axis - 1: lower})


# -- nonexpansive --------------------------------------------------------------------------------------------------


def contraction(x: Signal, shape: Sequence[int], constant: float = 1.0) -> Signal:
    """|v - v'| <= constant |z - z'| for a real value of another shape (without the batch)."""
    if x.is_complex():
        raise x.tracer.refuse("an order of complex values")
    slope = Slope(-1.0, 1.0) if constant == 1.0 else Slope.outward(-constant, constant)
    node = Nonlinear(x.node, slope, "whole", x.tracer.where(), tuple(shape))
    return Signal(x.tracer, x.tracer.system.append(node))


class Unknown:
    """What no bound can use, such as the positions of maxima; refused where it is used."""

    def __init__(self, tracer: Tracer, what: str):
        self.tracer, self.what = tracer, what

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [item for a in given if isinstance(a, (tuple, list)) for item in a]  # an index is nested
        used = next(a for a in given if isinstance(a, cls))
        raise used.tracer.refuse(used.what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.tracer.refuse(self.what)

    def __add__(self, *_: Any) -> Any:
        raise self.tracer.refuse(self.what)

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = __len__ = __iter__ = __add__
    __gt__ = __lt__ = __ge__ = __le__ = __eq__ = __ne__ = __add__  # type: ignore[assignment]
    __hash__ = object.__hash__


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int, windows: int) -> int:
    """The largest number of windows that one pixel lies in."""
    pixels = torch.arange(windows)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return int(torch.bincount(pixels[(pixels >= 0) & (pixels < size)], minlength=1).max())


def maximum_pool(rank: int, function: Callable[..., Any]) -> Callable:
    def rule(
        tracer: Tracer,
        x: Signal,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Signal:
        """The maximum over one window is nonexpansive; a pixel in k windows is counted k times: |v| <= sqrt(k) |z|."""
        if return_indices:
            raise tracer.refuse("the positions of maxima")
        spatial_rank(x, rank)
        size, padding, dilation = (per_axis(value, rank) for value in (kernel_size, padding, dilation))
        stride = size if stride is None or stride == [] else per_axis(stride, rank)
        result = function(torch.empty(x.shape), size, stride, padding, dilation, ceil_mode)
        windows = zip(x.shape[2:], size, stride, padding, dilation, result.shape[2:])
        return contraction(x, result.shape[1:], math.sqrt(math.prod(window_count(*w) for w in windows)))

    return rule


handles(F.max_pool1d, torch.max_pool1d)(maximum_pool(1, F.max_pool1d))
handles(F.max_pool2d, torch.max_pool2d)(maximum_pool(2, F.max_pool2d))
handles(F.max_pool3d, torch.max_pool3d)(maximum_pool(3, F.max_pool3d))


def adaptive_maximum_pool(rank: int, function: Callable[..., Any]) -> Callable:
    def rule(tracer: Tracer, x: Signal, output_size: Any, return_indices: bool = False) -> Signal:
        """Window i of m along an axis of n pixels is floor(i n / m) .. ceil((i + 1) n / m) - 1."""
        if return_indices:
            raise tracer.refuse("the positions of maxima")
        result, count = function(torch.empty(x.shape), output_size), 1
        for a in spatial_rank(x, rank):
            n, m = x.shape[2 + a], result.shape[2 + a]
            windows = [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
            count *= max(sum(pixel in window for window in windows) for pixel in range(n))
        return contraction(x, result.shape[1:], math.sqrt(count))

    return rule


handles(F.adaptive_max_pool1d)(adaptive_maximum_pool(1, F.adaptive_max_pool1d))
handles(F.adaptive_max_pool2d)(adaptive_maximum_pool(2, F.adaptive_max_pool2d))
handles(F.adaptive_max_pool3d)(adaptive_maximum_pool(3, F.adaptive_max_pool3d))


def maximum_of(a: Any, b: Any, sign: float) -> Any:
    """max(a, b) = a + relu(b - a), and min(a, b) = a - relu(a - b), entry by entry (sign -1).

    As a block with slopes [0, 1] it implies |max(a, b) - max(a', b')|^2 <= |a - a'|^2 + |b - b'|^2, and more.
    """
    first, second = (a, b) if isinstance(a, Signal) else (b, a)
    if not isinstance(second, Signal):
        if isinstance(second, Tensor) and torch.broadcast_shapes(second.shape, first.shape) != first.shape:
            raise first.tracer.refuse(f"a maximum of {tuple(first.shape)} and a constant that is larger")
        return activation(first, 0.0, 1.0)
    step = activation(first.combined([(sign, second), (-sign, first)]), 0.0, 1.0)
    return first.combined([(1.0, first), (sign, step)])


@handles(torch.maximum, torch.Tensor.maximum, torch.fmax, joins=True)
def maximum(tracer: Tracer, a: Any, b: Any) -> Signal:
    return maximum_of(a, b, 1.0)


@handles(torch.minimum, torch.Tensor.minimum, torch.fmin, joins=True)
def minimum(tracer: Tracer, a: Any, b: Any) -> Signal:
    return maximum_of(a, b, -1.0)


def extremum(sign: float, result_type: Any) -> Callable:
    """torch.max and torch.min: of two tensors, or along one axis with the positions, which nothing may use."""

    def rule(tracer: Tracer, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, (Signal, Tensor)):
            return maximum_of(x, dim, sign)
        values = extreme_values(tracer, x, dim, keepdim) if dim is not None else NotImplemented
        if values is NotImplemented:
            return NotImplemented
        return result_type((values, Unknown(tracer, "the positions of maxima or minima")))

    return rule


@handles(torch.amax, torch.Tensor.amax, torch.amin, torch.Tensor.amin, torch.logsumexp, torch.Tensor.logsumexp)
def extreme_values(tracer: Tracer, x: Signal, dim: Any = (), keepdim: bool = False) -> Any:
    """Nonexpansive; the gradient of log-sum-exp is a softmax, of norm at most 1."""
    axes = axes_of(x, dim)
    if axes is None:
        return NotImplemented
    kept = contraction(x, [1 if axis in axes else n for axis, n in enumerate(x.shape)][1:])
    return squeezed(kept, axes, keepdim)


handles(torch.max, torch.Tensor.max, joins=True)(extremum(1.0, torch.return_types.max))
handles(torch.min, torch.Tensor.min, joins=True)(extremum(-1.0, torch.return_types.min))


@handles(torch.sort, torch.Tensor.sort)
def sort(tracer: Tracer, x: Signal, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    """|sort(x) - sort(y)| <= |x - y|: the sorted pairing is the one of least distance."""
    if dim % x.dim() == 0:
        return NotImplemented
    return torch.return_types.sort((contraction(x, x.shape[1:]), Unknown(tracer, "the order of a sort")))


@handles(torch.topk, torch.Tensor.topk)
def topk(tracer: Tracer, x: Signal, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """A part of a sort; in no known order if `sorted` is false."""
    axis = dim % x.dim()
    if axis == 0 or not sorted:
        return NotImplemented
    values = contraction(x, [k if a == axis else n for a, n in enumerate(x.shape)][1:])
    return torch.return_types.topk((values, Unknown(tracer, "the positions of the largest entries")))
