"""Segmentation networks that come from optimisation, put together from the layers of the library."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from firmly.errors import SettingsError
from firmly.networks.monotone import MonotoneLayer
from firmly.segment.unrolled import unrolled_head


def unrolled_segmenter(
    in_channels: int, classes: int, size: Sequence[int], depth: int = 10, width: int = 16, coupling: float = 0.5
) -> nn.Sequential:
    """Images (batch, in_channels, *size) -> probabilities: two circular convolutions, then `unrolled_head`."""
    head = unrolled_head(classes, size, depth, coupling)
    return nn.Sequential(
        convolution(in_channels, width, 3, size), nn.ReLU(), convolution(width, classes, 3, size), head
    )


def monotone_segmenter(
    in_channels: int, classes: int, size: Sequence[int], features: int = 16, margin: float = 1.0
) -> nn.Sequential:
    """Images (batch, in_channels, *size) -> scores: a convolutional `MonotoneLayer` and a 1 x 1 convolution.

    The scores move by at most |read| |U| / margin times the image, with U the layer's `input_map`; `certify` proves
    more. Put an `EntropicTV` after it for probabilities that agree among neighbours.
    """
    layer = MonotoneLayer(in_channels, features, margin, spatial=tuple(size))
    return nn.Sequential(layer, convolution(features, classes, 1, size))


def convolution(inputs: int, outputs: int, kernel_size: int, size: Sequence[int]) -> nn.Module:
    if len(size) not in (2, 3):
        raise SettingsError(f"size is that of images or volumes, (height, width) or three numbers, given {tuple(size)}")
    kind = nn.Conv2d if len(size) == 2 else nn.Conv3d
    return kind(inputs, outputs, kernel_size, padding=kernel_size // 2, padding_mode="circular")
