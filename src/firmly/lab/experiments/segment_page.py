"""The report of the segmentation study: the table that says what to use, and what it looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from firmly.lab.experiments.segment_cells import Cell, Group, by_method, choice, groups, interval, ratio
from firmly.lab.experiments.segment_models import MODELS
from firmly.lab.experiments.segment_pictures import certified, section
from firmly.lab.experiments.segment_problems import Problem
from firmly.lab.experiments.segment_training import CROSS_ENTROPY, METHODS, Task
from firmly.lab.page import Page, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Listener

if TYPE_CHECKING:
    from firmly.lab.experiments.segment import SegmentSettings

TARGET = 80.0  # per cent of the lost overlap
COST = 0.5  # points on clean labels
SMALL = 1.0  # points: a loss too small for a ratio


class Advice(NamedTuple):
    """What was chosen for one model under one error, one cell for each seed, and what it is compared with.

    `blind` is chosen among methods that learn from no clean slice. `clean_plain` is cross-entropy with clean labels,
    `clean_best` there the method and parameter of `best`.
    """

    model: str
    noise: str
    rate: float
    plain: list[Cell]
    best: list[Cell]
    blind: list[Cell]
    clean_plain: list[Cell]
    clean_best: list[Cell]

    @property
    def lost(self) -> list[float]:
        return differences(self.clean_plain, self.plain)

    def recovered(self, cells: list[Cell]) -> tuple[float, float | None] | None:
        """Per cent of what the error costs cross-entropy, with half of the width of its interval."""
        if self.noise == "none" or fmean(self.lost) < SMALL:
            return None
        part, half = ratio(differences(cells, self.plain), self.lost)
        return 100 * part, None if half is None else 100 * half

    @property
    def met(self) -> bool:
        found = self.recovered(self.best)
        return found is not None and found[0] >= TARGET


def page(
    settings: SegmentSettings, data: Problem, cells: Sequence[Cell], task: Callable[[str, str, float, int], Task],
    run_folder: RunFolder, listen: Listener,
) -> Page:  # fmt: skip
    models = settings.models.split(",")
    advices = [advice(cells, model, *condition) for model in models for condition in settings.conditions]
    sections = [answer(settings, advices)]
    listen("note", {"text": "drawing labels, predictions and certified pixels"})
    first = next((a for a in advices if a.noise != "none"), advices[0])
    shown = task(first.model, first.noise, first.rate, 0)
    sections.append(section(data, shown, first.noise, first.rate, first.plain[0], first.best[0], run_folder))
    bounded = next((a for a in advices if a.model != "U-Net" and a.noise == first.noise and a.rate == first.rate), None)
    if bounded is not None:
        shown = task(bounded.model, bounded.noise, bounded.rate, 0)
        seconds = settings.certify_seconds
        sections.append(certified(data, shown, bounded.best[0], settings.radius, seconds, run_folder))
    for model in models:
        tables = [matrix(settings, cells, model, overlap_entry, OVERLAP)]
        if MODELS[model].probabilistic:
            tables.append(matrix(settings, cells, model, brier_entry, BRIER))
        sections.append(Section(f"All methods: {model}", "", tuple(tables)))
    sections.append(Section("How it was measured", how(settings, data)))
    wrong = [a for a in advices if a.recovered(a.best) is not None]
    blind = [a for a in wrong if (a.recovered(a.blind) or (0.0,))[0] >= TARGET]
    worst = min(((a.recovered(a.best) or (0.0,))[0] for a in wrong), default=0.0)
    kept = max(fmean(differences(a.clean_plain, a.best)) for a in advices if a.noise == "none")
    return Page(
        f"What was chosen on {len(data.clean.labels)} clean slices brings back {TARGET:.0f} % or more of what "
        f"wrong labels cost in {len([a for a in wrong if a.met])} of {len(wrong)} cases",
        f"The target is {TARGET:.0f} % of the mean overlap that cross-entropy loses, and at most {COST} points lost "
        f"where all labels are right: there the choice loses {max(kept, 0.0):.1f} points at most. Without clean slices "
        f"to learn from, {len(blind)} of {len(wrong)} reach it.",
        tuple(sections),
        {
            "least recovered (%)": round(worst, 1),
            "most lost on clean labels (points)": round(kept, 2),
            "trainings": len(cells),
        },
    )


def differences(some: Sequence[Cell], others: Sequence[Cell]) -> list[float]:
    """Of the test overlap, paired by seeds."""
    return [a.test - b.test for a, b in zip(some, others, strict=True)]


def advice(cells: Sequence[Cell], model: str, noise: str, rate: float) -> Advice:
    here = [c for c in cells if (c.model, c.noise, c.rate) == (model, noise, rate)]
    clean = [c for c in cells if (c.model, c.noise) == (model, "none")]
    plain, best, blind, clean_plain, clean_best = [], [], [], [], []
    for seed in sorted({c.seed for c in here}):
        found = [c for c in here if c.seed == seed]
        plain.append(next(c for c in found if c.method == CROSS_ENTROPY.name))
        best.append(choice(found))
        blind.append(choice([c for c in found if not METHODS[c.method].learns]))
        same = [c for c in clean if c.seed == seed]
        clean_plain.append(next(c for c in same if c.method == CROSS_ENTROPY.name))
        clean_best.append(next(c for c in same if (c.method, c.parameter) == (best[-1].method, best[-1].parameter)))
    return Advice(model, noise, rate, plain, best, blind, clean_plain, clean_best)


def names(cells: Sequence[Cell]) -> str:
    """What was chosen, and how often where seeds differ."""
    counts = Counter(c.title for c in cells).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{name}: {count} of {len(cells)}" for name, count in counts)


def give_or_take(value: float, half: float | None, digits: int = 1, sign: str = "") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def answer(settings: SegmentSettings, advices: Sequence[Advice]) -> Section:
    rows = []
    for a in advices:
        gains, costs = differences(a.best, a.plain), differences(a.clean_plain, a.clean_best)
        best, blind = a.recovered(a.best), a.recovered(a.blind)
        rows.append(
            [
                a.model,
                a.noise,
                f"{100 * fmean(c.wrong for c in a.plain):.0f} %",
                f"{fmean(c.test for c in a.plain):.1f}",
                names(a.best),
                f"{fmean(c.test for c in a.best):.1f}",
                give_or_take(fmean(gains), interval(gains), sign="+"),
                "" if best is None else f"{give_or_take(*best, digits=0)} %",
                names(a.blind) + ("" if blind is None else f" ({blind[0]:.0f} % recovered)"),
                give_or_take(fmean(costs), interval(costs)),
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
        + (
            f"Means over {settings.seeds} seeds, each with labels, networks and a choice of its own; 95 % intervals "
            "over the seeds, paired. Where seeds choose differently, after each method in how many it was chosen."
            if settings.seeds > 1
            else "One seed, and so no interval."
        )
    )
    text = (
        "With this kind of label error, what should one use, and what does it cost when the labels are clean? Chosen "
        "is the method with the best mIoU on clean slices that are neither in the training nor in the test, among "
        "those that beat cross-entropy there beyond chance (95 %, paired by slices); where none does, cross-entropy. "
        f"Rows that stand out reach the target of {TARGET:.0f} %."
    )
    return Section("What to use", text, (Table(columns, rows, caption, [i for i, a in enumerate(advices) if a.met]),))


OVERLAP = (
    "mIoU of the test slices in per cent (and the parameter that is best on the clean slices); with several seeds, "
    "what is gained over cross-entropy, with its paired 95 % interval"
)
BRIER = "Brier score against the probability maps, times 100: the smaller the better"


def overlap_entry(group: Group, plain: Group) -> str:
    text = f"{group.test:.1f}" + (f" ({group.parameter:g})" if group.parameter else "")
    gains = differences(group.cells, plain.cells)
    if len(gains) > 1 and group.method != CROSS_ENTROPY.name:
        text += f": {give_or_take(fmean(gains), interval(gains), sign='+')}"
    return text


def brier_entry(group: Group, plain: Group) -> str:
    return f"{100 * fmean(c.brier or 0.0 for c in group.cells):.2f}"


def matrix(
    settings: SegmentSettings, cells: Sequence[Cell], model: str, entry: Callable[[Group, Group], str], caption: str
) -> Table:
    """Every method under every error, each with the parameter that is best on the clean slices."""
    found = [by_method(groups(cells, model, *condition)) for condition in settings.conditions]
    rows = [
        [name, *(entry(f[name], f[CROSS_ENTROPY.name]) if name in f else None for f in found)]
        for name in METHODS
        if name in found[0]
    ]
    heads = [noise if noise == "none" else f"{noise} {100 * rate:.0f} %" for noise, rate in settings.conditions]
    return Table(["method", *heads], rows, caption)


def how(settings: SegmentSettings, data: Problem) -> str:
    train, clean, test = (len(part.labels) for part in (data.train, data.clean, data.test))
    stack = {
        "template": "They are slices of an average brain: strongly correlated among each other, and smoother than any "
        "real one. What is measured here ranks methods; it is no accuracy on patients.",
        "subject": "They are slices of one person, correlated among each other, with labels that an algorithm found.",
    }.get(data.name, "They are slices of one person, correlated among each other, with labels that a network found.")
    return (
        f"{train} slices for training, {test} for the test, {clean} clean ones away from both. {stack} Errors fill "
        "the given fraction of what is foreground before or after, as near as whole objects allow. Methods that learn "
        "from clean slices are trained twice, with the first and with the second half of them (the stack is not mixed, "
        "so that few neighbours are parted); each clean slice is judged by the network that has not seen it, and the "
        "test is the mean of both. 'cleaned labels' are those of clean_labels: the network of plain cross-entropy "
        "looks at the clean slices, a convex model learns what is right where it says what it says, and corrects the "
        "labels, by Bayes' rule with the most likely transition, for a training from the start; its three ridges come "
        "from firmly.bilevel, once for both halves. "
        "The coupling of total variation comes from firmly.bilevel, too, on the half that does not judge, for the "
        "scores of plain cross-entropy. 'sup-CVaR' is the wrong sense for wrong labels, and never chosen; nor are "
        "networks that were trained on clean slices ('then clean slices', 'clean slices alone'): the slices that judge "
        "them are neighbours. All networks learn for the same number of batches; 'cleaned labels' and 'forward "
        "correction' need that of plain cross-entropy before. Networks are certified where a bound is of use; that the "
        "labels are right is certified nowhere."
        + (" Of SVM-TV, 'cross-entropy' is the hinge loss." if "SVM-TV" in settings.models else "")
    )
