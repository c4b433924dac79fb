"""Averages in the primal coordinates of a Legendre pair, seen from the dual ones."""

from __future__ import annotations

import math
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import DataError
from firmly.prox.legendre import Legendre
from firmly.prox.legendre_pairs import Atan, Exp, Isru, Sigmoid, Softplus, Tanh, hypotenuse
from firmly.prox.row_stochastic import RowStochastic

CONCAVE = (Sigmoid, Tanh, Softplus, Exp)
"""Pairs for which rho'(rho^-1(x)) is concave in x, so that means in dual coordinates have a bound of their own."""


def mean(pair: Legendre, average: RowStochastic, u: Tensor) -> Tensor:
    """rho^-1(A rho(u)) for an average A of learned weights: (batch, *A.domain) to (batch, *A.codomain).

    A is applied to the distances of rho(u) to the ends of the domain, each with its full relative accuracy, and the
    inverse is taken of these; where they underflow, and rho is exponential there, to their logarithms. Raises
    `DataError` where the result is not finite nevertheless. Open to `__torch_function__`.
    """
    if has_torch_function((u,)):
        return handle_torch_function(mean, (u,), pair, average, u)
    value = _mean(pair, average, u)
    if value.is_meta or bool(value.isfinite().all()):
        return value
    if isinstance(pair, CONCAVE):
        value = _mean_of_logarithms(pair, average, u)
    if not bool(value.isfinite().all()):
        raise DataError(f"the average in the coordinates of {pair} is not finite in {u.dtype}: |u| is too large")
    return value


def mean_gain(pair: Legendre, average: RowStochastic) -> float:
    """A Lipschitz constant of u -> rho^-1(A rho(u)), infinite where none is known (docs/theory/bregman).

    The root of the largest number of means that an entry takes part in for pairs with concave rho'(rho^-1(x)), that of
    A where every mean is that of one entry, and (high / low) |A| for slopes in [low, high] with low > 0.
    """
    P, (low, high) = average.channel_matrix().detach(), pair.slope
    if average.selects():
        return average.norm().upper
    if isinstance(pair, CONCAVE):
        return math.sqrt(int((P > 0).sum(0).max())) * (1 + 1e-15)
    return high / low * average.norm().upper * (1 + 1e-15) if 0 < low and high < math.inf else math.inf


@singledispatch
def _mean(pair: Legendre, average: RowStochastic, u: Tensor) -> Tensor:
    return pair._inverse(average(pair._value(u)))


@_mean.register
def _(pair: Sigmoid, average: RowStochastic, u: Tensor) -> Tensor:
    return average(torch.sigmoid(u)).log() - average(torch.sigmoid(-u)).log()


@_mean.register
def _(pair: Tanh, average: RowStochastic, u: Tensor) -> Tensor:
    """tanh t = 2 sigmoid(2 t) - 1."""
    return _mean(Sigmoid(), average, 2 * pair.rate * u) / (2 * pair.rate)


@_mean.register
def _(pair: Atan, average: RowStochastic, u: Tensor) -> Tensor:
    """pi/2 - atan u = atan2(1, u)."""
    one = torch.ones_like(u)
    above, below = average(torch.atan2(one, u)), average(torch.atan2(one, -u))
    upper = above < below
    return torch.where(upper, 1.0, -1.0) / torch.where(upper, above, below).tan()


@_mean.register
def _(pair: Isru, average: RowStochastic, u: Tensor) -> Tensor:
    """1 - u / s = 1 / (s (s + u)) with s = sqrt(1 + u^2)."""
    above, below = average(_to_one(u)), average(_to_one(-u))
    return (below - above) / (2 * (above * below).sqrt())


def _to_one(u: Tensor) -> Tensor:
    s = hypotenuse(u)
    return torch.where(u > 0, 1 / (s * (s + u.clamp(min=0))), 1 - u / s)


@singledispatch
def _mean_of_logarithms(pair: Legendre, average: RowStochastic, u: Tensor) -> Tensor:
    raise TypeError(f"{pair} is not exponential at an end of its domain")


@_mean_of_logarithms.register
def _(pair: Sigmoid, average: RowStochastic, u: Tensor) -> Tensor:
    return average.log_average(F.logsigmoid(u)) - average.log_average(F.logsigmoid(-u))


@_mean_of_logarithms.register
def _(pair: Tanh, average: RowStochastic, u: Tensor) -> Tensor:
    return _mean_of_logarithms(Sigmoid(), average, 2 * pair.rate * u) / (2 * pair.rate)


@_mean_of_logarithms.register
def _(pair: Exp, average: RowStochastic, u: Tensor) -> Tensor:
    return average.log_average(u)


@_mean_of_logarithms.register
def _(pair: Softplus, average: RowStochastic, u: Tensor) -> Tensor:
    """beta x = log(1 + e^t) is e^t for small e^t, and its inverse log(beta x): both to rounding below -40."""
    t = pair.beta * u
    small = t < -40
    logs = average.log_average(torch.where(small, t, F.softplus(torch.where(small, 0.0, t), threshold=40.0).log()))
    small = logs < -40
    x = torch.where(small, 0.0, logs).exp()
    return torch.where(small, logs, x + (-torch.expm1(-x)).log()) / pair.beta
