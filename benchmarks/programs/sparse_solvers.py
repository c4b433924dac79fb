"""Times of Lasso solvers: python -m benchmarks.programs.sparse_solvers ROWS ATOMS NONZEROS FRACTION BATCH,BATCH,...

Every solver that can be imported is timed, in turn, on the same problems in one process; prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peers does not hold firmly

from firmly.priors import duality_gap, lasso

TOLERANCE = 1e-6  # of |y|^2 / 2
SAMPLE = 20  # problems that a loop is timed on; longer loops are this one, scaled
REPEATS = 3
CHECKED = 3  # problems solved to high accuracy

Solver = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # dictionary (m, n), y (m,), weight -> code (n,)


@dataclass
class Looped:
    """A solver of one problem; `accuracy` becomes its own tolerance."""

    solve: Callable[[float], Solver]
    accuracy: float
    fine: float


def problems(rows: int, atoms: int, nonzeros: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian dictionary with unit columns, and sparse Gaussian codes seen through it with 5 % of noise."""
    random = np.random.default_rng(0)
    D = random.normal(size=(rows, atoms))
    D /= np.linalg.norm(D, axis=0)
    Y = np.empty((count, rows))
    for y in Y:
        y[:] = D[:, random.choice(atoms, nonzeros, replace=False)] @ random.normal(size=nonzeros)
    noise = random.normal(size=Y.shape) * (0.05 / rows**0.5)
    return np.asfortranarray(D), Y + noise * np.linalg.norm(Y, axis=1, keepdims=True)


def peers() -> dict[str, Looped]:
    found: dict[str, Looped] = {}
    try:
        from sklearn.linear_model import Lasso

        def sklearn(tol: float) -> Solver:
            return lambda D, y, w: Lasso(alpha=w / len(y), fit_intercept=False, tol=tol, max_iter=10**5).fit(D, y).coef_

        found["scikit-learn"] = Looped(sklearn, TOLERANCE / 2, 1e-12)
    except ImportError:
        pass
    try:
        import celer as package

        def celer(tol: float) -> Solver:
            return lambda D, y, w: package.Lasso(alpha=w / len(y), fit_intercept=False, tol=tol).fit(D, y).coef_

        found["celer"] = Looped(celer, TOLERANCE / 2, 1e-12)
    except ImportError:
        pass
    try:
        from skglm import Lasso as Skglm

        def skglm(tol: float) -> Solver:  # its tolerance is a distance to optimality, not a gap
            return lambda D, y, w: Skglm(alpha=w / len(y), fit_intercept=False, tol=tol * w / len(y)).fit(D, y).coef_

        found["skglm"] = Looped(skglm, 1e-1, 1e-8)
    except ImportError:
        pass
    try:
        import spams

        def homotopy(tol: float) -> Solver:
            return lambda D, y, w: spams.lasso(
                np.asfortranarray(y[:, None]), D=D, lambda1=float(w), mode=2, numThreads=1
            ).toarray()[:, 0]

        found["spams"] = Looped(homotopy, 0.0, 0.0)
    except ImportError:
        pass
    return found


def spams_batch(D: np.ndarray, Y: np.ndarray, weights: np.ndarray) -> None:
    import spams

    scaled = np.asfortranarray((Y / weights[:, None]).T)  # it takes one weight
    spams.lasso(scaled, D=D, lambda1=1.0, mode=2, numThreads=torch.get_num_threads())


def measured(action: Callable[[], object]) -> tuple[object, tuple[float, float]]:
    """What it returns; wall and processor milliseconds."""
    wall, used = time.perf_counter(), time.process_time()
    value = action()
    return value, (1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - used))


def relative_gap(D: np.ndarray, y: np.ndarray, weight: float, code: np.ndarray) -> float:
    found = duality_gap(*map(torch.as_tensor, (D, y[None])), weight, torch.as_tensor(code)[None])
    return float(found.gap) / (y @ y / 2)


def calibrated(looped: Looped, D: np.ndarray, Y: np.ndarray, weights: np.ndarray) -> tuple[Solver, float]:
    """The solver at the first tolerance, tightened tenfold at a time, that gives every gap; and its worst gap."""
    accuracy = looped.accuracy
    for _ in range(8):
        solve = looped.solve(accuracy)
        worst = max(relative_gap(D, y, w, solve(D, y, w)) for y, w in zip(Y, weights))
        if worst <= TOLERANCE:
            break
        accuracy /= 10
    return solve, worst


def main(rows: int, atoms: int, nonzeros: int, fraction: float, batches: list[int]) -> dict:
    warnings.simplefilter("ignore")
    D, Y = problems(rows, atoms, nonzeros, max(*batches, SAMPLE))
    weights = fraction * np.abs(Y @ D).max(axis=1)
    D_, Y_, weights_ = torch.as_tensor(np.ascontiguousarray(D)), torch.as_tensor(Y), torch.as_tensor(weights)[:, None]
    sample, looped = slice(min(SAMPLE, max(batches))), peers()
    solvers = {name: calibrated(peer, D, Y[sample], weights[sample]) for name, peer in looped.items()}
    found = []
    for batch in batches:
        part = slice(min(batch, SAMPLE))
        scale = batch / min(batch, SAMPLE)

        def loop(solve: Solver, part: slice = part) -> None:
            for y, w in zip(Y[part], weights[part]):
                solve(D, y, w)

        actions = {"firmly": lambda batch=batch: lasso(D_, Y_[:batch], weights_[:batch], tol=TOLERANCE)}
        actions |= {name: lambda solve=solve: loop(solve) for name, (solve, _) in solvers.items()}
        if "spams" in solvers and batch > 1:
            actions["spams, all at once"] = lambda batch=batch: spams_batch(D, Y[:batch], weights[:batch])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
        ours = None
        for name in actions:
            if batch <= SAMPLE:
                measured(actions[name])  # warm
        for _ in range(REPEATS):
            for name, action in actions.items():
                value, pair = measured(action)
                times[name].append(pair)
                ours = value if name == "firmly" else ours
        gap = float((ours.gap / Y_[:batch].square().sum(1) * 2).max())
        row = {"batch": batch, "gap": gap, "converged": bool(ours.converged.all())}
        for name, pairs in times.items():
            factor = scale if name in solvers else 1.0
            row[f"wall {name}"], row[f"cpu {name}"] = (factor * statistics.median(p) for p in zip(*pairs))
        found.append(row)
    fine = lasso(D_, Y_[:CHECKED], weights_[:CHECKED], tol=1e-13).objective
    apart = {}
    for name, peer in looped.items():
        solve = peer.solve(peer.fine)
        codes = np.stack([solve(D, y, w) for y, w in zip(Y[:CHECKED], weights[:CHECKED])])
        theirs = duality_gap(D_, Y_[:CHECKED], weights_[:CHECKED], torch.as_tensor(codes)).objective
        apart[name] = float(((theirs - fine) / fine).abs().max())
    return {"rows": found, "gaps": {name: worst for name, (_, worst) in solvers.items()}, "apart": apart}


if __name__ == "__main__":
    m, n, k = map(int, sys.argv[1:4])
    print(json.dumps(main(m, n, k, float(sys.argv[4]), [int(b) for b in sys.argv[5].split(",")])))
