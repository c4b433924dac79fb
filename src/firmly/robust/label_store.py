"""What was predicted and what is believed at every pixel of a data set, in a few bytes, through augmentations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.losses import VOID
from firmly.robust.pencil import towards_labels, weights_are_fine

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class View(NamedTuple):
    """A crop of an image of any dimension, resized and then flipped: an augmentation that can be undone.

    `corner` and `extent` are in pixels of the image, `size` is that after scaling (None: the extent), `flips` are the
    axes that are reversed, 0 being the first spatial one.
    """

    corner: tuple[int, ...]
    extent: tuple[int, ...]
    size: tuple[int, ...] | None = None
    flips: tuple[int, ...] = ()

    def of_image(self, image: Tensor) -> Tensor:
        """What the view shows of an image (channel, *spatial), interpolated linearly."""
        return self.shown(self.crop(image))

    def shown(self, maps: Tensor) -> Tensor:
        """Maps (channel, *extent) of the pixels under the view, resized and flipped: (channel, *size)."""
        return self.scaled(maps, self.size or self.extent).flip([axis + 1 for axis in self.flips])

    def of_labels(self, labels: Tensor) -> Tensor:
        """What the view shows of a label map (*spatial): the nearest label, never a mean of two."""
        shown = self.crop(labels.unsqueeze(0)).unsqueeze(0)
        shown = interpolate(shown.double(), size=self.size or self.extent, mode="nearest-exact").to(labels.dtype)[0, 0]
        return shown.flip(self.flips)

    def back(self, maps: Tensor) -> Tensor:
        """Maps (channel, *size) of the view on the pixels (channel, *extent) of the image; laws stay laws."""
        return self.scaled(maps.flip([axis + 1 for axis in self.flips]), self.extent)

    def crop(self, image: Tensor) -> Tensor:
        """The pixels of the image under the view, not copied: (channel, *spatial) -> (channel, *extent)."""
        ends = [start + length for start, length in zip(self.corner, self.extent)]
        if not len(self.corner) == len(self.extent) == len(self.size or self.extent) == image.dim() - 1 or any(
            start < 0 or length < 1 or end > side
            for start, length, end, side in zip(self.corner, self.extent, ends, image.shape[1:], strict=True)
        ):
            raise ShapeError(f"{self} does not lie inside an image of {tuple(image.shape[1:])}")
        return image[(slice(None), *(slice(start, end) for start, end in zip(self.corner, ends, strict=True)))]

    @staticmethod
    def scaled(maps: Tensor, size: tuple[int, ...]) -> Tensor:
        """Means over cells where the maps shrink, linear interpolation where they grow."""
        if tuple(maps.shape[1:]) == tuple(size):
            return maps
        if all(new <= old for new, old in zip(size, maps.shape[1:], strict=True)):
            return interpolate(maps.unsqueeze(0), size=size, mode="area")[0]
        return interpolate(maps.unsqueeze(0), size=size, mode=LINEAR[len(size)], align_corners=False)[0]


class LabelStore(nn.Module):
    """Given labels, and running means of predictions from which believed labels follow in closed form (`label_step`).

    Of every pixel the `kept` largest mean probabilities (all, where there are fewer classes) are stored in half
    precision with their classes, and the rest of the mass is spread over the other classes: 1 + 3 kept bytes, whatever
    the number of classes. The tensors are buffers: they are saved, loaded and moved as those of a model.
    """

    given: Tensor
    classes_kept: Tensor
    means: Tensor

    def __init__(self, labels: Tensor, classes: int, momentum: float = 0.9, kept: int = 3, void: int = VOID):
        """`labels` are integers (images, *spatial); the mean moves by 1 - momentum of the way at every visit."""
        super().__init__()
        if not 2 <= classes <= 255 or kept < 1 or not 0 <= void <= 255:
            raise SettingsError(f"2 to 255 classes of which some are kept, given {classes}, {kept}, void {void}")
        kept = min(kept, classes)
        if not 0 <= momentum <= 0.98:
            raise SettingsError(f"the momentum lies in [0, 0.98], where half precision follows; given {momentum}")
        if labels.is_floating_point() or labels.dim() < 2:
            raise DataError(f"labels are integers (images, *spatial), given {labels.dtype} {tuple(labels.shape)}")
        if bool(((labels != void) & ((labels < 0) | (labels >= classes))).any()):
            raise DataError(f"labels lie between 0 and {classes - 1}, or are {void} where there is none")
        self.classes, self.momentum, self.void = classes, momentum, void
        shape = (labels.shape[0], kept, *labels.shape[1:])
        self.register_buffer("given", labels.to(torch.uint8))
        self.register_buffer("classes_kept", torch.zeros(shape, dtype=torch.uint8, device=labels.device))
        self.register_buffer("means", torch.zeros(shape, dtype=torch.float16, device=labels.device))

    @property
    def bytes_per_pixel(self) -> float:
        return sum(b.numel() * b.element_size() for b in self.buffers()) / self.given.numel()

    @torch.no_grad()
    def update(self, images: Sequence[int], probabilities: Tensor, views: Sequence[View] | None = None) -> None:
        """Take predictions (batch, class, *size) of views of some images into their means; views are undone."""
        if probabilities.dim() != self.given.dim() + 1 or probabilities.shape[:2] != (len(images), self.classes):
            expected = f"({len(images)}, {self.classes}, *size)"
            raise ShapeError(f"probabilities are {expected}, given {tuple(probabilities.shape)}")
        if not bool(((probabilities.sum(1) - 1).abs() <= 1e-2).all()):
            raise DataError("probabilities sum to one over the classes: apply the softmax first")
        for image, view, seen in zip(images, self.whole(images, views), probabilities, strict=True):
            new = view.back(seen.to(self.given.device).float())
            values, classes = view.crop(self.means[image]), view.crop(self.classes_kept[image])
            rate = torch.where(values[:1] > 0, 1 - self.momentum, 1.0).to(new)  # the first visit says all there is
            top = self.dense(values, classes).lerp_(new, rate).topk(values.shape[0], dim=0)
            values.copy_(top.values)
            classes.copy_(top.indices)

    def average(self, images: Sequence[int], views: Sequence[View] | None = None) -> Tensor:
        """Mean predictions (batch, class, *size) under views; uniform where nothing was predicted yet."""
        pairs = zip(images, self.whole(images, views), strict=True)
        return torch.stack([view.shown(self.mean(image, view)) for image, view in pairs])

    def labels(self, images: Sequence[int], views: Sequence[View] | None = None, kappa: float = 1.0) -> Tensor:
        """Believed laws (batch, class, *size): `label_step` of the means and the given labels.

        The given label where nothing was predicted yet, and the mean prediction on void.
        """
        weights_are_fine(kappa, 0.0)
        pairs = zip(images, self.whole(images, views), strict=True)
        return torch.stack([view.shown(self.believed(image, view, kappa)) for image, view in pairs])

    def believed(self, image: int, view: View, kappa: float) -> Tensor:
        """Believed laws (class, *extent) on the pixels under a view."""
        given = view.crop(self.given[image].unsqueeze(0))
        unseen = view.crop(self.means[image])[:1] == 0
        share = torch.where(unseen, 1.0, kappa / (1 + kappa)) * (given != self.void)
        return towards_labels(self.mean(image, view).unsqueeze(0), given, share)[0]

    def mean(self, image: int, view: View) -> Tensor:
        """Mean predictions (class, *extent) on the pixels under a view."""
        return self.dense(view.crop(self.means[image]), view.crop(self.classes_kept[image]))

    def dense(self, values: Tensor, classes: Tensor) -> Tensor:
        """Laws (class, *spatial) from the largest probabilities (kept, *spatial) and their classes."""
        values, seen = values.float(), values[:1] > 0
        total = values.sum(0, keepdim=True)  # above one by rounding only
        divisor = total if len(values) == self.classes else total.clamp(min=1)
        values = torch.where(seen, values / divisor, 1 / self.classes)
        rest = (1 - total).clamp(min=0) / max(self.classes - len(values), 1)
        laws = torch.where(seen, rest, 1 / self.classes).repeat(self.classes, *[1] * (values.dim() - 1))
        return laws.scatter_(0, classes.long(), values)

    def whole(self, images: Sequence[int], views: Sequence[View] | None) -> Sequence[View]:
        """The views, or for none the whole images."""
        if views is not None:
            if len(views) != len(images):
                raise ShapeError(f"{len(images)} images have {len(views)} views")
            return views
        spatial = tuple(self.given.shape[1:])
        return [View((0,) * len(spatial), spatial)] * len(images)
