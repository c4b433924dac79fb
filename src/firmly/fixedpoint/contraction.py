"""Contraction factors of algorithms, proved from certified constants."""

from __future__ import annotations

import math

from firmly.algorithms.algorithm import Algorithm, number
from firmly.algorithms.equilibrium import EquilibriumForwardBackward
from firmly.algorithms.forward_backward import ForwardBackward
from firmly.algorithms.smooth import Tikhonov, smoothness
from firmly.linear.algebra import Identity, Scale, Sum
from firmly.linear.map import LinearMap
from firmly.linear.monotone import monotonicity

OUTWARD = 1 + 1e-12  # for the rounding of a few operations


def contraction_factor(algorithm: Algorithm) -> float | None:
    """A proved r < 1 with |T(x) - T(z)| <= r |x - z| for the plain map T of the algorithm, None where none is known.

    - `ForwardBackward`, step t, slopes of the prox in [0, s], smooth part with curvatures in [mu, L]:
      r = s max(1 - t mu, t L - 1); mu from the smallest eigenvalue of A*A (with D*D of a `Tikhonov` ridge), or the
      ridge.
    - `EquilibriumForwardBackward`, step a: r = (1 - 2 a m + a^2 |I - W|^2)^(1/2).

    All conditions of the algorithm have to hold. Source: Ryu and Boyd, Primer on monotone operator methods, 2016,
    section 5 (contractions from strong monotonicity).
    """
    if not all(condition.holds for condition in algorithm.conditions()):
        return None
    if isinstance(algorithm, ForwardBackward):
        step = number(algorithm.step_size)
        mu, L = least_curvature(algorithm), number(smoothness(algorithm.A, algorithm.ridge))
        factor = float(algorithm.prior.slope_at(step).high) * max(1 - step * mu, step * L - 1)
    elif isinstance(algorithm, EquilibriumForwardBackward):
        step, m = number(algorithm.step_size), monotonicity(algorithm.loop)
        size = Sum(Identity(algorithm.loop.domain), Scale(-1.0, algorithm.loop)).norm().upper
        factor = math.sqrt(max(0.0, 1 - 2 * step * m + (step * size) ** 2))
    else:
        return None
    factor *= OUTWARD
    return factor if factor < 1 else None


def least_curvature(algorithm: ForwardBackward) -> float:
    """A proved lower bound of the curvatures of the smooth part."""
    A, ridge = algorithm.A, algorithm.ridge
    maps = [A, ridge.D] if isinstance(ridge, Tikhonov) else [A]
    other = 0.0 if ridge is None else number(ridge.kappa()) * max(0.0, float(ridge.slope.low))
    if sum(math.prod(m.codomain) for m in maps) < math.prod(A.domain):  # their Gram map is singular
        return other
    loop: LinearMap = Identity(A.domain)
    for m in maps:
        loop = Sum(loop, Scale(-1.0, m.T @ m))
    return other + max(0.0, monotonicity(loop))
