"""Hypergradients of nonsmooth problems.

Value and derivative, in the logarithm of the weight, of a hold-out loss at the solution of a Lasso, an elastic net, a
logistic regression or a group lasso, with `firmly.priors.implicit_lasso` and with other packages (in an environment of
their own, on the same torch; sparse-ho from its sources, patched where current numpy and scipy broke it). The truth is
Newton's method on the active features and the closed form there, with the optimality conditions checked on all of
them. Every peer runs with its default and with tight tolerances; those that only differentiate get celer's solution;
compilation, a first run of everybody, and Lipschitz constants are not timed. Ours and a peer run in turn in one
process; times are processor milliseconds on one thread, medians of three, one run where it takes seconds, and no answer
within a minute is none. The logistic regression of firmly is `firmly.priors.sparse_linear`.

Beside it: what the solution of a fixed point keeps for its backward pass when ten times more iterations lead there; the
backward pass at the size of google/jaxopt issue 274, where one on the support took 1.4 s; and forward and backward pass
of a monotone layer against torchdeq at equal residuals, in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    "lasso:100:200:10", "lasso:500:2000:20", "lasso:1000:20000:50", "diabetes:2",
    "group:100:200:10", "logistic:100:200:10", "elastic net:100:200:10",
    "diabetes:5", "group:500:2000:20", "logistic:500:2000:20", "elastic net:500:2000:20",
)  # fmt: skip
EQUAL = 1e-6  # relative error of the derivative, from which on settings count as equally accurate
WIDE, FASTER = 2000, 5.0
LIMIT_S = 600.0
PROGRAMS = ("sparse-ho,torchopt,jaxopt,torchdeq", "cvxpylayers")
REPEATS = 3
BACKWARD_MS, FLAT = 50.0, 1.05
LAYERS = (87, 256)  # features
PROGRAM = "benchmarks.programs.implicit_hypergradient"
LAYER = "benchmarks.programs.implicit_layer"


@dataclass(frozen=True)
class Compared:
    """What a program found of a problem: every setting of every package in it, and how the others failed."""

    problem: str
    rows: list[dict]
    failed: dict[str, str]
    active: int = 0
    features: tuple[int, int] = (0, 0)

    def fastest(self, package: str) -> float | None:
        """Milliseconds of its fastest setting that is accurate enough."""
        fit = (r["ms"] for r in self.rows if r["package"] == package and r["gradient error"] <= EQUAL)
        return min(fit, default=None)

    @property
    def sizes(self) -> dict[str, Cell]:
        kind = self.problem.partition(":")[0]
        return {"problem": kind, "n": self.features[0], "p": self.features[1], "active": self.active}


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
    """cvxpylayers in a program of its own, and no more once it had no answer in time."""
    partial, late = Partial(Path(__file__)), math.inf
    for name in PROBLEMS:
        for peers in PROGRAMS:
            key = f"{name} {peers}"
            if key not in partial.known:
                partial.keep(key, asked(name, peers, late))
            found = partial.known[key]
            if found.get("late") or not any(row["package"] == peers for row in found.get("rows", [])):
                late = min(late, width(name)) if "," not in peers else late
            features = tuple(found.get("features", (0, width(name))))
            yield Compared(name, found.get("rows", []), found["failed"], found.get("active", 0), features)
    partial.finish()


def asked(name: str, peers: str, late: float) -> dict:
    """What the program found, or the failure."""
    if "," not in peers and width(name) >= late:
        return {"failed": {peers: "not asked, as a problem no wider had no answer in time"}}
    try:
        return program(PROGRAM, [name, peers, str(REPEATS)], LIMIT_S, ENVIRONMENT.python(install=True))
    except ProgramFailed as failed:
        return {"failed": {peers: str(failed)}, "late": isinstance(failed, TimeIsUp)}


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
    found = implicit_hypergradient.main(name, [], 1)
    return Compared(name, found["rows"], {}, found["active"], tuple(found["features"]))


def equal_accuracy(compared: list[Compared]) -> Table:
    """One row for each problem: the fastest setting of everybody that is accurate enough, and the ratio to ours."""
    rows: list[dict[str, Cell]] = []
    for name in dict.fromkeys(c.problem for c in compared):
        here = [c for c in compared if c.problem == name and c.rows]
        if not here:
            continue
        row = here[0].sizes | {"ms firmly": here[0].fastest("firmly")}
        for peer in PEERS if len(compared) > 1 else ():
            times = [(c.fastest(peer), c.fastest("firmly")) for c in here]
            theirs, ours = next(((a, b) for a, b in times if a and b), (None, None))
            row |= {f"ms {peer}": theirs, f"ratio {peer}": theirs and ours and theirs / ours}
        rows.append(row)
    failures = dict.fromkeys(f"{c.problem}, {key}: {text}." for c in compared for key, text in c.failed.items())
    return Table(
        f"Milliseconds for value and derivative at a relative error of the derivative of at most {EQUAL:g}",
        rows, " ".join(failures),
    )  # fmt: skip


def every_setting(compared: list[Compared]) -> Table:
    rows = [c.sizes | row for c in compared for row in c.rows]
    return Table("All settings, with the relative errors of the value and of the derivative", rows)


def targets(compared: list[Compared]) -> list[Target]:
    table = [row for row in equal_accuracy(compared).rows if int(row["p"] or 0) >= WIDE]
    lasso = [row for row in table if row["problem"] in ("lasso", "diabetes")]
    errors = [row["gradient error"] for c in compared for row in c.rows if row["package"] == "firmly"]
    return [
        judged(f"Lasso, p >= {WIDE}: at least {FASTER:g} times faster than the fastest peer", lasso, tuple(PEERS)),
        judged(f"all problems, p >= {WIDE}: the same without sparse-ho", table,
               tuple(peer for peer in PEERS if peer != "sparse-ho")),
        Target("every derivative of firmly to 1e-9", f"{max(errors):.1e} at most", max(errors) <= 1e-9),
    ]  # fmt: skip


def judged(text: str, rows: list[dict[str, Cell]], peers: tuple[str, ...]) -> Target:
    """The least ratio over the peers, for each problem."""
    least = {}
    for row in rows:
        ratios = [float(ratio) for peer in peers if (ratio := row.get(f"ratio {peer}"))]
        if ratios:
            least[f"{row['problem']} {row['n']} x {row['p']}"] = min(ratios)
    if not least:
        return Target(text, "no peer", None)
    shown = ", ".join(f"{name}: {ratio:.2g}" for name, ratio in least.items())
    return Target(text, f"times faster: {shown}", min(least.values()) >= FASTER)
