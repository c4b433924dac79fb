"""Certificates of multilayer perceptrons.

Sixty-four inputs, ten outputs, ReLU; 'depth' counts the hidden layers. Random weights are normal with variance
2 / (inputs of the layer); trained networks learned the handwritten digits of scikit-learn. Ours is verified; eclipse-nn
(the package) and LipSDP with one multiplier per neuron (cvxpy with Clarabel, in the benchmark) are what they print. The
seconds are those of the bound alone, without imports. Ours may take half a minute for one network; a peer that needs
more than five is not asked for one that is at least as wide and as deep. 'At equal bound' compares the time of a peer
with the fastest of ours whose bound is at most the peer's.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import firmly as fm
from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Cell, Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, TimeIsUp, program, timed
from firmly.errors import NotCertifiable

WIDTHS, DEPTHS = (16, 32, 64, 128, 256), (2, 5, 10, 20, 50)
BUDGET_S, LIMIT_S = 30.0, 300.0
OURS = ("lipsdp", "eclipse", "product")
ECLIPSE_NN = Environment("eclipse-nn", ("eclipse-nn==0.1.7",))


def measure(quick: bool) -> Result:
    widths, depths = ((4,), (2,)) if quick else (WIDTHS, DEPTHS)
    every = [(width, depth) for depth in depths for width in widths]
    some = [(width, depth) for width, depth in every if quick or (depth <= 10 and width >= 32)]
    peers = [
        Peer("LipSDP", "benchmarks.programs.lipsdp_cvxpy"),
        Peer("ECLipsE", "benchmarks.programs.eclipse_nn", ("ECLipsE",), ECLIPSE_NN, install=not quick),
        Peer("ECLipsE-Fast", "benchmarks.programs.eclipse_nn", ("ECLipsE_Fast",), ECLIPSE_NN, install=not quick),
    ]
    families = {"Random weights": [row(random_mlp(*sizes), *sizes, peers) for sizes in every]}
    images, labels = digits()
    if images is not None:
        families["Trained on digits"] = [row(trained_mlp(*sizes, images, labels), *sizes, peers) for sizes in some]
    tables = [table for title, rows in families.items() for table in (bounds(title, rows), times(title, rows))]
    tables[-1] = replace(tables[-1], note=remarks(peers))
    return Result(tables, targets([row for rows in families.values() for row in rows]))


def bounds(title: str, rows: list[dict[str, Cell]]) -> Table:
    return Table(f"{title}: bounds", [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows])


def times(title: str, rows: list[dict[str, Cell]]) -> Table:
    kept = [{k: v for k, v in row.items() if k in ("width", "depth") or k.startswith("seconds")} for row in rows]
    return Table(f"{title}: seconds", kept)


def remarks(peers: list[Peer]) -> str:
    return "; ".join(f"{peer.name}: {remark}" for peer in peers for remark in peer.remarks)


# -- the networks --------------------------------------------------------------------------------------------------


def random_mlp(width: int, depth: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(depth)
    sizes = [64, *[width] * depth, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            layer.bias.normal_(0, 0.1, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> tuple[Tensor | None, Tensor | None]:
    """The 1,797 digits of scikit-learn, (count, 64) in [0, 1], and their labels; None if it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None, None
    data = load_digits()
    return torch.from_numpy(data.data / 16), torch.from_numpy(data.target)


def trained_mlp(width: int, depth: int, images: Tensor, labels: Tensor) -> nn.Sequential:
    """The random network after 200 steps of Adam with weight decay."""
    network = random_mlp(width, depth)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = torch.randint(len(images), (128,), generator=generator)
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


# -- the bounds ----------------------------------------------------------------------------------------------------


class Peer:
    """A program that prints the bound and the seconds for a file of weights."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: tuple[str, ...] = (),
        environment: Environment | None = None,
        install: bool = True,
    ):
        self.name = name
        self.module = module
        self.arguments = arguments
        self.environment = environment
        self.install = install
        self.too_large: list[tuple[int, int]] = []
        self.remarks: dict[str, None] = {}

    def bound(self, weights: Path, width: int, depth: int) -> tuple[float | None, float | None]:
        if any(width >= w and depth >= d for w, d in self.too_large):
            return None, None
        try:
            python = self.environment.python(self.install) if self.environment else None
            found = program(self.module, [str(weights), *self.arguments], LIMIT_S, python)
        except ProgramFailed as failure:
            self.remarks[str(failure)] = None
            if isinstance(failure, TimeIsUp):
                self.too_large.append((width, depth))
            return None, None
        return found["value"], found["seconds"]


def row(network: nn.Sequential, width: int, depth: int, peers: list[Peer]) -> dict[str, Cell]:
    """All bounds of one network, the peers' and ours in turn."""
    cells: dict[str, Cell] = {"width": width, "depth": depth}
    for method in OURS:
        value, seconds = ours(network, method)
        cells |= {method: value, f"seconds {method}": seconds}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        np.savez(path, *[layer.weight.detach().numpy() for layer in network if isinstance(layer, nn.Linear)])
        for peer in peers:
            value, seconds = peer.bound(path, width, depth)
            cells |= {peer.name: value, f"seconds {peer.name}": seconds}
    return cells


def ours(network: nn.Module, method: str) -> tuple[float | None, float | None]:
    """The verified bound of one method and the median of its own seconds."""
    seconds: list[float] = []

    def bound() -> float:
        certificate = fm.certify(network, method=method, shape=(64,), budget_s=BUDGET_S)
        seconds.append(certificate.bounds[0].seconds)
        return certificate.upper

    try:
        value, _ = timed(bound, repeats=3)
    except NotCertifiable:
        return None, None
    return value, sorted(seconds)[len(seconds) // 2]


def targets(rows: list[dict]) -> list[Target]:
    solved = [r for r in rows if r["LipSDP"]]
    away = max((abs(r["lipsdp"] / r["LipSDP"] - 1) for r in solved), default=None)
    faster = min((r["seconds LipSDP"] / r["seconds lipsdp"] for r in solved), default=None)
    found = [
        Target("within 0.1 % of LipSDP-neuron", shown(away, 100, " % at most"), verdict(away, lambda x: x <= 1e-3)),
        Target("at least ten times faster than LipSDP-neuron", shown(faster, 1, " times at least"),
               verdict(faster, lambda x: x >= 10)),
    ]  # fmt: skip
    for peer in ("ECLipsE", "ECLipsE-Fast"):
        asked = [r for r in rows if r[peer]]
        looser = max((min(r[name] or math.inf for name in OURS) / r[peer] for r in asked), default=None)
        faster = min((r[f"seconds {peer}"] / at_equal_bound(r, r[peer]) for r in asked), default=None)
        found += [
            Target(f"never looser than {peer} of eclipse-nn", shown(looser, 1, " of it at most"),
                   verdict(looser, lambda x: x <= 1)),
            Target(f"not slower than {peer} of eclipse-nn at equal bound", shown(faster, 1, " times as fast at least"),
                   verdict(faster, lambda x: x >= 1)),
        ]  # fmt: skip
    return found


def at_equal_bound(row: dict, bound: float) -> float:
    """The least seconds in which one of ours is as tight."""
    return min((row[f"seconds {name}"] for name in OURS if row[name] and row[name] <= bound), default=math.inf)


def shown(value: float | None, factor: float, unit: str) -> str:
    if value is None:
        return "no peer"
    return f"{value * factor:.3g}{unit}" if value < math.inf else "ours found no bound for some"


def verdict(value: float | None, kept) -> bool | None:
    return None if value is None else kept(value)
