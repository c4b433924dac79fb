"""Blurs: convolutions that filter every channel alike with a kernel of sum one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import ConditionError, ShapeError
from firmly.linear.convolution import Convolution, Padding


class Blur(Convolution):
    """A x: every channel of an image (channel, *spatial) filtered by one kernel (*size), taken as it is given.

    `Blur.gaussian` and `Blur.motion` make kernels of sum one. See `Convolution` for the origin and the padding.
    """

    def __init__(self, kernel: Tensor, shape: Sequence[int], padding: Padding = "circular"):
        if kernel.dim() != len(shape) - 1:
            raise ShapeError(
                f"Blur filters all channels of {tuple(shape)} by one kernel with {len(shape) - 1} axes, given "
                f"{tuple(kernel.shape)}; use Convolution for kernels (out, in, *size)"
            )
        super().__init__(kernel, shape, padding)

    @classmethod
    def gaussian(cls, width: float, shape: Sequence[int], padding: Padding = "circular") -> Blur:
        """The kernel exp(-|j|^2 / (2 width^2)), cut at four widths; `width` is the standard deviation in pixels."""
        if not width > 0:
            raise ConditionError(f"the width of a Gaussian blur is positive (pixels), given {width}")
        radius = math.ceil(4 * width)
        line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * width**2))
        line = line / line.sum()
        kernel = line
        for _ in range(len(shape) - 2):
            kernel = kernel[..., None] * line
        return cls(kernel, shape, padding)

    @classmethod
    def motion(cls, length: float, angle: float, shape: Sequence[int], padding: Padding = "circular") -> Blur:
        """A straight uniform motion over `length` pixels at `angle` degrees, anticlockwise from the row axis.

        Fine samples of the segment are shared among the four pixels around them (bilinear).
        """
        if not length > 0 or len(shape) != 3:
            raise ConditionError(
                f"a motion blur takes a positive length and a domain (channel, height, width), given {length}, "
                f"{tuple(shape)}"
            )
        radius = math.ceil(length / 2) + 1
        along = torch.linspace(-length / 2, length / 2, 16 * radius + 1, dtype=torch.float64)
        turn = math.radians(angle)
        row, column = radius - along * math.sin(turn), radius + along * math.cos(turn)
        side = 2 * radius + 1
        kernel = torch.zeros(side * side, dtype=torch.float64)
        for down in (0, 1):
            for right in (0, 1):
                i, j = row.floor() + down, column.floor() + right
                share = (1 - (row - i).abs()) * (1 - (column - j).abs())
                kernel.index_add_(0, (i * side + j).long(), share)
        return cls((kernel / kernel.sum()).reshape(side, side), shape, padding)
