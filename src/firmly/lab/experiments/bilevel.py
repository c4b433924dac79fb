"""Penalties chosen by gradients: one weight, one for every group, a function of features, one for every feature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.lab.charts import Line, number
from firmly.lab.experiments.bilevel_accuracy import on_data, right_and_wrong
from firmly.lab.experiments.bilevel_choices import HIGHEST, LOWEST, Choice, Chooser
from firmly.lab.experiments.bilevel_problems import Data, Table, read, split
from firmly.lab.page import Block, Chart, Page, Pictures, Section
from firmly.lab.page import Table as Rows
from firmly.lab.pictures import coloured
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study


@dataclass(frozen=True)
class BilevelSettings:
    """`data` are pixels of photographs, or a table of scikit-learn (diabetes, breast-cancer, digits).

    `samples` train, as many others validate, and the rest are for the test, which no choice sees; all is repeated for
    `draws` of them. `noise` is that of the neighbours of a pixel. A search of several weights has `solves` inner
    problems; `grid` weights make the curve of the validation error.
    """

    data: Data = "photographs"
    samples: int = 200
    noise: float = 0.05
    draws: int = 20
    solves: int = 60
    grid: int = 60
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require(self.samples >= 30, f"samples is at least 30; given {self.samples}")
        require(self.noise >= 0, f"noise is not negative; given {self.noise}")
        require(self.draws >= 1 and self.solves >= 2, "draws is at least 1, solves at least 2")
        require(self.grid >= 5, f"grid is at least 5; given {self.grid}")


def run_bilevel(settings: BilevelSettings, run: RunFolder, listen: Listener) -> Page:
    table = read(settings.data, settings.samples, settings.noise)
    accuracy, ours = right_and_wrong(settings.seed)
    every: list[list[Choice]] = []
    choosers = []
    for k in range(settings.draws):
        chooser = Chooser(table, split(table, settings.seed + k), settings.solves, settings.seed + k)
        choosers.append(chooser)
        group = chooser.by_group()
        every.append([
            chooser.one, chooser.by_function(), group, chooser.by_feature(),
            chooser.grid(settings.grid, group.seconds), chooser.random(group.seconds),
        ])  # fmt: skip
        listen("work", {"name": "choosing weights", "done": k + 1, "total": settings.draws})
    error = max(on_data(c.draw, choices[0].weights, k) for k, (c, choices) in enumerate(zip(choosers, every)))
    one, _, group, feature, grid, random = (mean([choices[i] for choices in every]) for i in range(6))
    apart = [choices[2].test - choices[4].test for choices in every]
    better = sum(a < 0 for a in apart)
    summary = (
        f"Data: {table.told}; {len(choosers[0].draw.train.A)} samples to train, as many to choose the weights of an l1 "
        f"penalty, others for the test. Gradients through the solution choose {len(table.group_names)} weights of "
        f"groups in {group.solves:.0f} inner solves. On test data their {table.error} is {group.test:.4g}, against "
        f"{grid.test:.4g} of a grid of one weight and {random.test:.4g} of random search in the same time: lower than "
        f"the grid's on {better} of {settings.draws} draws. A weight for every feature has a validation error of "
        f"{feature.validation:.4g} (groups: {group.validation:.4g}), and fits the test samples "
        f"{'worse' if feature.test > group.test else 'better'} than groups do ({feature.test:.4g})."
    )
    facts = {
        "test error, groups − grid": difference(apart),
        "inner solves, one weight": number(one.solves),
        "error of the gradient": f"{max(error, ours):.0e}",
        "weights at once": len(table.names),
    }
    sections = (
        Section(
            "The gradient is right", "The derivative of a validation loss goes through the solution of a nonsmooth "
            "problem. On the support of the solution this is one small symmetric system. On these data, in all "
            f"{len(table.names)} weights at once, the derivative and central differences agree to {error:.0e} "
            "(the worst of all draws; the differences themselves have errors of this size).",
            (accuracy,),
        ),
        Section(
            "One weight", "Twelve inner problems, each begun at the solution before: four spread over the range, eight "
            "that bisect on the sign of the gradient beside the best of them. Tangents are drawn with the slope that "
            "the hypergradient says.",
            (curve(choosers[0], settings.grid, table.error),),
        ),
        Section("The path", "What the penalty does to the coefficients.", (path(table, choosers[0], every[0][2]),)),
        Section(
            "The weights",
            f"Groups: {', '.join(table.group_names)}. A function of the feature has the logarithm of "
            "the weight linear in what describes it, so that two or three numbers make all weights.",
            tuple(weights(table, every, run)),
        ),
        Section(
            "What it buys", "The validation error is what the weights were chosen by: the more weights, the more it "
            "flatters. The test error is that of samples which no choice has seen. Nothing here is a certificate: a "
            "penalty chosen on samples has no guarantee on others.", (gains(table, every), race(table, every[0])),
        ),
    )  # fmt: skip
    return Page("Penalties chosen by gradients, all at once", summary, sections, facts)


class Mean(NamedTuple):
    validation: float
    test: float
    solves: float
    seconds: float


def mean(choices: list[Choice]) -> Mean:
    values = torch.tensor([[c.validation, c.test, c.solves, c.seconds] for c in choices], dtype=torch.float64)
    return Mean(*values.mean(0).tolist())


def difference(apart: list[float]) -> str:
    """Its mean with the standard error."""
    values = torch.tensor(apart, dtype=torch.float64)
    error = f" ± {float(values.std()) / len(apart) ** 0.5:.4f}" if len(apart) > 1 else ""
    return f"{float(values.mean()):+.4f}{error}"


def curve(chooser: Chooser, count: int, error: str) -> Chart:
    """The validation error over one weight, with tangents at trials of the bisection."""
    low, high = math.log(LOWEST * chooser.largest), math.log(HIGHEST * chooser.largest)
    points, start = [], None
    with torch.no_grad():
        for level in torch.linspace(high, low, count, dtype=torch.float64):
            start = chooser.draw.train.solve(level.exp(), start, 1e-8)
            points.append((float(level.exp()), float(chooser.error(start))))
    lines = [Line("validation error", points[::-1], "ours")]
    assert chooser.one.found is not None
    history = chooser.one.found.history
    half = (high - low) / 14
    for k, trial in enumerate(history):
        if k in (0, 1, 3, len(history) - 1):
            place, slope = math.log(float(trial.parameters)), float(trial.gradient)
            ends = [(math.exp(place + t), trial.objective + slope * t) for t in (-half, 0, half)]
            lines.append(Line(f"tangent, solve {k + 1}", ends))
    return Chart(
        lines, "weight", error, "The validation error of one draw. Kinks are where a feature enters.", log_x=True
    )


def path(table: Table, chooser: Chooser, chosen: Choice) -> Chart:
    """The largest coefficients over a common factor of the weights chosen for groups."""
    train = chooser.draw.train
    top = float((train.pull / chosen.weights[:, None]).max())
    factors = torch.logspace(math.log10(max(top, 1.01)), -0.5, 40, dtype=torch.float64)
    found, B = [], None
    with torch.no_grad():
        for factor in factors:
            B = train.solve(factor * chosen.weights, B, 1e-8)
            found.append(B[:-1, 0])
    largest = chosen.B[:-1, 0].abs().topk(min(6, len(chosen.weights))).indices.tolist()
    lines = [Line(table.names[j], [(float(f), float(b[j])) for f, b in zip(factors, found)][::-1]) for j in largest]
    caption = (
        "The largest coefficients of the first draw as the weights chosen for groups are multiplied by a factor: 1 is "
        "the choice, at the right end nothing is active."
        + (" Of the classes, the first is shown." if table.loss.shifted else "")
    )
    return Chart(lines, "factor of all weights", "coefficient", caption, log_x=True)


def weights(table: Table, every: list[list[Choice]], run: RunFolder) -> list[Block]:
    """The weights of groups in all draws, and those of features in the first, as curves and as pictures."""
    order = [int((table.groups == g).nonzero()[0]) for g in range(len(table.group_names))]
    rows = []
    for g, (name, at) in enumerate(zip(table.group_names, order)):
        logs = torch.stack([choices[2].weights[at].log() for choices in every])
        low, high = (float(v.exp()) for v in (logs.min(), logs.max()))
        active = sum(float((c[2].B[:-1] != 0).any(1)[table.groups == g].double().mean()) for c in every) / len(every)
        rows.append((name, int((table.groups == g).sum()), float(logs.median().exp()), f"{low:.3g} … {high:.3g}",
                     f"{100 * active:.0f} %"))  # fmt: skip
    columns = ("group", "features", "weight, median", "over the draws", "active")
    blocks: list[Block] = [Rows(columns, rows, "Weights chosen for groups; one weight would be the same for all.")]
    features = range(len(table.names))
    lines = [
        Line(choice.name, [(j + 1, float(choice.weights[j])) for j in features], role)
        for choice, role in zip(every[0][:4], ("twin", "other", "ours", "data"))
    ]
    blocks.append(Chart(lines, "feature", "weight", "The weights of all features, first draw.", log_y=True, dots=True))
    if table.grid is not None:
        items = []
        for choice, name in ((every[0][2], "groups"), (every[0][3], "features")):
            for what, values in (("weight", -choice.weights.log()), ("coefficient", choice.B[:-1].abs().amax(1))):
                run.write(f"pictures/{what}-{name}.png", coloured(picture(table.grid, values)))
                said = "penalty, bright: weak" if what == "weight" else "largest coefficient, bright: large"
                items.append((f"{what}-{name}", f"{choice.name}: {said}"))
        blocks.append(Pictures(items, "Features in their places, first draw.", columns=2))
    return blocks


def picture(grid: Tensor, values: Tensor) -> Tensor:
    """Values at their places, scaled to [0, 1] and enlarged; 0 where there is no feature."""
    low, high = float(values.min()), float(values.max())
    image = torch.zeros(*(grid.amax(0) + 1).tolist(), dtype=torch.float64)
    image[grid[:, 0], grid[:, 1]] = 0.1 + 0.9 * (values - low) / max(high - low, 1e-12)
    return image.repeat_interleave(24, 0).repeat_interleave(24, 1)


def gains(table: Table, every: list[list[Choice]]) -> Rows:
    """Errors of all ways, averaged over the draws."""
    rows = []
    for i, choice in enumerate(every[0]):
        choices = [c[i] for c in every]
        found = mean(choices)
        apart = torch.tensor([c[i].test - c[4].test for c in every], dtype=torch.float64)
        spread = (
            f"{float(apart.mean()):+.4f} ± {float(apart.std()) / len(every) ** 0.5:.4f}" if len(every) > 1 else None
        )
        active = sum(int((c.B[:-1] != 0).any(1).sum()) for c in choices) / len(choices)
        rows.append((choice.name, choice.numbers, f"{found.solves:.0f}", f"{found.seconds:.2f}", found.validation,
                     found.test, None if i == 4 else spread, f"{active:.0f}"))  # fmt: skip
    columns = ("weights", "numbers", "inner solves", "seconds", "validation", "test", "test − grid", "active")
    caption = (
        f"Means of the {table.error} over {len(every)} draws, with the standard error of the difference from the grid. "
        "The grid and random search stop when groups have taken their time, or at the end of the grid."
    )
    return Rows(columns, rows, caption, ours=(0, 1, 2, 3))


def race(table: Table, choices: list[Choice]) -> Chart:
    """The best validation error so far over time, first draw."""
    roles = {2: "ours", 4: "other", 5: "other"}
    end = max(choices[i].seconds for i in roles)
    lines = []
    for i, role in roles.items():
        before = choices[0].progress if i == 2 else []
        points = [*before, *choices[i].progress]
        lines.append(Line(choices[i].name, [*points, (end, points[-1][1])], role))
    return Chart(
        lines, "seconds", f"best validation {table.error} so far",
        "First draw. The gradients' line begins with the bisection of one weight.", log_x=True,
    )  # fmt: skip


DEFAULT = BilevelSettings()
SMOKE = BilevelSettings(samples=40, draws=1, solves=6, grid=8)
FULL = replace(DEFAULT, draws=30, solves=200, grid=200)
STUDY = Study(
    "bilevel", "Penalties by gradients", {"smoke": SMOKE, "default": DEFAULT, "full": FULL},
    lambda settings: f"l1 weights by hypergradients, {settings.data}", run_bilevel,
)  # fmt: skip
