"""What a solution keeps for its backward pass: python -m benchmarks.programs.implicit_memory ADJOINT SLOWNESS

solves a Lasso (200 x 400) by proximal gradient steps that are SLOWNESS times shorter than they could be, so that it
takes as many times more of them; ADJOINT is implicit or unrolled. Prints JSON: iterations, MiB saved by autograd, MiB
that the process grew by at most.
"""

from __future__ import annotations

import json
import sys

import torch

import firmly as fm
from benchmarks.runner.machine import peak_memory
from firmly.fixedpoint import Implicit, Unrolled, implicit


def main(adjoint: str, slowness: float) -> dict:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 400, generator=generator, dtype=torch.float64) / 200**0.5
    y = (X[:, :10].sum(1) + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64))[None]
    weight = (0.2 * (y @ X).abs().max()).requires_grad_()
    A = fm.linear.Dense(X)
    algorithm = fm.algorithms.ForwardBackward(A, fm.prox.L1(weight), step_size=1 / A.norm().upper ** 2 / slowness)
    chosen = Implicit("manifold") if adjoint == "implicit" else Unrolled()
    layer = implicit(algorithm, chosen, tol=1e-9, max_iterations=100_000)
    storages: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    before = peak_memory()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        found = layer.solve(y)
    torch.autograd.grad(found.state.x.square().sum(), weight)
    return {
        "adjoint": adjoint,
        "iterations": int(found.iterations.max()),
        "MiB saved": sum(storages.values()) / 2**20,
        "MiB of growth": peak_memory() - before,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]))))
