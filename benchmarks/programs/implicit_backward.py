"""The backward pass alone, n = 100, p = 1000, 4 active features.

python -m benchmarks.programs.implicit_backward REPEATS prints JSON. The size is that
of google/jaxopt issue 274, whose backward pass on the support took 1.4 s.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.programs.implicit_problems import random_problem
from firmly.priors import implicit_lasso


def main(repeats: int) -> dict:
    torch.set_num_threads(1)
    posed = random_problem("lasso", 100, 1000, 4)
    times, active, error = [], 0, 0.0
    for _ in range(repeats + 1):
        logs = torch.tensor(2 * posed.weight, dtype=torch.float64).log().requires_grad_()
        value = posed.outer(b := implicit_lasso(posed.X / 10, posed.y[None] / 10, logs.exp())[0])
        started = time.process_time()
        value.backward()
        times.append(1e3 * (time.process_time() - started))
        S = b.detach().nonzero()[:, 0]
        active, A, V = len(S), posed.X[:, S], posed.X_val[:, S]
        slope = 2 * V.mT @ (V @ b.detach()[S] - posed.y_val) / len(V)
        wanted = -2 * posed.weight * 100 * slope @ torch.linalg.solve(A.mT @ A, b.detach()[S].sign())
        error = abs(float(logs.grad) / float(wanted) - 1)
    return {"n": 100, "p": 1000, "active": active, "ms backward": statistics.median(times[1:]), "error": error}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
