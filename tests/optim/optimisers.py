"""What the tests of the inventory share: every optimiser of `firmly.optim` and what it takes, a network, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from firmly.optim import AdaptationGain, APosteriori, ArmijoSearch, BlockKalman, Dag, LayerRls, PolyakStep


class Case(NamedTuple):
    """An optimiser of a network. `takes`: what of the inventory it is made for, beside what all are."""

    name: str
    make: Callable[..., Optimizer]
    takes: frozenset[str]


def case(name: str, make: Callable[..., Optimizer], *takes: str) -> Case:
    return Case(name, make, frozenset(takes))


def of_parameters(kind: Callable[..., Any], **settings: Any) -> Callable[..., Optimizer]:
    return lambda net, **more: kind(net.parameters(), **(settings | more))


ALL = (
    "plain step", "params", "group rates", "tensor rate", "maximize", "fullgraph", "reached by schedules"
)  # fmt: skip
FILTER = AdaptationGain((0.3,), (0.2,))
CASES = [
    case("Dag", of_parameters(Dag, lr=0.05, poles=(0.9,)), *ALL),
    case("Dag, second order", of_parameters(Dag, lr=0.05, zeros=(0.2, 0.1), poles=(0.5, 0.2), weight_decay=0.01), *ALL),
    case("APosteriori", of_parameters(APosteriori, lr=0.5, gain=FILTER),
         "loss", "params", "group rates", "reached by schedules"),
    case("APosteriori, diagonal", of_parameters(APosteriori, lr=0.1, gain=FILTER, memory=20.0),
         "loss", "params", "group rates", "reached by schedules"),
    case("PolyakStep", of_parameters(PolyakStep, lr=0.1, batches=20), "loss", "params"),
    case("ArmijoSearch", of_parameters(ArmijoSearch, batches=20), "own gradients", "params"),
    case("LayerRls", lambda net, **more: LayerRls(net, **({"lr": 0.5} | more)), "plain step", "reached by schedules"),
    case("BlockKalman", of_parameters(BlockKalman, block=16, lr=0.7),
         "loss", "params", "group rates", "reached by schedules"),
]  # fmt: skip
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def those(what: str, without: bool = False):
    chosen = [c for c in CASES if (what in c.takes) != without]
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.sin(X @ torch.randn(4, 2, generator=GENERATOR, dtype=torch.float64))


def network(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(device, dtype)


def walk(net: nn.Module, optimizer: Optimizer, steps: int, step: Callable[..., Any] | None = None) -> list[float]:
    """Losses before each of the steps."""
    p = next(net.parameters())
    x, y = X.to(p), Y.to(p)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        if not isinstance(optimizer, ArmijoSearch):
            loss.backward()
        return loss

    for _ in range(steps):
        losses.append(float((step or optimizer.step)(closure).detach()))
    return losses


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
