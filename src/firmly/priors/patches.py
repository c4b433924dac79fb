"""Images and their overlapping patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ShapeError


def patches_of(images: Tensor, size: int, stride: int = 1) -> Tensor:
    """All size x size patches of images (batch, height, width), flattened: (batch * places, size^2)."""
    if images.dim() != 3 or min(images.shape[1:]) < size or size < 1 or stride < 1:
        raise ShapeError(f"patches of {size} x {size} at every {stride} pixels are taken from images (batch, height, "
                         f"width) that are at least as large, given {tuple(images.shape)}")  # fmt: skip
    return images.unfold(1, size, stride).unfold(2, size, stride).reshape(-1, size * size)


def image_from(patches: Tensor, shape: tuple[int, int, int], stride: int = 1) -> Tensor:
    """The mean of the patches that cover every pixel of images of `shape` (batch, height, width): what `patches_of`
    took apart, put together. Every pixel has to be covered: (length - size) is a multiple of the stride."""
    size = math.isqrt(patches.shape[1])
    batch, height, width = shape
    if size**2 != patches.shape[1] or stride > size or (height - size) % stride or (width - size) % stride:
        raise ShapeError(f"patches {tuple(patches.shape)} at every {stride} pixels do not cover images of {shape}")
    columns = patches.reshape(batch, -1, size * size).mT
    fold = torch.nn.Fold((height, width), size, stride=stride)
    return (fold(columns) / fold(torch.ones_like(columns[:1])))[:, 0]


def cosine_dictionary(size: int, atoms: int) -> Tensor:
    """The overcomplete cosine dictionary for size x size patches: (size^2, atoms), atoms a square of at least size^2.

    Products of one-dimensional atoms cos(i k pi / sqrt(atoms)), of mean zero for k > 0, all of unit norm.
    Source: Elad and Aharon, Image denoising via sparse and redundant representations over learned dictionaries, 2006.
    """
    side = math.isqrt(atoms)
    if side**2 != atoms or side < size:
        raise ShapeError(f"the number of atoms is a square of at least {size}^2, given {atoms}")
    places, orders = torch.arange(size, dtype=torch.float64), torch.arange(side, dtype=torch.float64)
    single = torch.cos(math.pi / side * places[:, None] * orders)
    single[:, 1:] -= single[:, 1:].mean(0)
    single = single / torch.linalg.vector_norm(single, dim=0)
    return torch.kron(single, single)
