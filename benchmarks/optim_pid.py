"""PID or a larger rate?

The published demonstration of PID steps (An et al., CVPR 2018): MNIST, a perceptron 784-1000-10, batches of 100, weight
decay 0.0001; test accuracy and mean training loss of the first epoch. Their rate is 0.01 for both methods, at which PID
sees a constant gradient 31 times, momentum 0.9 ten times. The other two rows have the rate at which their DC gain is
that of PID. Nothing is tuned. Means with 95 % intervals (Student) over five seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Result, Table, Target
from firmly.data import mnist
from firmly.lab.flows import interval
from firmly.optim import presets

SEEDS, RATE, BATCH = 5, 0.01, 100
PID, HEAVY = presets.pid(3.0, 100.0, 0.9), presets.heavy_ball(0.9)
EFFECTIVE = RATE * PID.scale * PID.gain.dc_gain()
PUBLISHED = {"momentum, their rate": "92.29", "PID, their rate": "95.03"}


def torch_sgd(rate: float, momentum: float) -> Callable[[Any], Optimizer]:
    return lambda params: torch.optim.SGD(params, rate, momentum, weight_decay=1e-4)


METHODS: dict[str, tuple[float, Callable[[Any], Optimizer]]] = {
    "momentum, their rate": (RATE, torch_sgd(RATE, 0.9)),
    "PID, their rate": (RATE, lambda params: PID(params, RATE, weight_decay=1e-4, decoupled=False)),
    "momentum, DC gain of PID": (EFFECTIVE / HEAVY.gain.dc_gain(), torch_sgd(EFFECTIVE / HEAVY.gain.dc_gain(), 0.9)),
    "SGD, DC gain of PID": (EFFECTIVE, torch_sgd(EFFECTIVE, 0.0)),
}


def measure(quick: bool) -> Result:
    if quick:
        found = {name: [one_epoch(make, 0, noise(300), noise(50))] for name, (_, make) in METHODS.items()}
        return Result([Table("MNIST after one epoch", rows_of(found))])
    train, test, found = read("train"), read("test"), {}
    partial = Partial(Path(__file__), tuple(f"optim/{name}.py" for name in ("dag", "presets", "adaptation_gain")))
    for name, (_, make) in METHODS.items():
        for seed in range(SEEDS):
            key = f"{name} {seed}"
            if key not in partial.known:
                partial.keep(key, one_epoch(make, seed, train, test))
            found.setdefault(name, []).append(partial.known[key])
    partial.finish()
    return Result([Table("MNIST after one epoch", rows_of(found))], targets(found))


def rows_of(found: dict[str, list[dict]]) -> list[dict[str, Any]]:
    return [
        {"method": name, "rate": f"{METHODS[name][0]:.3g}", "test %": shown([100 * r["accuracy"] for r in runs]),
         "published %": PUBLISHED.get(name, ""), "training loss": shown([r["loss"] for r in runs], 4)}
        for name, runs in found.items()
    ]  # fmt: skip


def one_epoch(make: Callable[[Any], Optimizer], seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]):
    """Mean training loss and test accuracy."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))
    optimizer, total = make(net.parameters()), 0.0
    for rows in torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed)).split(BATCH):
        loss = nn.functional.cross_entropy(net(train[0][rows]), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    with torch.no_grad():
        accuracy = float((net(test[0]).argmax(1) == test[1]).double().mean())
    return {"loss": total / len(train[1]), "accuracy": accuracy}


def read(split: Any) -> tuple[Tensor, Tensor]:
    data = mnist(split)
    return data.images.flatten(1).float() / 255, data.labels


def noise(count: int) -> tuple[Tensor, Tensor]:
    """Pictures that show nothing, to see that the benchmark runs."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)


def targets(found: dict[str, list[dict]]) -> list[Target]:
    mean = {name: 100 * sum(r["accuracy"] for r in runs) / len(runs) for name, runs in found.items()}
    momentum, pid, fair, _ = mean.values()
    return [
        Target("momentum at their rate: 92.2 ± 0.3 %", f"{momentum:.2f} %", abs(momentum - 92.2) <= 0.3),
        Target("PID at their rate: 94.9 ± 0.3 %", f"{pid:.2f} %", abs(pid - 94.9) <= 0.3),
        Target("momentum at the DC gain of PID: 94.9 ± 0.3 %", f"{fair:.2f} %", abs(fair - 94.9) <= 0.3),
    ]


def shown(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if len(values) < 2 else f" ± {half:.{digits}f}")
