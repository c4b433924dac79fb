"""Sparse coding to a duality gap.

Time until gap <= 1e-6 |y|^2 / 2 for Lasso problems with a Gaussian dictionary (unit columns; codes with 5 to 10 %
nonzeros, 5 % noise), weights in fractions of the largest meaningful one: batches with `firmly.priors.lasso` against a
loop over the fastest of scikit-learn, celer, skglm and spams (in an environment of their own, on the same torch, all in
one process and in turn), and single problems. spams also takes batches with one weight: that time is given beside the
loops. Loops are timed on 20 problems and scaled. The tolerance of every peer is what gives the same gap on those 20;
spams is exact. All times are processor time, medians of three, which other work on the machine disturbs least.
"""

from __future__ import annotations

from benchmarks.programs import sparse_solvers
from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program

PEERS = Environment("sparse", ("scikit-learn>=1.5", "celer==0.7.4", "skglm==0.5", "spams-bin==2.6.14"))
LOOPS = ("scikit-learn", "celer", "skglm", "spams")
SIZES = {(100, 200, 10): [1, 10, 100, 1000, 10_000], (250, 500, 25): [1, 10, 100, 1000, 10_000],
         (500, 2000, 40): [1], (1000, 5000, 50): [1]}  # fmt: skip
FRACTIONS = (0.1, 0.01)
FASTER, SLOWER = 5.0, 2.0  # batches against the fastest loop; single problems against the fastest peer


def measure(quick: bool) -> Result:
    sizes = {(20, 40, 3): [1, 10]} if quick else SIZES
    rows, accuracies = [], []
    note = ""
    for (m, n, k), batches in sizes.items():
        for fraction in FRACTIONS:
            found, failure = answer(m, n, k, fraction, batches, quick)
            note = note or failure
            rows += [line(m, n, fraction, row) for row in found["rows"]]
            accuracies.append(
                {"m": m, "n": n, "weight": fraction, "gap of firmly": max(row["gap"] for row in found["rows"])}
                | {f"gap of {name}": found["gaps"].get(name) for name in LOOPS}
                | {f"objective of {name} apart": found["apart"].get(name) for name in LOOPS}
            )
            if not all(row["converged"] for row in found["rows"]):
                note += f" Some problems of {m} x {n} at {fraction} did not converge."
    tables = [
        Table("Milliseconds of the processor for all problems of a batch", rows, note),
        Table("Largest gaps at the tolerance that was timed, and distances of objectives at high accuracy", accuracies),
    ]
    return Result(tables, targets(rows, accuracies))


def answer(m: int, n: int, k: int, fraction: float, batches: list[int], quick: bool) -> tuple[dict, str]:
    """What the program found, and why it had no peers."""
    arguments = (m, n, k, fraction, batches)
    if quick:
        return sparse_solvers.main(*arguments), ""
    text = [*map(str, arguments[:4]), ",".join(map(str, batches))]
    try:
        return program("benchmarks.programs.sparse_solvers", text, 3600.0, PEERS.python(install=True)), ""
    except ProgramFailed as failed:
        return program("benchmarks.programs.sparse_solvers", text, 3600.0), f"Without peers: {failed}."


def line(m: int, n: int, fraction: float, row: dict) -> dict:
    loops = [row[f"cpu {name}"] for name in LOOPS if f"cpu {name}" in row]
    cells = {"m": m, "n": n, "weight": fraction, "batch": row["batch"], "ms firmly": row["cpu firmly"]}
    cells |= {f"ms {name}": row.get(f"cpu {name}") for name in (*LOOPS, "spams, all at once")}
    return cells | {"ratio of the fastest loop": min(loops) / row["cpu firmly"] if loops else None}


def targets(rows: list[dict], accuracies: list[dict]) -> list[Target]:
    found = []
    for batch in sorted({row["batch"] for row in rows if row["batch"] > 1}):
        ratios = [row["ratio of the fastest loop"] for row in rows if row["batch"] == batch]
        found.append(
            judged(
                f"batches of {batch}: at least {FASTER:g} times faster than looping the fastest peer", ratios, FASTER
            )
        )
    for m, n in dict.fromkeys((row["m"], row["n"]) for row in rows if row["batch"] == 1):
        ratios = [
            row["ratio of the fastest loop"] for row in rows if row["batch"] == 1 and (row["m"], row["n"]) == (m, n)
        ]
        found.append(
            judged(f"single problems, {m} x {n}: within {SLOWER:g} times the fastest peer", ratios, 1 / SLOWER)
        )
    apart = [v for row in accuracies for k, v in row.items() if k.endswith("apart") and v is not None]
    worst = max(apart, default=None)
    measured = "no peer" if worst is None else f"{worst:.1e} at most"
    found.append(
        Target("objectives equal to those of the peers to 1e-8", measured, None if worst is None else worst <= 1e-8)
    )
    largest = max(row["gap of firmly"] for row in accuracies)
    found.append(
        Target("every gap within 1e-6 of half the squared norm of the data", f"{largest:.1e} at most", largest <= 1e-6)
    )
    return found


def judged(text: str, ratios: list[float | None], least: float) -> Target:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return Target(text, "no peer", None)
    shown = ", ".join(f"{ratio:.2g}" for ratio in known)
    return Target(text, f"times faster: {shown}", min(known) >= least)
