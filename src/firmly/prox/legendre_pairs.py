"""The Legendre pairs; every formula is in docs/theory/bregman.

Inverses and potentials take points that are inside the domain already. Gradients of all formulas are finite and right
wherever the values are, at zero too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.errors import SettingsError
from firmly.prox.dilogarithm import dilogarithm_of_exponential
from firmly.prox.legendre import Extremum, Legendre
from firmly.prox.prior import Slope


class Positive(Legendre):
    """Pairs whose parameters are positive and finite numbers."""

    def __post_init__(self) -> None:
        for parameter in fields(self):  # type: ignore[arg-type]
            value = getattr(self, parameter.name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise SettingsError(
                    f"{parameter.name} of {type(self).__name__} is a positive finite number, given {value}"
                )


@dataclass(frozen=True)
class Sigmoid(Legendre):
    """rho(u) = 1 / (1 + exp(-u)), rho^-1(x) = log(x / (1 - x)), phi = x log x + (1 - x) log(1 - x) on (0, 1)."""

    domain = (0.0, 1.0)
    slope = Slope(0.0, 0.25)
    extrema = (Extremum(0.0, 0.25, 0.25),)
    log_derivative_bound = 1.0

    def _value(self, u: Tensor) -> Tensor:
        return torch.sigmoid(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.logit(x)

    def _potential(self, x: Tensor) -> Tensor:
        return x * x.log() + (1 - x) * torch.log1p(-x)

    def log_derivative(self, u: Tensor) -> Tensor:
        return F.logsigmoid(u) + F.logsigmoid(-u)

    def ratio(self, b: Tensor) -> Tensor:
        return b.abs().exp()


@dataclass(frozen=True)
class Tanh(Positive):
    """rho(u) = a tanh(c u), rho^-1(x) = atanh(x / a) / c on (-a, a), a = scale, c = rate.

    phi(x) = (a / c) (y atanh y + log(1 - y^2) / 2) with y = x / a.
    """

    scale: float = 1.0
    rate: float = 1.0

    @property
    def domain(self) -> tuple[float, float]:
        return -self.scale, self.scale

    @property
    def slope(self) -> Slope:
        steepest = self.scale * self.rate
        return Slope(0.0, steepest if 1 in (self.scale, self.rate) else math.nextafter(steepest, math.inf))

    @property
    def extrema(self) -> tuple[Extremum, ...]:
        return (Extremum(0.0, self.lipschitz, self.lipschitz),)

    @property
    def log_derivative_bound(self) -> float:
        return 2 * self.rate

    def _value(self, u: Tensor) -> Tensor:
        value = torch.tanh(u if self.rate == 1.0 else self.rate * u)
        return value if self.scale == 1.0 else self.scale * value

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.atanh(x / self.scale) / self.rate

    def _potential(self, x: Tensor) -> Tensor:
        y = x / self.scale
        return self.scale / self.rate * (y * torch.atanh(y) + 0.5 * (torch.log1p(y) + torch.log1p(-y)))

    def log_derivative(self, u: Tensor) -> Tensor:
        twice = 2 * self.rate * u
        return F.logsigmoid(twice) + F.logsigmoid(-twice) + math.log(4 * self.scale * self.rate)

    def ratio(self, b: Tensor) -> Tensor:
        return (2 * self.rate * b.abs()).exp()


@dataclass(frozen=True)
class Atan(Legendre):
    """rho(u) = atan u, rho^-1(x) = tan x, phi(x) = -log cos x on (-pi/2, pi/2)."""

    domain = (-math.pi / 2, math.pi / 2)
    extrema = (Extremum(0.0, 1.0, 1.0),)
    log_derivative_bound = 1.0

    def _value(self, u: Tensor) -> Tensor:
        return torch.atan(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.tan(x)

    def _potential(self, x: Tensor) -> Tensor:
        return -torch.cos(x).log()

    def log_derivative(self, u: Tensor) -> Tensor:
        return -2 * log_hypotenuse(u)

    def ratio(self, b: Tensor) -> Tensor:
        return golden(b).square()


@dataclass(frozen=True)
class Isru(Legendre):
    """rho(u) = u / sqrt(1 + u^2), rho^-1(x) = x / sqrt(1 - x^2), phi(x) = -sqrt(1 - x^2) on (-1, 1)."""

    domain = (-1.0, 1.0)
    extrema = (Extremum(0.0, 1.0, 1.0),)
    log_derivative_bound = 1.5

    def _value(self, u: Tensor) -> Tensor:
        return u / hypotenuse(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return x / ((1 - x) * (1 + x)).sqrt()

    def _potential(self, x: Tensor) -> Tensor:
        return -((1 - x) * (1 + x)).sqrt()

    def log_derivative(self, u: Tensor) -> Tensor:
        return -3 * log_hypotenuse(u)

    def ratio(self, b: Tensor) -> Tensor:
        return golden(b) ** 3


@dataclass(frozen=True)
class Asinh(Legendre):
    """rho(u) = asinh u, rho^-1(x) = sinh x, phi(x) = cosh x on the real line."""

    extrema = (Extremum(0.0, 1.0, 1.0),)
    log_derivative_bound = 0.5

    def _value(self, u: Tensor) -> Tensor:
        return torch.asinh(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.sinh(x)

    def _potential(self, x: Tensor) -> Tensor:
        return torch.cosh(x)

    def log_derivative(self, u: Tensor) -> Tensor:
        return -log_hypotenuse(u)

    def ratio(self, b: Tensor) -> Tensor:
        return golden(b)


@dataclass(frozen=True)
class Softplus(Positive):
    """rho(u) = log(1 + exp(beta u)) / beta, rho^-1(x) = x + log(1 - exp(-beta x)) / beta on (0, inf).

    phi(x) = x^2 / 2 + Li2(exp(-beta x)) / beta^2 with the dilogarithm Li2.
    """

    beta: float = 1.0

    domain = (0.0, math.inf)

    @property
    def log_derivative_bound(self) -> float:
        return float(self.beta)

    def _value(self, u: Tensor) -> Tensor:
        return F.softplus(u, self.beta, 40.0)  # beyond 40, log(1 + e^-40) is less than the rounding of float64

    def _inverse(self, x: Tensor) -> Tensor:
        return x + (-torch.expm1(-self.beta * x)).log() / self.beta

    def _potential(self, x: Tensor) -> Tensor:
        return x.square() / 2 + dilogarithm_of_exponential(self.beta * x) / self.beta**2

    def log_derivative(self, u: Tensor) -> Tensor:
        return F.logsigmoid(self.beta * u)

    def ratio(self, b: Tensor) -> Tensor:
        return (self.beta * b.clamp(min=0)).exp()


@dataclass(frozen=True)
class Bent(Positive):
    """rho(u) = (u + sqrt(u^2 + 4 c)) / 2, rho^-1(x) = x - c / x, phi(x) = x^2 / 2 - c log x on (0, inf).

    The prox of -c log, a smooth ReLU. Its ratio is exp(6 s) where 16 sinh(s) cosh(s)^3 = (b / sqrt c) sqrt(1 + 2 cosh
    2 s) for b > 0, and 1 for b < 0 (docs/theory/bregman).
    """

    c: float = 0.25

    domain = (0.0, math.inf)

    @property
    def log_derivative_bound(self) -> float:
        return 3 * math.sqrt(3) / (8 * math.sqrt(self.c))

    def _value(self, u: Tensor) -> Tensor:
        larger = (torch.where(u >= 0, u, -u) + hypotenuse(u, 2 * math.sqrt(self.c))) / 2
        return torch.where(u >= 0, larger, self.c / larger)

    def _inverse(self, x: Tensor) -> Tensor:
        return x - self.c / x

    def _potential(self, x: Tensor) -> Tensor:
        return x.square() / 2 - self.c * x.log()

    def log_derivative(self, u: Tensor) -> Tensor:
        return self._value(u).log() - hypotenuse(u, 2 * math.sqrt(self.c)).log()

    @torch.no_grad()
    def ratio(self, b: Tensor) -> Tensor:
        push = b.clamp(min=0) / math.sqrt(self.c)
        low, high = torch.zeros_like(push), torch.asinh(push / 8)  # the left side is at least 8 sinh(s) sqrt(...)
        for _ in range(60):  # bisection, whose upper end is the bound
            s = (low + high) / 2
            enough = 16 * s.sinh() * s.cosh() ** 3 >= push * (1 + 2 * (2 * s).cosh()).sqrt()
            low, high = torch.where(enough, low, s), torch.where(enough, s, high)
        return (6 * high).exp()


@dataclass(frozen=True)
class Exp(Legendre):
    """rho(u) = exp u, rho^-1(x) = log x, phi(x) = x log x - x on (0, inf); no Lipschitz constant."""

    domain = (0.0, math.inf)
    slope = Slope(0.0, math.inf)
    log_derivative_bound = 1.0

    def _value(self, u: Tensor) -> Tensor:
        return torch.exp(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return x.log()

    def _potential(self, x: Tensor) -> Tensor:
        return x * x.log() - x

    def log_derivative(self, u: Tensor) -> Tensor:
        return 1.0 * u

    def ratio(self, b: Tensor) -> Tensor:
        return b.exp()


@dataclass(frozen=True)
class Hypentropy(Positive):
    """rho(u) = beta sinh u, rho^-1(x) = asinh(x / beta), phi = x asinh(x / beta) - sqrt(x^2 + beta^2) on the real line.

    Its slopes are at least beta and have no upper bound. Source: Ghai, Hazan and Singer, Exponentiated gradient meets
    gradient descent, 2020.
    """

    beta: float = 1.0

    log_derivative_bound = 1.0

    @property
    def slope(self) -> Slope:
        return Slope(float(self.beta), math.inf)

    @property
    def extrema(self) -> tuple[Extremum, ...]:
        return (Extremum(0.0, self.beta, self.beta),)

    def _value(self, u: Tensor) -> Tensor:
        return self.beta * torch.sinh(u)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.asinh(x / self.beta)

    def _potential(self, x: Tensor) -> Tensor:
        return x * torch.asinh(x / self.beta) - hypotenuse(x, self.beta)

    def log_derivative(self, u: Tensor) -> Tensor:
        return torch.logaddexp(u, -u) + math.log(self.beta / 2)

    def ratio(self, b: Tensor) -> Tensor:
        return b.abs().exp()


@dataclass(frozen=True)
class LeakyRelu(Positive):
    """rho(u) = u for u > 0, a u below, rho^-1(x) = x or x / a, phi(x) = x^2 / 2 or x^2 / (2 a) on the real line.

    a = negative_slope in (0, 1]. Of degree one and not differentiable at zero: the conventional derivative there is a.
    """

    negative_slope: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negative_slope > 1:
            raise SettingsError(f"negative_slope is at most 1, given {self.negative_slope}")

    @property
    def slope(self) -> Slope:
        return Slope(float(self.negative_slope), 1.0)

    @property
    def extrema(self) -> tuple[Extremum, ...]:
        return (Extremum(0.0, *self.slope),)

    @property
    def log_derivative_bound(self) -> float:
        return 0.0 if self.negative_slope == 1 else math.inf

    def _value(self, u: Tensor) -> Tensor:
        return F.leaky_relu(u, self.negative_slope)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x / self.negative_slope)

    def _potential(self, x: Tensor) -> Tensor:
        return x * self._inverse(x) / 2

    def log_derivative(self, u: Tensor) -> Tensor:
        return math.log(self.negative_slope) * (u <= 0).to(u.dtype)

    def ratio(self, b: Tensor) -> Tensor:
        return torch.where(b > 0, 1 / self.negative_slope, torch.ones_like(b))


def hypotenuse(u: Tensor, side: float = 1.0) -> Tensor:
    """sqrt(side^2 + u^2) without overflow."""
    return torch.hypot(u, torch.full_like(u, side))


def log_hypotenuse(u: Tensor) -> Tensor:
    """log sqrt(1 + u^2), accurate for small u and without overflow for large ones."""
    small = u.abs() < 1
    near = torch.where(small, u, 0.0)
    far = torch.where(small, 1.0, u)
    return torch.where(small, 0.5 * torch.log1p(near.square()), hypotenuse(far).log())


def golden(b: Tensor) -> Tensor:
    """(|b| + sqrt(b^2 + 4)) / 2, the larger root of r - 1 / r = |b|."""
    return (b.abs() + hypotenuse(b, 2.0)) / 2


PAIRS: dict[str, Callable[..., Legendre]] = {
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "scaled_tanh": functools.partial(Tanh, scale=1.7159, rate=0.6666),
    "atan": Atan,
    "isru": Isru,
    "asinh": Asinh,
    "softplus": Softplus,
    "bent": Bent,
    "exp": Exp,
    "hypentropy": Hypentropy,
    "leaky_relu": LeakyRelu,
}
