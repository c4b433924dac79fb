"""Descent on functions with kinks: quasi-Newton steps, and the least of nearby gradients where none of them lowers."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATIONARY = 1e-4  # of the objective: what a gradient may still gain for a move of one
FIRST_MOVE, LONGEST_MOVE, SHORTEST_MOVE = 0.5, 2.0, 1e-4  # the largest change of an entry in one step
ARMIJO, WOLFE = 1e-4, 0.9
MEMORY = 20  # steps that the quasi-Newton matrix remembers
NEAR = (0.1, 0.01, 0.001)  # how near the gradients of a kink are: as near as they do not cancel
ROUNDS = 20  # attempts to leave a kink, each of which adds gradients
PAIRS = 300  # steps towards the least convex combination


class Ending(Enum):
    """How a bilevel problem ended; the value is the sentence for the user."""

    STATIONARY = (
        "converged: the gradient in the logarithms of the parameters (in those of a map) is within the tolerance"
    )
    KINK = (
        "converged to a kink: a convex combination of gradients at points nearby, less than 0.1 % away in every "
        "parameter, is within the tolerance"
    )
    BRACKETED = "bisected: a change of sign of the gradient, or an end of the bounds, is bracketed"
    FLAT = (
        "stopped where the gradient is exactly zero: the objective does not depend on the parameters here, as under a "
        "penalty so large that nothing is active; start from smaller parameters"
    )
    STALLED = (
        "stopped as no step that changes a parameter by more than 0.01 % lowers the objective, nor do the gradients "
        "nearby cancel: a jump of the objective, or a gradient that is not accurate"
    )
    LIMIT = "stopped at the limit of inner solves: raise max_solves"
    INTERRUPTED = "interrupted: the result is the best so far"

    def __str__(self) -> str:
        return self.value


class Point(NamedTuple):
    """Where, the objective there, and its gradient; `solution` is for the caller."""

    place: Tensor
    objective: float
    gradient: Tensor
    solution: Any


class Descent:
    """Minimises a function with kinks inside a box, from its values and gradients.

    Steps are those of L-BFGS with a weak Wolfe line search, which needs no smoothness: across a kink gradients change
    much and the steps become short, along it they stay long. Where no step lowers the objective, the direction is the
    least convex combination of the gradients nearby, which is zero at a stationary kink.
    `evaluate(place)` returns a `Point` or None where there is none, `left()` the number of evaluations left, and
    `slack(point)` what errors of the objective may hide.
    Sources: Lewis and Overton, Nonsmooth optimization via quasi-Newton methods, 2013 (algorithm 2.6, the line search);
    Burke, Lewis and Overton, A robust gradient sampling algorithm, 2005; Nocedal, Updating quasi-Newton matrices with
    limited storage, 1980.
    """

    def __init__(
        self, evaluate: Callable[[Tensor], Point | None], low: float, high: float, left: Callable[[], int],
        slack: Callable[[Point], float],
    ):  # fmt: skip
        self.evaluate, self.low, self.high, self.left, self.slack = evaluate, low, high, left, slack
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.seen: list[Point] = []

    def run(self, point: Point) -> Ending:
        """The points evaluated are in `seen`, without a promise which is the best."""
        self.seen.append(point._replace(solution=None))
        while True:
            if not bool(point.gradient.any()):
                return Ending.FLAT
            if self.gain(point, point.gradient) <= STATIONARY * abs(point.objective):
                return Ending.STATIONARY
            new, rounds = self.search(point, self.quasi_newton(point)), 0
            while new is None and self.left() > 0:
                goal = STATIONARY * abs(point.objective)
                candidates = (self.least_gradient(point, reach) for reach in NEAR)
                least = next((g for g in candidates if self.gain(point, g) > goal), None)
                if least is None:
                    return Ending.KINK
                if rounds == ROUNDS:
                    return Ending.STALLED
                self.memory, rounds = [], rounds + 1
                new = self.search(point, self.limited(-least, FIRST_MOVE), least)
            if new is None:
                return Ending.LIMIT
            change, bend = new.place - point.place, new.gradient - point.gradient
            if float(change @ bend) > 1e-12 * float(change.norm() * bend.norm()):
                self.memory = [*self.memory, (change, bend)][-MEMORY:]
            point = new

    def search(self, point: Point, direction: Tensor, gradient: Tensor | None = None) -> Point | None:
        """A point along the direction that is lower by as much as the gradient promises, and, while it can be had
        soon, where the slope has risen; None where there is none that moves an entry by `SHORTEST_MOVE`.
        """
        gradient = point.gradient if gradient is None else gradient
        longest = float(direction.abs().max())
        above, t, found = math.inf, 1.0, None
        while t * longest > SHORTEST_MOVE and self.left() > 0:
            place = (point.place + t * direction).clamp(self.low, self.high)
            promised = float(gradient @ (place - point.place))
            if not promised < 0:
                return found
            new = self.evaluate(place)
            if new is not None:
                self.seen.append(new._replace(solution=None))
            if new is None or new.objective > point.objective + ARMIJO * promised + self.slack(point):
                if found is not None:
                    return found
                above = t
                t *= 0.1 if new is None else min(max(meeting(point, new), 0.1), 0.6)
            elif float(new.gradient @ (place - point.place)) < WOLFE * promised and math.isinf(above):
                if found is not None and new.objective >= found.objective:
                    return found
                found = new
                if t * longest >= LONGEST_MOVE:
                    return found
                t = min(2 * t, LONGEST_MOVE / longest)
            else:
                return new
        return found

    def free(self, point: Point, gradient: Tensor) -> Tensor:
        """Which entries are not held at a bound."""
        stuck = ((point.place <= self.low) & (gradient > 0)) | ((point.place >= self.high) & (gradient < 0))
        return ~stuck

    def gain(self, point: Point, gradient: Tensor) -> float:
        return float(((point.place - gradient).clamp(self.low, self.high) - point.place).abs().max())

    def quasi_newton(self, point: Point) -> Tensor:
        free = self.free(point, point.gradient)
        d, parts = -point.gradient * free, []
        if not self.memory:
            return self.limited(d, FIRST_MOVE)
        for change, bend in reversed(self.memory):
            share = (change @ d) / (change @ bend)
            d = d - share * bend
            parts.append(share)
        change, bend = self.memory[-1]
        d = d * (change @ bend) / (bend @ bend)
        for (change, bend), share in zip(self.memory, reversed(parts)):
            d = d + (share - (bend @ d) / (change @ bend)) * change
        d = d * free
        longest = float(d.abs().max())
        if not (math.isfinite(longest) and float(d @ point.gradient) < 0):
            return self.limited(-point.gradient * free, FIRST_MOVE)
        return d * min(1.0, LONGEST_MOVE / longest) if longest > 2 * SHORTEST_MOVE else self.limited(d, 0.01)

    def limited(self, direction: Tensor, longest: float) -> Tensor:
        return direction * (longest / float(direction.abs().max().clamp(min=1e-300)))

    def least_gradient(self, point: Point, reach: float) -> Tensor:
        """The shortest convex combination of the gradients at points seen near this one."""
        near = [p.gradient for p in self.seen if float((p.place - point.place).abs().max()) <= reach]
        return least_combination(torch.stack(near[-2 * MEMORY :]) * self.free(point, point.gradient))


def meeting(point: Point, new: Point) -> float:
    """Where the tangents at two points meet, as a part of the way: at the kink between two nearly straight pieces."""
    way = new.place - point.place
    down, up = float(point.gradient @ way), float(new.gradient @ way)
    return (new.objective - point.objective - up) / (down - up) if up > down else 0.5


def least_combination(vectors: Tensor) -> Tensor:
    """The shortest vector in the convex hull of the rows, by exchanges of weight between two of them at a time.

    Source: Mitchell, Demyanov and Malozemov, Finding the point of a polyhedron closest to the origin, 1974.
    """
    weight = vectors.new_zeros(len(vectors))
    weight[vectors.norm(dim=1).argmin()] = 1
    for _ in range(PAIRS):
        least = weight @ vectors
        along = vectors @ least
        take, give = int(torch.where(weight > 0, along, -math.inf).argmax()), int(along.argmin())
        apart = vectors[give] - vectors[take]
        size = float(apart @ apart)
        if not float(along[take] - along[give]) > 1e-12 * float(along.abs().max()) or size == 0:
            break
        share = min(float(weight[take]), float(along[take] - along[give]) / size)
        weight[take] -= share
        weight[give] += share
    return weight @ vectors
