"""The step of ALMA-prox on many random problems: python -m benchmarks.programs.robust_prox CASES; prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.programs.linf_step import compared

SIZES = (10, 100, 3 * 16 * 16)


def main(cases: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for size in SIZES:
        problem = boxed(cases, size)
        low, high = problem[3:]
        exact = torch.cat([by_all_pieces(*(part[k : k + 20] for part in problem)) for k in range(0, cases, 20)])
        solution = exact.abs().amax(1, keepdim=True)
        held = ((exact == low) | (exact == high)) & (exact.abs() < solution)
        row: dict[str, Any] = {"cases": cases, "entries": size, "boxes active in": int(held.any(1).sum())}
        found.append(row | compared(problem, exact))
    return found


def boxed(cases: int, size: int) -> tuple[Tensor, ...]:
    """Perturbations, weights, lam and boxes that hold back many entries, in double precision."""
    generator = torch.Generator().manual_seed(2)
    delta = 2 * torch.randn(cases, size, generator=generator, dtype=torch.float64)
    weight, low, high = (torch.rand(cases, size, generator=generator, dtype=torch.float64) for _ in range(3))
    lam = size * torch.rand(cases, generator=generator, dtype=torch.float64) ** 3
    return delta, weight, lam, -low, high


def by_all_pieces(delta: Tensor, weight: Tensor, lam: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The solution from the slope phi on every piece, each by a sum of its own: neither sorting nor search.

    t is the least of the roots of all pieces and of the break points at which phi <= 0.
    """
    box = delta.clamp(low, high)
    edge = box.abs()
    starts = torch.cat([torch.zeros_like(edge[:, :1]), edge], 1)  # of pieces; phi is linear until the next break point
    t = torch.full_like(lam, torch.inf)
    for k in range(starts.shape[1]):
        start = starts[:, k : k + 1]
        above = edge > start
        mass = torch.where(above, weight, 0).sum(1)
        pull = torch.where(above, weight * delta.abs(), 0).sum(1)
        end = torch.where(above, edge, torch.inf).amin(1)
        root = torch.maximum((pull - lam) / mass, start[:, 0])  # NaN where no entry is above
        t = torch.where((mass == 0) & (lam >= 0), torch.minimum(t, start[:, 0]), t)
        t = torch.where((mass > 0) & (root < end), torch.minimum(t, root), t)
    return box.clamp(-t.unsqueeze(1), t.unsqueeze(1))


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
