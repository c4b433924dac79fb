"""The report on three classifiers: curves of certified and attacked accuracy, the reasons, and the weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

import firmly as fm
from firmly.lab.charts import at_least, at_most, number
from firmly.lab.experiments.bregman_data import Split, regions
from firmly.lab.experiments.bregman_networks import KINDS, Fitted, Kind, Shape
from firmly.lab.experiments.bregman_pictures import Band, band, band_picture, radii_up_to, star_picture
from firmly.lab.experiments.bregman_robustness import Compared, What
from firmly.lab.flows import Interval, interval
from firmly.lab.page import Pictures, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.networks import BregmaNet, OnBox, bounds_on_box

OTHERS: tuple[Kind, ...] = ("ResNet", "MLP")


# -- the answer ----------------------------------------------------------------------------------------------------


def answer(gain: Interval) -> str:
    """What the interval of a difference says."""
    if math.isinf(gain.half):
        return "one seed, no answer"
    return "more" if gain.mean > gain.half else "less" if gain.mean < -gain.half else "no difference"


def headline(found: Compared) -> str:
    proved, attacked = (answer(found.gain("ResNet", what)) for what in ("certified", "attacked"))
    return f"Is a BregmaNet more robust than a ResNet? By proofs: {proved}; under attack: {attacked}"


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
    said = "By proofs no move changes the class below" if what == "certified" else "Attacks change it with a move of"
    return f"{said} {ours:.3f} on average for the BregmaNet, {', '.join(parts)}."


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


def bands(found: Compared, what: What) -> list[Band]:
    """The accuracy that is left at every radius."""
    radii = radii_up_to(found.radius)
    return [band(kind, radii, [r.curve(what, radii) for r in found.robust[kind]]) for kind in KINDS]


def robustness_section(found: Compared, run: RunFolder) -> Section:
    names: dict[What, str] = {"attacked": "not changed by attacks", "certified": "proved"}
    for what, name in names.items():
        run.write(f"pictures/{what}.png", band_picture(bands(found, what), "radius", f"right, and {name}"))
    rows = []
    for kind in KINDS:
        robust = found.robust[kind]
        rows.append((
            kind, shown([r.accuracy for r in robust]), shown(found.means(kind, "certified")),
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
        f"{f'Means over {seeds} seeds with 95% intervals (Student)' if seeds > 1 else 'One seed'}; radii are 0 for "
        "wrong classes and cut off at "
        f"{found.radius:g}. The learning rate was chosen on validation samples."
    )
    pictures = Pictures(
        [("attacked", "attacked accuracy"), ("certified", "certified accuracy")],
        "Accuracy that is left at every radius; bands are 95% intervals over the seeds.", 2,
    )  # fmt: skip
    return Section("How robust", text, (pictures, Table(columns, rows, caption, ours=(2,))))


# -- why -----------------------------------------------------------------------------------------------------------


def reasons_section(found: Compared, split: Split, run: RunFolder) -> Section:
    parts = {kind: [parts_of(f.net) for f in fitted] for kind, fitted in found.fitted.items()}
    blocks = [parts_table(found, parts), layers_table(found.fitted["BregmaNet"][0], split)]
    text = (
        "The proved radius is a margin over a constant. In dual coordinates u = ρ⁻¹(x) the BregmaNet is u+ = u + Wρ(u) "
        "+ b, a residual network with the activation before the weights: its skip adds what is not yet activated, and "
        f"its features end inside the range of ρ.\n\n{reason(found, 'ResNet', parts)}\n\n{reason(found, 'MLP', parts)}"
        f"\n\n{end_of_net(found)}"
    )
    if split.side is None:
        return Section("Why", text, blocks)
    stars = {kind: star(found.fitted[kind][0].net, split) for kind in KINDS}
    run.write("pictures/star.png", star_picture(stars))
    caption = (
        "Certified sensitivity of all outputs to nine parts of the picture, each moved alone (first seed). The "
        "constant of the whole is at least the longest ray and at most the root of the sum of their squares."
    )
    return Section("Why", text, (*blocks, Pictures([("star", "sensitivity to parts of the picture")], caption, 2)))


def reason(found: Compared, kind: Kind, parts: dict[Kind, list[tuple[float, float, float]]]) -> str:
    """Which factor makes the proved radii differ, in words."""
    ours, theirs = found.robust["BregmaNet"], found.robust[kind]

    def ratio(values: Sequence[float], others: Sequence[float]) -> float:
        return math.exp(mean([math.log(a / b) for a, b in zip(values, others)]))

    margins = ratio([median(r.margins) for r in ours], [median(r.margins) for r in theirs])
    proved = ratio([r.constants.upper for r in ours], [r.constants.upper for r in theirs])
    attained = ratio([r.constants.lower for r in ours], [r.constants.lower for r in theirs])
    first, middle, last = (ratio([p[i] for p in parts["BregmaNet"]], [p[i] for p in parts[kind]]) for i in range(3))
    return (
        f"Beside the {kind}, the median margin of the BregmaNet is {margins:.2f} times as large, its proved constant "
        f"{proved:.2f} times, and the constant that an attack attains {attained:.2f} times. Of its parts, ‖A‖ is "
        f"{first:.2f}, the constant of the layers {middle:.2f}, and ‖C‖ {last:.2f} times as large."
    )


def end_of_net(found: Compared) -> str:
    """What the features of the last layer have to do with it: the same network, read before the last activation."""
    said = []
    for what, name in (("certified", "proved"), ("attacked", "attacked")):
        radius = interval(found.means("BregmaNet, dual", what)).mean
        gains = (signed(found.gain(kind, what, "BregmaNet, dual")) for kind in ("BregmaNet", "ResNet"))
        said.append(
            "The mean radius, {}, is {:.3f}: {} beside the BregmaNet, {} beside the ResNet.".format(
                name, radius, *gains
            )
        )
    return (
        "Is it the last activation? The row 'BregmaNet, dual' is trained alike and ends with Cu + c instead of "
        f"Cρ(u) + c. {' '.join(said)}"
    )


def median(values: torch.Tensor) -> float:
    return max(float(values.median()), 1e-12)


def parts_of(net: nn.Sequential) -> tuple[float, float, float]:
    """Proved constants of the map in front, of the layers and of the map behind."""
    first, last = net[0], net[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    a, c = (fm.linear.Dense(linear.weight.detach()).norm().upper for linear in (first, last))
    return a, fm.certify(net[1], shape=(first.out_features,), budget_s=2.0).upper, c


def parts_table(found: Compared, parts: dict[Kind, list[tuple[float, float, float]]]) -> Table:
    rows = []
    for kind, robust in found.robust.items():
        rows.append((
            kind, mean([median(r.margins) for r in robust]), *(at_most(mean(part)) for part in zip(*parts[kind])),
            at_least(mean([r.constants.lower for r in robust])), at_most(mean([r.constants.upper for r in robust])),
            at_most(mean([r.constants.product for r in robust])), mean([r.steepest for r in robust]),
        ))  # fmt: skip
    columns = (
        "network", "median margin", "‖A‖", "layers, proved", "‖C‖", "whole: attained", "proved", "product",
        "steepest test sample",
    )  # fmt: skip
    caption = "x₀ = ρ(Ax + a), the layers, then Cx + c. Means over the seeds; the whole maps a sample to all outputs."
    return Table(columns, rows, caption, ours=(2,))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
        "Bounds of single layers and their products, in dual coordinates u+ = u + Wρ(u) + b and in primal ones, "
        "x = ρ(u); the box contains all test samples. The engine bounds the layers together, as they stand in the "
        "classifier, from u to x."
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
            accuracy = shown([r.accuracy for r in compared.robust[kind]])
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
