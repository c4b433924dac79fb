"""Linear torch operations on a `Signal`. Importing this module also registers the nonlinear ones."""

from __future__ import annotations

from numbers import Number, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.certificates import activations, legendre, loops, normalisation, pooling  # noqa: F401  (register their rules)
from firmly.certificates.pooling import per_axis
from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.torch_maps import AxisMaps, Einsum, Rearrange, TorchConvolution
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap, apply
from firmly.linear.mask import Diagonal


@handles(apply, views=True)  # the identity returns its argument
def linear_map(tracer: Tracer, mapping: LinearMap, x: Signal) -> Signal:
    return x.linear(mapping)


# -- sums and scalings ---------------------------------------------------------------------------------------------


@handles(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, joins=True)
def add(tracer: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Signal:
    if isinstance(a, Signal) and isinstance(b, Signal):
        return a.combined([(1.0, a), (alpha, b)])
    signal, constant, factor = (a, b, 1.0) if isinstance(a, Signal) else (b, a, alpha)
    return with_constant(signal, constant, factor)


@handles(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, joins=True)
def subtract(tracer: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Signal:
    if isinstance(a, Signal) and isinstance(b, Signal):
        return a.combined([(1.0, a), (-alpha, b)])
    signal, constant, factor = (a, b, 1.0) if isinstance(a, Signal) else (b, a, -alpha)
    return with_constant(signal, constant, factor)


@handles(torch.rsub, torch.Tensor.__rsub__, joins=True)
def reversed_subtract(tracer: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Signal:
    """b - alpha a."""
    return subtract(tracer, b, a, alpha=alpha)


def with_constant(signal: Signal, constant: Any, factor: float) -> Any:
    """factor * signal + constant: the increment loses the constant, which must not enlarge the shape."""
    if not isinstance(constant, (Tensor, Number)):
        return NotImplemented
    if isinstance(constant, Tensor) and torch.broadcast_shapes(constant.shape, signal.shape) != signal.shape:
        raise signal.tracer.refuse(f"adding a constant of shape {tuple(constant.shape)} to {tuple(signal.shape)}")
    return signal if factor == 1.0 else signal.scaled(factor)


@handles(torch.neg, torch.Tensor.neg)
def negate(tracer: Tracer, x: Signal) -> Signal:
    return x.scaled(-1.0)


@handles(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, joins=True)
def multiply(tracer: Tracer, a: Any, b: Any) -> Any:
    if isinstance(a, Signal) and isinstance(b, Signal):
        raise tracer.refuse("the product of two traced values (its slope depends on their size)")
    signal, factor = (a, b) if isinstance(a, Signal) else (b, a)
    if not isinstance(factor, Tensor):
        return signal.scaled(float(factor)) if isinstance(factor, Real) else NotImplemented
    if factor.numel() == 1 and factor.dim() <= signal.dim() and not factor.is_complex():
        return signal.scaled(factor.reshape(()))
    if torch.broadcast_shapes(factor.shape, signal.shape) != signal.shape:
        raise tracer.refuse(f"multiplying {tuple(signal.shape)} by a constant of shape {tuple(factor.shape)}")
    if factor.dim() == signal.dim():
        factor = factor[0]
    return signal.linear(Diagonal(factor, signal.shape[1:]))


@handles(torch.div, torch.true_divide, torch.Tensor.div, torch.Tensor.__truediv__, joins=True)
def divide(tracer: Tracer, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if isinstance(b, Signal) or rounding_mode is not None:
        return NotImplemented
    return multiply(tracer, a, 1.0 / b)


@handles(torch.cat, torch.concat, joins=True)
def concatenate(tracer: Tracer, tensors: Any, dim: int = 0) -> Signal:
    """Sum of the embeddings of every traced part; one rearrangement if all are parts of one value."""
    first = next(t for t in tensors if isinstance(t, Signal))
    axis = dim % first.dim()
    if axis == 0:
        raise tracer.refuse("concatenation along the batch")
    total = sum(t.shape[axis] for t in tensors)
    shape = [*first.shape[1:]]
    shape[axis - 1] = total
    parts, offset = [], 0
    for part in tensors:
        if isinstance(part, Signal):
            index = torch.full(shape, -1)
            origin, numbers = rearranged_from(part)
            index.narrow(axis - 1, offset, part.shape[axis]).copy_(numbers)
            parts.append((origin, index))
        offset += part.shape[axis]
    origin = parts[0][0]
    if all(other.node == origin.node for other, _ in parts):  # what one part leaves open, -1, the others fill
        index = torch.stack([index for _, index in parts]).amax(0)
        return origin.linear(Rearrange(origin.shape[1:], index))
    pieces = [(1.0, origin.linear(Rearrange(origin.shape[1:], index))) for origin, index in parts]
    return pieces[0][1].combined(pieces)


def rearranged_from(x: Signal) -> tuple[Signal, Tensor]:
    """The value that `x` is a rearrangement of, and the index of its entries there: `x[i] = origin[index[i]]`."""
    shape, index = x.shape[1:], torch.arange(x.numel())
    node = x.tracer.system.nodes[x.node]
    while isinstance(getattr(node, "map", None), Rearrange):
        index = torch.where(index < 0, index, node.map.index[index])  # type: ignore[union-attr]
        x = Signal(x.tracer, node.parent)  # type: ignore[union-attr]
        node = x.tracer.system.nodes[x.node]
    return x, index.reshape(shape)


@handles(torch.stack, joins=True)
def stack(tracer: Tracer, tensors: Any, dim: int = 0) -> Any:
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim)


@handles(torch.masked_fill, torch.Tensor.masked_fill)
def masked_fill(tracer: Tracer, x: Signal, mask: Tensor, value: Any) -> Any:
    """Constant where the mask is true."""
    return (
        multiply(tracer, x, (~mask).double())
        if isinstance(value, Real) and mask.dtype == torch.bool
        else NotImplemented
    )


@handles(torch.where, torch.Tensor.where, joins=True)
def where(tracer: Tracer, condition: Any, a: Any, b: Any) -> Any:
    """A choice that does not depend on the input: a masked sum of the two branches."""
    if isinstance(condition, Signal):
        raise tracer.refuse("a choice that depends on the data")
    condition = condition != 0
    masks = (condition.double(), (~condition).double())
    parts = [multiply(tracer, part, mask) for part, mask in zip((a, b), masks) if isinstance(part, Signal)]
    return parts[0].combined([(1.0, part) for part in parts])


# -- shapes --------------------------------------------------------------------------------------------------------


def rearranged(x: Signal, function: Any) -> Any:
    """One value, or several where the function cuts into pieces."""
    numbers = torch.arange(x.numel()).reshape(x.shape) + 1  # 0 stands for what the function fills with zeros
    result = function(numbers)
    for part in result if isinstance(result, (tuple, list)) else (result,):
        if part.dim() == 0 or part.shape[0] != 1:
            raise x.tracer.refuse(f"a change of shape that moves the batch: {tuple(x.shape)} -> {tuple(part.shape)}")
    if isinstance(result, (tuple, list)):
        return tuple(x.linear(Rearrange(x.shape[1:], part[0] - 1)) for part in result)
    return x.linear(Rearrange(x.shape[1:], result[0] - 1))


for _function in (
    *(torch.reshape, torch.Tensor.reshape, torch.Tensor.view, torch.flatten, torch.Tensor.flatten),
    *(torch.squeeze, torch.Tensor.squeeze, torch.unsqueeze, torch.Tensor.unsqueeze, torch.unflatten),
    *(torch.permute, torch.Tensor.permute, torch.transpose, torch.Tensor.transpose, torch.movedim),
    *(torch.flip, torch.roll, torch.Tensor.roll, torch.Tensor.flip, torch.Tensor.unflatten, torch.Tensor.__getitem__),
    *(torch.narrow, torch.Tensor.narrow, torch.Tensor.expand, torch.pixel_shuffle, torch.pixel_unshuffle),
    *(torch.select, torch.Tensor.select, torch.index_select, torch.Tensor.index_select, torch.Tensor.repeat),
    *(torch.tile, torch.repeat_interleave, torch.Tensor.repeat_interleave, torch.swapaxes, torch.Tensor.swapaxes),
    *(torch.channel_shuffle, torch.rot90, torch.diagonal, torch.tril, torch.triu, torch.Tensor.movedim, torch.ravel),
    *(torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split, torch.tensor_split, torch.unbind),
    *(torch.Tensor.unbind, torch.broadcast_to, torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as),
):

    @handles(_function, views=True)
    def shape_rule(tracer: Tracer, x: Signal, *args: Any, _function: Any = _function, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in [*args, *kwargs.values()]):  # view(dtype) reads bits anew
            return NotImplemented
        return rearranged(x, lambda t: _function(t, *args, **kwargs))


@handles(torch.clone, torch.Tensor.clone)
@handles(torch.Tensor.contiguous, torch.detach, torch.Tensor.detach, views=True)
def unchanged(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Signal:
    return x


@handles(torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.double, torch.Tensor.float, views=True)
def converted(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Any:
    """To another device or precision; not to integers, which rounds, nor from complex to real, which drops a part."""
    target = next((a for a in [*args, *kwargs.values()] if isinstance(a, (torch.dtype, Tensor))), x.dtype)
    target = target.dtype if isinstance(target, Tensor) else target
    if not (target.is_complex if x.is_complex() else target.is_floating_point):
        raise tracer.refuse(f"a conversion from {x.dtype} to {target}")
    return x if not x.is_complex() or args or kwargs else NotImplemented  # double() and float() take the real part


@handles(F.dropout, F.dropout2d, F.alpha_dropout, views=True)
def dropout(tracer: Tracer, x: Signal, p: float = 0.5, training: bool = True, inplace: bool = False) -> Signal:
    if training and p > 0:
        raise tracer.refuse("dropout in training mode (call .eval() on the network first)")
    return x


@handles(F.pad)
def pad(tracer: Tracer, x: Signal, pad: Any, mode: str = "constant", value: float | None = None) -> Signal:
    return rearranged(x, lambda numbers: F.pad(numbers.double(), pad, mode).round().long())


# -- products with weights -----------------------------------------------------------------------------------------


@handles(F.linear)
def linear(tracer: Tracer, x: Signal, weight: Tensor, bias: Tensor | None = None) -> Any:
    if x.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    return along_axis(x, weight, x.dim() - 1)


def along_axis(x: Signal, weight: Tensor, axis: int) -> Signal:
    """The matrix `weight` (out, in) applied along one axis, the same for all indices of the others."""
    if x.dim() == 2:
        return x.linear(Dense(weight))
    return x.linear(AxisMaps(x.shape[1:], [weight if a == axis else None for a in range(1, x.dim())]))


@handles(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, joins=True)
def matmul(tracer: Tracer, a: Any, b: Any) -> Any:
    """With a constant matrix on one side; a product of two traced values has no bounded slope."""
    if isinstance(a, Signal) and isinstance(b, Signal):
        raise tracer.refuse("the product of two traced values (its slope depends on their size)")
    weight, x = (b, a) if isinstance(a, Signal) else (a, b)
    if weight.dim() == x.dim() == 3 and len(weight) == 1:
        weight = weight[0]
    if weight.dim() != 2 or x.dim() < (2 if x is a else 3):
        return NotImplemented
    return along_axis(x, weight.T, x.dim() - 1) if x is a else along_axis(x, weight, x.dim() - 2)


@handles(torch.einsum, joins=True)
def einsum(tracer: Tracer, equation: str, *operands: Any) -> Any:
    """A constant and a traced value; every index once in each, and the batch first in the value and the result."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    if not arrow or len(operands) != 2 or len(names) != 2 or "." in left:
        return NotImplemented
    (x_name, x), (name, weight) = sorted(zip(names, operands), key=lambda pair: not isinstance(pair[1], Signal))
    if isinstance(weight, Signal):
        raise tracer.refuse("the product of two traced values (its slope depends on their size)")
    repeated = any(len(set(n)) < len(n) for n in (name, x_name, result))
    if repeated or x_name[:1] != result[:1] or x_name[0] in name or set(x_name) - set(name) - set(result):
        return NotImplemented
    return x.linear(Einsum(f"{name},{x_name}->{result}", weight, x.shape[1:]))


@handles(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    tracer: Tracer,
    x: Signal,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    rank = weight.dim() - 2
    if x.dim() != rank + 2:
        return NotImplemented
    stride, dilation = per_axis(stride, rank), per_axis(dilation, rank)
    if isinstance(padding, str):
        if padding == "same" and all(d * (k - 1) % 2 == 0 for k, d in zip(weight.shape[2:], dilation)):
            padding = tuple(d * (k - 1) // 2 for k, d in zip(weight.shape[2:], dilation))
        elif padding == "valid":
            padding = 0
        else:
            return NotImplemented
    padding = per_axis(padding, rank)
    circular = circular_origin(tracer, x, weight, stride, padding, dilation, groups)
    if circular is not None:
        return circular.linear(Convolution(weight, circular.shape[1:], padding="circular"))
    return x.linear(TorchConvolution(weight, x.shape[2:], stride, padding, dilation, groups))


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    tracer: Tracer,
    x: Signal,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """The adjoint of a convolution from the output to the input."""
    rank = weight.dim() - 2
    if x.dim() != rank + 2:
        return NotImplemented
    stride, padding, dilation = per_axis(stride, rank), per_axis(padding, rank), per_axis(dilation, rank)
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, per_axis(output_padding, rank))
    spatial = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in sizes]
    adjoint = TorchConvolution(weight, spatial, stride, padding, dilation, groups)
    if adjoint.codomain != tuple(x.shape[1:]):
        raise tracer.refuse("a transposed convolution with an output padding as large as its stride")
    return x.linear(adjoint.T)


def circular_origin(
    tracer: Tracer, x: Signal, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Signal | None:
    """The value whose circular padding `x` is, if the convolution of `x` is a circular one of the same size."""
    node = tracer.system.nodes[x.node]
    plain = all(s == 1 for s in (*stride, *dilation)) and not any(padding) and groups == 1
    if not plain or not isinstance(getattr(node, "map", None), Rearrange) or any(k % 2 == 0 for k in weight.shape[2:]):
        return None
    origin = Signal(tracer, node.parent)  # type: ignore[union-attr]
    if origin.dim() != x.dim() or any(
        n + k - 1 != m for n, m, k in zip(origin.shape[2:], x.shape[2:], weight.shape[2:])
    ):
        return None
    amounts = [amount for k in reversed(weight.shape[2:]) for amount in (k // 2, k // 2)]
    numbers = torch.arange(origin.numel()).reshape(origin.shape).double()
    wrapped = F.pad(numbers, amounts, "circular")[0].round().long()
    return origin if torch.equal(wrapped.flatten(), node.map.index) else None  # type: ignore[union-attr]
