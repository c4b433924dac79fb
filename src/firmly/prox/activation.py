"""Activations phi = psi' with a slope interval for every channel, the nonlinear part of a ridge regulariser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError


class Activation(nn.Module):
    """A function phi_i on every entry of channel i, with phi_i(0) = 0 and slopes in [low, high] by construction.

    `channels` is the size of dimension 1 of the input (batch, channels, *spatial). A subclass gives `forward`,
    `potential` (psi_i with psi_i' = phi_i, psi_i(0) = 0) and `interval`, the exact slopes of the current parameters.
    """

    channels: int
    low: float
    high: float

    def potential(self, z: Tensor) -> Tensor:
        """psi_i(z), entry by entry."""
        raise NotImplementedError

    def interval(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope of every channel, two tensors (channels,), differentiable."""
        raise NotImplementedError


class Clip(Activation):
    """phi_i(z) = clamp(z, -t_i, t_i) with a learnable t_i > 0, the derivative of the Huber function; slopes in [0, 1].

    z - phi(z) is the soft threshold. `threshold` is the start value, a positive number or a tensor (channels,).
    """

    low, high = 0.0, 1.0

    def __init__(self, channels: int, threshold: float | Tensor):
        super().__init__()
        start = torch.as_tensor(threshold, dtype=torch.get_default_dtype()).expand(channels)
        if not bool((start > 0).all()):
            raise ConditionError(f"the threshold of a clip is positive, given {threshold}")
        self.channels = channels
        self.log_threshold = nn.Parameter(start.log())

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def forward(self, z: Tensor) -> Tensor:
        bound = per_channel(self.threshold, z)
        return bound * torch.nn.functional.hardtanh(z / bound)  # ten times faster than minimum and maximum

    def potential(self, z: Tensor) -> Tensor:
        bound = per_channel(self.threshold, z)
        inside = z.abs().minimum(bound)
        return inside * (z.abs() - inside / 2)

    def interval(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(self.log_threshold)
        return 0 * ones, ones


def per_channel(values: Tensor, z: Tensor) -> Tensor:
    """values (channels,) shaped to broadcast against z (batch, channels, *spatial)."""
    return values.reshape(-1, *[1] * (z.dim() - 2))
