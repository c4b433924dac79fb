"""Data to classify: handwritten digits, pictures of clothes, and two spirals in the plane."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from firmly.data import fashion_mnist, mnist
from firmly.errors import SettingsError

Data = Literal["digits", "mnist", "fashion-mnist", "spirals"]
EXTENT = 1.25  # spirals lie in [-EXTENT, EXTENT]^2


class Samples(NamedTuple):
    x: Tensor  # (count, features), float32, pixels in [0, 1]
    labels: Tensor  # (count,), int64


class Split(NamedTuple):
    """Training, validation and test samples; `side` is that of a picture, None in the plane."""

    told: str
    train: Samples
    validation: Samples
    test: Samples
    classes: int
    side: int | None

    @property
    def features(self) -> int:
        return self.train.x.shape[1]


def read(data: Data, train: int, test: int, seed: int) -> Split:
    """At most `train` training samples and a quarter as many to validate, and at most `test` of the test samples.

    "digits" come with scikit-learn and are divided at random, the first 60 percent for training, 20 for validation and
    20 for the test. MNIST and Fashion-MNIST have test samples of their own; the others come from their training part,
    at random. Points on
    spirals are drawn. Raises `SettingsError` without scikit-learn.
    """
    generator = torch.Generator().manual_seed(seed)
    if data == "spirals":
        parts = [spirals(n, generator) for n in (train, max(1, train // 4), test)]
        return Split("points on two spirals", *parts, 2, None)
    if data == "digits":
        images, labels = digits()
        order = torch.randperm(len(images), generator=generator)
        ends = [int(0.6 * len(images)), int(0.8 * len(images))]
        found = [Samples(images[part], labels[part]) for part in order.tensor_split(ends)]
        parts = [Samples(p.x[:n], p.labels[:n]) for p, n in zip(found, (train, max(1, train // 4), test))]
        return Split("handwritten digits of 8 × 8 pixels (scikit-learn)", *parts, 10, 8)
    load = {"mnist": mnist, "fashion-mnist": fashion_mnist}[data]
    known, held_out = load("train"), load("test")
    order = torch.randperm(len(known.images), generator=generator)[: train + train // 4]
    chosen = [order[:train], order[train:]]
    parts = [Samples(known.images[i].flatten(1).float() / 255, known.labels[i]) for i in chosen]
    parts.append(Samples(held_out.images[:test].flatten(1).float() / 255, held_out.labels[:test]))
    name = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}[data]
    return Split(f"{name}, pictures of 28 × 28 pixels", *parts, 10, 28)


def spirals(count: int, generator: torch.Generator) -> Samples:
    """Points of two arms of one and a half turns, with normal noise of deviation 0.03."""
    labels = torch.arange(count) % 2
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    radius = angle / (3 * math.pi) * (1 - 2 * labels)
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return Samples(arm + 0.03 * torch.randn(count, 2, generator=generator), labels)


def digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SettingsError(
            "data=digits comes with scikit-learn: pip install 'firmly[sklearn]', or take data=mnist"
        ) from error
    found = load_digits()
    return torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target).long()


def regions(side: int) -> dict[str, Tensor]:
    """Masks (side^2,) of nine parts of a picture, by their names."""
    thirds = torch.arange(side).tensor_split(3)
    found = {}
    for row, above in zip(thirds, ("top", "middle", "bottom")):
        for column, beside in zip(thirds, ("left", "centre", "right")):
            mask = torch.zeros(side, side, dtype=torch.bool)
            mask[row[:, None], column] = True
            found[f"{above} {beside}"] = mask.flatten()
    return found
