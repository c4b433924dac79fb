"""Bregman networks: certified bounds, counted, and the price of the mirror form.

Random BregmaNets of 2 to 8 features and 1 to 6 layers with eight activations and weights of three sizes, read from dual
coordinates to dual or to primal ones. 'sampled' is the largest norm of 200 Jacobians, 'product' is the closed form
prod (1 + L |W|), 'certified' the upper end of `certify` within half a second. Then forward and backward passes of the
mirror form u <- u + W rho(u) + b against residual networks of the same shape and the same number of parameters in plain
PyTorch, in turn, on one thread; ratios are of processor time, the fastest of all rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import firmly as fm
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Cell, Result, Table, Target
from firmly.networks import BregmaNet, BregmanResNet

COUNT, PIECE = 1000, 50
NAMES = ("sigmoid", "tanh", "atan", "isru", "asinh", "softplus", "bent", "leaky_relu")
LIMIT = 1.3  # of the time of a residual network


def measure(quick: bool) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        networks = [bounds(seed) for seed in range(8)] if quick else counted()
        rows = [speed(name, *pair(), 1 if quick else 30) for name, pair in list(PAIRS.items())[: 1 if quick else None]]
    finally:
        torch.set_num_threads(threads)
    wrong = sum(not max(n["lower"], n["sampled"]) <= n["upper"] <= n["product"] * (1 + 1e-9) for n in networks)
    slowest = max(float(row["ratio"] or math.inf) for row in rows)
    return Result(
        [Table(f"{len(networks)} random networks, by depth", by_depth(networks)), Table("Forward and backward", rows)],
        [
            Target("lower <= upper, sampled <= upper <= product", f"{wrong} violations", wrong == 0),
            Target(f"the mirror form within {LIMIT} of a residual network", f"{slowest:.2f}", slowest <= LIMIT),
        ],
    )


def counted() -> list[dict]:
    partial = Partial(Path(__file__))
    for first in range(0, COUNT, PIECE):
        if str(first) not in partial.known:
            partial.keep(str(first), [bounds(seed) for seed in range(first, first + PIECE)])
    partial.finish()
    return [network for piece in partial.known.values() for network in piece]


def bounds(seed: int) -> dict:
    """The bounds of one network."""
    generator = torch.Generator().manual_seed(seed)
    width, depth = 2 + seed % 7, 1 + seed // 7 % 6
    net = BregmaNet(width, depth, NAMES[seed % 8], form="mixed" if seed % 2 else "dual").double()
    size = (0.5 + seed % 3) / math.sqrt(width)
    product = 1.0 if net.form == "dual" else net.activation.lipschitz
    for layer in net.layers:
        weight = size * torch.randn(width, width, generator=generator, dtype=torch.float64)
        layer.linear.weight.data = weight  # type: ignore[union-attr]
        product *= 1 + net.activation.lipschitz * float(torch.linalg.matrix_norm(weight, 2))
    found = fm.certify(net, budget_s=0.5)
    points = 2 * torch.randn(200, width, generator=generator, dtype=torch.float64)
    sampled = float(torch.linalg.matrix_norm(jacobians(net, points), 2).max())
    return {"depth": depth, "lower": found.lower, "upper": found.upper, "product": product, "sampled": sampled}


def jacobians(net: nn.Module, points: Tensor) -> Tensor:
    x = points.requires_grad_(True)
    outputs = net(x)
    return torch.stack([torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in outputs.unbind(1)], 1)


def by_depth(networks: list[dict]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for depth in [*sorted({n["depth"] for n in networks}), None]:
        part = [n for n in networks if depth in (None, n["depth"])]
        factors = [n["product"] / n["upper"] for n in part]
        gaps = [n["upper"] / max(n["lower"], n["sampled"]) for n in part]
        rows.append(
            {
                "layers": "all" if depth is None else depth,
                "networks": len(part),
                "product / certified": geometric(factors),
                "at most": max(factors),
                "certified / largest found": geometric(gaps),
            }
        )
    return rows


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# -- speed ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + last(tanh(... first(tanh(x)))), with plain layers."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*(part for layer in layers for part in (nn.Tanh(), layer)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def dense(width: int, depth: int, batch: int) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = nn.Sequential(*(Residual(nn.Linear(width, width)) for _ in range(depth)))
    return BregmaNet(width, depth, "tanh"), plain, torch.randn(batch, width)


def convolutional(channels: int, side: int, depth: int, batch: int) -> tuple[nn.Module, nn.Module, Tensor]:
    plain = nn.Sequential(*(Residual(conv(channels, channels)) for _ in range(depth)))
    return BregmaNet(channels, depth, "tanh", spatial=(side, side)), plain, torch.randn(batch, channels, side, side)


def images() -> tuple[nn.Module, nn.Module, Tensor]:
    widths, blocks = (16, 32, 64), 3
    parts: list[nn.Module] = [conv(3, widths[0])]
    for stage, width in enumerate(widths):
        if stage:
            parts += [nn.AvgPool2d(2), nn.Conv2d(widths[stage - 1], width, 1, bias=False)]
        parts += [Residual(conv(width, width), conv(width, width)) for _ in range(blocks)]
    head = [nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return BregmanResNet(3, 10, (32, 32), widths, blocks), nn.Sequential(*parts, *head), torch.randn(16, 3, 32, 32)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor]]] = {
    "20 layers of 64, batch 128": lambda: dense(64, 20, 128),
    "20 layers of 256, batch 256": lambda: dense(256, 20, 256),
    "6 convolutions, 16 channels, 32 x 32, batch 16": lambda: convolutional(16, 32, 6, 16),
    "6 convolutions, 64 channels, 8 x 8, batch 64": lambda: convolutional(64, 8, 6, 64),
    "9 blocks, 16 / 32 / 64 channels, 32 x 32, batch 16": images,
}


def speed(name: str, ours: nn.Module, plain: nn.Module, x: Tensor, rounds: int) -> dict[str, Cell]:
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, plain)]
    if sizes[0] != sizes[1]:
        raise RuntimeError(f"{name}: the networks are not of one size, {sizes}")
    best = [math.inf, math.inf]
    for _ in range(rounds + 1):
        for which, net in enumerate((ours, plain)):
            net.zero_grad()
            started = time.process_time()
            net(x).square().mean().backward()
            best[which] = min(best[which], time.process_time() - started)
    found = [1000 * seconds for seconds in best]
    return {"network": name, "parameters": sizes[0], "mirror form, ms": found[0], "residual, ms": found[1],
            "ratio": found[0] / found[1]}  # fmt: skip
