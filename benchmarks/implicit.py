"""Hypergradients of nonsmooth problems.

Value and derivative, in the logarithm of the weight, of a hold-out loss at the solution of a Lasso, an elastic net, a
logistic regression or a group lasso, with `firmly.priors.implicit_lasso` and with other packages (in an environment of
their own, on the same torch; sparse-ho from its sources, patched where current numpy and scipy broke it). The truth is
Newton's method on the active features and the closed form there, with the optimality conditions checked on all of
them. Every peer runs with its default and with tight tolerances; those that only differentiate get celer's solution;
compilation, a first run of everybody, and Lipschitz constants are not timed. Ours and a peer run in turn in one
process; times are processor milliseconds on one thread, medians of three, one run where it takes seconds, and no answer
within ten seconds is none. The logistic regression of firmly is `firmly.priors.sparse_linear`.

Beside it: what the solution of a fixed point keeps for its backward pass when ten times more iterations lead there; the
backward pass at the size of google/jaxopt issue 274, where one on the support took 1.4 s; and forward and backward pass
of a monotone layer against torchdeq at equal residuals, in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.programs import implicit_backward, implicit_hypergradient, implicit_layer, implicit_memory
from benchmarks.programs.implicit_peers import PEERS
from benchmarks.runner.environments import Environment
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Cell, Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, TimeIsUp, program

ENVIRONMENT = Environment(
    "implicit",
    ("torchopt==0.7.3", "jax==0.10.2", "jaxopt==0.8.5", "cvxpylayers==1.2.0", "torchdeq==0.1.0", "celer==0.7.4",
     "scikit-learn", "numba"),
)  # fmt: skip
PROBLEMS = (
    "lasso:100:200:10", "lasso:500:2000:20", "lasso:1000:20000:50", "diabetes:2", "diabetes:5",
    "logistic:100:200:10", "logistic:500:2000:20", "group:100:200:10", "group:500:2000:20",
    "elastic net:100:200:10", "elastic net:500:2000:20",
)  # fmt: skip
EQUAL = 1e-6  # relative error of the derivative, from which on settings count as equally accurate
WIDE, FASTER = 2000, 5.0
LIMIT_S = 400.0
REPEATS = 3
BACKWARD_MS, FLAT = 50.0, 1.05
LAYERS = (87, 512)  # features
PROGRAM = "benchmarks.programs.implicit_hypergradient"
LAYER = "benchmarks.programs.implicit_layer"


@dataclass(frozen=True)
class Compared:
    """Firmly and one peer on one problem; `peer` is empty if there was none, and `failure` says why."""

    problem: str
    peer: str
    rows: list[dict]  # firmly first
    failure: str = ""
    active: int = 0
    features: tuple[int, int] = (0, 0)


def measure(quick: bool) -> Result:
    compared = [alone("lasso:30:60:4")] if quick else list(against_peers())
    kept = memory(quick)
    single = implicit_backward.main(2 if quick else 5)
    layers = monotone(quick)
    tables = [
        equal_accuracy(compared),
        Table("What is kept for the backward pass", kept),
        Table("The backward pass alone", [single]),
        layers,
        every_setting(compared),
    ]
    return Result(tables, [*targets(compared), *smaller_targets(kept, single, layers)])


def against_peers() -> Iterator[Compared]:
    """Every problem with every peer; a peer that had no answer in time is not asked for problems as wide."""
    partial, late = Partial(Path(__file__)), {}
    for name in PROBLEMS:
        for peer in PEERS:
            key = f"{name} {peer}"
            if key not in partial.known:
                partial.keep(key, asked(name, peer, late.get(peer, math.inf)))
            found = partial.known[key]
            if found.get("late"):
                late[peer] = min(width(name), late.get(peer, math.inf))
            failures = [found["failure"]] if found.get("failure") else []
            failures += [f"{setting}: {text}" for setting, text in found.get("failed", {}).items()]
            rows, features = found.get("rows", []), found.get("features", (0, width(name)))
            yield Compared(name, peer, rows, "; ".join(failures), found.get("active", 0), tuple(features))
    partial.finish()


def asked(name: str, peer: str, late: float) -> dict:
    """What the program found, or the failure."""
    if width(name) >= late:
        return {"failure": "not asked, as a problem no wider had no answer in time"}
    try:
        return program(PROGRAM, [name, peer, str(REPEATS)], LIMIT_S, ENVIRONMENT.python(install=True))
    except ProgramFailed as failed:
        return {"failure": str(failed), "late": isinstance(failed, TimeIsUp)}


def width(name: str) -> int:
    kind, *numbers = name.split(":")
    return math.comb(10 + int(numbers[0]), 10) - 1 if kind == "diabetes" else int(numbers[1])


def memory(quick: bool) -> list[dict[str, Cell]]:
    """Each in a process of its own."""
    if quick:
        return [implicit_memory.main("implicit", 1)]
    module = "benchmarks.programs.implicit_memory"
    return [program(module, [adjoint, slow], LIMIT_S) for adjoint in ("implicit", "unrolled") for slow in ("1", "10")]


def monotone(quick: bool) -> Table:
    rows: list[dict[str, Cell]] = []
    note = ""
    for features in (8,) if quick else LAYERS:
        arguments = (features, 16 if quick else 128, 1 if quick else REPEATS)
        if quick:
            found = implicit_layer.main(*arguments, 1e-5, peers=False)
        else:
            text = [*map(str, arguments), "1e-5"]
            try:
                found = program(LAYER, text, LIMIT_S, ENVIRONMENT.python(install=True))
            except ProgramFailed as failed:
                note += f"{features} features, without torchdeq: {failed}. "
                found = implicit_layer.main(*arguments, 1e-5, peers=False)
        note += " ".join(f"{features} features, {row['solver']}: {row['failed']}." for row in found if "failed" in row)
        rows += [{"features": features, "batch": arguments[1]} | row for row in found if "failed" not in row]
    return Table("Forward and backward pass of a monotone layer at a tolerance of 1e-5", rows, note)


def smaller_targets(kept: list[dict[str, Cell]], single: dict[str, Cell], layers: Table) -> list[Target]:
    own = [row for row in kept if row["adjoint"] == "implicit"]
    saved, grown = ([float(row[key] or 0) for row in own] for key in ("MiB saved", "MiB of growth"))
    ratios = [max(values) / min(values) if len(own) > 1 else 1.0 for values in (saved, grown)]
    iterations = " and ".join(str(row["iterations"]) for row in own)
    found = [
        Target(f"memory within {FLAT:g} times for ten times more iterations",
               f"{iterations} iterations: saved {ratios[0]:.3f} times, the process {ratios[1]:.3f} times",
               max(ratios) <= FLAT if len(own) > 1 else None),
        Target(f"the backward pass, n = 100, p = 1000, 4 active, in {BACKWARD_MS:g} ms",
               f"{single['ms backward']:.3g} ms", single["ms backward"] <= BACKWARD_MS),  # type: ignore[operator]
    ]  # fmt: skip
    for features in dict.fromkeys(row["features"] for row in layers.rows):
        ours, *theirs = [row for row in layers.rows if row["features"] == features]
        fair = [row["ms"] for row in theirs if row["residual"] <= 2 * ours["residual"]]  # type: ignore[operator]
        text = f"monotone layer with {features} features: not slower than torchdeq at equal residual"
        ratio = min(fair) / ours["ms"] if fair else None  # type: ignore[type-var, operator]
        found.append(Target(text, "no peer" if ratio is None else f"{ratio:.2g} times faster", ratio and ratio >= 1))
    return found


def alone(name: str) -> Compared:
    found = implicit_hypergradient.main(name, "", 1)
    return Compared(name, "", found["rows"], "", found["active"], tuple(found["features"]))


def equal_accuracy(compared: list[Compared]) -> Table:
    """One row for each problem: the fastest setting of everybody that is accurate enough, and the ratio to ours."""
    rows: list[dict[str, Cell]] = []
    for name in dict.fromkeys(c.problem for c in compared):
        here = [c for c in compared if c.problem == name]
        ours = [c.rows[0] for c in here if c.rows]
        if not ours:
            continue
        row = sizes(next(c for c in here if c.rows)) | {"ms firmly": median(r["ms"] for r in ours)}
        for c in here:
            fast = fastest(c)
            row |= {f"ms {c.peer}": fast, f"ratio {c.peer}": fast and fast / c.rows[0]["ms"]} if c.peer else {}
        rows.append(row | {"error of firmly": max(r["gradient error"] for r in ours)})
    note = " ".join(f"{c.peer}, {c.problem}: {c.failure}." for c in compared if c.failure)
    return Table(
        f"Milliseconds for value and derivative at a relative error of the derivative of at most {EQUAL:g}", rows, note
    )


def every_setting(compared: list[Compared]) -> Table:
    rows = [sizes(c) | {"package": c.peer or "firmly"} | row for c in compared for row in c.rows[bool(c.peer) :]]
    return Table("All settings, with the relative errors of the value and of the derivative", rows)


def sizes(c: Compared) -> dict[str, Cell]:
    return {"problem": c.problem.partition(":")[0], "n": c.features[0], "p": c.features[1], "active": c.active}


def fastest(c: Compared) -> float | None:
    return min((row["ms"] for row in c.rows[1:] if row["gradient error"] <= EQUAL), default=None)


def targets(compared: list[Compared]) -> list[Target]:
    wide = [c for c in compared if c.peer and c.features[1] >= WIDE and fastest(c)]
    found = [
        judged(f"Lasso, p >= {WIDE}: at least {FASTER:g} times faster than the fastest peer",
               [c for c in wide if c.problem.startswith(("lasso", "diabetes"))]),
        judged(f"the same without sparse-ho, p >= {WIDE}, all problems",
               [c for c in wide if c.peer != "sparse-ho"]),
    ]  # fmt: skip
    worst = max(c.rows[0]["gradient error"] for c in compared if c.rows)
    found.append(Target("every derivative of firmly to 1e-9", f"{worst:.1e} at most", worst <= 1e-9))
    return found


def judged(text: str, compared: list[Compared]) -> Target:
    """The least ratio over the peers, for each problem."""
    least: dict[str, float] = {}
    for c in compared:
        ratio = (fastest(c) or 0) / c.rows[0]["ms"]
        least[c.problem] = min(ratio, least.get(c.problem, ratio))
    if not least:
        return Target(text, "no peer", None)
    shown = ", ".join(f"{name}: {ratio:.2g}" for name, ratio in least.items())
    return Target(text, f"times faster: {shown}", min(least.values()) >= FASTER)
