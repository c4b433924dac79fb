"""Gradient descent with backtracking: the step size finds itself, and the loss never rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from firmly.errors import DataError


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    iterations: int,
    rate: float = 1.0,
    growth: float = 8.0,
    callback: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Full-batch gradient descent on `loss()` in place; returns its values, the first before any step.

    A step that does not lower the loss is taken back and tried with half the rate; after one that does, the rate grows
    `growth` times. It ends after `iterations` steps, or where no rate above 1e-20 lowers the loss. Raises `DataError`
    if the loss is not finite at the start.
    """
    moved = [p for p in parameters if p.requires_grad]
    values = []
    for iteration in range(iterations + 1):
        now = loss()
        values.append(float(now.detach()))
        if callback is not None:
            callback(iteration, values[-1])
        if not math.isfinite(values[0]):
            raise DataError(f"the loss is {values[0]} before the first step: check the data")
        if iteration == iterations:
            break
        gradients = torch.autograd.grad(now, moved, allow_unused=True)
        rate = lowered(moved, gradients, loss, values[-1], rate)
        if rate == 0.0:
            break
        rate *= growth
    return values


@torch.no_grad()
def lowered(
    parameters: list[nn.Parameter],
    gradients: tuple[Tensor | None, ...],
    loss: Callable[[], Tensor],
    before: float,
    rate: float,
) -> float:
    """Move the parameters against their gradients at the first of rate, rate / 2, ... that lowers the loss.

    Returns that rate, or 0 with the parameters unmoved.
    """
    kept = [p.clone() for p in parameters]
    while rate > 1e-20:
        for parameter, old, gradient in zip(parameters, kept, gradients):
            if gradient is not None:
                parameter.copy_(old - rate * gradient)
        if float(loss()) < before:
            return rate
        rate /= 2
    for parameter, old in zip(parameters, kept):
        parameter.copy_(old)
    return 0.0
