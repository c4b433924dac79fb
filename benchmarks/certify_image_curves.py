"""Certificates of image networks against size, depth and channels.

Unrolled forward-backward with steps drawn uniformly from [0.3, 1.95] / |A|^2. Against size and depth: the deblurring
networks of the claim before this one, images of 256 x 256 where the depth changes, three seeds for each depth. Against
channels: convolutional sparse coding of images of 64 x 64 by 1 to 32 random filters of 7 x 7 pixels, five layers, so
that a block has one row for every channel of every layer.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

import firmly as fm
from benchmarks.certify_image import random_steps
from benchmarks.runner.curves import curves
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Picture, Result, Table
from benchmarks.runner.timing import ROOT, program
from firmly.lab.charts import Line

DEPTHS, CHANNELS, SEEDS, LAYERS = (5, 10, 20, 50), (1, 2, 4, 8, 16, 32), (0, 1, 2), 5
NOTE = (
    "'seconds' are those of all upper bounds, on one core without other work; 'blocks' the frequencies that differ, "
    "'rows' those of each."
)


def measure(quick: bool) -> Result:
    partial = Partial(Path(__file__))
    large, small = (32, 16) if quick else (256, 64)
    deep = [
        {"depth": d, "seed": s, **measured(partial, "depth", large, d, s)}
        for d in ((2, 3) if quick else DEPTHS)
        for s in ((0,) if quick else SEEDS)
    ]
    wide = [{"channels": c, **measured(partial, "channels", small, c, 0)} for c in ((1, 2) if quick else CHANNELS)]
    partial.finish()
    known = json.loads((ROOT / "benchmarks" / "results" / "certify_image.json").read_text())["result"]["tables"]
    return Result(
        [
            Table(f"Against depth, {large} x {large}", deep, NOTE),
            Table(f"Against channels, {LAYERS} layers, {small} x {small}", wide),
        ],
        pictures=pictures(known[1]["rows"], deep, wide),
    )


def pictures(sized: list[dict], deep: list[dict], wide: list[dict]) -> list[Picture]:
    """Gap and seconds against size, as the claim before this one measured them, depth and channels."""
    sized = [{**row, "side": int(row["image"].split()[0])} for row in sized]
    return [
        *pair("side", sized, "pixels a side", "images of N x N pixels, ten layers"),
        *pair("depth", deep, "layers", "networks of different depth, images of 256 x 256 pixels, three seeds"),
        *pair("channels", wide, "channels", f"networks with different numbers of channels, {LAYERS} layers"),
    ]


def measured(partial: Partial, kind: str, size: int, number: int, seed: int) -> dict:
    """A point of a curve, measured in a process of its own unless a stopped run has done so."""
    arguments = [kind, str(size), str(number), str(seed)]
    key = " ".join(arguments)
    if key not in partial.known:
        partial.keep(key, program("benchmarks.programs.certify_curve", arguments, limit_s=3600))
    return partial.known[key]


def network(kind: str, size: int, number: int, seed: int) -> nn.Module:
    """A network of `number` layers, or of `number` channels."""
    return random_steps(size, number, seed) if kind == "depth" else sparse_coding(size, number, seed)


def sparse_coding(size: int, channels: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    A = fm.linear.Convolution(torch.randn(1, channels, 7, 7, generator=generator), (channels, size, size))
    net = fm.unroll(fm.algorithms.ForwardBackward(A, fm.prox.L1(0.01)), LAYERS, learn=("step_size",))
    norm = A.norm().upper
    for layer in net.layers:
        layer.step_size = torch.empty(()).uniform_(0.3, 1.95, generator=generator) / norm**2
    return net


def pair(x: str, rows: Iterable[dict], axis: str, what: str) -> list[Picture]:
    """Gap and seconds against one column; the median where there are several rows for a value."""
    found = []
    for y, name, log_y in (("gap", "gap, %", False), ("seconds", "seconds", True)):
        points: dict[float, list[float]] = {}
        for row in rows:
            points.setdefault(row[x], []).append(100 * (row[y] - 1) if y == "gap" else row[y])
        if any(len(values) > 1 for values in points.values()):
            lines = [
                Line("median", [(at, statistics.median(values)) for at, values in points.items()], "ours"),
                Line("worst", [(at, max(values)) for at, values in points.items()], "twin"),
            ]
        else:
            lines = [Line("", [(at, values[0]) for at, values in points.items()], "ours")]
        if y == "gap":
            lines.append(Line("sharp", [(min(points), 0.0), (max(points), 0.0)], "other"))
        caption = f"{'Gap' if y == 'gap' else 'Time'} of certificates: {what}"
        found.append(curves(f"{x}-{y}", lines, axis, name, caption, log_y=log_y))
    return found
