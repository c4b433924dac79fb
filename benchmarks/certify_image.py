"""Certificates of image networks.

Unrolled forward-backward for a periodic Gaussian blur of width 1.6 pixels with the Tikhonov weight 0.02 and a
soft threshold, y to x: the family of the theory notes. The steps are drawn uniformly from [0.3, 1.95] / 1.02, or
learned on the photographs of the package together with the thresholds. Beside it, half-quadratic splitting with
learned filters, the network of `firmly run deblur`. Seeds are counted from zero, and none is left out.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import nn

import firmly as fm
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import program
from firmly.algorithms.smooth import Tikhonov
from firmly.certificates import Certificate
from firmly.lab.experiments import find
from firmly.lab.weights import learned, restore

WEIGHT, NOISE = 0.02, 0.02
GAP = {10: 1.10, 20: 1.05}  # targets
SECONDS = {10: 2.0, 20: 6.0}

COLUMNS = (
    "'seconds' is the whole of `certify` with its search for the lower bound, 'upper' all upper bounds, 'spectral' the "
    "matrix inequality with its proof; 'processor' is 'upper' times the share of the processor that `certify` had, "
    "what one core without other work would take."
)
GROWTH = (
    "'seconds' are those of all upper bounds, on one core without other work; 'blocks' the frequencies that differ, "
    "all of which are checked; 'MiB' the peak memory beyond the imports."
)


def measure(quick: bool) -> Result:
    size, depths, seeds = (32, (2,), range(1)) if quick else (256, (10, 20), range(5))
    rows = [row for depth in depths for row in networks(size, depth, seeds, steps=2 if quick else 100)]
    growth = [frequencies(n, depths[0]) for n in ((16, 32) if quick else (64, 128, 256, 512, 1024))]
    return Result(
        [
            Table(f"Images of {size} x {size}", rows, COLUMNS),
            Table(f"Against the number of frequencies, depth {depths[0]}", growth, GROWTH),
        ],
        [target for depth in depths for target in targets(rows, depth)] + growth_targets(growth),
    )


def targets(rows: list, depth: int) -> list[Target]:
    gap, seconds = GAP.get(depth, math.inf), SECONDS.get(depth, math.inf)
    mine = [row for row in rows if row["depth"] == depth and row["network"] == "forward-backward"]
    kept, worst = sum(row["gap"] <= gap for row in mine), max(row["gap"] for row in mine)
    measured = f"{kept} of {len(mine)}; {min(row['gap'] for row in mine):.3f} .. {worst:.3f}"
    slowest = max(row["seconds processor"] for row in mine)
    name = f"forward-backward, depth {depth}"
    return [
        Target(f"{name}: gap at most {gap:.2f}", measured, worst <= gap),
        Target(f"{name}: upper bounds in {seconds:g} s of one core", f"{slowest:.2f} s", slowest <= seconds),
    ]


def growth_targets(growth: list) -> list[Target]:
    first, last = growth[-2], growth[-1]
    exponent = math.log(last["seconds"] / first["seconds"]) / math.log(last["frequencies"] / first["frequencies"])
    return [
        Target("seconds grow at most linearly with the frequencies (exponent between the two largest sizes)",
               f"{exponent:.2f}", exponent <= 1.05),
        Target(f"memory at {last['image']} at most 1536 MiB", f"{last['MiB']:.0f} MiB", last["MiB"] <= 1536),
    ]  # fmt: skip


# -- the networks --------------------------------------------------------------------------------------------------


def networks(size: int, depth: int, seeds: range, steps: int) -> list[dict]:
    """One row per network of a depth."""
    rows = [row("forward-backward", f"random, seed {seed}", depth, random_steps(size, depth, seed)) for seed in seeds]
    crop = min(64, size)
    small = trained(forward_backward(crop, depth, learn=("step_size", "prior")), steps)
    large = forward_backward(size, depth, learn=("step_size", "prior"))
    restore(large, learned(small), "the trained network")
    rows.append(row("forward-backward", "trained", depth, large))
    if depth > 10:
        return rows
    experiment = find("deblur")
    settings = replace(experiment.presets["default"], depth=depth)
    small = trained(experiment.network(settings, crop, settings.cap), steps)
    large = experiment.resized(settings, small, size, settings.cap)
    rows.append(row("half-quadratic splitting", "trained", depth, large))
    return rows


def forward_backward(size: int, depth: int, learn: tuple[str, ...]) -> nn.Module:
    shape = (1, size, size)
    A = fm.linear.Blur.gaussian(1.6, shape)
    ridge = Tikhonov(math.sqrt(WEIGHT) * fm.linear.Identity(shape))
    return fm.unroll(fm.algorithms.ForwardBackward(A, fm.prox.L1(0.001), ridge=ridge), depth, learn)


def random_steps(size: int, depth: int, seed: int) -> nn.Module:
    """Steps uniform in [0.3, 1.95] / 1.02, where 1.02 is the norm of the smooth part."""
    network = forward_backward(size, depth, learn=("step_size",))
    generator = torch.Generator().manual_seed(seed)
    for layer in network.layers:
        layer.step_size = torch.empty(()).uniform_(0.3, 1.95, generator=generator) / (1 + WEIGHT)
    return network


@torch.enable_grad()
def trained(network: nn.Module, steps: int) -> nn.Module:
    """The network after `steps` steps of Adam on blurred and noisy crops of photographs."""
    generator = torch.Generator().manual_seed(0)
    size = network.data_shape[-1]
    A = fm.linear.Blur.gaussian(1.6, (1, size, size))
    crops = fm.data.Crops(fm.data.photographs("train"), size)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        truth = crops.batch(4, generator)
        measured = A(truth) + NOISE * torch.randn(truth.shape, generator=generator)
        loss = (network(measured) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


# -- what is measured ----------------------------------------------------------------------------------------------


def certified(network: nn.Module) -> tuple[Certificate, float, float]:
    """A certificate, its seconds by the clock and those of the processor."""
    started, used = time.perf_counter(), time.process_time()
    certificate = fm.certify(network, wrt="data")
    return certificate, time.perf_counter() - started, time.process_time() - used


def row(name: str, steps: str, depth: int, network: nn.Module) -> dict:
    certificate, seconds, processor = certified(network)
    bounds = {b.method: b for b in certificate.bounds}
    upper = sum(b.seconds for b in certificate.bounds)
    return {
        "network": name,
        "steps": steps,
        "depth": depth,
        "lower": certificate.lower,
        "upper": certificate.upper,
        "gap": certificate.gap,
        "product": bounds["product"].value,
        "averaged": bounds["averaged"].value,
        "seconds": seconds,
        "seconds upper": upper,
        "seconds processor": upper * processor / seconds,
        "seconds spectral": bounds["spectral"].seconds,
        "blocks": int(bounds["spectral"].note.split()[0]),
    }


def frequencies(size: int, depth: int) -> dict:
    """A row of the second table, measured in a process of its own."""
    found = program("benchmarks.programs.certify_size", [str(size), str(depth)])
    count = size * (size // 2 + 1)
    return {
        "image": f"{size} x {size}",
        "frequencies": count,
        **found,
        "ms per 1000 frequencies": 1e6 * found["seconds"] / count,
    }
