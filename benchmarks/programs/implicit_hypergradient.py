"""A hypergradient with firmly and with one peer, in turn: python -m benchmarks.programs.implicit_hypergradient PROBLEM
PEER REPEATS; prints JSON: every setting with its processor milliseconds and its errors."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peers does not hold firmly

import torch

from benchmarks.programs.implicit_peers import PEERS, Evaluation, NotOffered, firmly
from benchmarks.programs.implicit_problems import problem

ENOUGH = 20.0  # seconds of one setting, after which it is not repeated


def main(name: str, peer: str, repeats: int) -> dict:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    posed = problem(name)
    from firmly.priors.hypergradient import implicit_lasso

    scale = len(posed.y) ** 0.5
    near = implicit_lasso(posed.X / scale, posed.y[None] / scale, posed.weight, posed.curvature, posed.group)[0]
    truth = posed.truth(near)
    actions: dict[str, Evaluation] = {"firmly": firmly(posed)["default"]}
    try:
        actions |= PEERS[peer](posed) if peer else {}
    except (ImportError, NotOffered) as absent:
        raise SystemExit(f"{type(absent).__name__}: {absent}") from None
    found, failed, times = {}, {}, {key: [] for key in actions}
    for turn in range(repeats + 1):  # the first is to compile and to warm up
        for key, action in actions.items():
            if key in failed or (turn > 1 and sum(times[key]) > 1e3 * ENOUGH):
                continue
            started = time.process_time()
            try:
                found[key] = action()
            except Exception as error:  # a peer may fail in any way: that is a result
                failed[key] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
                continue
            if turn:
                times[key].append(1e3 * (time.process_time() - started))
    rows = [
        {
            "setting": key,
            "ms": statistics.median(times[key]),
            "value error": abs(value / truth[0] - 1),
            "gradient error": abs(gradient / truth[1] - 1),
        }
        for key, (value, gradient) in found.items()
        if key not in failed
    ]
    return {"rows": rows, "failed": failed, "active": int((near != 0).sum()), "features": list(posed.X.shape)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
