"""Legendre activations and their inverses, as nonlinearities with the slopes that the pair knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from firmly.certificates.activations import activation
from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.slopes import Pieces, Point, pieces
from firmly.certificates.torch_maps import Rearrange
from firmly.prox.known_slope import with_slope
from firmly.prox.legendre import Legendre, activate, dual_coordinates
from firmly.prox.legendre_mean import CONCAVE, mean, mean_gain
from firmly.prox.prior import Slope
from firmly.prox.row_stochastic import RowStochastic


@handles(activate)
def legendre_activation(tracer: Tracer, pair: Legendre, u: Signal) -> Signal:
    return activation(u, *finite(tracer, pair.slope, f"{pair}, whose slope has no upper bound"))


@handles(dual_coordinates)
def legendre_inverse(tracer: Tracer, pair: Legendre, x: Signal) -> Signal:
    low, high = pair.slope
    inverse = Slope(1 / high, 1 / low if low > 0 else math.inf)
    text = f"the inverse of {pair}, whose slope has no upper bound (certify the network in dual coordinates)"
    return activation(x, *Slope.outward(*finite(tracer, inverse, text)))


def finite(tracer: Tracer, slope: Slope, text: str) -> Slope:
    if not slope.high < math.inf:
        raise tracer.refuse(text)
    return slope


@handles(mean)
def legendre_mean(tracer: Tracer, pair: Legendre, average: RowStochastic, u: Signal) -> Any:
    """rho^-1(P rho(u)) as a map of the pixels with a Lipschitz constant, after blocks of pixels became channels."""
    text = "learned averages taken as exactly row-stochastic"
    if text not in tracer.system.assumptions:
        tracer.system.assumptions.append(text)
    places = torch.arange(math.prod(average.domain)).reshape(average.domain)
    if average.selects():
        return u.linear(Rearrange(average.domain, places[average.channel_matrix().detach().argmax(1)]))
    low, high = pair.slope
    if 0 < low and high < math.inf:
        return dual_coordinates(pair, average(activate(pair, u)))  # type: ignore[arg-type]
    gain = mean_gain(pair, average)
    if not gain < math.inf:
        names = ", ".join(sorted(known.__name__ for known in CONCAVE))
        raise tracer.refuse(f"a mean in the coordinates of {pair}; it has no bound but for {names}")
    index = blocks_as_channels(places, average.pool)
    outputs = average.codomain[0]
    missing = index.new_full((max(0, outputs - len(index)), *index.shape[1:]), -1)
    padded = Rearrange(average.domain, torch.cat([index, missing]))
    back = torch.arange(math.prod(padded.codomain)).reshape(padded.codomain)[:outputs]
    means = u.linear(padded).nonlinear(Slope(-gain, gain), "group")
    return means.linear(Rearrange(padded.codomain, back))


@handles(with_slope)
def known_slope(tracer: Tracer, function: Any, slope: Slope, x: Signal) -> Signal:
    return activation(x, *finite(tracer, slope, "a function whose slope has no upper bound"))


def blocks_as_channels(places: Tensor, size: int) -> Tensor:
    """(channels, *spatial) to (channels * size^k, *(n / size)): blocks of pixels become channels of a smaller image."""
    channels, *spatial = places.shape
    index = places.reshape(channels, *(part for n in spatial for part in (n // size, size)))
    axes = range(1, 2 * len(spatial), 2)
    return index.permute(0, *(axis + 1 for axis in axes), *axes).reshape(-1, *(n // size for n in spatial))


@pieces(activate)
def legendre_pieces(pair: Legendre, *_: Any) -> Pieces:
    return Pieces(tuple(Point(*extremum) for extremum in pair.extrema), linear=False)
