"""Data for the study of penalties: pixels of photographs from their neighbours, and tables that scikit-learn has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from firmly.data import photographs
from firmly.errors import SettingsError
from firmly.priors.losses import Logistic, Loss, Softmax, Squared
from firmly.priors.sparse_linear import SparseLinear

Data = Literal["photographs", "diabetes", "breast-cancer", "digits"]


class Table(NamedTuple):
    """Features and targets, and what is known of the features: a group, and numbers that describe them."""

    told: str
    draw: Callable[[torch.Generator], tuple[tuple[Tensor, Tensor], ...]]  # (X, target) to train, validate and test
    loss: Loss
    names: list[str]
    groups: Tensor  # (p,)
    group_names: list[str]
    descriptions: Tensor  # (p, d)
    grid: Tensor | None = None  # (p, 2): the place of every feature in a picture, row and column
    error: str = "log loss"


class Split(NamedTuple):
    """One draw: the problem, its validation and its test samples, in the scale of the training samples."""

    train: SparseLinear
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def error(self, B: Tensor, samples: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.train.loss
        return loss.error * loss.value(samples[0] @ B[:-1] + B[-1], samples[1]).mean()


def split(table: Table, seed: int) -> Split:
    """Features have mean 0 and standard deviation 1 on the training samples; so has the target of a regression."""
    (X, y), *others = table.draw(torch.Generator().manual_seed(seed))
    centre, scale = X.mean(0), X.std(0)
    scale = torch.where(scale > 0, scale, 1)
    level, unit = (y.mean(0), y.std(0)) if isinstance(table.loss, Squared) else (0.0, 1.0)
    validation, test = (((Z - centre) / scale, (t - level) / unit) for Z, t in others)
    return Split(SparseLinear((X - centre) / scale, (y - level) / unit, table.loss), validation, test)


def read(data: Data, samples: int, noise: float) -> Table:
    """The data set of this name; `samples` train and as many validate, where there are enough."""
    return neighbours(samples, noise) if data == "photographs" else from_sklearn(data, samples)


def neighbours(samples: int, noise: float) -> Table:
    """A pixel from noisy pixels before it in reading order, within 4 rows and columns, in photographs of one split.

    Weights may depend on the distance of a neighbour: it is its group (rounded), and its logarithm the description.
    """
    offsets = [(i, j) for i in range(-4, 1) for j in range(-4, 5) if i < 0 or j < 0]
    place = torch.tensor(offsets)
    distance = place.double().norm(dim=1)
    kinds = [photographs(name) for name in ("train", "validation", "test")]

    def draw(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], ...]:
        found = []
        for images, count in zip(kinds, (samples, samples, 4000)):
            which = torch.randint(len(images), (count,), generator=generator)
            part = torch.rand(count, 2, generator=generator, dtype=torch.float64)
            rows = []
            for k, image in enumerate(images):
                size = torch.tensor(image.shape[1:]) - 8
                at = 4 + (part[which == k] * size).long()
                around = torch.cat([place, torch.zeros(1, 2, dtype=torch.long)]) + at[:, None]
                rows.append(image[0].double()[around[..., 0], around[..., 1]])
            values = torch.cat(rows)
            level = values[:, :-1].mean(1, keepdim=True)
            near = values[:, :-1] - level + noise * torch.randn(values[:, :-1].shape, generator=generator).double()
            found.append((near, values[:, -1:] - level))
        return tuple(found)

    groups = distance.round().long() - 1
    return Table(
        f"a pixel of a photograph from {len(offsets)} noisy neighbours (row, column)", draw, Squared(),
        [str(offset) for offset in offsets], groups, [f"distance {k + 1}" for k in range(int(groups.max()) + 1)],
        distance.log()[:, None], place + 4,
        "squared error",
    )  # fmt: skip


def from_sklearn(data: str, samples: int) -> Table:
    """A table of scikit-learn; its samples are divided anew for every draw."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SettingsError(
            f"data={data} comes with scikit-learn: pip install 'firmly[sklearn]', or take data=photographs"
        ) from error
    if data == "diabetes":
        return diabetes(datasets.load_diabetes(scaled=False), samples)
    source = datasets.load_breast_cancer() if data == "breast-cancer" else datasets.load_digits()
    X, labels = torch.tensor(source.data, dtype=torch.float64), torch.tensor(source.target)
    if data == "breast-cancer":
        groups = torch.arange(30) // 10
        return Table(
            "benign or malignant from 30 measures of cell nuclei", shuffled(X, labels[:, None].double(), samples),
            Logistic(), [str(name) for name in source.feature_names], groups, ["mean", "standard error", "worst"],
            torch.nn.functional.one_hot(groups)[:, 1:].double(),
        )  # fmt: skip
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(-1, 2)
    away = (place.double() - 3.5).norm(dim=1)
    groups = ((away - 0.7) / 1.1).round().long().clamp(max=3)
    return Table(
        "which of ten digits from 8 × 8 pixels", shuffled(X, torch.nn.functional.one_hot(labels).double(), samples),
        Softmax(), [f"row {i}, column {j}" for i, j in place.tolist()], groups,
        [f"ring {k}" for k in range(int(groups.max()) + 1)], away[:, None] - 3, place,
    )  # fmt: skip


def diabetes(source: Any, samples: int) -> Table:
    """Ten measures, their squares and products: the kind of a feature is its group."""
    X = torch.tensor(source.data, dtype=torch.float64)
    X = (X - X.mean(0)) / X.std(0)
    names, columns, groups = list(source.feature_names), list(X.mT), [0] * 10
    for i in range(10):
        for j in range(i, 10):
            if (i, j) != (1, 1):  # the square of a number with two values says nothing new
                columns.append(X[:, i] * X[:, j])
                names.append(f"{names[i]} × {names[j]}" if i != j else f"{names[i]}²")
                groups.append(1 if i == j else 2)
    kind = torch.tensor(groups)
    return Table(
        "progression of diabetes from ten measures, their squares and products",
        shuffled(torch.stack(columns, 1), torch.tensor(source.target, dtype=torch.float64)[:, None], samples),
        Squared(), names, kind, ["measure", "square", "product"], torch.nn.functional.one_hot(kind)[:, 1:].double(),
        error="squared error",
    )  # fmt: skip


def shuffled(X: Tensor, y: Tensor, samples: int) -> Callable[[torch.Generator], tuple[tuple[Tensor, Tensor], ...]]:
    count = min(samples, math.floor(0.35 * len(X)))

    def draw(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], ...]:
        order = torch.randperm(len(X), generator=generator)
        parts = order[:count], order[count : 2 * count], order[2 * count :]
        return tuple((X[part], y[part]) for part in parts)

    return draw
