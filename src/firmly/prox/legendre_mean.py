"""Averages in the primal coordinates of a Legendre pair, seen from the dual ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import DataError
from firmly.prox.legendre import Legendre
from firmly.prox.legendre_pairs import Atan, Isru, Sigmoid, Tanh, hypotenuse

Average = Callable[[Tensor], Tensor]


def mean(pair: Legendre, average: Average, u: Tensor) -> Tensor:
    """rho^-1(A rho(u)) for an average A, a linear map with entries >= 0 and rows that sum to 1.

    A is applied to the distances of rho(u) to the ends of the domain, each with its full relative accuracy, and the
    inverse is taken of these. `DataError` where rho(u) underflows and the result is not finite. Open to
    `__torch_function__`.
    """
    if has_torch_function((u,)):
        return handle_torch_function(mean, (u,), pair, average, u)
    value = _mean(pair, average, u)
    if not value.is_meta and not bool(value.isfinite().all()):
        raise DataError(f"the average in the coordinates of {pair} is not finite in {u.dtype}: |u| is too large")
    return value


@singledispatch
def _mean(pair: Legendre, average: Average, u: Tensor) -> Tensor:
    return pair._inverse(average(pair._value(u)))


@_mean.register
def _(pair: Sigmoid, average: Average, u: Tensor) -> Tensor:
    return log_odds(average, u)


@_mean.register
def _(pair: Tanh, average: Average, u: Tensor) -> Tensor:
    """tanh t = 2 sigmoid(2 t) - 1."""
    return log_odds(average, 2 * pair.rate * u) / (2 * pair.rate)


def log_odds(average: Average, t: Tensor) -> Tensor:
    return average(torch.sigmoid(t)).log() - average(torch.sigmoid(-t)).log()


@_mean.register
def _(pair: Atan, average: Average, u: Tensor) -> Tensor:
    """pi/2 - atan u = atan2(1, u)."""
    one = torch.ones_like(u)
    above, below = average(torch.atan2(one, u)), average(torch.atan2(one, -u))
    upper = above < below
    return torch.where(upper, 1.0, -1.0) / torch.where(upper, above, below).tan()


@_mean.register
def _(pair: Isru, average: Average, u: Tensor) -> Tensor:
    """1 - u / s = 1 / (s (s + u)) with s = sqrt(1 + u^2)."""
    above, below = average(to_one(u)), average(to_one(-u))
    return (below - above) / (2 * (above * below).sqrt())


def to_one(u: Tensor) -> Tensor:
    s = hypotenuse(u)
    return torch.where(u > 0, 1 / (s * (s + u.clamp(min=0))), 1 - u / s)
