"""Bregman neural networks: layers with an inverse-activation skip, computed in dual coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.networks.bregman_inverse import inverse
from firmly.networks.bregman_invertible import Residual
from firmly.networks.bregman_log_det import log_det
from firmly.networks.bregman_weights import invertible_weight
from firmly.prox.legendre import Legendre, legendre
from firmly.prox.legendre_mean import mean
from firmly.prox.row_stochastic import RowStochastic

Form = Literal["dual", "primal", "mixed"]


class BregmanLayer(nn.Module):
    """x+ = rho(rho^-1(P x) + W x + b), computed as u+ = rho^-1(P rho(u)) + W rho(u) + b with u = rho^-1(x).

    `forward` maps dual coordinates to dual coordinates, u (batch, *W.domain) to (batch, *W.codomain): without an
    `average` P = Id and it is u + W rho(u) + b, which needs no inverse. `primal` is the first formula to the letter,
    for x in the domain of rho. `linear` is W, `bias` is b (None: no bias), `average` is P, for changes of width.
    Raises `ShapeError` where they do not fit.
    Source: Frecon, Gasso, Pontil and Salzo, Bregman neural networks, ICML 2022; the dual form: docs/theory/bregman.
    """

    def __init__(
        self,
        linear: LinearMap,
        activation: Legendre,
        bias: Tensor | None = None,
        average: RowStochastic | None = None,
    ):
        super().__init__()
        ends = (linear.domain, linear.domain) if average is None else (average.domain, average.codomain)
        if ends != (linear.domain, linear.codomain):
            raise ShapeError(
                f"W maps {linear.domain} -> {linear.codomain}, and the skip beside it {ends[0]} -> {ends[1]}; a change "
                "of width needs average=RowStochastic(inputs, outputs, spatial)"
            )
        self.linear, self.activation, self.average = linear, activation, average
        if isinstance(bias, nn.Parameter):
            self.bias: Tensor = bias
        else:
            self.register_buffer("bias", torch.zeros(()) if bias is None else bias)

    def weight(self) -> LinearMap:
        """W."""
        return self.linear

    def residual(self) -> Residual:
        """W rho(u) + b, the part beside an identity; `ConditionError` for layers that change the width."""
        if self.average is not None:
            raise ConditionError(
                f"this layer averages its input on the way {self.linear.domain} -> {self.linear.codomain}: only layers "
                "that keep their width are known to be invertible"
            )
        return Residual(self.linear, self.activation, self.bias)

    def forward(self, u: Tensor) -> Tensor:
        skipped = u if self.average is None else mean(self.activation, self.average, u)
        return self.joined(skipped, self.activation(u))

    def joined(self, skipped: Tensor, x: Tensor) -> Tensor:
        """rho^-1(P x) + W x + b from its parts."""
        return skipped + (self.linear(x) + self.bias)

    def primal(self, x: Tensor) -> Tensor:
        """rho(rho^-1(P x) + W x + b) with the inverse activation; `DataError` for x outside the domain of rho."""
        skipped = self.activation.inverse(x if self.average is None else self.average(x))
        return self.activation(self.joined(skipped, x))


class BregmaNet(nn.Module):
    """A chain of `depth` Bregman layers, run in dual coordinates: u <- u + W rho(u) + b.

    `features` is the width, or the widths of all values where it changes (then `depth` is left out): a layer that
    changes it averages its inputs with a learned row-stochastic P. Without `spatial` values are (batch, features);
    with it they are (batch, features, *spatial) and W is a convolution with kernels of `kernel_size`, zero beyond the
    border, or circular where the network is `invertible`. `activation` is a Legendre pair or its name.

    `form` says in which coordinates values come in and go out: "dual" (u to u), "primal" (x to x, for x strictly inside
    the domain of rho, else `DataError`), "mixed" (u to x: plain features come in, activated ones go out). All are the
    same network, x = rho(u); only the first value of the primal form passes through an inverse activation.

    With `invertible` the weights are such that every layer is a bijection, whatever they learn, and a change of width
    raises `ConditionError`. `inverse` and `log_det` work for every network whose weights are proved to be invertible.
    Raises `SettingsError` for other arguments. Source: as `BregmanLayer`.
    """

    def __init__(
        self,
        features: int | Sequence[int],
        depth: int | None = None,
        activation: str | Legendre = "tanh",
        invertible: bool = False,
        form: Form = "dual",
        spatial: Sequence[int] = (),
        kernel_size: int = 3,
    ):
        super().__init__()
        widths = widths_of(features, depth)
        if form not in get_args(Form):
            raise SettingsError(f"the form is one of {', '.join(get_args(Form))}; given {form!r}")
        if min(kernel_size, *spatial, 1) < 1:
            raise SettingsError(f"kernel_size and spatial are at least 1, given {kernel_size} and {tuple(spatial)}")
        if invertible and len(set(widths)) > 1:
            raise ConditionError(f"an invertible network keeps its width, given {widths}")
        self.activation = legendre(activation) if isinstance(activation, str) else activation
        self.form: Form = form
        self.inputs = {"data": (widths[0], *spatial)}
        scale = 1 / math.sqrt(len(widths) - 1)  # so that the sum of all layers keeps its size at any depth
        self.layers = nn.ModuleList(
            invertible_layer(self.activation, n, tuple(spatial), kernel_size)
            if invertible
            else bregman_layer(self.activation, n, m, tuple(spatial), kernel_size, scale)
            for n, m in itertools.pairwise(widths)
        )

    def forward(self, data: Tensor) -> Tensor:
        u = self.activation.inverse(data) if self.form == "primal" else data
        for layer in self.layers:
            u = layer(u)
        return u if self.form == "dual" else self.activation(u)

    def inverse(self, output: Tensor) -> Tensor:
        """The one input with this output, both in the coordinates of `form`, layer by layer with Newton's method.

        Where rho is saturated a primal output has lost the digits of its input: invert in dual coordinates then.
        Raises `ConditionError` if a layer is not proved to be invertible, `NotConverged` where Newton's method ends
        above its tolerance, and `DataError` for an output outside the domain of rho.
        """
        u = output if self.form == "dual" else self.activation.inverse(output)
        for layer in reversed(self.layers):
            u = inverse(layer, u)
        return self.activation(u) if self.form == "primal" else u

    def log_det(self, data: Tensor) -> Tensor:
        """log |det| of the Jacobian at every element of a batch, (batch,), in the coordinates of `form`.

        Exact; raises `ConditionError` as `inverse`, and `NotDiagonal` for layers too large for a factorisation.
        """
        u = self.activation.inverse(data) if self.form == "primal" else data
        total = -self._log_slopes(u) if self.form == "primal" else torch.zeros_like(u.flatten(1)[:, 0])
        for layer in self.layers:
            total = total + log_det(layer, u)
            u = layer(u)
        return total if self.form == "dual" else total + self._log_slopes(u)

    def _log_slopes(self, u: Tensor) -> Tensor:
        return self.activation.log_derivative(u).flatten(1).sum(1)


def widths_of(features: int | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """The widths of all values, one more than there are layers."""
    if isinstance(features, int):
        widths = (features,) * ((1 if depth is None else depth) + 1)
    else:
        widths = tuple(int(n) for n in features)
        if depth is not None and depth != len(widths) - 1:
            raise SettingsError(f"{len(widths)} widths make a depth of {len(widths) - 1}, given depth={depth}")
    if len(widths) < 2 or min(widths) < 1:
        raise SettingsError(f"a network has at least one layer and widths of at least 1, given {features=}, {depth=}")
    return widths


def bregman_layer(
    activation: Legendre, inputs: int, outputs: int, spatial: tuple[int, ...], kernel_size: int, scale: float
) -> BregmanLayer:
    """A layer with weights N(0, scale^2 / fan-in), bias 0, and an average beside them where widths differ."""
    size = (outputs, inputs, *[kernel_size] * len(spatial))
    weight = nn.Parameter(torch.randn(size) * scale / math.sqrt(math.prod(size[1:])))
    linear = Convolution(weight, (inputs, *spatial), "zero") if spatial else Dense(weight)
    average = None if inputs == outputs else RowStochastic(inputs, outputs, spatial)
    return BregmanLayer(linear, activation, zero_bias(outputs, spatial), average)


def invertible_layer(activation: Legendre, width: int, spatial: tuple[int, ...], kernel_size: int) -> BregmanLayer:
    """A layer that stays invertible whatever it learns."""
    linear = invertible_weight((width, *spatial), activation.lipschitz, kernel_size=kernel_size)
    return BregmanLayer(linear, activation, zero_bias(width, spatial))


def zero_bias(channels: int, spatial: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(channels, *[1] * len(spatial)))
