"""Label noise that looks like annotators: moved contours, forgotten and merged objects, confused classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.robust.contours import move_contours
from firmly.robust.losses import VOID

BISECTIONS = 14
CLOSE = 2e-3  # to the rate asked for
LONGEST = 64.0  # pixels that a contour may move in the search of `at_rate`


class Corrupted(NamedTuple):
    """Labels after an annotator's errors, and what the errors were.

    `labels` and `changed` are (batch, *spatial), `rate` is the fraction of valid pixels that changed, and
    `foreground_rate` that among those which are not background (class 0) before or after. `transition[j, k]` is the
    fraction of the valid pixels of class j that are now k (the identity for classes that do not occur).
    """

    labels: Tensor
    changed: Tensor
    rate: float
    foreground_rate: float
    transition: Tensor


@dataclass(frozen=True)
class LabelNoise:
    """An error of annotators, as strong as `amount`: model(labels, classes, seed) -> `Corrupted`.

    Labels are integers (batch, *spatial), void where nobody labelled: void pixels stay void, and no object or contour
    sees them. Image i of the batch has random numbers of its own, from (seed, i) alone: the errors do not depend on
    `amount` otherwise, and so grow with it.
    """

    amount: float

    def __call__(self, labels: Tensor, classes: int, seed: int = 0, void: int = VOID) -> Corrupted:
        valid = valid_labels(labels, classes, void)
        images = labels.cpu().long()
        out = images.clone()
        for index, (image, known) in enumerate(zip(images, valid.cpu(), strict=True)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
            if bool(known.any()):
                out[index] = torch.where(known, self.of_image(image, known, classes, generator), image)
        return compared(labels, out.to(labels), classes, void)

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """New class numbers (*spatial), any where not `known`."""
        raise TypeError(
            f"{type(self).__name__} says nothing of images: use one of the models, BoundaryJitter(2.0), say"
        )


@dataclass(frozen=True)
class BoundaryShift(LabelNoise):
    """Contours at the wrong place: the `grown` classes are dilated by `amount` pixels, eroded where it is negative.

    `move_contours` with this offset: a contour between a grown class and another moves by `amount`, the others stay.
    `grown=None` is every class but background, so that only outer contours move.
    """

    grown: tuple[int, ...] | None = None

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        grown = range(1, classes) if self.grown is None else self.grown
        if not all(0 <= k < classes for k in grown):
            raise SettingsError(f"grown classes lie between 0 and {classes - 1}, given {tuple(grown)}")
        offsets = torch.tensor([self.amount * (k in grown) for k in range(classes)])
        return move_contours(torch.where(known, image, VOID)[None], offsets)[0]


@dataclass(frozen=True)
class BoundaryJitter(LabelNoise):
    """Trembling contours: the class of x + u(x), u a smooth random displacement of root mean square `amount` pixels.

    u is white noise under a Gaussian of standard deviation `smoothness` pixels, one field for each axis.
    """

    smoothness: float = 4.0

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        grid = torch.meshgrid(*(torch.arange(n) for n in image.shape), indexing="ij")
        there = []
        for axis, at in enumerate(grid):
            u = self.amount * smooth_noise(image.shape, self.smoothness, generator)
            there.append((at + u).round().long().clamp(0, image.shape[axis] - 1))
        moved, seen = image[tuple(there)], known[tuple(there)]
        return torch.where(seen, moved, image)


@dataclass(frozen=True)
class MissingObjects(LabelNoise):
    """Forgotten objects: every connected region of a class but background becomes background with probability `amount`.

    `largest` limits the objects that can be overlooked to so many pixels (None: all can).
    """

    largest: int | None = None

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        check_probability(self)
        out = image.clone()
        for k in range(1, classes):
            objects, count = connected((image == k) & known)
            forgotten = torch.rand(count + 1, generator=generator) < self.amount
            if self.largest is not None:
                forgotten &= torch.bincount(objects.flatten(), minlength=count + 1) <= self.largest
            forgotten[0] = False
            out[forgotten[objects]] = 0
        return out


@dataclass(frozen=True)
class MergedObjects(LabelNoise):
    """Objects taken for one: every connected region becomes, with probability `amount`, part of the neighbour.

    The neighbour is the class that it has the longest border with (background only if there is no other).
    """

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        check_probability(self)
        out = image.clone()
        for k in range(1, classes):
            objects, count = connected((image == k) & known)
            chosen = torch.rand(count + 1, generator=generator) < self.amount
            border = torch.zeros(count + 1, classes)
            for axis in range(image.dim()):
                a, b = (slice(None),) * axis + (slice(1, None),), (slice(None),) * axis + (slice(None, -1),)
                for here, there in ((a, b), (b, a)):
                    touching = (objects[here] > 0) & (objects[there] == 0) & known[there]
                    pairs = objects[here][touching] * classes + image[there][touching]
                    border += torch.bincount(pairs, minlength=border.numel()).reshape(border.shape)
            border[:, 0] *= 1e-6
            chosen &= border.sum(1) > 0
            chosen[0] = False
            out = torch.where(chosen[objects], border.argmax(1)[objects], out)
        return out


@dataclass(frozen=True)
class ClassConfusion(LabelNoise):
    """Classes taken for others in patches: the fraction `amount` of the pixels of class j becomes class k.

    `pairs` are the (j, k) that are confused; None: every class with the next one, the last with the first but
    background. The patches are where a smooth random field is below its quantile in the image, about `smoothness`
    pixels wide; 0 is every pixel on its own.
    """

    pairs: tuple[tuple[int, int], ...] | None = None
    smoothness: float = 3.0

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        check_probability(self)
        if self.pairs is None and classes == 2:
            raise SettingsError("one class and background have no usual confusion: give pairs=((1, 0),), say")
        pairs = [(j, j % (classes - 1) + 1) for j in range(1, classes)] if self.pairs is None else self.pairs
        field = smooth_noise(image.shape, self.smoothness, generator)
        out = image.clone()
        for j, k in pairs:
            if not (0 <= j < classes and 0 <= k < classes):
                raise SettingsError(f"confused classes lie between 0 and {classes - 1}, given {(j, k)}")
            here = (image == j) & known
            level = torch.argsort(torch.argsort(field[here])).double() + 0.5
            out[here] = torch.where(level < self.amount * int(here.sum()), k, image[here])
        return out


@dataclass(frozen=True)
class RegionFlips(LabelNoise):
    """Regions of a wrong class: in each block of `block` pixels, each class there becomes, with probability `amount`,

    another class of the data set, uniformly drawn.
    """

    block: int = 8

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        check_probability(self)
        counts = [-(-n // self.block) for n in image.shape]
        draws = torch.rand(*counts, classes, generator=generator)
        steps = torch.randint(1, classes, (*counts, classes), generator=generator)
        grid = torch.meshgrid(*(torch.arange(n) // self.block for n in image.shape), indexing="ij")
        here = (*grid, torch.where(known, image, 0))
        return torch.where(draws[here] < self.amount, (image + steps[here]) % classes, image)


@dataclass(frozen=True)
class InTurn(LabelNoise):
    """Several errors one after the other, each `amount` times as strong as it says."""

    noises: tuple[LabelNoise, ...] = ()

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        for noise in self.noises:
            one = replace(noise, amount=noise.amount * self.amount)
            image = torch.where(known, one.of_image(image, known, classes, generator), image)
        return image


def at_rate(
    noise: LabelNoise, labels: Tensor, classes: int, rate: float, seed: int = 0, void: int = VOID
) -> tuple[LabelNoise, Corrupted]:
    """The model with the amount at which the `foreground_rate` of these labels is `rate`, by bisection; and its errors.

    The sign of the amount is kept. What an error that comes in whole objects attains is in the second result. Raises
    `SettingsError` where even the largest amount (1, or 64 pixels) does not come within 0.02 of the rate.
    """
    if not 0 <= rate < 1:
        raise SettingsError(f"the rate lies in [0, 1), given {rate}")
    sign = -1.0 if noise.amount < 0 else 1.0
    bounded = not isinstance(noise, (BoundaryShift, BoundaryJitter))
    low, high = 0.0, 1.0

    def tried(amount: float) -> tuple[LabelNoise, Corrupted]:
        model = replace(noise, amount=sign * amount)
        return model, model(labels, classes, seed, void)

    best = tried(0.0)
    if rate == 0:
        return best
    while not bounded and high < LONGEST and tried(high)[1].foreground_rate < rate:
        low, high = high, 2 * high
    last = tried(high)
    for model in (best, last):
        best = min(best, model, key=lambda found: abs(found[1].foreground_rate - rate))
    for _ in range(BISECTIONS):
        if abs(best[1].foreground_rate - rate) < CLOSE:
            break
        middle = (low + high) / 2
        found = tried(middle)
        best = min(best, found, key=lambda f: abs(f[1].foreground_rate - rate))
        low, high = (middle, high) if found[1].foreground_rate < rate else (low, middle)
    if last[1].foreground_rate < rate - 0.02:
        raise SettingsError(
            f"{noise} changes at most {last[1].foreground_rate:.2f} of the foreground of these labels, asked for {rate}"
        )
    return best


def compared(before: Tensor, after: Tensor, classes: int, void: int = VOID) -> Corrupted:
    """What changed between two label maps."""
    valid = before != void
    changed = (before != after) & valid
    foreground = valid & ((before != 0) | (after != 0))
    counts = torch.bincount(before[valid].long() * classes + after[valid].long(), minlength=classes**2)
    counts = counts.reshape(classes, classes).double()
    rows = counts.sum(1, keepdim=True)
    transition = torch.where(rows > 0, counts / rows.clamp(min=1), torch.eye(classes).to(counts))
    rates = [float(changed.sum()) / max(int(part.sum()), 1) for part in (valid, foreground)]
    return Corrupted(after, changed, *rates, transition)


def valid_labels(labels: Tensor, classes: int, void: int = VOID) -> Tensor:
    """Where labels are not void, once they are integers (batch, *spatial) of existing classes."""
    if labels.is_floating_point() or labels.is_complex() or labels.dim() < 2:
        raise DataError(f"labels are integers (batch, *spatial), given {labels.dtype} {tuple(labels.shape)}")
    valid = labels != void
    if classes < 2 or bool((valid & ((labels < 0) | (labels >= classes))).any()):
        raise DataError(f"labels lie between 0 and {classes - 1}, or are {void} where there is none")
    return valid


def check_probability(noise: LabelNoise) -> None:
    if not 0 <= noise.amount <= 1:
        raise SettingsError(f"the amount of {type(noise).__name__} is a probability, given {noise.amount}")


def connected(inside: Tensor) -> tuple[Tensor, int]:
    """The number (1, 2 ...) of the connected region of every pixel, 0 outside, and how many there are."""
    from scipy.ndimage import label

    numbers, count = label(inside.numpy())  # type: ignore[misc]
    return torch.from_numpy(numbers).long(), int(count)


def smooth_noise(shape: torch.Size, smoothness: float, generator: torch.Generator) -> Tensor:
    """White noise under a Gaussian, scaled to variance one over the image; continued by reflection."""
    from scipy.ndimage import gaussian_filter

    if not smoothness >= 0:
        raise SettingsError(f"the smoothness is a number of pixels of at least 0, given {smoothness}")
    white = torch.randn(shape, generator=generator, dtype=torch.float64)
    field = torch.from_numpy(gaussian_filter(white.numpy(), smoothness)) if smoothness > 0 else white
    return field / field.square().mean().sqrt().clamp(min=1e-12)
