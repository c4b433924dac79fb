"""What optimisers are compared on: data sets to classify, whole or chunk by chunk, and streams whose law may change."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from firmly.data import cifar10, cifar100, covtype, elec2
from firmly.lab.experiments.bregman_data import Samples, Split, read

Fixed = Literal["digits", "spirals", "mnist", "fashion", "cifar10", "cifar100"]
Pictures = Literal["digits", "mnist", "fashion"]

TURN = 180.0  # degrees, over the whole stream


class Chunks(NamedTuple):
    """Samples that come chunk by chunk, to be learnt in several passes over each; a whole set is one chunk.

    Rates are chosen by `validation`, of the law of the first chunk, when that has been learnt.
    """

    told: str
    chunks: tuple[Samples, ...]  # of equal lengths
    validation: Samples
    tests: tuple[Samples, ...]  # what is asked while each chunk is learnt
    classes: int
    incremental: bool = False  # every chunk has classes of its own, and the tests are of the classes so far

    @property
    def samples(self) -> int:
        return sum(len(chunk.x) for chunk in self.chunks)


class Stream(NamedTuple):
    """Samples in the order in which they come; the law changes at once at the `drifts`, if they are known."""

    told: str
    x: Tensor  # (time, features), float32
    labels: Tensor  # (time,), int64
    classes: int
    drifts: tuple[int, ...] = ()

    def no_change(self, first: float = 0.0) -> float:
        """The accuracy of predicting the label before, but for the `first` part."""
        labels = self.labels[int(first * len(self.labels)) :]
        return float((labels[1:] == labels[:-1]).double().mean())


def fixed(task: Fixed, train: int, test: int, seed: int) -> Split:
    """At most `train` samples to learn and a quarter as many to validate, apart from the test samples.

    Values are less their mean over the training samples, over their deviation.
    """
    split = _as_read(task, train, test, seed)
    mean, deviation = split.train.x.mean(), split.train.x.std()
    parts = [Samples((s.x - mean) / deviation, s.labels) for s in (split.train, split.validation, split.test)]
    return Split(split.told, *parts, split.classes, split.side)


def _as_read(task: Fixed, train: int, test: int, seed: int) -> Split:
    if task in ("cifar10", "cifar100"):
        load = {"cifar10": cifar10, "cifar100": cifar100}[task]
        known, held_out = load("train"), load("test")
        order = torch.randperm(len(known.images), generator=torch.Generator().manual_seed(seed))
        chosen = order[:train], order[train : train + train // 4]
        parts = [Samples(known.images[i].float() / 255, known.labels[i]) for i in chosen]
        parts.append(Samples(held_out.images[:test].float() / 255, held_out.labels[:test]))
        name, classes = {"cifar10": ("CIFAR-10", 10), "cifar100": ("CIFAR-100", 100)}[task]
        return Split(f"{name}, colour pictures of 32 × 32 pixels", *parts, classes, None)
    return read("fashion-mnist" if task == "fashion" else task, train, test, seed)


def whole(split: Split) -> Chunks:
    return Chunks(split.told, (split.train,), split.validation, (split.test,), split.classes)


def chunked(split: Split, parts: int) -> Chunks:
    """The training samples in `parts` chunks of one law."""
    size = len(split.train.x) // parts
    chunks = [Samples(*(v[k * size : (k + 1) * size] for v in split.train)) for k in range(parts)]
    told = f"{split.told}, in {parts} chunks"
    return Chunks(told, tuple(chunks), split.validation, (split.test,) * parts, split.classes)


def incremental(split: Split) -> Chunks:
    """The classes in pairs, one after the other; as many samples of each pair as there are of the rarest."""
    pairs = [(k, k + 1) for k in range(0, split.classes - 1, 2)]
    found = [_of(split.train, pair) for pair in pairs]
    size = min(len(part.x) for part in found)
    chunks = tuple(Samples(part.x[:size], part.labels[:size]) for part in found)
    tests = tuple(_of(split.test, (0, last)) for _, last in pairs)
    told = f"{split.told}, two classes at a time"
    return Chunks(told, chunks, _of(split.validation, pairs[0]), tests, split.classes, True)


def _of(samples: Samples, classes: tuple[int, int]) -> Samples:
    """Those of the classes from the first to the last."""
    inside = (samples.labels >= classes[0]) & (samples.labels <= classes[1])
    return Samples(samples.x[inside], samples.labels[inside])


def rotating(pictures: Pictures, length: int, seed: int) -> Stream:
    """Pictures that turn by 180 degrees, little by little, while the stream lasts."""
    told, x, labels = _repeated(pictures, length, seed)
    angle = torch.linspace(0, TURN * math.pi / 180, length)
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).reshape(-1, 2, 3)
    grid = functional.affine_grid(turn, list(x.shape), align_corners=False)
    turned = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return Stream(f"{told}, turned from 0 to 180 degrees", turned.flatten(1), labels, 10)


def permuted(pictures: Pictures, length: int, tasks: int, seed: int) -> Stream:
    """Pictures whose pixels are permuted anew at `tasks` - 1 known times; the first part is left as it is."""
    told, x, labels = _repeated(pictures, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ends = [length * k // tasks for k in range(1, tasks)]
    first, *others = x.flatten(1).tensor_split(ends)
    shuffled = [part[:, torch.randperm(part.shape[1], generator=generator)] for part in others]
    told = f"{told}, with pixels in a new order at {tasks - 1} times"
    return Stream(told, torch.cat([first, *shuffled]), labels, 10, tuple(ends))


def electricity(length: int, first: float) -> Stream:
    """The first `length` rows of Elec2; features are standardised by what the `first` part of them shows."""
    x, labels = (part[:length] for part in elec2())
    known = x[: max(2, int(first * len(x)))]
    return Stream("Elec2, prices of electricity", (x - known.mean(0)) / known.std(0).clamp(min=1e-3), labels, 2)


def forest(length: int, first: float) -> Stream:
    """The first `length` rows of Covertype; the ten numbers are standardised as in `electricity`, areas and soils are
    0 or 1."""
    x, labels = (part[:length].clone() for part in covtype())
    numbers = x[:, :10]
    known = numbers[: max(2, int(first * len(x)))]
    x[:, :10] = (numbers - known.mean(0)) / known.std(0)
    return Stream("Covertype, trees of a forest", x, labels, 7)


def _repeated(pictures: Pictures, length: int, seed: int) -> tuple[str, Tensor, Tensor]:
    """`length` pictures (time, 1, side, side), each as often as any other but for one time, in a random order."""
    if pictures == "digits":
        parts = fixed("digits", 10**6, 10**6, seed)
        samples = [parts.train, parts.validation, parts.test]
        x, labels = torch.cat([s.x for s in samples]), torch.cat([s.labels for s in samples])
        side, told = 8, parts.told
    else:
        split = fixed(pictures, min(length, 48_000), 1, seed)
        (x, labels), side, told = split.train, 28, split.told
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(x), generator=generator) for _ in range(-(-length // len(x)))]
    order = torch.cat(rounds)[:length]
    return told, x[order].reshape(-1, 1, side, side), labels[order]
