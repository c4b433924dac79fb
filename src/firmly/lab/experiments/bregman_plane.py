"""What can be seen in the plane: decision regions on two spirals, folds, and a normalising flow."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from firmly.errors import ConditionError
from firmly.lab.charts import at_least, at_most
from firmly.lab.experiments.bregman_data import read
from firmly.lab.experiments.bregman_networks import KINDS, Activation, Budget, Shape, accuracy, fit
from firmly.lab.experiments.bregman_pictures import region_picture
from firmly.lab.experiments.bregman_robustness import certified_radii, constants
from firmly.lab.flow_data import PLANE
from firmly.lab.flows import FlowSettings, Interval, compare
from firmly.lab.page import Pictures, Section, Table
from firmly.lab.pictures import coloured
from firmly.lab.plane_pictures import grid_picture, histogram
from firmly.lab.run_folder import RunFolder
from firmly.linear import Dense
from firmly.networks import BregmanLayer, invertibility
from firmly.networks.bregman_grid import grid_lines
from firmly.prox import legendre

POINTS = 400  # of the spirals, to train
FULL_COLOUR = 0.05  # the proved distance from which on a region has its full colour
SAMPLES = 40_000  # of a flow, in its picture


class PlaneSettings(Protocol):
    @property
    def spiral_width(self) -> int: ...
    @property
    def spiral_steps(self) -> int: ...
    @property
    def flow_steps(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def budget_s(self) -> float: ...
    @property
    def seed(self) -> int: ...


def region_section(settings: PlaneSettings, run: RunFolder) -> Section:
    split = read("spirals", POINTS, POINTS, settings.seed)
    shape = Shape(settings.spiral_width, settings.depth, settings.activation)
    budget = Budget(settings.spiral_steps, 64, settings.rates, 0.0)
    rows, items = [], []
    for kind in KINDS:
        net = fit(kind, split, shape, budget, settings.seed, run, "spirals").net
        known = constants(net, settings.budget_s)
        radii = certified_radii(net, split.test, known.pairs)
        run.write(f"pictures/regions-{kind.lower()}.png", region_picture(net, known.pairs, split.test, FULL_COLOUR))
        items.append((f"regions-{kind.lower()}", kind))
        bounds = (at_least(known.lower), at_most(known.upper), at_most(known.product))
        rows.append((kind, accuracy(net, split.test), *bounds, at_least(float(radii.mean()))))
    columns = ("network", "accuracy", "constant: attained", "proved", "product", "mean radius, proved")
    caption = (
        "Where the networks of one seed decide for which class: pale near the border, full where a move of "
        f"{FULL_COLOUR:g} is proved not to change the class. Dots are test points."
    )
    text = f"Two spirals, {POINTS} points to train, {shape.depth} layers of {shape.width} units."
    table = Table(columns, rows, "", ours=(2,))
    return Section("Decision regions", text, (Pictures(items, caption, 3), table))


def folding_section(run: RunFolder) -> Section:
    tanh = legendre("tanh")
    items = []
    told = []
    for name, s in (("invertible", -0.8), ("folded", -1.8)):
        layer = BregmanLayer(Dense(torch.tensor([[s, -1.5], [1.5, s]], dtype=torch.float64)), tanh)
        grid = grid_lines(layer)
        run.write(f"pictures/{name}.png", grid_picture(grid))
        norm = layer.weight().norm().upper
        try:
            proof = invertibility(layer)
            told.append(
                f"With s = {s:g} the layer is proved to be a bijection: condition '{proof.condition}', margin "
                f"{proof.margin:.2f}, although ‖W‖ is {norm:.2f} and an i-ResNet would need it below 1."
            )
        except ConditionError as error:
            told.append(f"With s = {s:g} it is refused: {error}.")
        items.append((name, f"s = {s:g}: folded on {100 * grid.folded:.0f}% of the grid"))
    text = "A layer of the plane u + W tanh(u) with W = (s, −1.5; 1.5, s). " + " ".join(told)
    return Section("Folds", text, (Pictures(items, "A grid through both; orange where the plane is turned over.", 2),))


def flow_section(settings: PlaneSettings, run: RunFolder) -> Section:
    moons = PLANE[0]
    plan = FlowSettings(depth=3, width=24, steps=settings.flow_steps, learning_rate=1e-2, test=5000, seeds=2)
    found = compare(moons, plan, run)
    generator = torch.Generator().manual_seed(settings.seed)
    pictures = [("data", moons.sample(SAMPLES, generator), "the density")]
    for name, flow, told in zip(("bregman-flow", "i-resnet"), found.flows, ("one-sided (ours)", "contraction")):
        pictures.append((name, flow.double().sample(SAMPLES, generator), f"drawn from the flow, {told}"))
    items = []
    for name, points, told in pictures:
        run.write(f"pictures/{name}.png", coloured(histogram(points - torch.tensor([0.5, 0.25]), 2.0)))
        items.append((name, told))
    rows = [("one-sided (ours)", likelihood(found.ours)), ("contraction, an i-ResNet", likelihood(found.twin)),
            ("gain, seed by seed", likelihood(found.gain)), ("true density", likelihood(found.reference))]  # fmt: skip
    better = abs(found.gain.mean) > found.gain.half
    verdict = "The difference is beyond the interval." if better else "The difference is within the interval."
    text = (
        f"Normalising flows of {plan.depth} layers of {plan.width} activations on two moons, {plan.steps} batches of "
        f"{plan.batch} points, {plan.seeds} seeds. Ours keeps layers invertible by the one-sided condition, whatever "
        f"their norm; its twin by a contraction, with at least as many parameters. {verdict}"
    )
    table = Table(("flow", "mean log-likelihood of test points, nats"), rows, "Means with 95% intervals over the "
                  "seeds (Student); two seeds make them wide.", ours=(0,))  # fmt: skip
    return Section("A flow", text, (Pictures(items, "", 3), table))


def likelihood(value: Interval) -> str:
    return f"{value.mean:.3f}" + ("" if math.isinf(value.half) else f" ± {value.half:.3f}")
