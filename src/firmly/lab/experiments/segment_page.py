"""The report of the segmentation study: the table that says what to use, and what it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from firmly.lab.experiments.segment_cells import Cell, Group, by_method, choice, groups, interval
from firmly.lab.experiments.segment_problems import Problem
from firmly.lab.experiments.segment_training import CLEAN_ALONE, CROSS_ENTROPY, METHODS
from firmly.lab.page import Page, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Listener

if TYPE_CHECKING:
    from firmly.lab.experiments.segment import SegmentSettings

TARGET = 80.0  # percent of the lost overlap
COST = 0.5  # points on clean labels


def page(
    settings: SegmentSettings, data: Problem, cells: Sequence[Cell], run_folder: RunFolder, listen: Listener
) -> Page:
    models = settings.models.split(",")
    rows, ours = [], []
    for model in models:
        clean = groups(cells, model, "none", 0.0)
        for noise, rate in settings.conditions:
            rows.append(advice(model, noise, rate, groups(cells, model, noise, rate), clean))
    answer = Table(
        ("model", "label error", "wrong", "cross-entropy", "use", "its mIoU", "recovered", "cost on clean labels"),
        rows,
        "mIoU in per cent of the test slices, on labels that nobody corrupted.",
        ours,
    )
    sections = [Section("What to use", "", (answer,))]
    for model in models:
        sections.append(Section(model, "", (matrix(settings, cells, model),)))
    return Page("Segmentation from wrong labels", "", tuple(sections))


def advice(model: str, noise: str, rate: float, found: list[Group], clean: list[Group]) -> list[object]:
    """A row: which method was chosen for this error, how much it recovers, what it costs on clean labels."""
    plain, best = by_method(found)[CROSS_ENTROPY.name], choice(found)
    reference = by_method(clean)[CROSS_ENTROPY.name]
    same = next(g for g in clean if (g.method, g.parameter) == (best.method, best.parameter))
    lost = reference.test - plain.test
    recovered = None if noise == "none" or lost <= 0 else 100 * (best.test - plain.test) / lost
    gained = interval([b.test - p.test for b, p in zip(best.cells, plain.cells)])
    mine = f"{best.test:.1f}" + ("" if gained is None else f" (gain {best.test - plain.test:.1f} ± {gained:.1f})")
    return [
        model,
        noise,
        f"{100 * plain.cells[0].wrong:.0f} %",
        f"{plain.test:.1f}",
        best.title,
        mine,
        None if recovered is None else f"{recovered:.0f} %",
        f"{reference.test - same.test:.1f}",
    ]


def matrix(settings: SegmentSettings, cells: Sequence[Cell], model: str) -> Table:
    """mIoU of every method under every error, each with the parameter chosen on the clean slices."""
    conditions = settings.conditions
    found = [by_method(groups(cells, model, *condition)) for condition in conditions]
    names = [m.name for m in (*METHODS, CLEAN_ALONE) if m.name in found[0]]
    rows = [[name, *(f"{f[name].test:.1f}" if name in f else None for f in found)] for name in names]
    columns = ["method", *(noise if noise == "none" else f"{noise} {100 * rate:.0f} %" for noise, rate in conditions)]
    return Table(columns, rows, "mIoU of the test slices in per cent")
