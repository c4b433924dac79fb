"""A hypergradient with firmly and with peers, in turn.

python -m benchmarks.programs.implicit_hypergradient PROBLEM PEER,PEER,... REPEATS prints JSON: every setting with its
processor milliseconds and its errors, and how the others failed.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peers does not hold firmly

import torch
from torch import Tensor

from benchmarks.programs.implicit_peers import PEERS, firmly
from benchmarks.programs.implicit_problems import HoldOut, problem
from firmly.priors import implicit_lasso
from firmly.priors.losses import Logistic
from firmly.priors.sparse_linear import SparseLinear

# processor seconds of one setting after which it is not repeated, after which the first run counts; seconds for one run
ENOUGH, LONG, LIMIT = 3.0, 20.0, 60.0


class TooSlow(Exception):
    """A setting has used up its time."""


def too_slow(*signal: object) -> None:
    raise TooSlow(f"no answer in {LIMIT:g} s")


def main(name: str, peers: list[str], repeats: int) -> dict:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_slow)
    posed = problem(name)
    truth, active = posed.truth(near(posed))
    actions = {("firmly", key): action for key, action in firmly(posed).items()}
    failed: dict[tuple[str, str], str] = {}
    for peer in peers:
        try:
            actions |= {(peer, key): action for key, action in PEERS[peer](posed).items()}
        except Exception as error:  # a peer may fail in any way: that is a result
            failed[peer, ""] = described(error)
    found, times = {}, {key: [] for key in actions}
    for turn in range(repeats + 1):  # the first is to compile and to warm up
        for key, action in actions.items():
            if key in failed or sum(times[key]) > 1e3 * ENOUGH:
                continue
            started = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_REAL, LIMIT)
                found[key] = action()
            except Exception as error:
                failed[key] = described(error)
                continue
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            used = time.process_time() - started
            if turn or used > LONG:
                times[key].append(1e3 * used)
    rows = [
        {
            "package": key[0],
            "setting": key[1],
            "ms": statistics.median(times[key]),
            "value error": abs(value / truth[0] - 1),
            "gradient error": abs(gradient / truth[1] - 1),
        }
        for key, (value, gradient) in found.items()
        if key not in failed
    ]
    failures = {" ".join(filter(None, key)): text for key, text in failed.items()}
    return {"rows": rows, "failed": failures, "active": active, "features": list(posed.X.shape)}


def described(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0] if first else ''}"[:160]


def near(posed: HoldOut) -> Tensor:
    """Coefficients with the right active features; what is wrong about them, `HoldOut.truth` refuses."""
    if posed.kind == "logistic":
        return SparseLinear(posed.X, (posed.y[:, None] + 1) / 2, Logistic(), False).solve(torch.tensor(posed.weight))[
            :-1, 0
        ]
    scale = len(posed.y) ** 0.5
    return implicit_lasso(posed.X / scale, posed.y[None] / scale, posed.weight, posed.curvature, posed.group)[0]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]))))
