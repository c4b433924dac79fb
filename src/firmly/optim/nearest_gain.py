"""The adaptation gain nearest to a wished one among those with a proved property."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from firmly.errors import ConditionError, SettingsError
from firmly.optim.adaptation_gain import AdaptationGain
from firmly.optim.quadratic import Quadratic

Property = Literal["spr", "pr"]
_MARGIN = 1e-6  # kept of the quadratics in cos w, against rounding


def nearest_gain(wished: AdaptationGain, asked: Property) -> AdaptationGain:
    """The filter of the same order whose coefficients are closest to `wished` and which is `spr` or `pr`.

    For given poles the zeros that qualify form a convex set, on which they are projected; the poles, one or two
    numbers, are searched by a shrinking pattern, so that the distance is a local minimum. What is returned has the
    property, in closed form. A filter that has it already is returned as it is. Raises `ConditionError` if none is
    found.
    """
    if asked not in ("spr", "pr"):
        raise SettingsError(f"a filter is asked to be 'spr' or 'pr', given {asked!r}")
    if _has(wished, asked):
        return wished
    order = wished.order
    distance = lambda gain: math.dist((*wished.zeros, *wished.poles), (*gain.zeros, *gain.poles))  # noqa: E731
    best, step = _with_poles(wished, (0.0,) * order, asked), 0.5
    while best and step > 1e-9:
        steps = itertools.product((-step, 0.0, step), repeat=order)
        tried = [_with_poles(wished, tuple(map(sum, zip(best.poles, move, strict=False))), asked) for move in steps]
        nearer = min(filter(None, tried), key=distance)
        if distance(nearer) < distance(best) - 1e-12:
            best = nearer
        else:
            step /= 2
    if best is None or not _has(best, asked):
        raise ConditionError(
            f"no {asked!r} filter of order {order} found near zeros {wished.zeros}, poles {wished.poles}"
        )
    return best


def _has(gain: AdaptationGain, asked: Property) -> bool:
    return gain.spr() if asked == "spr" else gain.pr()


def _with_poles(wished: AdaptationGain, poles: tuple[float, ...], asked: Property) -> AdaptationGain | None:
    """The wished zeros projected on those that have the property with these poles; None if there are none."""

    def condition(*zeros: float) -> Quadratic:
        gain = AdaptationGain(zeros, poles)
        return gain.real_part if asked == "spr" else gain.integrated_real_part

    order = wished.order
    if not AdaptationGain((), poles).stable:
        return None
    constant = condition()
    slopes = [condition(*unit) - constant for unit in ((1.0,), (0.0, 1.0))[:order]]
    cuts = [([1.0] * order, _MARGIN - 1)] if asked == "pr" else []  # normal, offset: normal . zeros >= offset
    points = [-1.0, 1.0]
    for _ in range(50):
        cuts += [([slope(x) for slope in slopes], _MARGIN - constant(x)) for x in points]
        zeros = _onto_half_planes(wished.zeros[:order], cuts)
        if zeros is None:
            return None
        polynomial = condition(*zeros)
        lowest = polynomial.where_least(-1, 1)
        if polynomial(lowest) >= _MARGIN / 2:
            return AdaptationGain(zeros, poles)
        points = [lowest]
    return None


def _onto_half_planes(point: tuple[float, ...], cuts: list[tuple[list[float], float]]) -> tuple[float, ...] | None:
    """The nearest point with normal . point >= offset for every cut; on a line or in a plane at most two are active."""

    def dot(a: list[float] | tuple[float, ...], b: list[float] | tuple[float, ...]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    candidates = [point]
    for normal, offset in cuts:
        if length := dot(normal, normal):
            shift = (offset - dot(normal, point)) / length
            candidates.append(tuple(p + shift * n for p, n in zip(point, normal, strict=True)))
    if len(point) == 2:
        for ((a, b), p), ((c, d), q) in itertools.combinations(cuts, 2):
            if determinant := a * d - b * c:
                candidates.append(((p * d - b * q) / determinant, (a * q - p * c) / determinant))
    feasible = [z for z in candidates if all(dot(n, z) >= o - 1e-12 for n, o in cuts)]
    return min(feasible, key=lambda z: math.dist(z, point), default=None)
