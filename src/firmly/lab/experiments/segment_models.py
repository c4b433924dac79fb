"""The models of the segmentation study: how each is built, what it sees, what its loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from firmly.robust import cross_entropy
from firmly.segment import PixelFeatures, UNet, monotone_segmenter, unrolled_segmenter

ModelName = Literal["U-Net", "logistic-TV", "SVM-TV", "unrolled", "implicit"]
SCALES = (1.0, 2.0)
SMALLEST = 1e-6  # a probability whose logarithm is a score


class Labelled(NamedTuple):
    """Images (n, 1, height, width), what a model sees of them (n, channels, ...), their labels (n, height, width)."""

    images: Tensor
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Model:
    """`build(classes, inputs)` is trained, on inputs = seen(images); `losses` are of every class, from its scores.

    `coupled`: an `EntropicTV` follows the scores, whose coupling is chosen on clean slices; `crop`: it learns from
    parts of images, of any size.
    """

    name: ModelName
    build: Callable[[int, Tensor], nn.Module]
    seen: Callable[[Tensor], Tensor]
    losses: Callable[[Tensor], Tensor]
    learning_rate: float
    coupled: bool = False
    crop: bool = True

    @property
    def probabilistic(self) -> bool:
        return self.losses is cross_entropy


def hinge(scores: Tensor) -> Tensor:
    """max_j (s_j + 1[j != k]) - s_k for every class k, the loss of Crammer and Singer without coupling."""
    top = scores.topk(2, dim=1)
    best, second = top.values[:, :1], top.values[:, 1:]
    is_best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top.indices[:, :1], True)
    rival = torch.where(is_best, second, best)
    return (1 + rival - scores).clamp(min=0)


class Logarithm(nn.Module):
    """Probabilities -> scores."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=SMALLEST).log()


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    return PixelFeatures(SCALES)(images)


def as_they_are(images: Tensor) -> Tensor:
    return images


def linear(classes: int, inputs: Tensor) -> nn.Module:
    """Scores of features that are brought to mean 0 and variance 1 first."""
    count = inputs.shape[1]
    standard, read = nn.Conv2d(count, count, 1, groups=count), nn.Conv2d(count, classes, 1)
    deviation = inputs.std((0, 2, 3)).clamp(min=1e-6)
    weights = (1 / deviation, -inputs.mean((0, 2, 3)) / deviation, torch.zeros(()), torch.zeros(()))
    with torch.no_grad():
        for parameter, value in zip((*standard.parameters(), *read.parameters()), weights, strict=True):
            parameter.copy_(value.reshape([-1, *[1] * (parameter.dim() - 1)]) if value.dim() else value)
    return nn.Sequential(standard.requires_grad_(False), read)


def unet(classes: int, inputs: Tensor) -> nn.Module:
    return UNet(1, classes, width=8).to(memory_format=torch.channels_last)


def unrolled(classes: int, inputs: Tensor) -> nn.Module:
    size = (inputs.shape[2], inputs.shape[3])
    return nn.Sequential(unrolled_segmenter(1, classes, size, depth=5, width=8, coupling=0.2), Logarithm())


def implicit(classes: int, inputs: Tensor) -> nn.Module:
    return monotone_segmenter(1, classes, (inputs.shape[2], inputs.shape[3]), features=8)


MODELS = {
    model.name: model
    for model in (
        Model("U-Net", unet, as_they_are, cross_entropy, 2e-2),
        Model("logistic-TV", linear, features, cross_entropy, 1.0, coupled=True),
        Model("SVM-TV", linear, features, hinge, 1.0, coupled=True),
        Model("unrolled", unrolled, as_they_are, cross_entropy, 1e-2, crop=False),
        Model("implicit", implicit, as_they_are, cross_entropy, 1e-2, crop=False),
    )
}


@torch.no_grad()
def scores(network: nn.Module, inputs: Tensor) -> Tensor:
    """Scores (n, class, height, width) in eval mode."""
    training = network.training
    found = network.eval()(inputs)
    network.train(training)
    return found
