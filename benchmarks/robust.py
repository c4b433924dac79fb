"""Robust risks beside dro and CVXPY, and the memory of learned labels.

The risk of log-normal losses in single precision with its gradient, beside the robust loss of dro 0.4.3 (chi-square and
conditional value at risk are what it has; its bisection stops at 1e-2, which is its default). Errors are relative, to a
reference in double precision by sorting or root finding that shares no code with either. Times are of the processor,
medians, one thread, ours and the peer's in turn. CVXPY with Clarabel gives the second table, its time with that of
building the problem. The third is arithmetic: labels of whole data sets as the published method keeps them, one number
in single precision per pixel and class, and as `LabelStore` does; and what it takes to read and update one image.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.programs import robust_duals, robust_risks
from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program, timed
from firmly.robust import LabelStore

DRO = Environment("dro", ("--no-deps", "dro==0.4.3"))  # the file of its loss needs torch and SciPy only
CVXPY = Environment("cvxpy", ("cvxpy>=1.5",))
SIZES = (1_000_000, 10_000_000)
REPEATS = 3
DATA_SETS = {
    "CamVid, training": (367, (360, 480), 11),
    "Cityscapes, training": (2975, (1024, 2048), 19),
    "ADE20K at 512 x 512": (20210, (512, 512), 150),
}


def measure(quick: bool) -> Result:
    risks, no_dro = answer("robust_risks", robust_risks, [10_000, 1] if quick else None, DRO)
    duals, no_cvxpy = answer("robust_duals", robust_duals, [100] if quick else None, CVXPY)
    stores = [memory(name, *sizes, quick) for name, sizes in DATA_SETS.items()]
    tables = [
        Table("Risk and gradient of many losses", [line(row) for row in risks], no_dro),
        Table(
            "Risks of 1000 losses with random nominal weights; Wasserstein: 200 pixels of 5 classes", duals, no_cvxpy
        ),
        Table("Learned labels of a data set", stores),
    ]
    return Result(tables, targets(risks, duals, stores))


def answer(name: str, module: Any, quick: list[int] | None, environment: Environment) -> tuple[list[dict], str]:
    """What a program found, and why it had no peer."""
    if quick is not None:
        return module.main(*quick), ""
    calls = [[str(size), str(REPEATS)] for size in SIZES] if module is robust_risks else [["1000"]]
    note = ""
    try:
        python = environment.python(install=True)
    except ProgramFailed as failed:
        python, note = None, f"Without the peer: {failed}."
    found = [program(f"benchmarks.programs.{name}", call, 1800.0, python) for call in calls]
    return [row for rows in found for row in rows], note


def line(row: dict[str, Any]) -> dict[str, Any]:
    cells = {key: row[key] for key in ("losses", "set", "radius")}
    for name in ("firmly", "dro"):
        error = row.get(f"error of {name}")
        cells |= {f"error of {name}": None if error is None else f"{error:.0e}", f"ms {name}": row.get(f"ms {name}")}
    return cells | {"ratio": row["ms dro"] / row["ms firmly"] if "ms dro" in row else None}


def memory(name: str, images: int, side: tuple[int, int], classes: int, quick: bool) -> dict[str, Any]:
    """Bytes of all labels, and the time of one whole image."""
    size = (32, 32) if quick else side
    store = LabelStore(torch.zeros(1, *size, dtype=torch.uint8), classes)
    p = torch.rand(1, classes, *size, generator=torch.Generator().manual_seed(0)).softmax(1)
    pixels = images * side[0] * side[1]
    return {
        "data set": name, "classes": classes, "GiB published": pixels * 4 * classes / 2**30,
        "GiB LabelStore": pixels * store.bytes_per_pixel / 2**30,
        "ms to update an image": 1e3 * timed(lambda: store.update([0], p), 3)[1],
        "ms to read an image": 1e3 * timed(lambda: store.labels([0]), 3)[1],
    }  # fmt: skip


def targets(risks: list[dict], duals: list[dict], stores: list[dict]) -> list[Target]:
    worst = max(row["error of firmly"] for row in risks)
    found = [Target("risks exact to single precision", f"{worst:.0e} at most", worst <= 2e-7)]
    for divergence in ("cvar", "chi2"):
        for size in sorted({row["losses"] for row in risks}):
            rows = [r for r in risks if r["set"] == divergence and r["losses"] == size and "ms dro" in r]
            ratios = [row["ms dro"] / row["ms firmly"] for row in rows]
            shown = ", ".join(f"{ratio:.2g}" for ratio in ratios) or "no peer"
            met = min(ratios) > 1 if ratios else None
            found.append(Target(f"{divergence} of {size:.0e} losses: faster than dro", f"times faster: {shown}", met))
    apart = [row["apart"] for row in duals if row["apart"] is not None]
    measured = f"{max(apart):.0e} at most" if apart else "no peer"
    found.append(Target("duals equal those of CVXPY to 1e-6", measured, max(apart) <= 1e-6 if apart else None))
    less = [row["GiB published"] / row["GiB LabelStore"] for row in stores]
    shown = ", ".join(f"{ratio:.2g}" for ratio in less)
    found.append(Target("labels of a data set in a quarter of the memory", f"times less: {shown}", min(less) >= 4))
    return found
