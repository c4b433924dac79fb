"""Risks of few losses beside CVXPY: python -m benchmarks.programs.robust_duals SIZE; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peer does not hold firmly

from firmly.robust import label_risk, ordinal_cost, risk

RADII = {"kl": (0.1, 1.0), "chi2": (0.1, 1.0), "cvar": (0.1, 0.5), "tv": (0.1, 0.5), "wasserstein": (0.1,)}
CASES = [(d, radius, sense) for d, radii in RADII.items() for radius in radii for sense in ("sup", "inf")]


def main(size: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(size, generator=generator, dtype=torch.float64).exp()
    p = torch.rand(size, generator=generator, dtype=torch.float64)
    p = p / p.sum()
    maps = torch.rand(1, 5, size // 5, generator=generator, dtype=torch.float64)
    labels = (torch.rand(1, size // 5, generator=generator) * 5).long()
    found = []
    for divergence, radius, sense in CASES:
        wasserstein = partial(label_risk, maps, labels, radius, ordinal_cost(5), sense=sense)
        other = partial(risk, losses, p, divergence=divergence, radius=radius, sense=sense)
        ours, ms = timed((lambda of=wasserstein: of().risk) if divergence == "wasserstein" else other)
        theirs, peer_ms = conic(divergence, radius, sense, losses, p, maps, labels)
        found.append(
            {"set": divergence, "radius": radius, "sense": sense, "risk": ours, "ms firmly": ms}
            | {"ms CVXPY": peer_ms, "apart": None if theirs is None else abs(ours - theirs)}
        )
    return found


def timed(action: Any) -> tuple[float, float]:
    action()
    started = time.process_time()
    value = float(action())
    return value, 1e3 * (time.process_time() - started)


def conic(divergence, radius, sense, losses, p, maps, labels) -> tuple[float | None, float | None]:
    """The same risk by CVXPY and Clarabel, and its time with that of building the problem."""
    try:
        import cvxpy as cp
    except ImportError:
        return None, None
    started = time.process_time()
    direction = cp.Maximize if sense == "sup" else cp.Minimize
    if divergence == "wasserstein":
        gains, cost = maps[0].T.numpy(), ordinal_cost(5)[labels[0]].numpy()
        moved = cp.Variable(gains.shape, nonneg=True)  # every pixel has one given label
        limits = [cp.sum(moved, axis=1) == 1, cp.sum(cp.multiply(cost, moved)) <= radius * len(gains)]
        problem = cp.Problem(direction(cp.sum(cp.multiply(gains, moved)) / len(gains)), limits)
    else:
        law, q = p.numpy(), cp.Variable(len(p), nonneg=True)
        limit = {
            "kl": lambda: cp.sum(cp.rel_entr(q, law)) <= radius,
            "chi2": lambda: cp.sum_squares(cp.multiply(q - law, 1 / np.sqrt(law))) <= 2 * radius,
            "cvar": lambda: q <= law / radius,
            "tv": lambda: cp.norm1(q - law) <= 2 * radius,
        }[divergence]()
        problem = cp.Problem(direction(losses.numpy() @ q), [cp.sum(q) == 1, limit])
    value = problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return float(value), 1e3 * (time.process_time() - started)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
