"""The report on three classifiers: curves of certified and attacked accuracy, the reasons, and the weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

import firmly as fm
from firmly.lab.charts import at_least, at_most, number
from firmly.lab.experiments.bregman_data import Split, regions
from firmly.lab.experiments.bregman_networks import KINDS, Fitted, Kind, Shape
from firmly.lab.experiments.bregman_pictures import Band, band_picture, star_picture
from firmly.lab.experiments.bregman_robustness import Compared
from firmly.lab.flows import Interval, interval
from firmly.lab.page import Pictures, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.networks import BregmaNet, OnBox, bounds_on_box

What = Literal["certified", "attacked"]
OTHERS: tuple[Kind, ...] = ("ResNet", "MLP")


# -- the answer ----------------------------------------------------------------------------------------------------


def answer(gain: Interval) -> str:
    """yes or no if the interval says so."""
    if math.isinf(gain.half):
        return "one seed says nothing"
    return "yes" if gain.mean > gain.half else "no, less" if gain.mean < -gain.half else "not decided"


def headline(found: Compared) -> str:
    said = [f"than the {kind}: {answer(found.gain(kind, 'attacked'))}" for kind in OTHERS]
    return f"Is the BregmaNet more robust under attack? {'; '.join(said).capitalize().replace('mlp', 'MLP').replace('resnet', 'ResNet')}"


def summary(found: Compared, split: Split, shape: Shape) -> str:
    size = sum(p.numel() for p in found.fitted["MLP"][0].net.parameters())
    return (
        f"Data: {split.told}, {len(split.train.x)} to train, {len(split.test.x)} for the test. Three networks of "
        f"{shape.depth} layers of {shape.width} units with {shape.activation}, {size} parameters each, the same "
        f"optimiser, batches and number of steps, {len(found.fitted['MLP'])} seeds. They differ in the skip: "
        "x+ = ρ(Wx + b) in the MLP, x + ρ(Wx + b) in the ResNet, ρ(ρ⁻¹(x) + Wx + b) in the BregmaNet. "
        f"{sentence(found, 'certified')} {sentence(found, 'attacked')}"
    )


def sentence(found: Compared, what: What) -> str:
    """The mean radii in words."""
    ours = interval(found.means("BregmaNet", what)).mean
    parts = []
    for kind in OTHERS:
        gain = found.gain(kind, what)
        parts.append(f"{interval(found.means(kind, what)).mean:.3f} for the {kind} (difference {signed(gain)})")
    verb = "proved to need" if what == "certified" else "found by attacks to take"
    return f"To change the class is {verb} a move of {ours:.3f} on average for the BregmaNet, {', '.join(parts)}."


def facts(found: Compared) -> dict[str, float | str]:
    return {f"{kind}, proved and attacked": " / ".join(
        f"{interval(found.means(kind, what)).mean:.3f}" for what in ("certified", "attacked")) for kind in KINDS
    }  # fmt: skip


def signed(value: Interval) -> str:
    return f"{value.mean:+.3f}" + ("" if math.isinf(value.half) else f" ± {value.half:.3f}")


def shown(values: Sequence[float], digits: int = 3) -> str:
    found = interval(list(values))
    return f"{found.mean:.{digits}f}" + ("" if math.isinf(found.half) else f" ± {found.half:.{digits}f}")


# -- how robust ----------------------------------------------------------------------------------------------------


def bands(found: Compared, what: What, points: int = 60) -> list[Band]:
    """The accuracy that is left at every radius, with its 95% interval over the seeds."""
    radii = [found.radius * k / (points - 1) for k in range(points)]
    made = []
    for kind in KINDS:
        at = [
            interval([float((getattr(r, what) > radius).double().mean()) for r in found.robust[kind]])
            for radius in radii
        ]
        halves = [0.0 if math.isinf(i.half) else i.half for i in at]
        low = [i.mean - half for i, half in zip(at, halves)]
        high = [i.mean + half for i, half in zip(at, halves)]
        made.append(Band(kind, radii, [i.mean for i in at], low, high))
    return made


def robustness_section(found: Compared, run: RunFolder) -> Section:
    names: dict[What, str] = {"attacked": "not changed by attacks", "certified": "proved"}
    for what, name in names.items():
        run.write(f"pictures/{what}.png", band_picture(bands(found, what), "radius", f"right, and {name}"))
    rows = []
    for kind in KINDS:
        robust = found.robust[kind]
        rows.append((
            kind, shown([r.accuracy(0.0)[0] for r in robust]), shown(found.means(kind, "certified")),
            shown(found.means(kind, "attacked")),
            None if kind == "BregmaNet" else signed(found.gain(kind, "certified")),
            None if kind == "BregmaNet" else signed(found.gain(kind, "attacked")),
        ))  # fmt: skip
    columns = ("network", "accuracy", "mean radius, proved", "attacked", "BregmaNet less it, proved", "attacked")
    seeds = len(found.fitted["MLP"])
    text = (
        "Of every test sample: how far it may move in Euclidean norm before its class changes. Proved: the margin to "
        "every other class over a certified Lipschitz constant of the difference of the two outputs. Attacked: the "
        "smallest perturbation that projected gradient ascent with restarts and a bisection has found. The truth lies "
        "between. No attack was inside a proof; the run stops otherwise. Perturbed pixels may leave [0, 1]."
    )
    caption = (
        f"Means over {seeds} seeds with 95% intervals (Student); radii are 0 for wrong classes and cut off at "
        f"{found.radius:g}. The learning rate was chosen on validation samples."
    )
    pictures = Pictures([("attacked", "attacked accuracy"), ("certified", "certified accuracy")],
                        "Accuracy that is left at every radius; bands are 95% intervals over the seeds.", 2)  # fmt: skip
    return Section("How robust", text, (pictures, Table(columns, rows, caption, ours=(2,))))


# -- why -----------------------------------------------------------------------------------------------------------


def reasons_section(found: Compared, split: Split, run: RunFolder) -> Section:
    blocks = [parts_table(found, split), layers_table(found.fitted["BregmaNet"][0], split)]
    text = f"The proved radius is a margin over a constant. {reason(found, 'ResNet')} {reason(found, 'MLP')}"
    if split.side is None:
        return Section("Why", text, blocks)
    stars = {kind: star(found.fitted[kind][0].net, split) for kind in KINDS}
    run.write("pictures/star.png", star_picture(stars))
    caption = (
        "Certified sensitivity of all outputs to nine parts of the picture, each moved alone (first seed). "
        "The network itself is more sensitive than the sum of squares of none of them."
    )
    return Section("Why", text, (*blocks, Pictures([("star", "sensitivity to parts of the picture")], caption, 2)))


def reason(found: Compared, kind: Kind) -> str:
    """Which factor makes the proved radii differ, in words."""
    ours, theirs = found.robust["BregmaNet"], found.robust[kind]

    def ratio(values: list[float], others: list[float]) -> float:
        return math.exp(sum(math.log(a / b) for a, b in zip(values, others)) / len(values))

    margins = ratio([median(r.margins) for r in ours], [median(r.margins) for r in theirs])
    proved = ratio([r.constants.upper for r in ours], [r.constants.upper for r in theirs])
    attained = ratio([r.constants.lower for r in ours], [r.constants.lower for r in theirs])
    return (
        f"Beside the {kind}, the median margin of the BregmaNet is {margins:.2f} times as large, its proved constant "
        f"{proved:.2f} times, and the constant that an attack attains {attained:.2f} times."
    )


def median(values: torch.Tensor) -> float:
    return max(float(values.median()), 1e-12)


def parts_table(found: Compared, split: Split) -> Table:
    rows = []
    for kind in KINDS:
        nets, robust = [f.net for f in found.fitted[kind]], found.robust[kind]
        first, last = ([norm(net[i]) for net in nets] for i in (0, -1))
        width = nets[0][-1].in_features
        middle = [fm.certify(net[1], shape=(width,), budget_s=2.0).upper for net in nets]
        rows.append((
            kind, mean([median(r.margins) for r in robust]), at_most(mean(first)), at_most(mean(middle)),
            at_most(mean(last)), at_least(mean([r.constants.lower for r in robust])),
            at_most(mean([r.constants.upper for r in robust])), at_most(mean([r.constants.product for r in robust])),
            mean([r.steepest for r in robust]),
        ))  # fmt: skip
    columns = ("network", "median margin", "‖A‖", "middle, proved", "‖C‖", "whole: attained", "proved", "product",
               "steepest test sample")  # fmt: skip
    return Table(columns, rows, "x₀ = ρ(Ax + a), the layers, then Cx + c. Means over the seeds; the whole is the map "
                 "from a sample to all outputs.", ours=(2,))  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def norm(linear: nn.Module) -> float:
    assert isinstance(linear, nn.Linear)
    return fm.linear.Dense(linear.weight.detach()).norm().upper


def layers_table(fitted: Fitted, split: Split) -> Table:
    """The layers of a BregmaNet by closed forms, one engine, and what samples attain."""
    first, net = fitted.net[0], fitted.net[1]
    assert isinstance(net, BregmaNet)
    with torch.no_grad():
        u = first(split.test.x.double())
    low, high = u.amin(0) - 1e-9, u.amax(0) + 1e-9
    anywhere, inside = bounds_on_box(net), bounds_on_box(net, low, high)
    steps = [(a.weight, a.dual, b.dual, b.primal) for a, b in zip(anywhere.layers, inside.layers)]
    rows: list[tuple[object, ...]] = [
        (f"layer {k + 1}", *(at_most(value) for value in step)) for k, step in enumerate(steps)
    ]
    rows.append(("their product", None, *(at_most(v) for v in (anywhere.dual, inside.dual, inside.primal))))
    net_proved = fm.certify(net, budget_s=2.0)
    on_box = fm.certify(OnBox(net, low, high), budget_s=2.0)
    rows.append(("by the engine, whole space", None, at_most(net_proved.upper), None, None))
    rows.append(("by the engine, on the box", None, None, at_most(on_box.upper), None))
    rows.append(("attained", None, at_least(net_proved.lower), at_least(on_box.lower), None))
    columns = ("BregmaNet of the first seed", "‖W‖", "dual, anywhere", "dual, on the box", "primal, on the box")
    caption = (
        "Bounds of single layers and their products, in dual coordinates u+ = u + Wρ(u) + b and in primal ones x = ρ(u); "
        "the box contains all test samples. The engine bounds the layers together, as they stand in the classifier, "
        "from u to x."
    )
    return Table(columns, rows, caption, ours=(len(steps) + 1,))


def star(net: nn.Sequential, split: Split) -> dict[str, float]:
    assert split.side is not None
    groups = {name: ("data", mask) for name, mask in regions(split.side).items()}
    found = fm.certificates.star(net, groups, shape=(split.features,), tolerance=1e-2, budget_s=10.0)
    return {name: certificate.upper for name, certificate in found.groups.items()}


# -- the weight decay ----------------------------------------------------------------------------------------------


def decay_section(decays: Sequence[float], found: Sequence[Compared]) -> Section:
    rows, best = [], {}
    for decay, compared in sorted(zip(decays, found), key=lambda pair: pair[0]):
        for kind in KINDS:
            accuracy = shown([r.accuracy(0.0)[0] for r in compared.robust[kind]])
            certified, attacked = compared.means(kind, "certified"), compared.means(kind, "attacked")
            rows.append((number(decay), kind, accuracy, shown(certified), shown(attacked)))
            best[kind] = max(best.get(kind, 0.0), mean(attacked))
    columns = ("weight decay", "network", "accuracy", "mean radius, proved", "attacked")
    text = (
        "Does the answer depend on the regularisation? The same training with other weight decays, the same for all "
        "three. The best mean attacked radius of any: "
        + ", ".join(f"{kind} {value:.3f}" for kind, value in best.items())
        + "."
    )
    ours = [k for k, row in enumerate(rows) if row[1] == "BregmaNet"]
    return Section("With other weight decays", text, (Table(columns, rows, "", ours),))
