"""Soft thresholds that are learned, one for every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError
from firmly.prox.activation import per_channel
from firmly.prox.l1 import soft_threshold
from firmly.prox.prior import Prior, sum_over_sample


class ChannelThreshold(Prior):
    """g(x) = sum_c weight_c |x_c|_1 with a learnable weight_c = exp(parameter) > 0 for every channel (dimension 1).

    prox: soft threshold by t weight_c, real or complex. `weight` is the start: a positive number or tensor (channels,).
    """

    structure = "channel"

    def __init__(self, channels: int, weight: float | Tensor = 0.1):
        super().__init__()
        start = torch.as_tensor(weight, dtype=torch.get_default_dtype()).expand(channels)
        if not bool((start > 0).all()):
            raise ConditionError(f"the start weights of a learnable threshold are positive, given {weight}")
        self.log_weight = nn.Parameter(start.log())

    @property
    def weight(self) -> Tensor:
        return self.log_weight.exp()

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(per_channel(self.weight, x) * x.abs())

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return soft_threshold(z, step * per_channel(self.weight, z))

    def extra_repr(self) -> str:
        return f"channels={len(self.log_weight)}"
