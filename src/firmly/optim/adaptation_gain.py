"""The dynamic adaptation gain: the filter between gradients and updates, and what can be proved about it."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from firmly.errors import SettingsError
from firmly.optim.quadratic import Quadratic, greatest_ratio, least_positive_root


class Response(NamedTuple):
    """What a filter does to a sinusoid: angular frequencies (0, pi], magnitude, phase in radians."""

    frequency: list[float]
    magnitude: list[float]
    phase: list[float]


@dataclass(frozen=True)
class AdaptationGain:
    """H = C / D, C = 1 + c1 z^-1 + c2 z^-2, D = 1 - d1 z^-1 - d2 z^-2, with zeros (c1, c2) and poles (d1, d2).

    A gradient g becomes the update -lr H g, and parameters sum updates: from gradients to parameters the filter is
    H / (1 - z^-1), "with the integrator". On the unit circle, with x = cos w, everything below is a quotient of
    polynomials of degree at most two in x, so that the conditions are decided in closed form, not on a grid.
    Raises `SettingsError` for more than two coefficients, or ones that are not finite.
    Source: Landau, Airimitoaie, Vau, Buche, arXiv 2404.12672; closed forms derived in the docs.
    """

    zeros: tuple[float, float] = (0.0, 0.0)
    poles: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("zeros", "poles"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or len(given) > 2 or not all(map(_is_finite, given)):
                raise SettingsError(f"{name} are at most two finite coefficients, given {given!r}")
            object.__setattr__(self, name, (*map(float, given), 0.0, 0.0)[:2])

    @property
    def order(self) -> int:
        """2, 1, or 0 for a plain gradient step."""
        return 2 if self.zeros[1] or self.poles[1] else 1 if self.zeros[0] or self.poles[0] else 0

    @property
    def stable(self) -> bool:
        """Do both poles lie inside the unit circle?"""
        d1, d2 = self.poles
        return abs(d2) < 1 and abs(d1) < 1 - d2

    def dc_gain(self) -> float:
        """H(1) = (1 + c1 + c2) / (1 - d1 - d2): how much farther than lr a constant gradient moves the parameters."""
        self._require_stable("a DC gain")
        return (1 + sum(self.zeros)) / (1 - sum(self.poles))

    def spr_margin(self) -> float:
        """min over the unit circle of Re(H) |D|^2, a quadratic in cos w; H is strictly positive real iff it is > 0."""
        return self.real_part.least(-1, 1) if self.stable else -math.inf

    def pr_margin(self) -> float:
        """min over the unit circle of 2 Re(H / (1 - z^-1)) |D|^2; positive real with the integrator iff it is >= 0.

        (And H(1) > 0, without which it is -inf.)
        """
        if not self.stable or 1 + sum(self.zeros) <= 0:
            return -math.inf
        return self.integrated_real_part.least(-1, 1)

    def spr(self) -> bool:
        """Is H strictly positive real? Then slow adaptation is stable, by averaging."""
        return self.spr_margin() > 0

    def pr(self) -> bool:
        """Is H / (1 - z^-1) positive real?

        Then the a-posteriori step of a linear regression is stable for every constant gain lr > 0 and every sequence of
        regressors.
        """
        return self.pr_margin() >= 0

    def shortage(self) -> float:
        """max(0, -min over the unit circle of Re(H / (1 - z^-1))); zero iff `pr`.

        The a-posteriori step is stable where lr max|phi|^2 shortage < 1. Infinite for filters that are not stable or
        whose DC gain is not positive.
        """
        if not self.stable or 1 + sum(self.zeros) <= 0:
            return math.inf
        return max(0.0, greatest_ratio(-1 * self.integrated_real_part, 2 * self._modulus))

    def sector_limit(self, L: float = 1.0) -> float:
        """Below this lr, explicit steps are stable for every time-varying gradient with slopes in [0, L].

        The circle criterion, lr L max_w Re(-z^-1 H / (1 - z^-1)) < 1. 0 for filters that are not stable or whose DC
        gain is not positive. Raises `SettingsError` unless L > 0.
        """
        if not self.stable or 1 + sum(self.zeros) <= 0:
            _require_positive(L)
            return 0.0
        return 1 / (
            _require_positive(L)
            * greatest_ratio(self.real_part - Quadratic(1, 1, 0) * self._imaginary, 2 * self._modulus)
        )

    def quadratic_limit(self, L: float = 1.0) -> float:
        """Below this lr, explicit steps converge on every fixed quadratic with eigenvalues in (0, L].

        Jury's test of (1 - z^-1) D + lr L z^-1 C, solved for lr. For an eigenvalue that this limit excludes there is a
        quadratic on which the iteration does not converge. Raises `SettingsError` unless L > 0.
        """
        _require_positive(L)
        if not self.stable or 1 + sum(self.zeros) <= 0:
            return 0.0
        (c1, c2), (d1, d2) = self.zeros, self.poles
        # z^3 + a2 z^2 + a1 z + a0, affine in k = lr L
        a2, a1, a0 = Quadratic(-1 - d1, 1, 0), Quadratic(d1 - d2, c1, 0), Quadratic(d2, c2, 0)
        one, skew = Quadratic(1, 0, 0) - a0 * a0, a1 - a0 * a2
        conditions = (
            one - skew,
            one + skew,
            Quadratic(1, 0, 0) - a0,
            Quadratic(1, 0, 0) + a0,
            Quadratic(1, 0, 0) - a2 + a1 - a0,
        )
        return min(map(least_positive_root, conditions)) / L

    def response(self, frequency: Sequence[float] = (), integrator: bool = False) -> Response:
        """Bode's picture: magnitude and phase of H, or of H / (1 - z^-1), by default at 200 frequencies in (0, pi]."""
        grid = list(frequency) or [math.pi * 10 ** (-4 * (1 - k / 199)) for k in range(200)]
        delays = [cmath.exp(-1j * w) for w in grid]
        (c1, c2), (d1, d2) = self.zeros, self.poles
        values = [(1 + c1 * q + c2 * q * q) / (1 - d1 * q - d2 * q * q) / (1 - q if integrator else 1) for q in delays]
        return Response(grid, [abs(v) for v in values], [cmath.phase(v) for v in values])

    def _require_stable(self, wanted: str) -> None:
        if not self.stable:
            raise SettingsError(f"{wanted} needs |d2| < 1 and |d1| < 1 - d2, given poles {self.poles}")

    @property
    def real_part(self) -> Quadratic:
        """Re(H) |D|^2 as a polynomial in x = cos w."""
        (c1, c2), (d1, d2) = self.zeros, self.poles
        return Quadratic(1 - c1 * d1 - c2 * d2 - (c2 - d2), c1 - d1 - c1 * d2 - c2 * d1, 2 * (c2 - d2))

    @property
    def _imaginary(self) -> Quadratic:
        """Im(H) |D|^2 / sin w as a polynomial in x = cos w."""
        (c1, c2), (d1, d2) = self.zeros, self.poles
        return Quadratic(-(c1 - c2 * d1) - (d1 + c1 * d2), -2 * (c2 + d2), 0)

    @property
    def _modulus(self) -> Quadratic:
        """|D|^2 as a polynomial in x = cos w."""
        d1, d2 = self.poles
        return Quadratic((1 + d2) ** 2 + d1 * d1, 2 * d1 * (d2 - 1), -4 * d2)

    @property
    def integrated_real_part(self) -> Quadratic:
        """2 Re(H / (1 - z^-1)) |D|^2 as a polynomial in x = cos w, as 1 / (1 - z^-1) = (1 - i cot(w / 2)) / 2."""
        return self.real_part + Quadratic(1, 1, 0) * self._imaginary


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _require_positive(L: float) -> float:
    if not (_is_finite(L) and L > 0):
        raise SettingsError(f"the greatest slope L of the gradient is positive and finite, given {L!r}")
    return L
