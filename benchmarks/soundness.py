"""Soundness by counting.

Random small networks: layers of width one to six, dense and circular convolutional maps, factors per entry, skip
connections, and nonlinearities with slopes inside and outside [0, 1]. 'exact' is the largest gain when every slope is
at an end of its interval, by enumeration with the network run as a linear one: neither tracer nor solver takes part.
Every network is certified by `certify` with the methods that it chooses, and once more with one that it does not choose
for networks as small as these; what is refused is counted as well. A run that was stopped goes on where it was, as long
as neither the library nor this file has changed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import firmly as fm
from benchmarks.runner.machine import cores
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Result, Table, Target
from firmly.certificates import Certificate
from firmly.certificates.certify import Method
from firmly.errors import NotCertifiable

ROUNDING = 1 + 1e-9
COUNT, PIECE = 10_000, 50
UNITS = 10  # slopes of a network: 2^10 patterns
ACTIVATIONS: list[tuple[Callable[[Tensor], Tensor], float, float]] = [  # with the slopes that they attain or approach
    (torch.relu, 0.0, 1.0),
    (torch.abs, -1.0, 1.0),
    (torch.tanh, 0.0, 1.0),
    (torch.sigmoid, 0.0, 0.25),
    (torch.sin, -1.0, 1.0),
    (F.hardtanh, 0.0, 1.0),
    (F.gelu, -0.128904, 1.128904),
    (lambda x: F.softshrink(x, 0.1), 0.0, 1.0),
    (lambda x: F.leaky_relu(x, -0.7), -0.7, 1.0),
    (lambda x: F.leaky_relu(x, 1.8), 1.0, 1.8),
    (lambda x: F.elu(x, 2.0), 0.0, 2.0),
]


OTHERS = ("spectral", "eclipse")  # bounds that 'auto' has no use for here, in turn
KINDS = ("linear", "activation", "convolution", "entries", "skip")
COUNTED = (
    "lower > exact", "exact > upper", "exact > upper by another method", "refused", "refused by another method",
    "upper within 1 % of exact", "lower within 1 % of exact", "slopes outside [0, 1]", "skip connections",
    "convolutions", "two or more nonlinearities",
)  # fmt: skip
WRONG = COUNTED[:3]


def measure(quick: bool) -> Result:
    total = tally(range(20)) if quick else in_parallel()
    count, wrong = total["networks"], sum(total[what] for what in WRONG)
    table = Table(f"{count} random networks", [{"what": what, "networks": total[what]} for what in COUNTED])
    return Result([table], [Target("no bound on the wrong side of the exact value", f"{wrong} of {count}", wrong == 0)])


def in_parallel() -> Counter[str]:
    """The counts of `COUNT` networks, on all cores that this process may use."""
    partial = Partial(Path(__file__))
    firsts = [first for first in range(0, COUNT, PIECE) if str(first) not in partial.known]
    with ProcessPoolExecutor(cores(), get_context("spawn"), one_thread) as pool:
        waiting = {pool.submit(tally, range(first, first + PIECE)): first for first in firsts}
        for done in as_completed(waiting):
            partial.keep(str(waiting[done]), done.result())
    partial.finish()
    return sum(map(Counter, partial.known.values()), Counter())


def one_thread() -> None:
    torch.set_num_threads(1)


def tally(seeds: range) -> Counter[str]:
    """What happened to the networks of some seeds."""
    found: Counter[str] = Counter()
    for seed in seeds:
        network = RandomNetwork(seed)
        exact = network.exact()
        used = [ACTIVATIONS[what] for kind, what, *_ in network.steps if kind == "activation"]
        kinds = {kind for kind, *_ in network.steps}
        found["networks"] += 1
        found["slopes outside [0, 1]"] += any(low < 0 or high > 1 for _, low, high in used)
        found["two or more nonlinearities"] += len(used) > 1
        found["skip connections"] += "skip" in kinds
        found["convolutions"] += "convolution" in kinds
        try:
            certificate = certified(network, "auto")
            found["lower > exact"] += certificate.lower > exact * ROUNDING + 1e-12
            found["exact > upper"] += exact > certificate.upper * ROUNDING + 1e-12
            found["upper within 1 % of exact"] += certificate.upper <= 1.01 * exact + 1e-12
            found["lower within 1 % of exact"] += certificate.lower >= 0.99 * exact - 1e-12
        except NotCertifiable:
            found["refused"] += 1
        try:
            upper = certified(network, OTHERS[seed % len(OTHERS)]).upper
            found["exact > upper by another method"] += exact > upper * ROUNDING + 1e-12
        except NotCertifiable:
            found["refused by another method"] += 1
    return found


def certified(network: RandomNetwork, method: Method) -> Certificate:
    return fm.certify(network, method=method, shape=(network.size,), tolerance=1e-2, budget_s=2.0)


class RandomNetwork(nn.Module):
    """A random program of layers, convolutions, factors per entry, nonlinearities and sums with earlier values."""

    def __init__(self, seed: int):
        super().__init__()
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList()
        self.steps: list[tuple[str, int, int, float]] = []  # kind, index of a weight, activation or value, coefficient
        self.size = draw.randint(1, 6)
        sizes, left = [self.size], UNITS
        for kind in (
            "linear",
            *draw.choices(KINDS, k=8),
            "linear",
        ):
            size, what = sizes[-1], len(self.weights)
            if kind == "linear":
                sizes.append(draw.randint(1, 6))
                self.add(torch.randn(sizes[-1], size, generator=generator) / size**0.5)
            elif kind == "convolution":
                self.add(torch.randn(1, 1, min(3, size), generator=generator))
            elif kind == "entries":
                self.add(torch.randn(size, generator=generator))
            elif kind == "activation":
                what = draw.randrange(len(ACTIVATIONS))
                if size > left:
                    continue
                left -= size
            elif kind == "skip":
                what = draw.choice([i for i, n in enumerate(sizes) if n == size])
            if kind != "linear":
                sizes.append(size)
            self.steps.append((kind, what, len(self.steps), draw.uniform(-1.5, 1.5)))
        self.bias = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes[1:]]

    def add(self, weight: Tensor) -> None:
        self.weights.append(weight.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, lambda value, k, what: ACTIVATIONS[what][0](value + self.bias[k]))

    def run(self, x: Tensor, activation: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        values = [x]
        for kind, what, k, coefficient in self.steps:
            value = values[-1]
            if kind == "linear":
                value = F.linear(value, self.weights[what])
            elif kind == "convolution":
                kernel = self.weights[what]
                padded = F.pad(value.unsqueeze(1), (kernel.shape[-1] - 1, 0), mode="circular")
                value = F.conv1d(padded, kernel).squeeze(1)
            elif kind == "entries":
                value = value * self.weights[what]
            elif kind == "activation":
                value = activation(value, k, what)
            else:
                value = value + coefficient * values[what]
            values.append(value)
        return values[-1]

    @torch.no_grad()
    def exact(self) -> float:
        """The largest norm of the linear networks that have every slope at an end of its interval."""
        widths = {}
        self.run(torch.zeros(1, self.size, dtype=torch.float64), lambda v, k, what: widths.setdefault((k, what), v))
        ends = [ACTIVATIONS[what][1:] for (_, what), v in widths.items() for _ in range(v.shape[1])]
        low, high = torch.tensor(ends, dtype=torch.float64).reshape(-1, 2).T
        patterns = (torch.arange(2 ** len(ends))[:, None] >> torch.arange(len(ends))) & 1
        slopes = torch.where(patterns.bool(), high, low)
        parts = dict(zip((k for k, _ in widths), slopes.split([v.shape[1] for v in widths.values()], dim=1)))
        basis = torch.eye(self.size, dtype=torch.float64).repeat(len(slopes), 1)  # (patterns x inputs, inputs)
        output = self.run(basis, lambda v, k, _: v * parts[k].repeat_interleave(self.size, 0))
        return float(torch.linalg.matrix_norm(output.unflatten(0, (len(slopes), self.size)), ord=2).max())
