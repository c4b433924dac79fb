"""Dictionary learning.

256 atoms for 8 x 8 patches of the training photographs (mean removed, unit norm), in float32, from the same start, each
method in a process of its own: online learning with an l1 penalty (0.15) and with pursuit (5 atoms), one pass in
batches of 256, against spams and scikit-learn's MiniBatchDictionaryLearning (LARS); K-SVD, four passes in mini-batches
of 3,000 and four on all patches. Scores are taken by one coder on 2,000 patches of the validation photographs: the l1
objective, and half the squared error with 5 atoms. Then the peak memory of a stream, and the recovery of a known
dictionary (50 atoms of length 30, noise 0.1, start at 0.90). Ratios are of processor time, which other work on the
machine disturbs least.
"""

from __future__ import annotations

import statistics

from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Cell, Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program
from firmly.lab.experiments.dictionary_toys import gradient_toy, recoveries

SPAMS = Environment("spams", ("spams-bin==2.6.14",))
OURS = {"firmly, online": "online", "firmly, online with pursuit": "online-pursuit", "firmly, K-SVD": "k-svd"}
PEERS = {"spams": "spams", "spams with pursuit": "spams-pursuit", "scikit-learn": "scikit-learn"}
SLOW = "scikit-learn"  # once at the largest size
PASSES = {"k-svd": "8"}
OBJECTIVE, ERROR, SECONDS = "l1 objective", "error, 5 atoms", "seconds processor"


def measure(quick: bool) -> Result:
    counts, repeats = ([1500], 1) if quick else ([10_000, 100_000], 3)
    tables, targets, rows = [], [], {}
    for count in counts:
        rows, note = learned(count, repeats, quick)
        tables.append(Table(f"{count:,} patches", list(rows.values()), note))
    targets += compared(rows, counts[-1], quick)
    sizes = [2560, 5120] if quick else [10_000, 100_000, 500_000]
    stream = [
        {"patches": f"{n:,}", **program("benchmarks.programs.learn_dictionary", ("stream", str(n)), 1800)}
        for n in sizes
    ]
    tables.append(Table("A stream of patches that are cut on the fly, online learning", stream))
    more = stream[-1]["MiB"] - stream[0]["MiB"]
    targets.append(Target("memory flat in the number of patches of a stream", f"{more:+.1f} MiB from {sizes[0]:,} to "
                          f"{sizes[-1]:,} patches", more < 8))  # fmt: skip
    found = recoveries(gradient_toy(2022, 200 if quick else 1000), 3 if quick else 120, lambda *progress: None)
    tables.append(Table("Recovery of a known dictionary", [
        {"method": r.name, "start": r.scores[0][1], "score": r.scores[-1][1], "rounds": len(r.scores) - 1,
         "objective at the end": r.objective} for r in found
    ]))  # fmt: skip
    targets += [
        Target(f"recovery of at least 0.975: {r.name}", f"{r.scores[-1][1]:.4f}", r.scores[-1][1] >= 0.975)
        for r in found[:2]
    ]
    return Result(tables, targets)


def learned(count: int, repeats: int, quick: bool) -> tuple[dict[str, dict[str, Cell]], str]:
    """One row for each method, and what kept others from theirs."""
    runs: dict[str, list[dict[str, float]]] = {}
    remarks: dict[str, None] = {}
    for k in range(repeats):
        for name, method in {**OURS, **PEERS}.items():
            if name == SLOW and k and count > 50_000:
                continue
            try:
                python = SPAMS.python(install=not quick) if name.startswith("spams") else None
                arguments = (method, str(count), PASSES.get(method, "1"))
                result = program("benchmarks.programs.learn_dictionary", arguments, 2400, python)
            except ProgramFailed as failure:
                remarks[f"{name}: {failure}"] = None
            else:
                runs.setdefault(name, []).append(result)
    rows: dict[str, dict[str, Cell]] = {}
    for name, found in runs.items():
        rows[name] = {
            "method": name,
            **{key: statistics.median(r[key] for r in found) for key in found[0]},
            "runs": len(found),
        }
    fastest = float(rows["firmly, online"][SECONDS])  # type: ignore[arg-type]
    for row in rows.values():
        row["ratio to firmly, online"] = float(row[SECONDS]) / fastest  # type: ignore[arg-type]
    return rows, "; ".join(remarks)


def compared(rows: dict[str, dict[str, Cell]], count: int, quick: bool) -> list[Target]:
    """Every method of ours beside the peer with the same penalty, and K-SVD beside both."""
    pairs = [
        ("firmly, online", "scikit-learn", OBJECTIVE), ("firmly, online", "spams", OBJECTIVE),
        ("firmly, online with pursuit", "spams with pursuit", ERROR), ("firmly, K-SVD", "scikit-learn", ERROR),
        ("firmly, K-SVD", "spams with pursuit", ERROR),
    ]  # fmt: skip
    targets = []
    for ours, peer, score in pairs:
        if ours not in rows or peer not in rows:
            texts = (f"{ours}: equal or better {score} than {peer}", f"{ours}: faster than {peer}")
            targets += [Target(text, "no peer", None) for text in texts]
            continue
        a, b = (float(rows[name][score]) for name in (ours, peer))  # type: ignore[arg-type]
        s, t = (float(rows[name][SECONDS]) for name in (ours, peer))  # type: ignore[arg-type]
        targets += [
            Target(
                f"{ours}: equal or better {score} than {peer}, {count:,} patches",
                f"{a:.5f} and {b:.5f}",
                a <= b * 1.001,
            ),
            Target(f"{ours}: faster than {peer}, {count:,} patches", f"it takes {t / s:.3g} of our time", t >= s),
        ]
    return targets
