"""Training unrolled networks.

Time of a training step and peak memory, each program in a process of its own, in turn: unrolled forward-backward with a
soft threshold against deepinv's unfolded PGD (BlurFFT, L1Prior, its own environment on the same torch) and against the
loop written out in plain PyTorch; half-quadratic splitting with 16 learned filters of 5 x 5, without and with the cap
that a certificate needs, against the loop with conv2d. All networks of a family start with the same loss. Ratios are
of processor time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.programs import train_unrolled
from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program

FAMILIES = {
    "Forward-backward with a soft threshold": {
        "firmly": "firmly_pgd",
        "deepinv": "deepinv_pgd",
        "plain PyTorch": "plain_pgd",
    },
    "Half-quadratic splitting with a learned ridge": {
        "firmly": "firmly_hqs",
        "firmly, inside the certificate": "firmly_hqs_capped",
        "plain PyTorch": "plain_hqs",
    },
}
# the release of torchvision for this one of torch
DEEPINV = Environment("deepinv", ("deepinv==0.5.0", f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"))


def measure(quick: bool) -> Result:
    size, batch, depth, steps, rounds = (16, 2, 2, 2, 1) if quick else (64, 16, 10, 20, 3)
    tables, targets = [], []
    for title, networks in FAMILIES.items():
        found: dict[str, list[dict]] = {name: [] for name in networks}
        remarks: dict[str, None] = {}
        for _ in range(rounds):
            for name, network in networks.items():
                try:
                    found[name].append(trained(network, (size, batch, depth, steps), quick))
                except ProgramFailed as failure:
                    remarks[f"{name}: {failure}"] = None
        rows = [{"network": name, **middle(runs)} for name, runs in found.items() if runs]
        ours = rows[0]
        for row in rows:
            row["ratio to firmly"] = row["ms of the processor"] / ours["ms of the processor"]
        losses = [row["loss at the start"] for row in rows]
        if max(losses) > min(losses) * (1 + 1e-4):
            raise RuntimeError(f"{title}: the networks do not compute the same, their losses are {losses}")
        tables.append(Table(f"{title}: {depth} layers, {batch} images of {size} x {size}", rows, "; ".join(remarks)))
        targets += [
            Target(f"{title}: not slower than {row['network']}", f"it takes {row['ratio to firmly']:.2f} of our time",
                   row["ratio to firmly"] >= 1) for row in rows if not str(row["network"]).startswith("firmly")
        ]  # fmt: skip
    return Result(tables, targets)


def trained(network: str, sizes: tuple[int, ...], quick: bool) -> dict:
    """The figures of one run; the quick preset saves the new processes."""
    if network == "deepinv_pgd":
        python = DEEPINV.python(install=not quick)
    elif quick:
        return train_unrolled.main(network, *sizes)
    else:
        python = None
    return program("benchmarks.programs.train_unrolled", [network, *map(str, sizes)], python=python)


def middle(runs: list[dict]) -> dict:
    return {
        "ms per step": statistics.median(run["ms"] for run in runs),
        "ms of the processor": statistics.median(run["cpu"] for run in runs),
        "MiB at the peak": statistics.median(run["MiB"] for run in runs),
        "loss at the start": runs[0]["loss"],
    }
