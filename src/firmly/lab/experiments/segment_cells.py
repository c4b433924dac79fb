"""What one training of the segmentation study gave, and what is chosen from many of them on clean slices."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.segment_models import Labelled
from firmly.lab.experiments.segment_problems import mean_overlap
from firmly.lab.experiments.segment_training import CONTROL, CROSS_ENTROPY, METHODS, Task


class Cell(NamedTuple):
    """One method with one parameter and seed: mIoU in per cent of every clean slice, and of the test slices.

    A method that learns from clean slices has a network for each half of them. Every clean slice is judged by the one
    that has not seen it, and the test slices by both: their mean.
    """

    model: str
    noise: str
    rate: float
    method: str
    parameter: float
    seed: int
    clean: tuple[float, ...]
    test: float
    brier: float | None
    wrong: float

    @property
    def title(self) -> str:
        return titled(self.method, self.parameter)


class Group(NamedTuple):
    """The cells of one method with one parameter on one kind of labels, one for each seed."""

    method: str
    parameter: float
    cells: tuple[Cell, ...]

    @property
    def clean(self) -> float:
        return fmean(v for c in self.cells for v in c.clean)

    @property
    def test(self) -> float:
        return fmean(c.test for c in self.cells)


def titled(method: str, parameter: float) -> str:
    return f"{method} ({parameter:g})" if parameter else method


def groups(cells: Sequence[Cell], model: str, noise: str, rate: float) -> list[Group]:
    """All methods and parameters on these labels."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        if (cell.model, cell.noise, cell.rate) == (model, noise, rate):
            found.setdefault((cell.method, cell.parameter), []).append(cell)
    return [Group(*key, tuple(sorted(some, key=lambda c: c.seed))) for key, some in found.items()]


def by_method(all_groups: Sequence[Group]) -> dict[str, Group]:
    """Each method with the parameter that is best on the clean slices."""
    best: dict[str, Group] = {}
    for group in all_groups:
        if group.method not in best or group.clean > best[group.method].clean:
            best[group.method] = group
    return best


def choice(cells: Sequence[Cell]) -> Cell:
    """Of one seed, the method that is best on the clean slices among those that beat cross-entropy beyond chance.

    Beyond chance: the 95 percent interval of the mean difference, paired by slices, is above zero. Else cross-entropy.
    The control is never chosen, nor are networks that were trained on clean slices: they are judged by neighbours of
    those, which flatters them.
    """
    plain = next(c for c in cells if c.method == CROSS_ENTROPY.name)
    better = []
    for cell in cells:
        gains = [a - b for a, b in zip(cell.clean, plain.clean, strict=True)]
        excluded = cell.method == CONTROL.name or METHODS[cell.method].finishes
        if not excluded and fmean(gains) > (interval(gains) or 0.0):
            better.append(cell)
    return max(better, key=lambda c: fmean(c.clean), default=plain)


def interval(values: Sequence[float]) -> float | None:
    """Half of the width of the 95 percent interval of a mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle = fmean(values)
    variance = sum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return float(t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float | None]:
    """sum of parts / sum of wholes, and half of the width of its 95 percent interval, by the delta method."""
    quotient = fmean(parts) / fmean(wholes)
    half = interval([a - quotient * b for a, b in zip(parts, wholes, strict=True)])
    return quotient, None if half is None else half / abs(fmean(wholes))


def measured(task: Task, test: Labelled, networks: Sequence[nn.Module]) -> tuple[list[float], float, Tensor]:
    """mIoU of every clean slice and of the test slices, in per cent, and the mean law (n, class, ...) on the latter.

    With the energy that was tuned on one half of the clean slices the other half is judged. Of networks that learned
    from one half, too, there is one for each.
    """
    clean = [0.0] * len(task.clean.labels)
    tests, laws = [], []
    for fold, learned in enumerate(task.halves):
        network, energy = networks[fold % len(networks)], task.energies[fold]
        judged = [i for i in range(len(clean)) if i not in learned]
        found = energy.laws(task.model, network, Labelled(*(part[judged] for part in task.clean)))
        for i, law in zip(judged, found, strict=True):
            clean[i] = 100 * mean_overlap(law.argmax(0), task.clean.labels[i], task.classes)
        laws.append(energy.laws(task.model, network, test))
        tests.append(100 * mean_overlap(laws[-1].argmax(1), test.labels, task.classes))
    return clean, fmean(tests), torch.stack(laws).mean(0)
