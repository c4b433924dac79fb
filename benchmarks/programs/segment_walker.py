"""The random walker on a volume: python -m benchmarks.programs.segment_walker SIDE SOLVER TOL FLOOR; prints JSON.

SOLVER is firmly, or a mode of scikit-image (cg_j: conjugate gradients with the diagonal, as here).
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peer does not hold firmly

from firmly.errors import NotConverged
from firmly.segment import contrast_weights
from firmly.segment.random_walker import harmonic, laplacian, start_of

BETA = 5e4  # scikit-image divides by 10 standard deviations, and adds 1e-10 to the weights


def problem(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The volume of scikit-image/scikit-image#2360, for a side of 101: smooth noise, a marked box and its outside."""
    noise = np.random.RandomState(42).randn(side, side, side)
    smooth = gaussian_filter(noise, 10 * side / 101, mode="nearest")
    low, high = np.percentile(smooth, [5, 95])
    volume = np.clip((smooth - low) / (high - low), 0, 1)
    markers = np.zeros((side,) * 3, dtype=np.int64)
    box = slice(45 * side // 101, 55 * side // 101)
    markers[box, box, box] = 1
    for axis in range(3):
        for end in (0, -1):
            markers[(slice(None),) * axis + (end,)] = 2
    return volume, markers


def ours(weights: torch.Tensor, markers: np.ndarray, tol: float) -> np.ndarray:
    """The solution before anything is cut off."""
    x, marked = start_of(weights, torch.from_numpy(np.where(markers == 0, 255, markers - 1))[None], 2, 255)
    return harmonic(weights, x, marked, tol, 10_000)[0].numpy()


def theirs(volume: np.ndarray, markers: np.ndarray, tol: float, mode: str) -> np.ndarray:
    from skimage.segmentation import random_walker

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that probabilities are outside of [0, 1]
        return random_walker(volume, markers, beta=BETA, mode=mode, tol=tol, return_full_prob=True)


def main(side: int, solver: str, tol: float, floor: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    volume, markers = problem(side)
    weights = contrast_weights(torch.from_numpy(volume)[None, None], BETA / (10 * volume.std()), floor)
    row: dict[str, Any] = {"solver": solver, "tol": tol, "least weight": floor}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        x = ours(weights, markers, tol) if solver == "firmly" else theirs(volume, markers, tol, solver)
    except NotConverged:
        x = None
    row |= {"s": time.process_time() - started}
    row |= {"MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
    if x is None:
        return row | {"outside": "refused: NotConverged", "residual": None}
    outside = max(0.0, float(-x.min()), float(x.max() - 1), float(np.abs(x.sum(0) - 1).max()))
    free = torch.from_numpy(markers == 0)
    rest = laplacian(torch.from_numpy(np.ascontiguousarray(x))[None].double(), weights) * free
    return row | {"outside": outside, "residual": float(rest.norm())}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))))
