"""Polynomials of degree at most two: their least value on an interval, their roots, the greatest of a quotient."""

from __future__ import annotations

import math
from typing import NamedTuple

from firmly.errors import SettingsError


class Quadratic(NamedTuple):
    """a + b x + c x^2."""

    a: float
    b: float
    c: float

    def __call__(self, x: float) -> float:
        return self.a + x * (self.b + x * self.c)

    def __add__(self, other: Quadratic) -> Quadratic:  # type: ignore[override]
        return Quadratic(self.a + other.a, self.b + other.b, self.c + other.c)

    def __sub__(self, other: Quadratic) -> Quadratic:
        return self + -1 * other

    def __rmul__(self, factor: float) -> Quadratic:  # type: ignore[override]
        return Quadratic(factor * self.a, factor * self.b, factor * self.c)

    def __mul__(self, other: Quadratic) -> Quadratic:  # type: ignore[override]
        """The product of two polynomials whose degrees add up to at most two."""
        if self.c * other.c or self.b * other.c + self.c * other.b:
            raise SettingsError(f"the product of {self} and {other} has a degree above two")
        return Quadratic(
            self.a * other.a,
            self.a * other.b + self.b * other.a,
            self.a * other.c + self.b * other.b + self.c * other.a,
        )

    def roots(self) -> list[float]:
        """Real roots; none for a constant."""
        if self.c == 0:
            return [] if self.b == 0 else [-self.a / self.b]
        discriminant = self.b * self.b - 4 * self.a * self.c
        if discriminant < 0:
            return []
        far = -(self.b + math.copysign(math.sqrt(discriminant), self.b)) / 2  # no cancellation
        return [far / self.c] if far == 0 else [far / self.c, self.a / far]

    def where_least(self, low: float, high: float) -> float:
        """A point of [low, high] at which it is least."""
        inside = [-self.b / (2 * self.c)] if self.c > 0 and low < -self.b / (2 * self.c) < high else []
        return min([low, high, *inside], key=self)

    def least(self, low: float, high: float) -> float:
        """Its least value on [low, high]."""
        return self(self.where_least(low, high))


def greatest_ratio(numerator: Quadratic, denominator: Quadratic) -> float:
    """max over [-1, 1] of numerator / denominator, for a denominator that is positive there.

    The derivative vanishes where n' d - n d' does, whose cubic terms cancel.
    """
    (a, b, c), (p, q, r) = numerator, denominator
    critical = Quadratic(b * p - a * q, 2 * (c * p - a * r), c * q - b * r).roots()
    return max(numerator(x) / denominator(x) for x in [-1.0, 1.0, *(x for x in critical if -1 < x < 1)])


def least_positive_root(polynomial: Quadratic) -> float:
    """The first x > 0 at which a polynomial that is positive, or zero and growing, at 0 vanishes; infinity if none."""
    return min((x for x in polynomial.roots() if x > 0), default=math.inf)
