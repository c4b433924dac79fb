"""Legendre activations and their inverses, as nonlinearities with the slopes that the pair knows."""

from __future__ import annotations

import math
from typing import Any

from firmly.certificates.activations import activation
from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.slopes import Pieces, Point, pieces
from firmly.prox.legendre import Legendre, activate, dual_coordinates
from firmly.prox.prior import Slope


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


@pieces(activate)
def legendre_pieces(pair: Legendre, *_: Any) -> Pieces:
    return Pieces(tuple(Point(*extremum) for extremum in pair.extrema), linear=False)
