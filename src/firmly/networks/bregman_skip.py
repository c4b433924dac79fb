"""Skips of Bregman layers that change the width: learned averages, taken in primal coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError
from firmly.linear.map import LinearMap
from firmly.prox.legendre import Legendre
from firmly.prox.legendre_mean import mean
from firmly.prox.simplex import onto_simplex


class RowStochastic(LinearMap):
    """x_o <- sum_c P_oc x_c for every pixel, with P >= 0 and rows that sum to 1: (in, *spatial) -> (out, *spatial).

    The rows of P are the exact projections of the rows of the parameter `raw` onto the simplex, so that most entries of
    a learned P are zero. At the start output o is the average of the inputs c = o (mod out) or, for more outputs than
    inputs, the input o (mod in), and every entry can still learn. With `pool` = s the average runs over blocks of s
    pixels along every axis too, and the sizes, multiples of s, shrink by s.
    """

    def __init__(self, inputs: int, outputs: int, spatial: Sequence[int] = (), pool: int = 1):
        if min(inputs, outputs, pool, *spatial) < 1 or any(n % pool for n in spatial):
            raise SettingsError(
                f"an average takes channels, given {inputs} -> {outputs}, and blocks of {pool} pixels, which have to "
                f"divide the sizes {tuple(spatial)}"
            )
        super().__init__((inputs, *spatial), (outputs, *(n // pool for n in spatial)))
        self.pool = pool
        same = torch.arange(outputs)[:, None] % inputs == torch.arange(inputs) % outputs
        self.raw = nn.Parameter(onto_simplex(same.double(), 1.0, 1).to(torch.get_default_dtype()))

    def matrix_of_channels(self) -> Tensor:
        """P, (out, in)."""
        return onto_simplex(self.raw, 1.0, 1)

    def _apply_map(self, x: Tensor) -> Tensor:
        P = self.matrix_of_channels().to(x.dtype)
        mixed = torch.tensordot(P, self._pooled(x), dims=([1], [1]))
        return mixed.movedim(0, 1)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        P = self.matrix_of_channels().to(y.dtype)
        mixed = torch.tensordot(P, y, dims=([0], [1])).movedim(0, 1)
        for axis in range(2, mixed.dim()):
            mixed = mixed.repeat_interleave(self.pool, axis) / self.pool
        return mixed

    def _pooled(self, x: Tensor) -> Tensor:
        for axis in range(2, x.dim()):
            if self.pool > 1:
                x = x.unflatten(axis, (-1, self.pool)).mean(axis + 1)
        return x

    def _upper(self) -> float:
        from firmly.linear.dense import Dense

        blocks = self.pool ** (len(self.domain) - 1)
        return Dense(self.matrix_of_channels().detach()).norm().upper / math.sqrt(blocks) * (1 + 1e-15)


class BregmanMean(nn.Module):
    """u -> rho^-1(P rho(u)) for a row-stochastic P: the average of x = rho(u), in dual coordinates.

    Every output lies between the smallest and the largest of the inputs it is an average of. It is computed from the
    distances of x to both ends of the domain, without the cancellation of the inverse activation.
    """

    def __init__(self, activation: Legendre, average: RowStochastic):
        super().__init__()
        self.activation, self.average = activation, average
        self.domain, self.codomain = average.domain, average.codomain

    def forward(self, u: Tensor) -> Tensor:
        return mean(self.activation, self.average, u)
