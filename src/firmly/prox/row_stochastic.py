"""Averages with learned weights: matrices P >= 0 whose rows sum to 1, and means over blocks of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
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

    def channel_matrix(self) -> Tensor:
        """P, (out, in)."""
        return onto_simplex(self.raw, 1.0, 1)

    def selects(self) -> bool:
        """Whether every output is one of the inputs."""
        return self.pool == 1 and bool(((self.channel_matrix().detach() > 0).sum(1) == 1).all())

    def _apply_map(self, x: Tensor) -> Tensor:
        P = self.channel_matrix().to(x.dtype)
        mixed = torch.tensordot(P, self._pooled(x), dims=([1], [1]))
        return mixed.movedim(0, 1)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        P = self.channel_matrix().to(y.dtype)
        mixed = torch.tensordot(P, y, dims=([0], [1])).movedim(0, 1)
        for axis in range(2, mixed.dim()):
            mixed = mixed.repeat_interleave(self.pool, axis) / self.pool
        return mixed

    def _pooled(self, x: Tensor) -> Tensor:
        for axis in range(2, x.dim()):
            if self.pool > 1:
                x = x.unflatten(axis, (-1, self.pool)).mean(axis + 1)
        return x

    def log_average(self, logs: Tensor) -> Tensor:
        """log(A exp(logs)) without underflow or overflow, and with all derivatives, at zeros of P too."""
        for axis in range(2, logs.dim()):
            if self.pool > 1:
                logs = logs.unflatten(axis, (-1, self.pool)).logsumexp(axis + 1) - math.log(self.pool)
        P = self.channel_matrix().to(logs.dtype)
        logs = logs.movedim(1, -1)[..., None, :]  # (batch, *spatial, 1, in) beside P, (out, in)
        used = P > 0
        kept = torch.where(used, logs + torch.where(used, P, 1.0).log(), -torch.inf).logsumexp(-1)
        top = math.log(torch.finfo(logs.dtype).max) - math.log(P.shape[1])
        others = torch.where(used, 0.0, P * (logs - kept[..., None]).clamp(max=top).exp()).sum(-1)  # zero in value
        return (kept + torch.log1p(others)).movedim(-1, 1)

    def _upper(self) -> float:
        blocks = self.pool ** (len(self.domain) - 1)
        return Dense(self.channel_matrix().detach()).norm().upper / math.sqrt(blocks) * (1 + 1e-15)
