"""Normalisation: affine with stored statistics; without a global bound where it divides by those of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.linear.mask import Diagonal


@handles(F.batch_norm)
def batch_norm(
    tracer: Tracer,
    x: Signal,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Signal:
    """In evaluation mode: weight / sqrt(var + eps), channel by channel."""
    if training or running_var is None:
        raise tracer.refuse("batch normalisation in training mode (call .eval() on the network first)")
    return scaled_channels(x, running_var, weight, eps)


def scaled_channels(x: Signal, variance: Tensor, weight: Tensor | None, eps: float) -> Signal:
    factor = torch.rsqrt(variance.double() + eps)
    factor = factor if weight is None else factor * weight.double()
    return x.linear(Diagonal(factor.reshape(-1, *[1] * (x.dim() - 2)), x.shape[1:]))


@handles(F.instance_norm)
def instance_norm(
    tracer: Tracer,
    x: Signal,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Signal:
    """Affine with the statistics of the training; without a bound with those of the image itself."""
    if use_input_stats or running_var is None:
        raise tracer.refuse(STATISTICS.format("instance normalisation"))
    return scaled_channels(x, running_var, weight, eps)


STATISTICS = (
    "{}, which divides by the standard deviation of its input: its slopes grow to 1 / sqrt(eps) where the input is "
    "nearly constant (batch normalisation in evaluation mode has a bound)"
)
ATTENTION = (
    "attention, a product of values that both depend on the input: it has no global Lipschitz constant (Kim, "
    "Papamakarios and Mnih, 2021)"
)


def refused(text: str) -> Callable:
    def rule(tracer: Tracer, *args: Any, **kwargs: Any) -> Signal:
        raise tracer.refuse(text)

    return rule


handles(F.layer_norm, torch.layer_norm)(refused(STATISTICS.format("layer normalisation")))
handles(F.group_norm, torch.group_norm)(refused(STATISTICS.format("group normalisation")))
handles(F.rms_norm)(refused(STATISTICS.format("root-mean-square normalisation")))
handles(F.local_response_norm)(refused("local response normalisation, which divides by the size of its input"))
handles(F.normalize)(refused("normalisation to length one, whose slopes are unbounded near zero"))
handles(F.scaled_dot_product_attention, F.multi_head_attention_forward, joins=True)(refused(ATTENTION))
