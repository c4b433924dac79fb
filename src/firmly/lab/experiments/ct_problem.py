"""The measurement of `firmly run ct`: a real sinogram with most views left out, and phantoms in the same scanner."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.data import Crops, photographs, rebinned, tooth
from firmly.linear import FilteredRadon

FIELD = 384  # detectors of the file that make the field of view


class Problem(NamedTuple):
    """Sinograms are (slices, 1, angles, size) on the scale on which the reference has values in about [0, 1]."""

    B: FilteredRadon  # of the views that are used
    unused: FilteredRadon  # of the views that are left out: an image is tested on them without knowing the truth
    data: Tensor
    unused_data: Tensor
    reference: Tensor  # filtered back projection from all views: (slices, 1, size, size)
    noise: float  # standard deviation of the sinogram where it sees air
    centre: float  # of rotation, in detectors of the file

    @property
    def weighted(self) -> Tensor:
        return self.B.weighted(self.data)


def problem(size: int, every: int) -> Problem:
    """The tooth at size x size pixels from every so many views."""
    sinogram = tooth()
    values = rebinned(sinogram, size, FIELD / size)[:, None]
    views = len(sinogram.angles)
    used = torch.arange(0, views - every + 1, every)
    unused = torch.tensor([i for i in range(views) if i not in set(used.tolist())])
    everything = FilteredRadon((1, size, size), sinogram.angles, size)
    reference = everything.T(everything.weighted(values))
    scale = torch.quantile(reference.flatten(), 0.999)
    values = values / scale
    return Problem(
        FilteredRadon((1, size, size), sinogram.angles[used], size),
        FilteredRadon((1, size, size), sinogram.angles[unused], size),
        values[:, :, used],
        values[:, :, unused],
        reference / scale,
        float(torch.cat([values[..., :3], values[..., -3:]]).std()),
        sinogram.centre,
    )


class Phantoms:
    """Random objects in air, 0 to about 1: overlapping ellipses, some of them holes, textured by photographs."""

    def __init__(self, size: int, split: str):
        self.crops = Crops([i for i in photographs(split) if min(i.shape[-2:]) >= size], size)  # type: ignore[arg-type]
        line = torch.linspace(-1, 1, size)
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        textures = self.crops.batch(count, generator)
        return torch.stack([self._object(texture, generator) for texture in textures])

    def _object(self, texture: Tensor, generator: torch.Generator) -> Tensor:
        image = torch.zeros_like(texture)
        field = self.x**2 + self.y**2 < 0.9
        for _ in range(int(torch.randint(3, 9, (), generator=generator))):
            x, y, width, height, turn, shade = torch.rand(6, generator=generator).tolist()
            cosine, sine = math.cos(math.pi * turn), math.sin(math.pi * turn)
            along = (self.x - x + 0.5) * cosine + (self.y - y + 0.5) * sine
            across = (self.y - y + 0.5) * cosine - (self.x - x + 0.5) * sine
            inside = (along / (0.08 + 0.45 * width)) ** 2 + (across / (0.08 + 0.45 * height)) ** 2 < 1
            value = 0.0 if shade < 0.3 else shade
            image = torch.where(inside & field, value * (0.85 + 0.3 * texture), image)
        return image


def measured(B: FilteredRadon, image: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Weighted data F^(1/2) (R image + white noise)."""
    white = torch.randn(len(image), *B.codomain, generator=generator, dtype=image.dtype)
    return B(image) + noise * B.weighted(white)


def unused_error(p: Problem, image: Tensor) -> float:
    """|R x - y| / |y| over the views that were left out, weighted by the ramp so that it is an error of images."""
    expected = p.unused.weighted(p.unused_data)
    return float((p.unused(image) - expected).norm() / expected.norm())
