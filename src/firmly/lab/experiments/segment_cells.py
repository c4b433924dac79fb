"""What one training of the segmentation study gave, and what is chosen from many of them on clean slices."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.segment_problems import mean_overlap
from firmly.lab.experiments.segment_training import CLEAN_ALONE, CONTROL, CROSS_ENTROPY, Labelled, scores
from firmly.segment import EntropicTV

ACCURACY = 3e-2  # root mean square per pixel, of probabilities


class Cell(NamedTuple):
    """One training: mIoU in per cent on the clean slices and on the test slices, Brier score, coupling chosen."""

    model: str
    noise: str
    rate: float
    method: str
    parameter: float
    seed: int
    clean: float
    test: float
    brier: float | None
    coupling: float
    wrong: float


class Group(NamedTuple):
    """The trainings of one method with one parameter on one kind of labels, one for each seed."""

    method: str
    parameter: float
    cells: tuple[Cell, ...]

    @property
    def clean(self) -> float:
        return fmean(c.clean for c in self.cells)

    @property
    def test(self) -> float:
        return fmean(c.test for c in self.cells)

    @property
    def title(self) -> str:
        return f"{self.method} ({self.parameter:g})" if self.parameter else self.method


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


def choice(all_groups: Sequence[Group]) -> Group:
    """The method and parameter that are best on the clean slices; cross-entropy where nothing is better."""
    open_to_choice = [g for g in all_groups if g.method not in (CONTROL.name, CLEAN_ALONE.name)]
    plain = next(g for g in open_to_choice if g.method == CROSS_ENTROPY.name)
    best = max(open_to_choice, key=lambda g: g.clean)
    return best if best.clean > plain.clean else plain


def interval(values: Sequence[float]) -> float | None:
    """Half of the width of the 95 percent interval of a mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle = fmean(values)
    variance = sum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return float(t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5


@torch.no_grad()
def predicted(network: nn.Module, inputs: Tensor, coupling: float) -> Tensor:
    """Scores, or, with a coupling, probabilities (n, class, height, width)."""
    found = scores(network, inputs)
    return EntropicTV(coupling, accuracy=ACCURACY)(found) if coupling > 0 else found


def chosen_coupling(
    network: nn.Module, clean: Labelled, classes: int, couplings: Sequence[float]
) -> tuple[float, float]:
    """The coupling with the best overlap on the clean slices, and that overlap."""
    found = {c: mean_overlap(predicted(network, clean.inputs, c).argmax(1), clean.labels, classes) for c in couplings}
    best = max(found, key=lambda c: found[c])
    return best, found[best]
