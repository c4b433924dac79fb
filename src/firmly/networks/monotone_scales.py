"""Monotone operator equilibrium layers on several grids (E. Winston, J. Z. Kolter, NeurIPS 2020, multi-tier)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError
from firmly.linear.monotone import Monotone
from firmly.linear.tiers import Tier, Tiers, from_phases, halved, phases
from firmly.networks.monotone import MonotoneLayer
from firmly.prox.prior import Prior


class MultiscaleMonotoneLayer(nn.Module):
    """(z_1, ..., z_s) = prox_g(W (z_1, ..., z_s) + (U x, 0, ..., 0) + b), features on grids each half as fine:

        W = (1 - margin) I - A*A + B - B*,   A z = (A_11 z_1, A_21 z_1 + A_22 z_2, ..., A_s,s-1 z_s-1 + A_ss z_s),

    with circular convolutions A_ii and B_ii of every grid on itself, and A_i+1,i to the next coarser with stride 2, all
    of `kernel_size`; B is block diagonal. x is (batch, in_features, *spatial), z_i (batch, features[i], *spatial /
    2^i). I - W is strongly monotone with the margin whatever the weights, so that there is one solution.

    `stacked` is the same layer in phases of the coarsest grid (`firmly.linear.phases`), a `MonotoneLayer` with its
    `tol`, `step_size`, `solve` and `lipschitz_bound`: phases only reorder entries, so that `certify(layer.stacked)`
    bounds how far all z_i together move when x moves. Raises `SettingsError`, `ShapeError` for grids that cannot be
    halved, and `ConditionError` for a margin that is not positive.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, section 4.
    """

    def __init__(
        self,
        in_features: int,
        features: Sequence[int],
        spatial: Sequence[int],
        margin: float = 1.0,
        prior: Prior | None = None,
        kernel_size: int = 3,
    ):
        super().__init__()
        if min(in_features, kernel_size, len(features), len(spatial), *features, *spatial) < 1:
            raise SettingsError(
                f"in_features, kernel_size, all features and the grid are at least 1, and there is at least one tier; "
                f"given {in_features} -> {tuple(features)} features, kernel_size {kernel_size}, grid {tuple(spatial)}"
            )
        coarsest, finest = halved(spatial, len(features) - 1), 2 ** (len(features) - 1)
        tiers = [Tier(count, finest >> i) for i, count in enumerate(features)]

        def initial(out: int, inputs: int) -> nn.Parameter:
            size = (out, inputs, *[kernel_size] * len(spatial))
            return nn.Parameter(torch.randn(size) / math.sqrt(3 * math.prod(size[1:])))

        own = {(i, i): initial(t.channels, t.channels) for i, t in enumerate(tiers)}
        down = {(i + 1, i): initial(b.channels, a.channels) for i, (a, b) in enumerate(pairwise(tiers))}
        turning = {(i, i): initial(t.channels, t.channels) for i, t in enumerate(tiers)}
        self.stacked = MonotoneLayer.of(
            Tiers({(0, 0): initial(features[0], in_features)}, [Tier(in_features, finest)], tiers, coarsest),
            Monotone(Tiers(own | down, tiers, tiers, coarsest), margin, Tiers(turning, tiers, tiers, coarsest)),
            TierBias(tiers, len(spatial)),
            prior,
        )
        self.tiers = tiers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = self.stacked(phases(x, self.tiers[0].scale))
        parts = z.split([t.channels * t.scale ** (x.dim() - 2) for t in self.tiers], dim=1)
        return tuple(from_phases(part, tier.scale) for part, tier in zip(parts, self.tiers))


class TierBias(nn.Module):
    """One number for every channel of every tier, the same in all its phases: (channels of the stack, 1, ...)."""

    def __init__(self, tiers: Sequence[Tier], axes: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(sum(t.channels for t in tiers)))
        counts = torch.tensor([t.scale**axes for t in tiers for _ in range(t.channels)])
        self.register_buffer("channel", torch.arange(len(counts)).repeat_interleave(counts), persistent=False)
        self.axes = axes

    def forward(self) -> Tensor:
        return self.values[self.channel].reshape(-1, *[1] * self.axes)
