"""The time of an optimiser's step.

The 62 parameters of a ResNet-18 (11.7 million numbers, float32). CPU seconds of `step()`, the methods in turn; a ratio
is the median over the rounds of ours to that of `torch.optim.SGD` doing the same, its `foreach` form. Memory is what
the optimiser keeps in its state after a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.runner.results import Result, Table, Target
from firmly.optim import Dag, LyapunovMonitor, presets

MOMENTUM = 0.9


def shapes() -> list[tuple[int, ...]]:
    """Parameters of torchvision's resnet18."""
    found: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        found += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
        found += [(out, width, 1, 1), (out,), (out,)] if stride == 2 else []
        width = out
    return [*found, (1000, 512), (1000,)]


def sgd(**options) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: torch.optim.SGD(params, 1e-3, foreach=True, **options)


def monitored(params: list[nn.Parameter]) -> Optimizer:
    optimiser = presets.heavy_ball(MOMENTUM)(params, 1e-3)
    LyapunovMonitor(optimiser)
    return optimiser


# name: (how it is made, the peer that takes the same steps)
METHODS = {
    "SGD": (sgd(), None),
    "SGD, momentum": (sgd(momentum=MOMENTUM), None),
    "SGD, Nesterov": (sgd(momentum=MOMENTUM, nesterov=True), None),
    "Adam": (lambda params: Adam(params, 1e-3, foreach=True), None),
    "Dag, gradient": (lambda params: presets.gradient()(params, 1e-3), "SGD"),
    "Dag, heavy ball": (lambda params: presets.heavy_ball(MOMENTUM)(params, 1e-3), "SGD, momentum"),
    "Dag, Nesterov": (lambda params: presets.nesterov(MOMENTUM)(params, 1e-3), "SGD, Nesterov"),
    "Dag, second order": (lambda params: Dag(params, 1e-3, (0.5, 0.2), (0.5, 0.25)), "SGD, momentum"),
    "Dag, heavy ball, monitored": (monitored, "SGD, momentum"),
}


def measure(quick: bool) -> Result:
    sizes = [(4, 3), (4,)] if quick else shapes()
    optimisers = {name: make(parameters(sizes)) for name, (make, _) in METHODS.items()}
    rounds = 3 if quick else 41
    for optimiser in optimisers.values():
        optimiser.step()  # buffers are made in the first step
    seconds = {name: [] for name in optimisers}
    for _ in range(rounds):
        for name, optimiser in optimisers.items():
            started = time.process_time()
            optimiser.step()
            seconds[name].append(time.process_time() - started)
    rows, ratios = [], {}
    for name, (_, peer) in METHODS.items():
        pairs = zip(seconds[name], seconds[peer], strict=True) if peer else []
        ratios[name] = statistics.median([a / max(b, 1e-9) for a, b in pairs]) if peer else None
        rows.append(
            {
                "method": name,
                "ms": 1e3 * statistics.median(seconds[name]),
                "compared with": peer or "",
                "ratio": ratios[name],
                "MiB kept": kept(optimisers[name]) / 2**20,
            }
        )
    ours, momentum, second = (
        kept(optimisers[name]) for name in ("Dag, heavy ball", "SGD, momentum", "Dag, second order")
    )
    speed = []
    for name in ("Dag, heavy ball", "Dag, Nesterov"):
        met = None if quick else ratios[name] <= 1.1
        speed.append(Target(f"{name} at most 1.1 times {METHODS[name][1]}", f"{ratios[name]:.2f}", met))
    memory = [
        Target("first order keeps what SGD with momentum keeps", f"{ours / momentum:.2f} times", ours == momentum),
        Target("second order keeps one buffer more", f"{second / momentum:.2f} times", second == 2 * momentum),
    ]
    note = "The monitor itself keeps one buffer more. Its readings cost three inner products per parameter and step."
    return Result([Table(f"{len(sizes)} tensors, medians of {rounds} rounds", rows, note)], speed + memory)


def parameters(sizes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def kept(optimiser: Optimizer) -> int:
    """Bytes of the state's tensors, step counters left out."""
    tensors = [v for state in optimiser.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim]
    return sum(v.numel() * v.element_size() for v in tensors)
