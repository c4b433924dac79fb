"""Multi-scale features of pixels and voxels: smoothed values, lengths of gradients, eigenvalues of Hessians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.errors import SettingsError, ShapeError
from firmly.prox.prior import Slope

Padding = Literal["replicate", "circular"]


class PixelFeatures(nn.Module):
    """(batch, channels, *spatial) -> (batch, channels (1 + scales (2 + d)), *spatial), d = 2 or 3 spatial axes.

    For each channel I: I itself, and for each scale (a standard deviation in pixels) the Gaussian G I, the length of
    the gradient |scale grad G I|, and the eigenvalues of scale^2 Hess G I from the largest down. They turn with the
    image by quarter turns, and are differentiable. The kernels are sampled to 4 standard deviations, and exact on
    polynomials of degree 0, 1, 2 respectively. Images are continued periodically ("circular": so `certify`
    bounds the features of images tightly, at any size) or by their border ("replicate").
    """

    def __init__(self, scales: Sequence[float] = (1.0, 2.0, 4.0), padding: Padding = "circular"):
        super().__init__()
        if padding not in get_args(Padding):
            raise SettingsError(f"padding is one of {get_args(Padding)}, given {padding!r}")
        self.padding: Padding = padding
        if not scales or not all(math.isfinite(s) and s > 0 for s in scales):
            raise SettingsError(f"scales are positive numbers of pixels, at least one, given {tuple(scales)}")
        self.scales = tuple(float(s) for s in scales)

    def forward(self, x: Tensor) -> Tensor:
        axes = x.dim() - 2
        if axes not in (2, 3):
            raise ShapeError(f"features are of images (batch, channels, *spatial) in 2 or 3-D, given {tuple(x.shape)}")
        parts = [x]
        for scale in self.scales:
            parts.append(self.derivative(x, scale, [0] * axes))
            slopes = [self.derivative(x, scale, [int(a == b) for b in range(axes)]) for a in range(axes)]
            parts.append(lengths(torch.cat(slopes, 1), axes))
            parts.extend(self.curvatures(x, scale))
        return torch.cat(parts, 1)

    def curvatures(self, x: Tensor, scale: float) -> list[Tensor]:
        """The eigenvalues of the Hessian, from the largest down."""
        axes = x.dim() - 2

        def second(a: int, b: int) -> Tensor:
            return self.derivative(x, scale, [int(a == c) + int(b == c) for c in range(axes)])

        if axes == 2:
            down, across, mixed = second(0, 0), second(1, 1), second(0, 1)
            mean, half = 0.5 * (down + across), lengths(torch.cat([0.5 * (down - across), mixed], 1), 2)
            return [mean + half, mean - half]
        rows = [torch.stack([second(min(a, b), max(a, b)) for b in range(axes)], -1) for a in range(axes)]
        values = torch.linalg.eigvalsh(torch.stack(rows, -2))
        return [values[..., k] for k in reversed(range(axes))]

    def derivative(self, x: Tensor, scale: float, orders: Sequence[int]) -> Tensor:
        """scale^(sum of orders) times the derivative of the smoothed image, by short convolutions along the axes."""
        channels, axes = x.shape[1], len(orders)
        convolve = F.conv2d if axes == 2 else F.conv3d
        for axis, order in enumerate(orders):
            weight = kernel(scale, order)
            shape = [len(weight) if a == axis else 1 for a in range(axes)]
            padded = self.padded(x, axis, len(weight) // 2)
            weight = weight.to(x.device, x.dtype).reshape(1, 1, *shape).repeat(channels, 1, *[1] * axes)
            x = convolve(padded, weight, groups=channels)
        return x

    def padded(self, x: Tensor, axis: int, reach: int) -> Tensor:
        """The image continued by `reach` pixels on both sides of one axis."""
        size, last = x.shape[2 + axis], x.dim() - 3 - axis
        if self.padding == "circular" and reach > size:  # F.pad goes round once only
            return x.index_select(2 + axis, torch.arange(-reach, size + reach, device=x.device) % size)
        return F.pad(x, [0] * (2 * last) + [reach] * 2 + [0] * (2 * axis), mode=self.padding)

    def count(self, channels: int, axes: int = 2) -> int:
        """How many features images with so many channels have."""
        return channels * (1 + len(self.scales) * (2 + axes))

    def extra_repr(self) -> str:
        return f"scales={self.scales}, padding={self.padding!r}"


def kernel(scale: float, order: int) -> Tensor:
    """scale^order times the derivative of a Gaussian of this order, to be correlated with, in float64."""
    reach = max(1, math.ceil(4 * scale))
    t = torch.arange(-reach, reach + 1, dtype=torch.float64)
    gauss = (-t.square() / (2 * scale**2)).exp()
    gauss = gauss / gauss.sum()
    if order == 0:
        return gauss
    if order == 1:
        weight = t * gauss
        return scale * weight / (weight * t).sum()
    weight = (t.square() - (gauss * t.square()).sum()) * gauss  # of sum zero
    return scale**2 * weight / ((weight * t.square()).sum() / 2)


def lengths(v: Tensor, parts: int) -> Tensor:
    """|v| over the parts: (batch, parts * channels, *spatial) -> (batch, channels, *spatial); gradient 0 at 0."""
    if has_torch_function((v,)):
        return handle_torch_function(lengths, (v,), v, parts)
    return torch.linalg.vector_norm(v.unflatten(1, (parts, -1)), dim=1)


@handles(lengths)
def traced_lengths(tracer: Tracer, v: Signal, parts: int) -> Signal:
    """v -> (|v|, 0, ..., 0) does not expand: ||v| - |v'|| <= |v - v'|, for every pixel."""
    return v.nonlinear(Slope(-1.0, 1.0), "group")[:, : v.shape[1] // parts]
