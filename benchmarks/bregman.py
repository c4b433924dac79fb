"""Bregman networks: are they more robust?

Multilayer perceptron, x+ = rho(W x + b), residual network, x + rho(W x + b), and BregmaNet, rho(rho^-1(x) + W x + b),
with rho = tanh, between the same affine maps: equal numbers of parameters, equal first weights up to their scale, the
same batches, AdamW, number of steps and weight decay (1; 0 on the spirals). Validation samples choose the epoch, and
those of the first seed the learning rate, 0.003 or 0.01, for each kind of network and data set. Each seed has training
samples of its own. MNIST and Fashion-MNIST: 10,000 training and 500 test images, 3 layers of 48 units, 800 batches of
64; spirals: 400 points, 4 layers of 16 units, 1000 batches.

Proved radius: margin over a certified Lipschitz constant of the difference of two outputs. Attacked radius: the norm of
the smallest perturbation found by projected gradient ascent on eight balls with restarts, and bisection. Both are
Euclidean, 0 where the class is wrong, and cut off at the end of the axis. Means with 95% intervals (Student) over 5
seeds; differences are taken seed by seed. Then bregmanet 1.0.0: answers to questions, and the time of a forward and
backward pass with the same weights, in turn, on one thread, processor time, the fastest of all rounds.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.programs import bregman_peer
from benchmarks.runner.environments import Environment
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Cell, Picture, Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program
from firmly.lab.experiments.bregman_data import Data, Split, read
from firmly.lab.experiments.bregman_networks import KINDS, Budget, Kind, Shape, fit
from firmly.lab.experiments.bregman_pictures import HEIGHT, WIDTH, band, band_picture, radii_up_to
from firmly.lab.experiments.bregman_robustness import Effort, What, robustness
from firmly.lab.flows import Interval, interval
from firmly.lab.run_folder import RunFolder

SEEDS, RATES, BATCH, ROUNDS = 5, (3e-3, 1e-2), 64, 60
ENVIRONMENT = Environment("bregmanet", ("--no-deps", "bregmanet==1.0.0"))
WHATS: tuple[What, What] = ("certified", "attacked")
NAMES: dict[What, str] = {"certified": "proved", "attacked": "attacked"}


@dataclass(frozen=True)
class Task:
    """A data set, what is trained on it, and how far attacks go."""

    data: Data
    train: int
    test: int
    shape: Shape
    steps: int
    decay: float
    radius: float


TASKS = (
    Task("spirals", 400, 400, Shape(16, 4), 1000, 0.0, 0.2),
    Task("mnist", 10_000, 500, Shape(48, 3), 800, 1.0, 2.0),
    Task("fashion-mnist", 10_000, 500, Shape(48, 3), 800, 1.0, 2.0),
)
QUICK = Task("spirals", 60, 40, Shape(6, 2), 10, 0.0, 0.2)


def measure(quick: bool) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {task.data: quickly() if quick else trained(task) for task in ((QUICK,) if quick else TASKS)}
    finally:
        torch.set_num_threads(threads)
    peer, note = against_peer(quick)
    tables = [Table(f"{data}: accuracy and radii", radii(nets)) for data, nets in found.items()]
    why = [row for data, nets in found.items() for row in reasons(data, nets)]
    note_why = (
        "Medians of margins of the right output to the next one, and Lipschitz constants of the map from a sample to "
        "all outputs; means over the seeds."
    )
    tables.append(Table("Why: margins and constants", why, note_why))
    tables += [Table("Questions to both packages", peer["defects"], note), Table("Forward and backward", peer["speed"])]
    pictures = [drawing(data, nets, what) for data, nets in found.items() for what in WHATS]
    return Result(tables, targets(found, peer), pictures)


# -- networks ------------------------------------------------------------------------------------------------------

Networks = dict[str, list[dict[str, Any]]]  # by kind, one of each seed


def trained(task: Task) -> Networks:
    partial = Partial(Path(__file__))
    found: Networks = {}
    for seed in range(SEEDS):
        split = None
        for kind in KINDS:
            key = f"{task} {kind} {seed}"
            if key not in partial.known:
                split = split or read(task.data, task.train, task.test, seed)
                rates = RATES if seed == 0 else (found[kind][0]["rate"],)
                partial.keep(key, one(task, split, kind, seed, rates))
            found.setdefault(kind, []).append(partial.known[key])
    return found


def quickly() -> Networks:
    split = read(QUICK.data, QUICK.train, QUICK.test, 0)
    return {kind: [one(QUICK, split, kind, 0, RATES[:1])] for kind in KINDS}


def one(task: Task, split: Split, kind: Kind, seed: int, rates: tuple[float, ...]) -> dict[str, Any]:
    """Train a network, and keep the numbers that the tables and pictures need."""
    budget = Budget(task.steps, BATCH, rates, task.decay)
    with tempfile.TemporaryDirectory() as folder:
        net, rate, _ = fit(kind, split, task.shape, budget, seed, RunFolder(folder), task.data)
    robust = robustness(net, split.test, Effort(task.radius, 20, 60.0), seed)
    at = radii_up_to(task.radius)
    return {
        "rate": rate,
        "parameters": sum(p.numel() for p in net.parameters()),
        "samples": len(split.test.x),
        "radius": task.radius,
        "accuracy": robust.accuracy,
        "margin": float(robust.margins.median()),
        "lower": robust.constants.lower,
        "upper": robust.constants.upper,
        "product": robust.constants.product,
    } | {what: {"mean": robust.mean(what, task.radius), "curve": robust.curve(what, at)} for what in WHATS}


# -- tables --------------------------------------------------------------------------------------------------------


def radii(nets: Networks) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for kind, found in nets.items():
        row: dict[str, Cell] = {"network": kind, "parameters": found[0]["parameters"]}
        row["accuracy"] = shown(interval([n["accuracy"] for n in found]))
        for what in WHATS:
            row[f"radius, {NAMES[what]}"] = shown(interval(means(found, what)))
        for what in WHATS:
            row[f"BregmaNet less it, {NAMES[what]}"] = (
                None if kind == "BregmaNet" else shown(gain(nets, kind, what), "+")
            )
        rows.append(row)
    return rows


def means(found: Sequence[dict[str, Any]], what: What) -> list[float]:
    return [n[what]["mean"] for n in found]


def gain(nets: Networks, over: str, what: What) -> Interval:
    return interval([a - b for a, b in zip(means(nets["BregmaNet"], what), means(nets[over], what))])


def shown(found: Interval, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f}" + ("" if math.isinf(found.half) else f" ± {found.half:.3f}")


def reasons(data: str, nets: Networks) -> list[dict[str, Cell]]:
    columns = {"margin": "margin", "lower": "attained", "upper": "proved", "product": "product of norms"}
    rows: list[dict[str, Cell]] = []
    for kind, found in nets.items():
        row: dict[str, Cell] = {"data": data, "network": kind}
        for key, name in columns.items():
            row[name] = sum(n[key] for n in found) / len(found)
        rows.append(row)
    return rows


def drawing(data: str, nets: Networks, what: What) -> Picture:
    radius = next(iter(nets.values()))[0]["radius"]
    bands = [band(kind, radii_up_to(radius), [n[what]["curve"] for n in found]) for kind, found in nets.items()]
    png = band_picture(
        bands, "radius", f"{data}: right and {'proved' if what == 'certified' else 'not changed by attacks'}"
    )
    uri = base64.b64encode(png).decode("ascii")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<image width="{WIDTH}" height="{HEIGHT}" href="data:image/png;base64,{uri}"/></svg>\n'
    )
    return Picture(f"{data}-{NAMES[what]}", f"{data}: accuracy that is left at every radius, {NAMES[what]}", svg)


def targets(found: dict[Data, Networks], peer: dict[str, list[dict[str, Any]]]) -> list[Target]:
    attacked = sum(n["samples"] for nets in found.values() for networks in nets.values() for n in networks)
    made = [Target("no attack inside a proof (a run stops at the first)", f"0 of {attacked} samples", True)]
    for what in WHATS:
        for other in ("MLP", "ResNet"):
            gains = {data: gain(nets, other, what) for data, nets in found.items()}
            more = [data for data, g in gains.items() if g.mean > g.half]
            less = [data for data, g in gains.items() if g.mean < -g.half]
            measured = f"more: {', '.join(more) or 'none'}; less: {', '.join(less) or 'none'}; of {len(gains)}"
            decided = all(math.isfinite(g.half) for g in gains.values())
            text = f"BregmaNet more robust than the {other}, {NAMES[what]}, beyond the interval on every data set"
            made.append(Target(text, measured, len(more) == len(gains) if decided else None))
    ratios = [row["ratio"] for row in peer["speed"]]
    known = all(r is not None for r in ratios)
    measured = ", ".join(f"{r:.2f}" for r in ratios) if known else "bregmanet not installed"
    made.append(Target("forward and backward not slower than bregmanet (its time over ours)", measured,
                       min(ratios) >= 1 if known else None))  # fmt: skip
    return made


def against_peer(quick: bool) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """What the program found, and why it had no peer."""
    if quick:
        return bregman_peer.main(1, peer=False), ""
    try:
        python = ENVIRONMENT.python(install=True)
        return program("benchmarks.programs.bregman_peer", [str(ROUNDS)], 600.0, python), ""
    except ProgramFailed as failed:
        return bregman_peer.main(ROUNDS, peer=False), f"Without bregmanet: {failed}."
