"""How the slopes of a nonlinearity depend on the interval that its input lies in.

Between a few known points the derivative of every function here is monotone. On an interval [l, u] its range is
spanned by its values at l and u and by the slopes at the known points inside, which are kinks or extrema.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.certificates.signal import Signal
from firmly.certificates.system import Call, Nonlinear
from firmly.prox.activation import per_channel
from firmly.prox.box import Box, NonNegative
from firmly.prox.elastic_net import ElasticNet
from firmly.prox.l1 import L1
from firmly.prox.prior import Prior, proximal
from firmly.prox.threshold import ChannelThreshold

WIDER = 1e-9  # relative widening of intervals, for the rounding of what they were computed from
SMOOTH = 1e-8  # widening of slopes of curved functions, for the rounding of their derivatives


class Point(NamedTuple):
    """A kink or an extremum of the slope: where it lies (a number, or a tensor (1, *shape) that broadcasts against the
    input), and the smallest and largest slope at it, on both sides."""

    at: Any
    low: Any
    high: Any


class Pieces(NamedTuple):
    """The points of a function, and whether it is piecewise linear (then its computed slopes are exact)."""

    points: tuple[Point, ...]
    linear: bool = True


def interval_slopes(node: Nonlinear, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest slope of every entry over |z - z_0| <= radius, all (1, *shape).

    The interval of the whole nonlinearity where more is not known: for group maps, complex values, functions without
    known pieces.
    """
    call = node.call
    lowest = torch.full((1, *node.shape), float(node.slope.low), dtype=torch.float64)
    highest = torch.full((1, *node.shape), float(node.slope.high), dtype=torch.float64)
    pieces = None if call is None or node.structure not in ("separable", "channel") else pieces_of(call)
    if call is None or pieces is None or call.at.is_complex():
        return lowest, highest
    radius = radius + WIDER * (1 + call.at.abs().max() + radius)
    left, right = call.at - radius, call.at + radius
    slopes = derivative(call, left), derivative(call, right)
    low, high = torch.minimum(*slopes), torch.maximum(*slopes)
    for point in pieces.points:
        at, *ends = (torch.as_tensor(p, dtype=torch.float64) for p in point)
        inside = (left <= at) & (at <= right)
        low = torch.where(inside, torch.minimum(low, ends[0]), low)
        high = torch.where(inside, torch.maximum(high, ends[1]), high)
    if not pieces.linear:
        low, high = low - SMOOTH, high + SMOOTH
    known = low.isfinite() & high.isfinite() & left.isfinite() & right.isfinite()
    low, high = low.maximum(lowest).minimum(highest), high.minimum(highest).maximum(lowest)
    return torch.where(known, low, lowest), torch.where(known, high, highest)


