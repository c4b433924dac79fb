"""What the common ONNX operators compute, with torch. Source: the operator reference of ONNX, opsets 7 to 22.

Every function takes the inputs of a node (None for those left out) and its attributes by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.lab.onnx_shapes import (
    concat,
    depth_to_space,
    expand,
    flatten,
    gather,
    integers,
    pad,
    padded,
    refuse,
    reshape,
    resize,
    slices,
    split,
    squeeze,
    transpose,
    unsqueeze,
)

# -- products with weights -----------------------------------------------------------------------------------------


def gemm(a: Any, b: Any, c: Any = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Any:
    product = torch.matmul(a.transpose(0, 1) if transA else a, b.transpose(0, 1) if transB else b)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else product + beta * c


def window(
    x: Any, kernel: Sequence[int], strides: Any, dilations: Any, pads: Any, auto_pad: str
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and the padding before and after along every axis."""
    rank = len(kernel)
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations):
            missing = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            half = missing // 2
            before.append(half if auto_pad == "SAME_UPPER" else missing - half)
            after.append(missing - before[-1])
        return strides, dilations, before, after
    pads = [0] * (2 * rank) if pads is None or auto_pad == "VALID" else list(pads)
    return strides, dilations, pads[:rank], pads[rank:]


def conv(
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: Any = None,
    group: int = 1,
    kernel_shape: Any = None,
    pads: Any = None,
    strides: Any = None,
) -> Any:
    strides, dilations, before, after = window(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    if before == after:
        return function(x, weight, bias, strides, before, dilations, group)
    return function(padded(x, before, after), weight, bias, strides, 0, dilations, group)


def conv_transpose(
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: Any = None,
    group: int = 1,
    kernel_shape: Any = None,
    output_padding: Any = None,
    output_shape: Any = None,
    pads: Any = None,
    strides: Any = None,
) -> Any:
    strides, dilations, before, after = window(x, weight.shape[2:], strides, dilations, pads, "NOTSET")
    if auto_pad != "NOTSET" or output_shape is not None or before != after:
        raise refuse("ConvTranspose with auto_pad, output_shape or one-sided pads")
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    return function(x, weight, bias, strides, before, list(output_padding or [0] * len(before)), group, dilations)


def batch_normalization(
    x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0, spatial: int = 1,
) -> Any:  # fmt: skip
    return F.batch_norm(x, mean, var, scale, bias, bool(training_mode), 1 - momentum, epsilon)


def layer_normalization(x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
    shape = list(x.shape[axis % x.dim() :])
    return F.layer_norm(x, shape, scale, bias, epsilon)


def instance_normalization(x: Any, scale: Any, bias: Any, epsilon: float = 1e-5) -> Any:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


# -- pooling and reductions ----------------------------------------------------------------------------------------


def max_pool(
    x: Any, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Any = None, pads: Any = None,
    storage_order: int = 0, strides: Any = None,
) -> Any:  # fmt: skip
    strides, dilations, before, after = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_shape) - 1]
    fits = before == after and all(2 * p <= k for p, k in zip(before, kernel_shape))
    x, padding = (x, before) if fits else (padded(x, before, after, -math.inf), [0] * len(before))
    return function(x, list(kernel_shape), strides, padding, dilations, bool(ceil_mode))


def average_pool(
    x: Any, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Any = None, pads: Any = None, strides: Any = None,
) -> Any:  # fmt: skip
    strides, dilations, before, after = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    if any(d != 1 for d in dilations) or before != after:
        raise refuse("AveragePool with dilations or one-sided pads")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel_shape) - 1]
    return function(x, list(kernel_shape), strides, before, bool(ceil_mode), bool(count_include_pad))


