"""How far a BregmaNet moves on a box of inputs: a closed form, and slopes for the certificate engine.

In dual coordinates a BregmaNet is a residual network with slopes in [0, L], so that `certify`, `local`, `gains` and
`star` bound it on the whole space. What is here uses a box of inputs, which primal coordinates need: the inverse
activation has no Lipschitz constant on the whole domain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, NotCertifiable
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.networks.bregman import BregmaNet, BregmanLayer
from firmly.prox.known_slope import with_slope
from firmly.prox.legendre import Legendre
from firmly.prox.legendre_mean import mean, mean_gain
from firmly.prox.prior import Slope

OUTWARD = 1e-12  # relative, for the rounding of a few functions of the ends of a box
FAR = 1e150  # beyond it slopes are those at infinity
TINY = 1e-290  # slopes below it are not computed with full accuracy
LARGEST = torch.finfo(torch.float64).max
LARGEST_MATRIX = 2**24  # entries

Range = tuple[Tensor, Tensor]  # low and high, (*shape) in float64; ends may be infinite


@dataclass(frozen=True)
class LayerOnBox:
    """Closed-form bounds of one layer for inputs in a box: of x -> x+ (`primal`) and of u -> u+ (`dual`).

    The Jacobians are diag(rho'(u+)) (diag(1 / rho'(m)) P + W) with m = rho^-1(P x), and M + W diag(rho'(u)) with that
    of the skip, M. `ratio` bounds rho'(u+) / rho'(m), `entering` and `leaving` are the largest slopes rho'(u) and
    rho'(u+), `weight` is |W|, and `skip` and `dual_skip` are |P| and |M| (1 without a change of width).
    """

    ratio: float
    entering: float
    leaving: float
    weight: float
    skip: float
    dual_skip: float

    @property
    def primal(self) -> float:
        """ratio |P| + leaving |W|."""
        return (self.ratio * self.skip + self.leaving * self.weight) * (1 + 1e-15)

    @property
    def dual(self) -> float:
        """|M| + entering |W|."""
        return (self.dual_skip + self.entering * self.weight) * (1 + 1e-15)


@dataclass(frozen=True)
class BoundsOnBox:
    """The closed forms of all layers, and their products: Lipschitz constants of x_0 -> x_n and of u_0 -> u_n."""

    layers: tuple[LayerOnBox, ...]

    @property
    def primal(self) -> float:
        return math.prod(layer.primal for layer in self.layers) * (1 + 1e-13)

    @property
    def dual(self) -> float:
        return math.prod(layer.dual for layer in self.layers) * (1 + 1e-13)


@torch.no_grad()
def bounds_on_box(net: BregmaNet, low: float | Tensor = -math.inf, high: float | Tensor = math.inf) -> BoundsOnBox:
    """Closed-form Lipschitz bounds of a network and its layers, in both coordinates, for inputs in [low, high].

    The ends are numbers, or tensors that broadcast to one input, in the coordinates that the network takes: primal for
    form="primal", else dual; what lies outside the domain is cut off. Boxes are passed on by interval arithmetic. A
    bound may be infinite: the primal one needs finite W x + b, that is a bounded domain or a bounded box, and a width
    that changes has a dual one only for some activations. Raises `NotCertifiable` where both are infinite, and
    `ConditionError` for an empty box. Source: docs/theory/bregman.
    """
    ranges = ranges_of(net, low, high)
    found = BoundsOnBox(
        tuple(layer_on_box(layer, u, after) for layer, (u, after) in zip(layers_of(net), itertools.pairwise(ranges)))
    )
    if not (found.primal < math.inf or found.dual < math.inf):
        raise NotCertifiable(
            f"no finite bound on this box in the coordinates of {net.activation}: give a bounded box of inputs"
        )
    return found


class OnBox(nn.Module):
    """A BregmaNet for inputs in [low, high] with the slopes that it has there, for `certify` and its relatives.

    It computes net(clamp(x, low, high)), which is the network itself on the box and moves no further outside. A trace
    records every activation with the slopes on the range that its input stays in, and the inverse at the entrance of a
    primal form too. Ends as in `bounds_on_box`, but inside the domain; `NotCertifiable` where a slope is unbounded.
    """

    low: Tensor
    high: Tensor

    def __init__(self, net: BregmaNet, low: float | Tensor, high: float | Tensor):
        super().__init__()
        self.net, self.inputs = net, net.inputs
        require_box(low, high)
        for name, end in (("low", low), ("high", high)):
            self.register_buffer(name, torch.as_tensor(end, dtype=torch.float64).expand(net.inputs["data"]).clone())

    def forward(self, data: Tensor) -> Tensor:
        net, (slopes, means) = self.net, self._slopes(data)
        u = torch.clamp(data, self.low.to(data.device, data.dtype), self.high.to(data.device, data.dtype))
        if net.form == "primal":
            u = with_slope(net.activation.inverse, inverted(slopes[0]), u)
        for layer, slope, of_mean in zip(layers_of(net), slopes, means):
            pair, average = layer.activation, layer.average
            x = with_slope(pair, slope, u)
            if average is not None:
                u = mean(pair, average, u) if of_mean is None else with_slope(pair.inverse, of_mean, average(x))
            u = layer.joined(u, x)
        return u if net.form == "dual" else with_slope(net.activation, slopes[-1], u)

    @torch.no_grad()
    def _slopes(self, data: Tensor) -> tuple[list[Slope], list[Slope | None]]:
        """For a trace, with the weights as they are now: the slopes of rho on all ranges, and those of rho^-1 on the
        ranges of means, where they prove more than `mean_gain`."""
        net, layers = self.net, layers_of(self.net)
        if isinstance(data, Tensor):
            return [net.activation.slope] * (len(layers) + 1), [None] * len(layers)
        ranges = ranges_of(net, self.low, self.high)
        slopes = [hull(layer.activation, u) for layer, u in zip(layers, ranges)]
        means = [slopes_of_mean(layer, u, slope) for layer, u, slope in zip(layers, ranges, slopes)]
        return [*slopes, hull(net.activation, ranges[-1])], means


def layers_of(net: BregmaNet) -> list[BregmanLayer]:
    """The layers, all of the one activation that makes primal coordinates those of the network."""
    layers = [layer for layer in net.layers if isinstance(layer, BregmanLayer)]
    if len(layers) < len(net.layers) or any(layer.activation != net.activation for layer in layers):
        raise NotCertifiable(f"bounds on boxes are for chains of BregmanLayers with the activation {net.activation}")
    return layers


def slopes_of_mean(layer: BregmanLayer, u: Range, slope: Slope) -> Slope | None:
    """The slopes of rho^-1 on the range of the means of a layer, if they prove more than `mean_gain`."""
    if layer.average is None:
        return None
    middle = hull(layer.activation, skipped(layer, u))
    gain = slope.high / middle.low * layer.average.norm().upper if middle.low else math.inf
    return inverted(middle) if gain < mean_gain(layer.activation, layer.average) else None


def hull(pair: Legendre, u: Range) -> Slope:
    low, high = slope_limits(pair, u)
    return Slope(float(low.min()), float(high.max()))


def inverted(slope: Slope) -> Slope:
    """The slopes of the inverse of a function with these slopes."""
    return Slope.outward(1 / slope.high, 1 / slope.low if slope.low else math.inf)


def layer_on_box(layer: BregmanLayer, u: Range, after: Range) -> LayerOnBox:
    pair, push = layer.activation, pushed(layer, u)
    entering, leaving = slope_limits(pair, u)[1], slope_limits(pair, after)[1]
    anywhere = torch.maximum(pair.ratio(push[0]), pair.ratio(push[1]))
    middle, average = slope_limits(pair, skipped(layer, u))[0], layer.average
    size = 1.0 if average is None else average.norm().upper
    spread = float(entering.max() / middle.min()) * size * (1 + 4 * OUTWARD)
    return LayerOnBox(
        ratio=float(torch.minimum(anywhere, leaving / middle).max()) * (1 + 4 * OUTWARD),
        entering=float(entering.max()),
        leaving=float(leaving.max()),
        weight=layer.linear.norm().upper,
        skip=size,
        dual_skip=1.0 if average is None else min(mean_gain(pair, average), spread),
    )


def slope_limits(pair: Legendre, u: Range) -> Range:
    """The smallest and the largest slope of rho on the range of every entry."""
    low, high = pair.slopes_between(u[0].clamp(-FAR, FAR), u[1].clamp(-FAR, FAR))
    endless = u[0].isinf() | u[1].isinf()  # where the slope may fall to its infimum
    low, high = torch.where(endless | (low < TINY), 0.0, low * (1 - OUTWARD)), high.clamp(min=TINY) * (1 + OUTWARD)
    return low.clamp(min=pair.slope.low), high.clamp(max=pair.slope.high)


# -- ranges of values ----------------------------------------------------------------------------------------------


def require_box(low: float | Tensor, high: float | Tensor) -> None:
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
    if not bool((low <= high).all()):
        raise ConditionError(f"a box has low <= high, given low up to {low.max():.6g}, high from {high.min():.6g}")


@torch.no_grad()
def ranges_of(net: BregmaNet, low: float | Tensor, high: float | Tensor) -> list[Range]:
    """The ranges of all values u_0, ..., u_n in dual coordinates, for inputs in [low, high]."""
    require_box(low, high)
    device, pair, shape = next(net.parameters()).device, net.activation, net.inputs["data"]
    ends = [torch.as_tensor(end, dtype=torch.float64, device=device).expand(shape) for end in (low, high)]
    if net.form == "primal" and not bool(((ends[0] < pair.domain[1]) & (ends[1] > pair.domain[0])).all()):
        raise ConditionError(f"the box lies outside the domain {pair.domain} of {pair}, and holds no input")
    u: Range = to_dual(pair, (ends[0], ends[1])) if net.form == "primal" else (ends[0], ends[1])
    ranges = [u]
    for layer in layers_of(net):
        u = added(skipped(layer, u), pushed(layer, u))
        ranges.append(u)
    return ranges


def wider(values: Range, *parts: Range) -> Range:
    """The range with the rounding of its computation, relative to itself and to the parts that it was made of."""
    low, high = (
        end + sign * OUTWARD * sum(finite(of[i]).abs() for of in (values, *parts))
        for i, (sign, end) in enumerate(zip((-1, 1), values))
    )
    return low.clamp(max=LARGEST), high.clamp(min=-LARGEST)  # an end that overflowed to the wrong side is inside again


def added(first: Range, second: Range) -> Range:
    return wider((first[0] + second[0], first[1] + second[1]), first, second)


def to_primal(pair: Legendre, u: Range) -> Range:
    """rho of a range, with the ends of the domain for infinite ones."""
    low, high = (pair(end.clamp(-FAR, FAR)) for end in u)
    low, high = torch.where(u[0] == -math.inf, pair.domain[0], low), torch.where(u[1] == math.inf, pair.domain[1], high)
    low, high = wider((low, high))
    return low.clamp(min=pair.domain[0]), high.clamp(max=pair.domain[1])


def to_dual(pair: Legendre, x: Range) -> Range:
    """rho^-1 of a range, infinite at the ends of the domain and beyond."""
    bottom, top = pair.domain
    middle = pair(torch.zeros_like(x[0]))
    inside = [torch.where((end > bottom) & (end < top), end, middle) for end in x]
    ones = torch.ones_like(inside[0])  # inverses have zeros, where their error is that of their argument
    low, high = wider((pair._inverse(inside[0]), pair._inverse(inside[1])), (inside[0], inside[1]), (ones, ones))
    low = torch.where(x[0] <= bottom, -math.inf, low)
    return low, torch.where(x[1] >= top, math.inf, high)


def skipped(layer: BregmanLayer, u: Range) -> Range:
    """The range of rho^-1(P rho(u))."""
    if layer.average is None:
        return u
    return to_dual(layer.activation, monotone(layer.average, None, to_primal(layer.activation, u)))


def pushed(layer: BregmanLayer, u: Range) -> Range:
    """The range of W rho(u) + b."""
    low, high = monotone(*split(layer.linear), to_primal(layer.activation, u))
    shape, bias = layer.linear.codomain, layer.bias.detach().double().expand(layer.linear.codomain)
    return added((low.reshape(shape), high.reshape(shape)), (bias, bias))


def monotone(plus: LinearMap, minus: LinearMap | None, x: Range) -> Range:
    """The range of plus(x) - minus(x) for maps without negative entries, with their rounding."""
    error = 0.0
    for part in (plus, *([] if minus is None else [minus])):
        size = max(float(end[end.isfinite()].norm()) for end in x)
        error += 2 * LinearMap.application_error * part.norm().upper * size

    def applied(up: Tensor, down: Tensor) -> Tensor:
        """plus(up) - minus(down); infinite as soon as an infinite value has a weight."""
        up, down = up.reshape(1, *plus.domain), down.reshape(1, *plus.domain)
        value, endless = plus(finite(up))[0], plus(infinite(up))[0]
        if minus is not None:
            value, endless = value - minus(finite(down))[0], endless - minus(infinite(down))[0]
        return torch.where(endless.abs() > 0, endless.sign() * math.inf, value)

    return applied(x[0], x[1]) - error, applied(x[1], x[0]) + error


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def infinite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), 0.0, x.sign())


def split(linear: LinearMap) -> tuple[LinearMap, LinearMap]:
    """W = plus - minus, two maps without negative entries."""
    if isinstance(linear, Convolution):
        made: Callable[[Tensor], LinearMap] = lambda k: Convolution(k, linear.domain, linear.padding)  # noqa: E731
        weight = linear.kernel.detach().double()
    else:
        if math.prod(linear.domain) * math.prod(linear.codomain) > LARGEST_MATRIX:
            raise NotCertifiable(f"no ranges behind {type(linear).__name__} {linear.domain}: its matrix is too large")
        made, weight = Dense, linear.matrix().detach()
    return made(weight.clamp(min=0)), made((-weight).clamp(min=0))
