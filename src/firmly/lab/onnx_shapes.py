"""Shapes in ONNX: what rearranges, cuts, pads and resizes, with torch. Source: the operator reference of ONNX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class UnknownOperator(Exception):
    """A variant of an operator that has no meaning here; the text says which."""


def refuse(what: str) -> UnknownOperator:
    return UnknownOperator(what)


def integers(value: Any) -> list[int]:
    return [int(v) for v in value.flatten()] if isinstance(value, Tensor) else [int(v) for v in value]


def padded(x: Any, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Any:
    if not any(before) and not any(after):
        return x
    return F.pad(x, [n for pair in zip(reversed(before), reversed(after)) for n in pair], "constant", value)


def reshape(x: Any, shape: Any, allowzero: int = 0) -> Any:
    sizes = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(integers(shape))]
    return x.reshape(sizes)


def flatten(x: Any, axis: int = 1) -> Any:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape([math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def transpose(x: Any, perm: Any = None) -> Any:
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.dim()))))


def concat(*parts: Any, axis: int) -> Any:
    return torch.cat(list(parts), axis)


def slices(x: Any, starts: Any = (), ends: Any = (), axes: Any = None, steps: Any = None) -> Any:
    starts, ends = integers(starts), integers(ends)
    axes = list(range(len(starts))) if axes is None else integers(axes)
    steps = [1] * len(starts) if steps is None else integers(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps):
        index = torch.arange(x.shape[axis])[slice(start, end, step) if step > 0 else slice(None)]
        if step < 0:
            index = torch.tensor(list(range(x.shape[axis]))[slice(start, end if end >= -x.shape[axis] else None, step)])
        x = torch.index_select(x, axis % x.dim(), index.long())
    return x


def squeeze(x: Any, axes: Any = None) -> Any:
    if axes is None:
        raise refuse("Squeeze without axes")
    for axis in sorted((a % x.dim() for a in integers(axes)), reverse=True):
        x = x.squeeze(axis)
    return x


def unsqueeze(x: Any, axes: Any) -> Any:
    axes = integers(axes)
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


def split(x: Any, sizes: Any = None, axis: int = 0, num_outputs: int | None = None, split: Any = None) -> Any:
    sizes = split if sizes is None else sizes
    if sizes is None:
        if num_outputs is None:
            raise refuse("Split without sizes")
        sizes = -(-x.shape[axis] // num_outputs)
        return torch.split(x, sizes, axis)
    return torch.split(x, integers(sizes), axis)


def gather(x: Any, indices: Tensor, axis: int = 0) -> Any:
    size = x.shape[axis]
    flat = torch.where(indices < 0, indices + size, indices).flatten().long()
    taken = torch.index_select(x, axis % x.dim(), flat)
    axis = axis % x.dim()
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def pad(x: Any, pads: Any = None, value: Any = None, axes: Any = None, mode: str = "constant") -> Any:
    amounts = integers(pads)
    rank = len(amounts) // 2
    places = list(range(x.dim())) if axes is None else [a % x.dim() for a in integers(axes)]
    before, after = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(places):
        before[axis], after[axis] = amounts[i], amounts[rank + i]
    fill = float(value) if isinstance(value, (Tensor, float, int)) else 0.0
    if mode == "constant":
        return padded(x, before, after, fill)
    spatial = [n for pair in zip(reversed(before[2:]), reversed(after[2:])) for n in pair]
    if any(before[:2]) or any(after[:2]):
        raise refuse(f"Pad of batch or channels in mode {mode}")
    return F.pad(x, spatial, {"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def expand(x: Any, shape: Any) -> Any:
    sizes = integers(shape)
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(sizes)))


def depth_to_space(x: Any, blocksize: int, mode: str = "DCR") -> Any:
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    x = x.reshape([n, blocksize, blocksize, c // blocksize**2, h, w]).permute([0, 3, 4, 1, 5, 2])
    return x.reshape([n, c // blocksize**2, h * blocksize, w * blocksize])


def resize(
    x: Any, roi: Any = None, scales: Any = None, sizes: Any = None, mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, antialias: int = 0, **others: Any,
) -> Any:  # fmt: skip
    """The settings that are those of torch; anything else is refused."""
    coordinates, unsupported = coordinate_transformation_mode, {k for k, v in others.items() if v}
    new = None if sizes is None else integers(sizes)[2:]
    factors = [float(s) for s in scales.flatten()][2:] if new is None else None
    if mode == "nearest":
        doubling = factors is not None and all(f == round(f) for f in factors)
        exact = coordinates == "asymmetric" and nearest_mode == "floor"
        same = exact or (doubling and coordinates == "half_pixel" and nearest_mode.startswith("round"))
        name, corners = "nearest", None
    else:
        same = coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
        same = same and (mode != "cubic" or cubic_coeff_a == -0.75) and not antialias
        name = {"linear": ("linear", "bilinear", "trilinear")[x.dim() - 3], "cubic": "bicubic"}[mode]
        corners = coordinates == "align_corners"
    stretched = others.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if not same or not stretched or unsupported - {"extrapolation_value", "keep_aspect_ratio_policy"}:
        raise refuse(f"Resize with mode {mode}, {coordinates} and {nearest_mode}")
    return F.interpolate(x, new, factors, name, corners)
