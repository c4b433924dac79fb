"""Data and label noise of the segmentation study."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from firmly.data import LabelledSlices, brain_slices, organ_slices
from firmly.data.label_maps import Split
from firmly.robust import (
    BoundaryJitter,
    BoundaryShift,
    ClassConfusion,
    Corrupted,
    LabelNoise,
    MergedObjects,
    MissingObjects,
    RegionFlips,
    at_rate,
)

DataName = Literal["template", "subject", "ct", "mr"]
MULTIPLE = 4  # of the sides of images, for networks of three levels


class Part(NamedTuple):
    """Images (n, 1, height, width), class numbers (n, height, width), probability maps (n, class, height, width)."""

    images: Tensor
    labels: Tensor
    probabilities: Tensor


class Problem(NamedTuple):
    """One stack of slices: for training, a few clean ones for choices, and those of the test."""

    name: DataName
    classes: tuple[str, ...]
    train: Part
    clean: Part
    test: Part

    @property
    def noises(self) -> dict[str, LabelNoise]:
        """The errors of annotators; contours between tissues move where these fill the image, else outer contours."""
        grown = (1, 3) if self.name in ("template", "subject") else None
        return {
            "dilation": BoundaryShift(1.0, grown),
            "erosion": BoundaryShift(-1.0),
            "jitter": BoundaryJitter(1.0),
            "missing": MissingObjects(0.5),
            "merged": MergedObjects(0.5),
            "confusion": ClassConfusion(0.5),
            "regions": RegionFlips(0.5),
        }

    def corrupted(self, noise: str, rate: float, seed: int) -> Corrupted:
        """Labels for training of which the fraction `rate` is wrong, among all that are foreground before or after."""
        return at_rate(self.noises[noise], self.train.labels, len(self.classes), rate, seed)[1]


def problem(name: DataName) -> Problem:
    def part(split: Split) -> Part:
        found: LabelledSlices
        found = brain_slices(name, split) if name in ("template", "subject") else organ_slices(name, split)
        return Part(*(cropped(t) for t in (found.images, found.labels, found.probabilities)))

    classes = (brain_slices(name) if name in ("template", "subject") else organ_slices(name)).classes
    return Problem(name, classes, part("train"), part("validation"), part("test"))


def cropped(maps: Tensor) -> Tensor:
    """The middle part whose sides are multiples of `MULTIPLE`."""
    for dim in (-2, -1):
        kept = maps.shape[dim] // MULTIPLE * MULTIPLE
        maps = maps.narrow(dim, (maps.shape[dim] - kept) // 2, kept)
    return maps.contiguous()


def overlap(predicted: Tensor, truth: Tensor, classes: int) -> list[float]:
    """The intersection over union of every class that occurs, over all pixels of a stack; NaN for others."""
    out = []
    for k in range(classes):
        a, b = predicted == k, truth == k
        union = int((a | b).sum())
        out.append(int((a & b).sum()) / union if union else float("nan"))
    return out


def mean_overlap(predicted: Tensor, truth: Tensor, classes: int) -> float:
    values = torch.tensor(overlap(predicted, truth, classes))
    return float(values.nanmean())
