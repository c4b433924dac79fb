"""Segmentation beside peers: energies, gradients, logistic regression, support vectors, the random walker

Multinomial logistic regression of pixel features without coupling, beside scikit-learn (newton-cholesky, tolerance
1e-8), with the objective of both. The minimiser of the entropic energy, beside FISTA with the plain step and CVXPY with
Clarabel; errors are root mean squares per pixel to a solution that is certified to 1e-7. Its gradient, beside FISTA
unrolled; errors are relative to the gradient at an accuracy of 1e-7, in the Euclidean norm. A support vector segmenter
with coupling, trained on two slices.

The random walker on the volume of scikit-image/scikit-image#2360 (smooth noise of side 101, a marked box and its
outside, beta = 5e4), and on one of side 41 with steeper contours, before anything is cut off: how far it leaves [0, 1]
or a sum of 1, and the norm of the residual. The least weight is a floor: 1e-10, which scikit-image always has, or 1e-4,
which keeps the system solvable. scikit-image takes conjugate gradients with the diagonal ("cg_j"), as firmly does.
Times are of the processor, one thread; the memory is what the peak of the process grows by.
"""

from __future__ import annotations

from typing import Any

from benchmarks.programs import segment_models, segment_walker
from benchmarks.runner.environments import Environment
from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import ProgramFailed, program

PEERS = Environment("segment", ("cvxpy>=1.5", "scikit-image>=0.24", "scikit-learn>=1.5"))
WALKS = (  # side, solver, tolerance, least weight
    (101, "firmly", 1e-14, 1e-4),
    (101, "cg_j", 1e-3, 1e-10),
    (101, "cg_j", 1e-5, 1e-10),
    (41, "firmly", 1e-14, 1e-4),
    (41, "cg_j", 1e-5, 1e-10),
)
LIMIT_S = 3000.0


def measure(quick: bool) -> Result:
    note = ""
    if quick:
        models, walks = segment_models.main(6), [segment_walker.main(12, "firmly", 1e-14, 1e-4)]
    else:
        try:
            python = PEERS.python(install=True)
        except ProgramFailed as failed:
            python, note = None, f"Without the peers: {failed}."
        models = program("benchmarks.programs.segment_models", ["16"], LIMIT_S, python)
        walks = [walk(*of, python) for of in WALKS if python or of[1] == "firmly"]
    tables = [
        Table("Multinomial logistic regression", models["logistic"], note),
        Table("The minimiser of the energy", models["energy"]),
        Table("Its gradient", models["gradients"]),
        Table("Support vectors with coupling", models["svm"]),
        Table("The random walker", walks),
    ]
    return Result([Table(t.title, [shown(row) for row in t.rows], t.note) for t in tables], targets(models, walks))


def walk(side: int, solver: str, tol: float, floor: float, python: str | None) -> dict[str, Any]:
    arguments = [str(side), solver, str(tol), str(floor)]
    return {"side": side} | program("benchmarks.programs.segment_walker", arguments, LIMIT_S, python)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    small = ("error", "apart", "outside", "residual", "tol", "least")
    return {k: f"{v:.1e}" if isinstance(v, float) and any(s in k for s in small) else v for k, v in row.items()}


def targets(models: dict[str, Any], walks: list[dict[str, Any]]) -> list[Target]:
    apart = [row["weights apart"] for row in models["logistic"] if row["weights apart"] is not None]
    errors = {row["solver"]: row["error"] for row in models["energy"]}
    ours = walks[0]["outside"]
    return [
        Target("weights of scikit-learn's logistic regression to 1e-4", f"{max(apart):.0e}" if apart else "no peer",
               max(apart) <= 1e-4 if apart else None),
        Target("errors of the minimiser below the accuracy asked for", f"{errors['firmly, accuracy 1e-05']:.0e}",
               errors["firmly, accuracy 0.001"] <= 1e-3 and errors["firmly, accuracy 1e-05"] <= 1e-5),
        Target("random walker (floor 1e-4) in [0, 1] to 1e-10 before any cut", f"{ours:.0e}", ours <= 1e-10),
    ]  # fmt: skip
