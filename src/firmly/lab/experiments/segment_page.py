"""The report of the segmentation study: the table that says what to use, and what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from firmly.lab.experiments.segment_cells import Cell, Group, by_method, choice, groups, interval
from firmly.lab.experiments.segment_models import MODELS
from firmly.lab.experiments.segment_pictures import certified, section
from firmly.lab.experiments.segment_problems import Problem
from firmly.lab.experiments.segment_training import CLEAN_ALONE, CONTOURS, CROSS_ENTROPY, FINE_TUNED, METHODS
from firmly.lab.page import Page, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Listener

if TYPE_CHECKING:
    from firmly.lab.experiments.segment import SegmentSettings

TARGET = 80.0  # per cent of the lost overlap
COST = 0.5  # points on clean labels
SMALL = 1.0  # points: a loss too small for a ratio
WITH_CLEAN = (CONTOURS.name, FINE_TUNED.name, "forward correction")  # they learn from the clean slices, too


class Advice(NamedTuple):
    """What was chosen for one model under one error, beside cross-entropy, and both without an error."""

    model: str
    noise: str
    rate: float
    plain: Group
    best: Group
    blind: Group
    clean_plain: Group
    clean_best: Group

    @property
    def lost(self) -> float:
        return self.clean_plain.test - self.plain.test

    def recovered(self, group: Group) -> float | None:
        """Per cent of what the error costs cross-entropy."""
        if self.noise == "none" or self.lost < SMALL:
            return None
        return 100 * (group.test - self.plain.test) / self.lost

    @property
    def cost(self) -> float:
        """Points that the chosen method and parameter lose where all labels are right."""
        return self.clean_plain.test - self.clean_best.test


def page(
    settings: SegmentSettings, data: Problem, cells: Sequence[Cell], labels: Callable[[str, float, int], Tensor],
    run_folder: RunFolder, listen: Listener,
) -> Page:  # fmt: skip
    models = settings.models.split(",")
    advices = [advice(cells, model, *condition) for model in models for condition in settings.conditions]
    sections = [answer(settings, advices)]
    listen("note", {"text": "drawing labels, predictions and certified pixels"})
    first = next((a for a in advices if a.noise != "none"), advices[0])
    given = labels(first.noise, first.rate, 0)
    sections.append(
        section(data, first.model, first.noise, first.rate, first.plain, first.best, given, settings.steps,
                settings.seed, run_folder)
    )  # fmt: skip
    bounded = next((a for a in advices if a.model != "U-Net" and a.noise == first.noise and a.rate == first.rate), None)
    if bounded is not None:
        sections.append(
            certified(data, bounded.model, bounded.best, given, settings.steps, settings.seed, settings.radius,
                      settings.certify_seconds, run_folder)
        )  # fmt: skip
    for model in models:
        tables = [matrix(settings, cells, model, "test")]
        if MODELS[model].probabilistic:
            tables.append(matrix(settings, cells, model, "brier"))
        sections.append(Section(f"All methods: {model}", "", tuple(tables)))
    sections.append(Section("How it was measured", how(settings, data)))
    wrong = [a for a in advices if a.recovered(a.best) is not None]
    worst = min((a.recovered(a.best) or 0.0 for a in wrong), default=0.0)
    kept = [a.clean_plain.test - a.best.test for a in advices if a.noise == "none"]
    met = [a for a in wrong if (a.recovered(a.best) or 0.0) >= TARGET]
    return Page(
        f"What was chosen on {len(data.clean.labels) // 2} clean slices brings back {TARGET:.0f} % or more of what "
        f"wrong labels cost in {len(met)} of {len(wrong)} cases",
        f"The target is {TARGET:.0f} % of the mean overlap that cross-entropy loses, and at most {COST} points lost "
        f"where all labels are right: there the choice loses {max(kept):.1f} points at most. Without clean slices to "
        f"learn from, {len([a for a in wrong if (a.recovered(a.blind) or 0.0) >= TARGET])} of {len(wrong)} reach it.",
        tuple(sections),
        {
            "least recovered (%)": round(worst, 1),
            "most lost on clean labels (points)": round(max(kept), 2),
            "trainings": len(cells),
        },
    )


def advice(cells: Sequence[Cell], model: str, noise: str, rate: float) -> Advice:
    found, clean = groups(cells, model, noise, rate), groups(cells, model, "none", 0.0)
    plain, best = by_method(found)[CROSS_ENTROPY.name], choice(found)
    blind = choice([g for g in found if g.method not in WITH_CLEAN])
    same = next(g for g in clean if (g.method, g.parameter) == (best.method, best.parameter))
    return Advice(model, noise, rate, plain, best, blind, by_method(clean)[CROSS_ENTROPY.name], same)


def answer(settings: SegmentSettings, advices: Sequence[Advice]) -> Section:
    rows = []
    for a in advices:
        gain = interval([b.test - p.test for b, p in zip(a.best.cells, a.plain.cells)])
        best, blind = a.recovered(a.best), a.recovered(a.blind)
        rows.append(
            [
                a.model,
                a.noise,
                f"{100 * fmean(c.wrong for c in a.plain.cells):.0f} %",
                f"{a.plain.test:.1f}",
                a.best.title,
                f"{a.best.test:.1f}",
                f"{a.best.test - a.plain.test:+.1f}" + ("" if gain is None else f" ± {gain:.1f}"),
                "" if best is None else f"{best:.0f} %",
                f"{a.blind.title}" + ("" if blind is None else f": {blind:.0f} %"),
                f"{a.cost:.1f}",
            ]
        )
    columns = (
        "model", "label error", "wrong", "cross-entropy", "use", "its mIoU", "gain", "recovered",
        "without learning from clean slices", "cost on clean labels",
    )  # fmt: skip
    caption = (
        "Mean intersection over union in per cent, over all classes of the test slices, by labels that nobody "
        "corrupted. Recovered: of what the error costs cross-entropy. Cost: what the same method with the same "
        "parameter loses, in points, if all labels are right after all (negative: it gains). "
        + ("Intervals: 95 % over the seeds, paired." if settings.seeds > 1 else "One seed, and so no interval.")
    )
    chosen = [i for i, a in enumerate(advices) if (a.recovered(a.best) or 0.0) >= TARGET]
    text = (
        "With this kind of label error, what should one use, and what does it cost when the labels are clean? Methods "
        "and parameters are those with the best mIoU on clean slices that are neither in the training nor in the test. "
        f"Rows that stand out reach the target of {TARGET:.0f} %."
    )
    return Section("What to use", text, (Table(columns, rows, caption, chosen),))


def matrix(settings: SegmentSettings, cells: Sequence[Cell], model: str, what: str) -> Table:
    """Every method under every error, each with the parameter chosen on the clean slices."""
    conditions = settings.conditions
    found = [by_method(groups(cells, model, *condition)) for condition in conditions]
    names = [m.name for m in (*METHODS, CLEAN_ALONE) if m.name in found[0]]

    def entry(group: Group | None) -> str | None:
        if group is None:
            return None
        if what == "test":
            return f"{group.test:.1f}" + (f" ({group.parameter:g})" if group.parameter else "")
        return f"{100 * fmean(c.brier or 0.0 for c in group.cells):.2f}"

    # what is learned from clean slices alone does not depend on the errors of other labels
    rows = [[n, *(entry(f.get(n) or (found[0][n] if n == CLEAN_ALONE.name else None)) for f in found)] for n in names]
    columns = ["method", *(noise if noise == "none" else f"{noise} {100 * rate:.0f} %" for noise, rate in conditions)]
    if what == "test":
        return Table(columns, rows, "mIoU of the test slices in per cent (and the parameter that was chosen)")
    return Table(columns, rows, "Brier score against the probability maps, times 100: the smaller the better")


def how(settings: SegmentSettings, data: Problem) -> str:
    train, clean, test = (len(part.labels) for part in (data.train, data.clean, data.test))
    stack = {
        "template": "They are slices of an average brain: strongly correlated among each other, and smoother than any "
        "real one. What is measured here ranks methods; it is no accuracy on patients.",
        "subject": "They are slices of one person, correlated among each other, with labels that an algorithm found.",
    }.get(data.name, "They are slices of one person, correlated among each other, with labels that a network found.")
    return (
        f"{train} slices for training, {test} for the test, {clean} clean ones away from both. {stack} Errors fill "
        "the given fraction of what is foreground before or after, as near as whole objects allow. Half of the clean "
        "slices are for learning ('then clean slices' ends with them, forward correction finds its matrix on them, "
        "'contours moved back' its offsets, 'clean slices alone' has no other), the other half for choosing; they are "
        "neighbours of each other, which favours methods that learn from clean slices. 'sup-CVaR' is the wrong sense "
        "for wrong labels, and 'clean slices alone' no method for them: neither is ever chosen. All methods "
        "learn for the same number of batches. Networks are certified where a bound is of use; that the labels are "
        "right is certified nowhere."
        + (" Of SVM-TV, 'cross-entropy' is the hinge loss." if "SVM-TV" in settings.models else "")
    )
