"""Legendre pairs: an activation rho = grad phi*, its inverse rho^-1 = grad phi, and what is known of both."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import DataError, SettingsError
from firmly.prox.prior import Slope


class Extremum(NamedTuple):
    """A place where the slope of an activation is extremal or jumps; the slopes on its two sides are in [low, high]."""

    at: float
    low: float
    high: float


class Legendre:
    """An increasing activation rho of real entries, and the Legendre function phi with rho = grad phi*.

    `h(u)` is rho(u) for any shape; `h.inverse(x)` is rho^-1(x) = phi'(x), `h.potential(x)` is phi(x), entry by entry,
    both for x strictly inside `h.domain`: anything else, NaN too, raises `DataError`, and nothing is clamped.
    `h.derivative(u)` is rho'(u), `h.log_derivative(u)` its logarithm without underflow. Constants:

    - `h.slope`: the slopes of rho, and `h.lipschitz` the largest of them, L (infinite for exp and hypentropy);
    - `h.log_derivative_bound`: kappa = sup |(log rho')'|, infinite where rho' jumps;
    - `h.ratio(b)`: sup_u rho'(u + b) / rho'(u), at most exp(kappa |b|), largest on an interval at one of its ends.

    Pairs are frozen values: two of the same parameters are equal. A subclass gives `_value`, `_inverse`, `_potential`,
    `log_derivative` and the constants; between two neighbours of `extrema` its slope is monotone.
    Source: Frecon, Gasso, Pontil and Salzo, Bregman neural networks, ICML 2022; constants from docs/theory/bregman.
    """

    domain: tuple[float, float] = (-math.inf, math.inf)
    slope: Slope = Slope(0.0, 1.0)
    extrema: tuple[Extremum, ...] = ()
    log_derivative_bound: float = math.inf

    @property
    def lipschitz(self) -> float:
        """L, the largest slope of rho; phi is 1/L-strongly convex."""
        return self.slope.high

    def __call__(self, u: Tensor) -> Tensor:
        return activate(self, u)

    def inverse(self, x: Tensor) -> Tensor:
        """rho^-1(x), the dual coordinates of x; `DataError` outside the domain, and where the result overflows."""
        return dual_coordinates(self, x)

    def potential(self, x: Tensor) -> Tensor:
        """phi(x), entry by entry, for x inside the domain."""
        self.require_inside(x)
        return self._potential(x)

    def derivative(self, u: Tensor) -> Tensor:
        """rho'(u)."""
        return self.log_derivative(u).exp()

    def log_derivative(self, u: Tensor) -> Tensor:
        """log rho'(u), also where rho'(u) underflows."""
        raise NotImplementedError

    def ratio(self, b: Tensor) -> Tensor:
        """sup_u rho'(u + b) / rho'(u), entry by entry."""
        raise NotImplementedError

    def _value(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _inverse(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _potential(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def require_inside(self, x: Tensor) -> None:
        """Raise `DataError` unless every entry of x is strictly inside the domain."""
        if not x.is_floating_point():
            raise DataError(f"{self} is defined on real floating-point tensors, given {x.dtype}; use x.float()")
        low, high = self.domain
        inside = (x > low) & (x < high)
        if not bool(inside.all()):
            outside = x[~inside].flatten()
            raise DataError(
                f"{self} has the domain ({low:.9g}, {high:.9g}), without its ends; {len(outside)} of {x.numel()} "
                f"entries lie outside it in {x.dtype}, one is {float(outside[0]):.9g}; scale the data into the domain, "
                "or stay in dual coordinates, which are all of the real line"
            )

    def slopes_between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest slope of rho on every interval [low, high], up to rounding."""
        ends = self.derivative(low), self.derivative(high)
        smallest, largest = torch.minimum(*ends), torch.maximum(*ends)
        for point in self.extrema:
            inside = (low <= point.at) & (point.at <= high)
            smallest = torch.where(inside, smallest.clamp(max=point.low), smallest)
            largest = torch.where(inside, largest.clamp(min=point.high), largest)
        return smallest, largest


def activate(pair: Legendre, u: Tensor) -> Tensor:
    """pair(u), open to `__torch_function__` so that a traced input records the activation instead."""
    if has_torch_function((u,)):
        return handle_torch_function(activate, (u,), pair, u)
    return pair._value(u)


def dual_coordinates(pair: Legendre, x: Tensor) -> Tensor:
    """pair.inverse(x), open to `__torch_function__`."""
    if has_torch_function((x,)):
        return handle_torch_function(dual_coordinates, (x,), pair, x)
    if x.is_meta:  # shapes only
        return pair._inverse(x)
    pair.require_inside(x)
    u = pair._inverse(x)
    if not bool(u.isfinite().all()):
        place = float(x[~u.isfinite()].flatten()[0])
        raise DataError(f"the inverse of {pair} at {place:.9g} overflows {u.dtype}; use float64 or smaller values")
    return u


def legendre(name: str, **parameters: float) -> Legendre:
    """The Legendre pair of this name: `legendre("tanh")`, `legendre("softplus", beta=10.0)`.

    Names: sigmoid, tanh (scale, rate), scaled_tanh (1.7159 tanh(0.6666 u)), atan, isru, asinh, softplus (beta), bent
    (c), exp, hypentropy (beta), leaky_relu (negative_slope). Raises `SettingsError` for other names and parameters.
    """
    from firmly.prox.legendre_pairs import PAIRS

    if name not in PAIRS:
        raise SettingsError(
            f"no Legendre pair is called {name!r}: choose one of {', '.join(PAIRS)}. An admissible activation is "
            "increasing on the whole real line: relu is flat, sin turns, GELU and SiLU are not monotone"
        )
    made: Any = PAIRS[name]
    try:
        return made(**parameters)
    except TypeError as error:
        raise SettingsError(f"{name} does not take the parameters {sorted(parameters)}: {error}") from error
