"""The part of a law that holds its largest losses: what CVaR, trimming and total variation are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def threshold(losses: Tensor, nominal: Tensor, fraction: float) -> Tensor:
    """The upper quantile (rows, 1): the largest value such that losses of at least this hold `fraction` of the mass.

    Rows whose valid atoms have equal masses and equal numbers need a selection only, the others a sort.
    """
    valid = nominal > 0
    reduced = torch.where(valid, losses, -torch.inf)
    counts = valid.sum(1)
    equal = (nominal.amax(1) * counts - 1).abs() <= 1e-12 * counts
    if bool(equal.all()) and bool((counts == counts[0]).all()):
        count = int(counts[0])
        rank = min(max(math.ceil(fraction * count * (1 - 1e-14)), 1), count)
        return torch.kthvalue(reduced, losses.shape[1] - rank + 1, dim=1, keepdim=True).values
    ordered, order = reduced.sort(dim=1, descending=True)
    reached = nominal.gather(1, order).cumsum(1) >= fraction * (1 - 1e-14)
    last = torch.where(reached.any(1), reached.int().argmax(1), counts - 1)
    return ordered.gather(1, torch.minimum(last, counts - 1).unsqueeze(1))


def top(losses: Tensor, nominal: Tensor, fraction: float) -> Tensor:
    """The law on the largest losses that make up `fraction` of the mass; losses that tie at the end share the rest.

    (rows, atoms) -> (rows, atoms), q_i <= p_i / fraction.
    """
    level = threshold(losses, nominal, fraction)
    above = torch.where(losses > level, nominal, 0)
    tied = torch.where(losses == level, nominal, 0)
    rest = (fraction - above.sum(1, keepdim=True)).clamp(min=0) / tied.sum(1, keepdim=True)
    return (above + rest * tied) / fraction


def top_drift(losses: Tensor, nominal: Tensor, fraction: float) -> Tensor:
    """The derivative of `top` in the fraction: the share above shrinks, that of the tied losses grows."""
    level = threshold(losses, nominal, fraction)
    above = torch.where(losses > level, nominal, 0)
    tied = torch.where(losses == level, nominal, 0)
    return (tied * (above.sum(1, keepdim=True) / tied.sum(1, keepdim=True)) - above) / fraction**2


def maximisers(losses: Tensor, nominal: Tensor) -> tuple[Tensor, Tensor]:
    """The nominal weights of the largest losses (rows, atoms), 0 elsewhere, and their mass (rows, 1)."""
    largest = torch.where(nominal > 0, losses, -torch.inf).amax(1, keepdim=True)
    at_top = torch.where(losses == largest, nominal, 0)
    return at_top, at_top.sum(1, keepdim=True)
