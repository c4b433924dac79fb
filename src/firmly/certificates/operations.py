"""Linear torch operations on a `Signal`. Importing this module also registers the nonlinear ones."""

from __future__ import annotations

import math
from numbers import Number, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.certificates import activations  # noqa: F401  (registers its rules)
from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.torch_maps import Rearrange, TorchConvolution, rearrange
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
    """Sum of the embeddings of every traced part."""
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
            numbers = torch.arange(math.prod(part.shape[1:])).reshape(part.shape[1:])
            index.narrow(axis - 1, offset, part.shape[axis]).copy_(numbers)
            parts.append((1.0, part.linear(Rearrange(part.shape[1:], index))))
        offset += part.shape[axis]
    return parts[0][1].combined(parts)


# -- shapes --------------------------------------------------------------------------------------------------------


def rearranged(x: Signal, function: Any) -> Signal:
    result = function(torch.empty(x.shape, device="meta"))
    if result.dim() == 0 or result.shape[0] != 1:
        raise x.tracer.refuse(f"a change of shape that moves the batch: {tuple(x.shape)} -> {tuple(result.shape)}")
    return x.linear(rearrange(x.shape[1:], function))


for _function in (
    *(torch.reshape, torch.Tensor.reshape, torch.Tensor.view, torch.flatten, torch.Tensor.flatten),
    *(torch.squeeze, torch.Tensor.squeeze, torch.unsqueeze, torch.Tensor.unsqueeze, torch.unflatten),
    *(torch.permute, torch.Tensor.permute, torch.transpose, torch.Tensor.transpose, torch.movedim),
    *(torch.flip, torch.roll, torch.Tensor.roll, torch.Tensor.flip, torch.Tensor.unflatten, torch.Tensor.__getitem__),
    *(torch.narrow, torch.Tensor.narrow, torch.Tensor.expand, torch.pixel_shuffle, torch.pixel_unshuffle),
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
    fill = {"value": -1.0} if mode == "constant" else {}
    return rearranged(x, lambda numbers: F.pad(numbers.double(), pad, mode, **fill).round().long())


# -- products with weights -----------------------------------------------------------------------------------------


@handles(F.linear)
def linear(tracer: Tracer, x: Signal, weight: Tensor, bias: Tensor | None = None) -> Any:
    if x.dim() != 2:
        return NotImplemented
    return x.linear(Dense(weight))


@handles(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)
def matmul(tracer: Tracer, a: Signal, b: Any) -> Any:
    if isinstance(b, Tensor) and a.dim() == 2 and b.dim() == 2:
        return a.linear(Dense(b.T))
    return NotImplemented


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


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),) * rank


@handles(F.batch_norm)
def batch_norm(
    tracer: Tracer,
    x: Signal,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Signal:
    """In evaluation mode: weight / sqrt(var + eps), channel by channel."""
    if training or running_var is None:
        raise tracer.refuse("batch normalisation in training mode (call .eval() on the network first)")
    factor = torch.rsqrt(running_var.double() + eps)
    factor = factor if weight is None else factor * weight.double()
    return x.linear(Diagonal(factor.reshape(-1, *[1] * (x.dim() - 2)), x.shape[1:]))
