"""Attacks on segmentation: the exact step beside ternary search, and what attacks find on a small U-Net.

The step of ALMA-prox is the proximal map of the maximum norm in a diagonal metric and a box; here for an image of
3 x 512 x 1024, by sorting and by sorting between two guesses, both exact, and by a search in thirds to 1e-6 as in the
released code of the paper (written here from its description). Errors are beside sorting in double precision.

Then a U-Net of width 8,
trained for 300 steps on the training slices of `firmly.data.brain_slices` (four classes), is attacked on the middle
(48 x 40) of every third test slice: neighbours in one template, a demonstration and not a sample. A success is an
image with 99 % of its pixels wrong, by a perturbation inside [0, 1]; norms are in grey levels of 255, those of failures
infinite in the median. The settings of the first row (step 3e-3 for 1e-3, `logit_lead`, multipliers of at least 1e-4
for 1e-12) were chosen on two validation slices; the others have published ones, 20 steps and 13 bisections inside 160
grey levels for PGD, and DAG once with longer steps, too. The network runs on all slices at once. Times are of the
processor, one thread, medians of five for the steps.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.programs import linf_step, segmentation_attacks
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import program


def measure(quick: bool) -> Result:
    if quick:
        steps = {"steps": linf_step.main(16), "apart": linf_step.apart()}
        attacks = segmentation_attacks.main(2, 2, 4, 2)
    else:
        steps = program("benchmarks.programs.linf_step", ["512"])
        attacks = program("benchmarks.programs.segmentation_attacks", ["4", "300"], 7200.0)
    note = f"Without an attack {attacks['accuracy']:.3f} of the pixels are right, mean intersection over union "
    note += f"{attacks['miou']:.3f}."
    tables = [
        Table("One step of 1.6 million pixels", [row | {"ratio": ratio(row)} for row in shown(steps["steps"])]),
        Table(f"Attacks on {attacks['images']} slices", attacks["attacks"], note),
    ]
    return Result(tables, targets(steps, attacks))


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: f"{v:.0e}" if k.startswith("error") else v for k, v in row.items()} for row in rows]


def ratio(row: dict[str, Any]) -> float:
    return row["ms ternary"] / row["ms guesses"]


def targets(steps: dict[str, Any], attacks: dict[str, Any]) -> list[Target]:
    ratios = [ratio(row) for row in steps["steps"]]
    norms = {row["attack"]: row["median norm"] or math.inf for row in attacks["attacks"]}
    ours = norms[segmentation_attacks.OURS]
    best = min(norm for name, norm in norms.items() if not name.startswith(segmentation_attacks.OURS))
    return [
        Target("both exact steps agree to 1e-12 on 4000 cases, boxes active", f"{steps['apart']:.0e}",
               steps["apart"] <= 1e-12),
        Target("exact step faster than ternary search", "times faster: " + ", ".join(f"{r:.2g}" for r in ratios),
               min(ratios) > 1),
        Target("ALMA-prox: median norm at most that of every other attack", f"{ours:.1f} against {best:.1f} of 255",
               ours <= best and ours < math.inf),
    ]  # fmt: skip
