"""Bilevel problems: the positive hyperparameters of an inner problem, chosen by the gradient of an outer objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, NotConverged, SettingsError

Parameters = Tensor | tuple[Tensor, ...]

FIRST, DECAY = 1e-5, 0.25  # tolerances of inner problems: geometric, so that their errors have a finite sum
STATIONARY = 1e-4  # of the objective: what a gradient in the logarithms may still gain for a factor of e
FIRST_MOVE, LONGEST_MOVE, SHORTEST_MOVE = 0.5, 2.0, 1e-4  # the largest change of a logarithm in one step
ARMIJO = 1e-4
BISECTIONS, DESCENTS = 12, 60


class Ending(Enum):
    """How a bilevel problem ended; the value is the sentence for the user."""

    STATIONARY = "converged: the gradient in the logarithms of the parameters is within the tolerance"
    BRACKETED = "bisected: a change of sign of the gradient, or an end of the bounds, is bracketed"
    FLAT = (
        "stopped where the gradient is exactly zero: the objective does not depend on the parameters here, as under a "
        "penalty so large that nothing is active; start from smaller parameters"
    )
    STALLED = (
        "stopped as no step along the gradient that changes a parameter by more than 0.01 % lowers the objective: a "
        "kink, as between two active sets, or a gradient that is not accurate"
    )
    LIMIT = "stopped at the limit of inner solves: raise max_solves"
    INTERRUPTED = "interrupted: the result is the best so far"

    def __str__(self) -> str:
        return self.value


class Trial(NamedTuple):
    """One inner solve: the parameters, the objective, its gradient in their logarithms, and the inner tolerance.

    The objective is NaN, and the gradient too, where the inner problem was not solved, or its solution has no
    derivative.
    """

    parameters: Parameters
    objective: float
    gradient: Parameters
    tol: float


@dataclass(frozen=True)
class BilevelSolution:
    """The best of all `history`, to the tolerance of its trial, and how the search ended."""

    parameters: Parameters
    solution: Any
    objective: float
    status: Ending
    history: list[Trial]

    @property
    def converged(self) -> bool:
        return self.status in (Ending.STATIONARY, Ending.BRACKETED)


class Point(NamedTuple):
    logs: Tensor
    objective: float
    gradient: Tensor
    solution: Any


def bilevel(
    inner: Callable[[Any, Any, float], Any],
    outer: Callable[[Any, Any], Tensor],
    parameters: Parameters,
    bounds: tuple[float, float] | None = None,
    tol: float | None = None,
    max_solves: int | None = None,
    callback: Callable[[Trial], object] | None = None,
) -> BilevelSolution:
    """min over p > 0 of outer(x(p), p), where x(p) = inner(p, start, tol) solves the inner problem for p.

    `parameters` is the first p, a positive tensor (a weight, or one for every feature) or a tuple of them; `inner` and
    `outer` receive the same. `inner` returns the solution, a tensor or a tuple of tensors, to the relative residual
    `tol`, differentiable in p (`firmly.implicit`, `firmly.fixed_point`), from the solution `start` of the problem
    before, None at first; `outer` returns one number. The search is in log p, within `bounds` if given, and the inner
    tolerances fall geometrically to `tol` (None: eps^(3/4) of the precision of p).

    - One number with bounds: 12 inner solves. A third of them are spread evenly over log p, from the upper bound down,
      the others bisect on the sign of the gradient beside the best. A gradient of exactly zero counts as positive:
      above the largest useful weight nothing is active.
    - Else: gradient descent whose steps are the inverse of the local Lipschitz constant of the gradient, measured
      between the last two iterates, halved until the objective falls; 60 inner solves at most. It ends at a gradient
      of at most 1e-4 of the objective. No rate is to be chosen. A step where the inner problem fails is halved too.

    What is returned is the best p of all, not the last: the objective need not be unimodal. `callback(trial)` follows
    every inner solve. Raises `ConditionError` for parameters that are not positive or bounds that do not hold them,
    `SettingsError` for an outer objective that does not reach them, `NotConverged` where the first problem fails, or
    one of a bisection.
    Sources: Pedregosa, Hyperparameter optimization with approximate gradient, 2016 (inexact solves); Barzilai and
    Borwein, Two-point step size gradient methods, 1988 (the first of the two steps).
    """
    search = Search(inner, outer, parameters, bounds, tol, callback)
    bisected = bounds is not None and search.first.numel() == 1
    count = max_solves if max_solves is not None else BISECTIONS if bisected else DESCENTS
    if count < 1:
        raise SettingsError(f"max_solves is at least 1 or None, given {max_solves}")
    try:
        status = search.bisect(count) if bisected else search.descend(count)
    except KeyboardInterrupt:
        if search.best is None:
            raise
        status = Ending.INTERRUPTED
    best = search.best
    assert best is not None  # the first solve sets it or raises
    return BilevelSolution(search.shaped(best.logs.exp()), best.solution, best.objective, status, search.history)


class Search:
    """The state of one search: solutions to start from, trials made, and the best of them."""

    def __init__(
        self, inner: Callable[[Any, Any, float], Any], outer: Callable[[Any, Any], Tensor], parameters: Parameters,
        bounds: tuple[float, float] | None, tol: float | None, callback: Callable[[Trial], object] | None,
    ):  # fmt: skip
        self.inner, self.outer, self.callback = inner, outer, callback
        parts = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
        if not parts or not all(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
            raise SettingsError("the parameters are a real floating-point tensor or a tuple of such tensors")
        if len({(p.dtype, p.device) for p in parts}) > 1:
            raise DataError(f"the parameters share a dtype and a device, given {[(p.dtype, p.device) for p in parts]}")
        self.single, self.shapes = isinstance(parameters, Tensor), [p.shape for p in parts]
        flat = torch.cat([p.detach().flatten() for p in parts])
        if not bool(((flat > 0) & torch.isfinite(flat)).all()) or flat.numel() == 0:
            raise ConditionError(
                "the parameters of a bilevel problem are positive and finite: they enter by their logs"
            )
        low, high = (0.0, math.inf) if bounds is None else bounds
        if not (0 <= low < high) or (bounds is not None and (low == 0 or math.isinf(high))):
            raise ConditionError(f"bounds are (low, high) with 0 < low < high finite, given {bounds}")
        if bounds is not None and not bool(((flat >= low) & (flat <= high)).all()):
            raise ConditionError(f"the first parameters lie within the bounds {bounds}")
        self.low, self.high = -math.inf if low == 0 else math.log(low), math.log(high) if high < math.inf else math.inf
        self.first = flat.log()
        self.tol = float(torch.finfo(flat.dtype).eps ** 0.75) if tol is None else tol
        if not (self.tol > 0 and math.isfinite(self.tol)):
            raise SettingsError(f"tol is positive and finite or None, given {tol}")
        self.history: list[Trial] = []
        self.best: Point | None = None
        self.start: Any = None

    def shaped(self, flat: Tensor) -> Parameters:
        parts = [p.reshape(shape) for p, shape in zip(flat.split([s.numel() for s in self.shapes]), self.shapes)]
        return parts[0] if self.single else tuple(parts)

    def next_tol(self) -> float:
        return max(self.tol, FIRST * DECAY ** len(self.history))

    def solve(self, logs: Tensor) -> Point:
        """One inner problem with the objective and its gradient; raises `NotConverged` where there is none."""
        tol, logs = self.next_tol(), logs.detach().clone().requires_grad_()
        parameters = self.shaped(logs.exp())
        value, gradient, solution = math.nan, torch.full_like(logs, math.nan), None
        try:
            with torch.enable_grad():
                solution = self.inner(parameters, self.start, tol)
                objective = self.outer(solution, parameters)
            value, gradient = self.differentiate(objective, parameters)
            if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
                raise NotConverged(f"the outer objective or its gradient is not finite at {parameters}")
        finally:
            trial = Trial(self.shaped(logs.detach().exp()), value, self.shaped(gradient), tol)
            self.history.append(trial)
        point = Point(logs.detach(), value, gradient, detached(solution))
        self.start = point.solution
        if self.best is None or value < self.best.objective:
            self.best = point
        if self.callback is not None:
            self.callback(trial)
        return point

    def differentiate(self, objective: Any, parameters: Parameters) -> tuple[float, Tensor]:
        """The objective, and its gradient in the logarithms."""
        if not isinstance(objective, Tensor) or objective.numel() != 1:
            raise SettingsError("the outer objective is one number, a tensor with one entry")
        if not objective.requires_grad:
            raise SettingsError(
                "the outer objective does not depend on the parameters: `inner` has to return a solution that is "
                "differentiable in them, firmly.implicit(algorithm)(y, start), say"
            )
        parts = (parameters,) if isinstance(parameters, Tensor) else parameters
        found = torch.autograd.grad(objective.sum(), parts, allow_unused=True)
        unused = [i for i, gradient in enumerate(found) if gradient is None]
        if unused:
            raise SettingsError(f"the outer objective does not depend on the parameters number {unused}, from 0")
        return float(objective.detach()), torch.cat([(g * p.detach()).flatten() for g, p in zip(found, parts)])

    def bisect(self, count: int) -> Ending:
        number = max(1, count // 3)
        places = [self.low + (self.high - self.low) * i / (number + 1) for i in range(number + 2)]
        points = [self.solve(torch.full_like(self.first, place)) for place in reversed(places[1:-1])][::-1]
        best = min(range(number), key=lambda i: points[i].objective)
        point, low, high = points[best], places[best], places[best + 2]
        for _ in range(count - number):
            if float(point.gradient) >= 0:
                high = float(point.logs)
            else:
                low = float(point.logs)
            point = self.solve(torch.full_like(self.first, (low + high) / 2))
        return Ending.BRACKETED

    def descend(self, count: int) -> Ending:
        point = self.solve(self.first)
        step = math.inf
        while True:
            if not bool(point.gradient.any()):
                return Ending.FLAT
            gain = float((self.moved(point, 1.0) - point.logs).abs().max())
            if gain <= STATIONARY * abs(point.objective):
                return Ending.STATIONARY
            move = LONGEST_MOVE if math.isfinite(step) else FIRST_MOVE
            steepest = float(point.gradient.abs().max())
            step = max(min(step, move / steepest), 2 * SHORTEST_MOVE / steepest)
            following = None
            while following is None:
                if step * steepest <= SHORTEST_MOVE:
                    return Ending.STALLED
                if len(self.history) >= count:
                    return Ending.LIMIT
                following = self.accepted(point, step)
                step /= 2
            change, bend = following.logs - point.logs, following.gradient - point.gradient
            curvature = float((change * bend).sum())
            step = float(change.square().sum()) / curvature if curvature > 0 else 4 * step  # it was halved
            point = following

    def moved(self, point: Point, step: float) -> Tensor:
        return (point.logs - step * point.gradient).clamp(self.low, self.high)

    def accepted(self, point: Point, step: float) -> Point | None:
        """The point after a step, if the objective falls by as much as its gradient promises, up to inner errors."""
        logs = self.moved(point, step)
        slack = math.sqrt(self.next_tol()) * abs(point.objective)
        try:
            trial = self.solve(logs)
        except NotConverged:
            return None
        promised = ARMIJO * float((point.gradient * (point.logs - logs)).sum())
        return trial if trial.objective <= point.objective - promised + slack else None


def detached(solution: Any) -> Any:
    if isinstance(solution, Tensor):
        return solution.detach()
    if not (isinstance(solution, tuple) and all(isinstance(part, Tensor) for part in solution)):
        raise SettingsError(f"`inner` returns a tensor or a tuple of tensors, given {type(solution).__name__}")
    parts = [part.detach() for part in solution]
    return type(solution)(*parts) if hasattr(solution, "_fields") else type(solution)(parts)
