"""The exact step of ALMA-prox beside ternary search: python -m benchmarks.programs.linf_step HEIGHT; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from firmly.robust import linf_prox

ACCURACY = 1e-6  # of the ternary search, as in the released code of the paper
REPEATS = 5
CASES = 1000


def main(height: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for dtype in (torch.float32, torch.float64):
        for active in (False, True):
            problem = [g.to(dtype) for g in perturbed(3 * height * 2 * height, active)]
            exact = linf_prox(*(g.double() for g in problem), sort=True)
            row = {"precision": str(dtype)[6:], "box": "active" if active else "far"}
            found.append(row | compared(problem, exact))
    return found


def compared(problem: Sequence[Tensor], exact: Tensor) -> dict[str, float]:
    """Errors of the two exact versions and of ternary search, and medians of their times, taken in turn."""
    methods: dict[str, Callable[[], Tensor]] = {
        "guesses": lambda: linf_prox(*problem, sort=False),
        "sorting": lambda: linf_prox(*problem, sort=True),
        "ternary": lambda: ternary(*problem),
    }
    row, times = {}, {name: [] for name in methods}
    for _ in range(REPEATS):
        for name, method in methods.items():
            started = time.process_time()
            p = method()
            times[name].append(1e3 * (time.process_time() - started))
            row[f"error of {name}"] = float((p.double() - exact).abs().max())
    return row | {f"ms {name}": sorted(ms)[REPEATS // 2] for name, ms in times.items()}


def apart() -> float:
    """The largest difference of the two exact versions on many small problems, boxes active."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for size in (2, 5, 20, 100):
        delta = 2 * torch.randn(CASES, size, generator=generator, dtype=torch.float64)
        weight, low, high = (torch.rand(CASES, size, generator=generator, dtype=torch.float64) for _ in range(3))
        lam = size * torch.rand(CASES, generator=generator, dtype=torch.float64) ** 3
        both = [linf_prox(delta, weight, lam, -low, high, sort=sort) for sort in (False, True)]
        worst = max(worst, float((both[0] - both[1]).abs().max()))
    return worst


def perturbed(size: int, active: bool) -> tuple[Tensor, ...]:
    """A step as the attack takes it: a perturbation of some grey levels, weights of all sizes, an image in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    delta = 0.03 * torch.randn(1, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, size, generator=generator, dtype=torch.float64).exp()
    image = torch.rand(1, size, generator=generator, dtype=torch.float64)
    if active:
        image = image.round() + 0.02 * (0.5 - image.round()) * image  # nearly black and nearly white
    else:
        image = 0.4 + 0.2 * image
    lam = 0.003 * weight.sum(1)
    return delta, weight, lam, -image, 1 - image


def ternary(delta: Tensor, weight: Tensor, lam: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same proximal map by a search in thirds over the objective as a function of t, to `ACCURACY`."""
    boxed = delta.clamp(low, high)
    lam = lam.to(delta.dtype)

    def objective(t: Tensor) -> Tensor:
        p = torch.minimum(torch.maximum(boxed, -t), t)
        return lam.unsqueeze(1) * t + (weight * (p - delta) ** 2).sum(1, keepdim=True) / 2

    a, b = torch.zeros_like(lam).unsqueeze(1), boxed.abs().amax(1, keepdim=True)
    while bool((b - a > ACCURACY).any()):
        third = (b - a) / 3
        left = objective(a + third) <= objective(b - third)
        a, b = torch.where(left, a, a + third), torch.where(left, b - third, b)
    t = (a + b) / 2
    return torch.minimum(torch.maximum(boxed, -t), t)


if __name__ == "__main__":
    print(json.dumps({"steps": main(int(sys.argv[1])), "apart": apart()}))
