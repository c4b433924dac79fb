"""A bound of the package eclipse-nn: python -m benchmarks.programs.eclipse_nn WEIGHTS.npz MODE, on its environment."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from eclipse_nn import LipConstEstimator

from benchmarks.runner.timing import timed

if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        weights = [torch.from_numpy(file[f"arr_{i}"]) for i in range(len(file.files))]
    value, seconds = timed(lambda: float(LipConstEstimator(weights=weights).estimate(sys.argv[2])), repeats=3)
    print(json.dumps({"value": value, "seconds": seconds}))
