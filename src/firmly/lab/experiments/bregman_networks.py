"""Three networks that differ in their skip only: none, the identity, and that of a BregmaNet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.bregman_data import Samples, Split
from firmly.lab.run_folder import RunFolder
from firmly.lab.training import Plan, train
from firmly.networks import BregmaNet

Kind = Literal["MLP", "ResNet", "BregmaNet", "BregmaNet, dual"]
Activation = Literal["tanh", "sigmoid", "softplus"]
KINDS: tuple[Kind, ...] = ("MLP", "ResNet", "BregmaNet")
FUNCTIONS: dict[Activation, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus,
}  # fmt: skip
EPOCHS = 5


class Block(nn.Module):
    """x -> rho(W x + b), with x added to it for a ResNet."""

    def __init__(self, linear: nn.Linear, rho: nn.Module, skip: bool):
        super().__init__()
        self.linear, self.rho, self.skip = linear, rho, skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.rho(self.linear(x))
        return x + y if self.skip else y


@dataclass(frozen=True)
class Shape:
    """`depth` layers of `width` units between an affine map in front and one behind."""

    width: int
    depth: int
    activation: Activation = "tanh"


def classifier(kind: Kind, features: int, classes: int, shape: Shape, seed: int) -> nn.Sequential:
    """A network x_0 = rho(A x + a), then x+ = rho(W x + b), x + rho(W x + b) or rho(rho^-1(x) + W x + b), then C x + c.

    All kinds have the same number of parameters; A and C begin with the same values, and so does every W but for its
    scale, which is 1 / sqrt(depth) where there is a skip. "BregmaNet, dual" ends with C u + c for u = rho^-1(x).
    """
    generator = torch.Generator().manual_seed(seed)

    def affine(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
        linear = nn.Linear(inputs, outputs)
        linear.weight.data = torch.randn(outputs, inputs, generator=generator) * scale / math.sqrt(inputs)
        linear.bias.data = torch.zeros(outputs)
        return linear

    width = shape.width
    scale = 1.0 if kind == "MLP" else 1 / math.sqrt(shape.depth)
    first, last = affine(features, width), affine(width, classes)
    inner = [affine(width, width, scale) for _ in range(shape.depth)]
    if kind in ("BregmaNet", "BregmaNet, dual"):
        net = BregmaNet(width, shape.depth, shape.activation, form="mixed" if kind == "BregmaNet" else "dual")
        for layer, linear in zip(net.layers, inner):
            layer.linear.weight.data = linear.weight.data  # type: ignore[union-attr]
        return nn.Sequential(first, net, last)
    rho = FUNCTIONS[shape.activation]
    blocks = [Block(linear, rho(), kind == "ResNet") for linear in inner]
    return nn.Sequential(first, nn.Sequential(rho(), *blocks), last)


@dataclass(frozen=True)
class Budget:
    """`steps` batches of `batch` samples with AdamW; `rates` are the learning rates to choose from."""

    steps: int
    batch: int
    rates: tuple[float, ...]
    decay: float


class Fitted(NamedTuple):
    """A trained network in double precision, its learning rate, and the accuracy that chose it."""

    net: nn.Sequential
    rate: float
    validation: float


def fit(
    kind: Kind, split: Split, shape: Shape, budget: Budget, seed: int, run: RunFolder, name: str,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Fitted:  # fmt: skip
    """The network of the learning rate and the epoch with the best accuracy on the validation samples."""
    best = None
    for rate in budget.rates:
        net = classifier(kind, split.features, split.classes, shape, seed)
        plan = Plan(EPOCHS, max(1, budget.steps // EPOCHS), rate, weight_decay=budget.decay, seed=seed)
        key = f"{name}-{kind.lower().replace(', ', '-')}-{budget.decay:g}-{rate:g}-{seed}"
        train(
            net, batches(split.train, budget.batch), plan, run, key, loss=nn.functional.cross_entropy,
            validate=lambda n: accuracy(n, split.validation), callback=callback,
        )  # fmt: skip
        score = accuracy(net, split.validation)
        if best is None or score > best.validation:
            best = Fitted(net.cpu().double(), rate, score)
    assert best is not None
    return best


def batches(samples: Samples, size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(samples.x), (size,), generator=generator)
        return samples.x[chosen], samples.labels[chosen]

    return draw


@torch.no_grad()
def accuracy(net: nn.Module, samples: Samples) -> float:
    parameter = next(net.parameters())
    found = net(samples.x.to(parameter)).argmax(1).cpu()
    return float((found == samples.labels).double().mean())
