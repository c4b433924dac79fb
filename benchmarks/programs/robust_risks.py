"""Risks of many losses beside the package dro: python -m benchmarks.programs.robust_risks SIZE REPEATS; prints JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peer does not hold firmly

from firmly.robust import risk

CASES = [
    ("chi2", 0.1),
    ("chi2", 1.0),
    ("chi2", 5.0),
    ("cvar", 0.05),
    ("cvar", 0.5),
    ("kl", 0.1),
    ("kl", 2.0),
    ("tv", 0.1),
]


def main(size: int, repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    losses = torch.randn(size, generator=torch.Generator().manual_seed(0)).exp()
    ordered = np.sort(losses.double().numpy())[::-1]
    loss = peer()
    found = []
    for divergence, radius in CASES:
        row: dict[str, Any] = {"losses": size, "set": divergence, "radius": radius}
        exact = float(reference(divergence, radius, ordered))
        ours = partial(risk, divergence=divergence, radius=radius)
        actions = {"firmly": partial(gradient, ours, losses)}
        if loss is not None and divergence in ("chi2", "cvar"):
            theirs = loss(radius, 0.0, {"chi2": "chi-square", "cvar": "cvar"}[divergence])._compute_robust_loss
            actions["dro"] = partial(gradient, theirs, losses)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats + 1):  # the first run warms up
            for name, action in actions.items():
                started = time.process_time()
                value = action()
                seconds[name].append(time.process_time() - started)
                row[f"error of {name}"] = abs(value - exact) / exact
        row |= {f"ms {name}": 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
        found.append(row)
    return found


def gradient(of: Callable[[torch.Tensor], torch.Tensor], losses: torch.Tensor) -> float:
    """The risk, with its gradient computed."""
    x = losses.clone().requires_grad_()
    value = of(x)
    value.backward()
    return float(value.detach())


def peer() -> Any:
    """The loss of dro, from its file alone: the package imports more than the loss needs."""
    try:
        path = importlib.metadata.distribution("dro").locate_file("dro/neural_model/fdro_utils.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("fdro_utils", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RobustLoss


def reference(divergence: str, radius: float, ordered: np.ndarray) -> float:
    """The risk in float64 by sorting or root finding, from losses in falling order."""
    n = len(ordered)
    if divergence in ("cvar", "tv"):
        fraction = radius if divergence == "cvar" else 1 - radius
        whole = math.floor(fraction * n)
        top = ordered[:whole].sum() + (fraction * n - whole) * (ordered[whole] if whole < n else 0)
        tail = top / (fraction * n)
        return tail if divergence == "cvar" else radius * ordered[0] + (1 - radius) * tail
    if divergence == "chi2":  # the active set of k losses whose eta lies between the k-th and the next
        k = np.arange(1, n + 1)
        centred = ordered - ordered.mean()
        mean = np.cumsum(centred) / k
        variance = np.maximum(np.cumsum(centred**2) / k - mean**2, 0)
        slack = (1 + 2 * radius) * k / n - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            eta = np.where(slack > 0, mean - np.sqrt(variance / slack), np.inf)
        following = np.append(centred[1:], -np.inf)
        active = int(np.argmax((eta < centred) & (eta >= following)))
        return float(ordered.mean() + mean[active] + math.sqrt(slack[active] * variance[active]))

    shifted = ordered - ordered[0]

    def law(t: float) -> np.ndarray:
        weights = np.exp(t * shifted)
        return weights / weights.sum()

    def excess(logarithm: float) -> float:
        q = law(math.exp(logarithm))
        return float(np.sum(q[q > 0] * np.log(n * q[q > 0]))) - radius

    return float(ordered[0] + (law(math.exp(brentq(excess, -12, 6, xtol=1e-10))) * shifted).sum())


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
