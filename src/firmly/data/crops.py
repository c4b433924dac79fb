"""Random and central crops of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import DataError


class Crops:
    """Random square crops of a list of images, turned and flipped at random.

    Every pixel position of every image is equally likely, so larger images are drawn more often. All randomness comes
    from the `torch.Generator` that `batch` is given.
    """

    def __init__(self, images: Sequence[Tensor], size: int):  # images: (channel, height, width)
        for image in images:
            if min(image.shape[-2:]) < size:
                raise DataError(f"an image of {tuple(image.shape[-2:])} pixels has no crop of {size} x {size}")
            if not image.isfinite().all():
                raise DataError("an image has values that are not finite: remove it or repair it")
        if not images:
            raise DataError("there are no images to take crops from")
        self.images = list(images)
        self.size = size
        areas = [(i.shape[-2] - size + 1) * (i.shape[-1] - size + 1) for i in images]
        self.weights = torch.tensor(areas, dtype=torch.float64)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` crops: (count, channel, size, size)."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return torch.stack([self._crop(self.images[int(i)], generator) for i in chosen])

    def _crop(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[-2:]
        top = int(torch.randint(height - self.size + 1, (), generator=generator))
        left = int(torch.randint(width - self.size + 1, (), generator=generator))
        crop = image[..., top : top + self.size, left : left + self.size]
        symmetry = int(torch.randint(8, (), generator=generator))
        crop = crop.rot90(symmetry % 4, (-2, -1))
        return crop.flip(-1) if symmetry >= 4 else crop


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The size x size pixels in the middle of an image (..., height, width)."""
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise DataError(f"an image of {height} x {width} pixels has no central crop of {size} x {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size]