def derivative(call: Call, z: Tensor) -> Tensor:
    """phi'(z), entry by entry, by automatic differentiation of the operation itself."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        args = [z.clone() if isinstance(a, Signal) else a for a in call.args]  # it may be in place
        (slope,) = torch.autograd.grad(call.function(*args, **call.kwargs).sum(), z)
    return slope.detach()


def pieces_of(call: Call) -> Pieces | None:
    """The pieces of the operation with its arguments; None for operations that are not listed."""
    builder = PIECES.get(call.function)
    return None if builder is None else builder(*call.args, **call.kwargs)


# -- operations of torch: builders that take the same arguments ----------------------------------------------------

PIECES: dict[Callable, Callable[..., Pieces | None]] = {}


def pieces(*functions: Callable) -> Callable:
    def register(builder: Callable[..., Pieces | None]) -> Callable[..., Pieces | None]:
        PIECES.update({function: builder for function in functions})
        return builder

    return register


def curved(*points: tuple[float, float], functions: tuple[Callable, ...]) -> None:
    """Functions with a continuous slope that is extremal at the given (location, slope) and monotone between them."""
    known = Pieces(tuple(Point(at, slope, slope) for at, slope in points), linear=False)
    pieces(*functions)(lambda *args, **kwargs: known)


curved((0.0, 1.0), functions=(torch.tanh, F.tanh, torch.Tensor.tanh, F.softsign, torch.atan, torch.asinh))
curved((0.0, 0.25), functions=(torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid))
curved((0.0, 0.0), functions=(F.tanhshrink,))
curved((0.0, 2 / math.sqrt(math.pi)), functions=(torch.erf,))
curved(functions=(F.logsigmoid, F.softplus))


@pieces(torch.relu, F.relu, torch.Tensor.relu)
def relu_pieces(*_: Any, **__: Any) -> Pieces:
    return Pieces((Point(0.0, 0.0, 1.0),))


@pieces(torch.abs, torch.Tensor.abs)
def abs_pieces(x: Signal) -> Pieces:
    return Pieces((Point(0.0, -1.0, 1.0),))


@pieces(F.relu6)
def relu6_pieces(x: Signal, inplace: bool = False) -> Pieces:
    return box_pieces(0.0, 6.0)


@pieces(F.hardtanh)
def hardtanh_pieces(x: Signal, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Pieces:
    return box_pieces(min_val, max_val)


@pieces(torch.clamp, torch.Tensor.clamp)
def clamp_pieces(x: Signal, min: Any = None, max: Any = None) -> Pieces:
    return box_pieces(-math.inf if min is None else min, math.inf if max is None else max)


@pieces(F.leaky_relu)
def leaky_relu_pieces(x: Signal, negative_slope: float = 0.01, inplace: bool = False) -> Pieces:
    return Pieces((Point(0.0, min(negative_slope, 1.0), max(negative_slope, 1.0)),))


@pieces(torch.prelu, F.prelu)
def prelu_pieces(x: Signal, weight: Tensor) -> Pieces:
    return Pieces((Point(0.0, min(float(weight.min()), 1.0), max(float(weight.max()), 1.0)),))


@pieces(F.elu)
def elu_pieces(x: Signal, alpha: float = 1.0, inplace: bool = False) -> Pieces:
    return Pieces((Point(0.0, min(alpha, 1.0), max(alpha, 1.0)),), linear=False)


@pieces(F.softshrink)
def softshrink_pieces(x: Signal, lambd: float = 0.5) -> Pieces:
    return threshold_pieces(lambd)


@pieces(F.hardswish)
def hardswish_pieces(x: Signal, inplace: bool = False) -> Pieces:
    return Pieces((Point(-3.0, -0.5, 0.0), Point(3.0, 1.0, 1.5)), linear=False)


@pieces(F.silu)
def silu_pieces(x: Signal, inplace: bool = False) -> Pieces:
    peak, high = 2.399357280520468, 1.0998393201288
    return Pieces((Point(-peak, 1 - high, 1 - high), Point(peak, high, high)), linear=False)


@pieces(F.gelu)
def gelu_pieces(x: Signal, approximate: str = "none") -> Pieces | None:
    if approximate != "none":
        return None
    at = math.sqrt(2)
    high = 0.5 * (1 + math.erf(1.0)) + at * math.exp(-1.0) / math.sqrt(2 * math.pi)
    return Pieces((Point(-at, 1 - high, 1 - high), Point(at, high, high)), linear=False)


# -- proximal maps -------------------------------------------------------------------------------------------------


def box_pieces(low: Any, high: Any) -> Pieces:
    return Pieces((Point(low, 0.0, 1.0), Point(high, 0.0, 1.0)))


def threshold_pieces(threshold: Any, slope: Any = 1.0, linear: bool = True) -> Pieces:
    """Kinks at -+threshold; its last digits may differ from those that the operation computes."""
    return Pieces((Point(-threshold, 0.0, slope), Point(threshold, 0.0, slope)), linear)


@pieces(proximal)
def proximal_pieces(prior: Prior, z: Signal, step: Any) -> Pieces | None:
    return prox_pieces(prior, z, step)


@singledispatch
def prox_pieces(prior: Prior, z: Signal, step: Any) -> Pieces | None:
    return None


@prox_pieces.register
def _(prior: NonNegative, z: Signal, step: Any) -> Pieces:
    return Pieces((Point(0.0, 0.0, 1.0),))


@prox_pieces.register
def _(prior: Box, z: Signal, step: Any) -> Pieces:
    return box_pieces(prior.low, prior.high)


@prox_pieces.register
def _(prior: L1, z: Signal, step: Any) -> Pieces:
    return threshold_pieces(step * prior.weight)


@prox_pieces.register
def _(prior: ChannelThreshold, z: Signal, step: Any) -> Pieces:
    return threshold_pieces(step * per_channel(prior.weight, z))


@prox_pieces.register
def _(prior: ElasticNet, z: Signal, step: Any) -> Pieces:
    return threshold_pieces(step * prior.weight, 1 / (1 + step * prior.curvature), linear=False)
