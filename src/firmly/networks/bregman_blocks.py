"""Residual networks of Bregman blocks for images, in dual coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError, ShapeError
from firmly.linear.convolution import Convolution
from firmly.linear.map import LinearMap
from firmly.networks.bregman import zero_bias
from firmly.prox.legendre import Legendre, legendre
from firmly.prox.legendre_mean import mean
from firmly.prox.row_stochastic import RowStochastic


class BregmanBlock(nn.Module):
    """x+ = rho(rho^-1(x) + B rho(A x + a) + b), computed as u+ = u + B rho(A rho(u) + a) + b with u = rho^-1(x).

    `forward` maps dual coordinates, `primal` is the first formula for x in the domain of rho. A = `inner` takes the
    values to any others, B = `outer` takes these back; else `ShapeError`. In dual coordinates it is a residual block
    with the activation in front. There is no batch normalisation: the skip needs none, and training statistics have no
    certificate. Source: Frecon et al., Bregman neural networks, ICML 2022, without the normalisation of its blocks.
    """

    def __init__(
        self, inner: LinearMap, outer: LinearMap, activation: Legendre, inner_bias: nn.Parameter, bias: nn.Parameter
    ):
        super().__init__()
        if (inner.domain, inner.codomain) != (outer.codomain, outer.domain):
            raise ShapeError(
                f"a block returns to where it comes from: A maps {inner.domain} -> {inner.codomain}, B maps "
                f"{outer.domain} -> {outer.codomain}"
            )
        self.inner, self.outer, self.activation = inner, outer, activation
        self.inner_bias, self.bias = inner_bias, bias

    def forward(self, u: Tensor) -> Tensor:
        return u + self.branch(self.activation(u))

    def primal(self, x: Tensor) -> Tensor:
        """The block in primal coordinates; `DataError` for x outside the domain of rho."""
        return self.activation(self.activation.inverse(x) + self.branch(x))

    def branch(self, x: Tensor) -> Tensor:
        """B rho(A x + a) + b."""
        return self.outer(self.activation(self.inner(x) + self.inner_bias)) + self.bias


class BregmanMean(nn.Module):
    """u -> rho^-1(P rho(u)) for a row-stochastic P: the average of x = rho(u), in dual coordinates.

    Every output lies between the smallest and the largest of the inputs it is an average of.
    """

    def __init__(self, activation: Legendre, average: RowStochastic):
        super().__init__()
        self.activation, self.average = activation, average

    def forward(self, u: Tensor) -> Tensor:
        return mean(self.activation, self.average, u)


class BregmanResNet(nn.Module):
    """Images (batch, in_channels, *spatial) to (batch, outputs): a ResNet whose skips are Bregman skips.

    A convolution takes the image to the dual coordinates of `channels[0]` channels; `blocks` Bregman blocks follow for
    every entry of `channels`; between two stages a `BregmanMean` halves the resolution and changes the number of
    channels by averages in primal coordinates; the mean of rho(u) over all pixels goes through a linear layer.
    Convolutions are 3 x 3 with zeros beyond the border. Raises `SettingsError` for sizes that do not halve.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        spatial: Sequence[int],
        channels: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        activation: str | Legendre = "tanh",
    ):
        super().__init__()
        spatial, halvings = tuple(spatial), len(channels) - 1
        if halvings < 0 or min(in_channels, outputs, blocks, *channels, *spatial) < 1:
            raise SettingsError(
                f"channels, outputs, blocks and sizes are at least 1, given {in_channels} -> {tuple(channels)} -> "
                f"{outputs}, {blocks} blocks on {spatial}"
            )
        if not spatial or any(n % 2**halvings for n in spatial):
            raise SettingsError(f"{len(channels)} stages halve the sizes {halvings} times, given {spatial}")
        self.activation = legendre(activation) if isinstance(activation, str) else activation
        self.inputs = {"data": (in_channels, *spatial)}
        self.stem = convolution(in_channels, channels[0], spatial)
        self.bias = zero_bias(channels[0], spatial)
        scale = 1 / math.sqrt(blocks * len(channels))
        layers: list[nn.Module] = []
        for stage, width in enumerate(channels):
            if stage:
                layers.append(BregmanMean(self.activation, RowStochastic(channels[stage - 1], width, spatial, pool=2)))
                spatial = tuple(n // 2 for n in spatial)
            layers += (bregman_block(self.activation, width, spatial, scale) for _ in range(blocks))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], outputs)

    def forward(self, data: Tensor) -> Tensor:
        u = self.layers(self.stem(data) + self.bias)
        return self.head(self.activation(u).flatten(2).mean(2))


def bregman_block(activation: Legendre, width: int, spatial: tuple[int, ...], scale: float) -> BregmanBlock:
    """A block with weights N(0, 1 / fan-in), those of B times `scale`, and biases 0."""
    inner, outer = convolution(width, width, spatial), convolution(width, width, spatial, scale)
    return BregmanBlock(inner, outer, activation, zero_bias(width, spatial), zero_bias(width, spatial))


def convolution(inputs: int, outputs: int, spatial: tuple[int, ...], scale: float = 1.0) -> Convolution:
    size = (outputs, inputs, *[3] * len(spatial))
    kernel = nn.Parameter(torch.randn(size) * scale / math.sqrt(math.prod(size[1:])))
    return Convolution(kernel, (inputs, *spatial), "zero")