def reduce_with(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        if axes is None and noop_with_empty_axes:
            return x
        dims = list(range(x.dim())) if axes is None else integers(axes)
        return function(x, dims, bool(keepdims))

    return run


def clip(x: Any, low: Any = None, high: Any = None, min: Any = None, max: Any = None) -> Any:
    low, high = (min if low is None else low), (max if high is None else high)
    ends = {k: float(v) for k, v in (("min", low), ("max", high)) if v is not None}
    return torch.clamp(x, **ends) if ends else x


def softmax(x: Any, axis: int = -1, flattens: bool = False) -> Any:
    if flattens and axis % x.dim() != x.dim() - 1:
        raise refuse("Softmax of opset below 13 over several axes")
    return torch.softmax(x, axis)


def accumulate(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Max, Min and Sum take any number of inputs."""

    def run(*values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return run


def cast(x: Any, to: int, saturate: int = 1, **_: Any) -> Any:
    floating = to in (1, 10, 11, 16)  # FLOAT, FLOAT16, DOUBLE, BFLOAT16: all run in double precision
    kinds = {6: torch.int32, 7: torch.int64, 9: torch.bool, 2: torch.uint8, 3: torch.int8}
    if not floating and to not in kinds:
        raise refuse(f"Cast to the type {to}")
    return x.to(torch.float64 if floating else kinds[to])


def shape_of(x: Any, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end])


def constant_of_shape(shape: Tensor, value: Tensor | None = None) -> Tensor:
    value = torch.zeros(1, dtype=torch.float64) if value is None else value
    value = value.double() if value.is_floating_point() else value
    return value.expand(integers(shape)).clone()


def dropout(x: Any, ratio: Any = None, training_mode: Any = None, **_: Any) -> Any:
    return F.dropout(x, 0.5, training=training_mode is not None and bool(training_mode))


def selu(x: Any, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Any:
    if abs(alpha - 1.6732632423543772) > 1e-6 or abs(gamma - 1.0507009873554805) > 1e-6:
        raise refuse("Selu with other constants than those of self-normalising networks")
    return F.selu(x)


def hard_sigmoid(x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return torch.clamp(alpha * x + beta, min=0.0, max=1.0)


def gelu(x: Any, approximate: str = "none") -> Any:
    return F.gelu(x, approximate=approximate)


def swish(x: Any, alpha: float = 1.0) -> Any:
    return F.silu(x) if alpha == 1.0 else F.silu(alpha * x) / alpha


def prelu(x: Any, slope: Tensor) -> Any:
    return F.prelu(x, slope.flatten())


def cumulative_sum(x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> Any:
    if exclusive or reverse:
        raise refuse("CumSum that is exclusive or reversed")
    return torch.cumsum(x, int(axis))


OPERATORS: dict[str, Callable[..., Any]] = {
    "Gemm": gemm,
    "MatMul": torch.matmul,
    "Einsum": lambda *operands, equation: torch.einsum(equation, *operands),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Neg": torch.neg,
    "Identity": lambda x: x,
    "Dropout": dropout,
    "Cast": cast,
    "CastLike": lambda x, like: x.to(like.dtype),
    "Shape": shape_of,
    "ConstantOfShape": constant_of_shape,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Concat": concat,
    "Slice": slices,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Split": split,
    "Gather": gather,
    "Pad": pad,
    "Expand": expand,
    "DepthToSpace": depth_to_space,
    "Resize": resize,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.dim())), True),
    "GlobalMaxPool": lambda x: torch.amax(x, list(range(2, x.dim())), True),
    "ReduceMean": reduce_with(torch.mean),
    "ReduceSum": reduce_with(torch.sum),
    "ReduceMax": reduce_with(torch.amax),
    "ReduceMin": reduce_with(torch.amin),
    "ReduceLogSumExp": reduce_with(torch.logsumexp),
    "CumSum": cumulative_sum,
    "Sum": accumulate(lambda a, b: a + b),
    "Max": accumulate(torch.maximum),
    "Min": accumulate(torch.minimum),
    "Clip": clip,
    "Relu": torch.relu,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "PRelu": prelu,
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Selu": selu,
    "Celu": lambda x, alpha=1.0: F.celu(x, alpha),
    "Gelu": gelu,
    "TwiceGelu": lambda x: 2.0 * F.gelu(x),  # of the patterns, no operator of ONNX
    "Swish": swish,
    "HardSigmoid": hard_sigmoid,
    "Sigmoid": torch.sigmoid,
    "HardSwish": F.hardswish,
    "Tanh": torch.tanh,
    "Softplus": lambda x: F.softplus(x),
    "Softsign": F.softsign,
    "Mish": F.mish,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Atan": torch.atan,
    "Asinh": torch.asinh,
    "Abs": torch.abs,
    "Softmax": softmax,
    "LogSoftmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Pow": torch.pow,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Equal": torch.eq,
    "Not": torch.logical_not,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Where": torch.where,
    "Range": lambda start, end, step: torch.arange(start.item(), end.item(), step.item()),
}
