"""Bilevel problems: the positive hyperparameters of an inner problem, chosen by the gradient of an outer objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, NotConverged, SettingsError
from firmly.fixedpoint.descent import Descent, Ending, Point

Parameters = Any  # a tensor, or tuples, lists and dictionaries of them

FIRST, DECAY = 1e-5, 0.25  # tolerances of inner problems: geometric, so that their errors have a finite sum
BISECTIONS, DESCENTS = 12, 60


class Trial(NamedTuple):
    """One inner solve: the parameters, the objective, its gradient in their logarithms (with `mapped` in themselves),
    and the inner tolerance.

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
        return self.status in (Ending.STATIONARY, Ending.KINK, Ending.BRACKETED)


def bilevel(
    inner: Callable[[Any, Any, float], Any],
    outer: Callable[[Any, Any], Tensor],
    parameters: Parameters,
    bounds: tuple[float, float] | None = None,
    tol: float | None = None,
    max_solves: int | None = None,
    callback: Callable[[Trial], object] | None = None,
    mapped: Callable[[Any], Any] | None = None,
) -> BilevelSolution:
    """min over p > 0 of outer(x(p), p), where x(p) = inner(p, start, tol) solves the inner problem for p.

    `parameters` is the first p: a positive tensor (a weight, or one for every feature), or tuples, lists and
    dictionaries of them; `inner` and `outer` receive the same. `inner` returns the solution, a tensor or tuples, lists
    and dictionaries of tensors, to the relative residual `tol`, differentiable in p (`firmly.implicit`,
    `firmly.fixed_point`, `SparseLinear`), from the solution `start` of the problem before, None at first; `outer`
    returns one number. The search is in log p, within `bounds` if given, and the inner tolerances fall geometrically to
    `tol` (None: eps^(3/4) of the precision of p).

    With `mapped`, p = mapped(q) is a differentiable function of any real `parameters` q, in which the search takes
    place: `lambda q: (q[0] + Z @ q[1]).exp()` for weights that follow from descriptions Z of the features. `bounds` are
    those of q then, and steps suit entries that change p by a factor of e when they change by one.

    - One number with bounds: 12 inner solves. A third of them are spread evenly over log p, from the upper bound down,
      the others bisect on the sign of the gradient beside the best. A gradient of exactly zero counts as positive:
      above the largest useful weight nothing is active.
    - Else: quasi-Newton descent with line searches that kinks do not stop (`Descent`), 60 inner solves at most. It ends
      at a gradient, or near a kink at a convex combination of gradients, of at most 1e-4 of the objective. No rate is
      to be chosen. A step where the inner problem fails is made shorter.

    What is returned is the best p of all, not the last: the objective need not be unimodal. `callback(trial)` follows
    every inner solve. Raises `ConditionError` for parameters that are not positive or bounds that do not hold them,
    `SettingsError` for an outer objective that does not reach them, `NotConverged` where the first problem fails, or
    one of a bisection.
    Sources: Pedregosa, Hyperparameter optimization with approximate gradient, 2016 (inexact solves); Lewis and Overton,
    Nonsmooth optimization via quasi-Newton methods, 2013.
    """
    search = Search(inner, outer, parameters, bounds, tol, callback, mapped)
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
    return BilevelSolution(
        search.shaped(search.scaled(best.place)), best.solution, best.objective, status, search.history
    )


class Search:
    """The state of one search: solutions to start from, trials made, and the best of them."""

    def __init__(
        self, inner: Callable[[Any, Any, float], Any], outer: Callable[[Any, Any], Tensor], parameters: Parameters,
        bounds: tuple[float, float] | None, tol: float | None, callback: Callable[[Trial], object] | None,
        mapped: Callable[[Any], Any] | None,
    ):  # fmt: skip
        self.inner, self.outer, self.callback, self.mapped = inner, outer, callback, mapped
        self.like, flat = parameters, entries(parameters, positive=mapped is None)
        low, high = (0.0 if mapped is None else -math.inf, math.inf) if bounds is None else bounds
        if bounds is not None and not (-math.inf < low < high < math.inf and (low > 0 or mapped is not None)):
            raise ConditionError(f"bounds are (low, high), finite, low < high, and 0 < low for logs, given {bounds}")
        if not bool(((flat >= low) & (flat <= high)).all()):
            raise ConditionError(f"the first parameters lie within the bounds {bounds}")
        if mapped is None:
            low, high = -math.inf if low == 0 else math.log(low), math.log(high) if high < math.inf else math.inf
        self.low, self.high = low, high
        self.first = flat.log() if mapped is None else flat
        self.tol = float(torch.finfo(flat.dtype).eps ** 0.75) if tol is None else tol
        if not (self.tol > 0 and math.isfinite(self.tol)):
            raise SettingsError(f"tol is positive and finite or None, given {tol}")
        self.history: list[Trial] = []
        self.best: Point | None = None
        self.start: Any = None

    def scaled(self, place: Tensor) -> Tensor:
        return place.exp() if self.mapped is None else place

    def shaped(self, flat: Tensor) -> Any:
        return shaped(flat, self.like)

    def next_tol(self) -> float:
        return max(self.tol, FIRST * DECAY ** len(self.history))

    def solve(self, place: Tensor) -> Point:
        """One inner problem with the objective and its gradient; raises `NotConverged` where there is none."""
        tol, place = self.next_tol(), place.detach().clone().requires_grad_()
        parameters = self.shaped(self.scaled(place))
        value, gradient, solution = math.nan, torch.full_like(place, math.nan), None
        try:
            with torch.enable_grad():
                given = parameters if self.mapped is None else self.mapped(parameters)
                solution = self.inner(given, self.start, tol)
                objective = self.outer(solution, given)
            value, gradient = self.differentiate(objective, place, parameters)
            if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
                raise NotConverged(f"the outer objective or its gradient is not finite at {parameters}")
        finally:
            found = rebuilt(parameters, lambda leaf: leaf.detach())
            trial = Trial(found, value, self.shaped(gradient), tol)
            self.history.append(trial)
        point = Point(place.detach(), value, gradient, detached(solution))
        self.start = point.solution
        if self.best is None or value < self.best.objective:
            self.best = point
        if self.callback is not None:
            self.callback(trial)
        return point

    def differentiate(self, objective: Any, place: Tensor, parameters: Any) -> tuple[float, Tensor]:
        """The objective, and its gradient in the variables of the search."""
        if not isinstance(objective, Tensor) or objective.numel() != 1:
            raise SettingsError("the outer objective is one number, a tensor with one entry")
        if not objective.requires_grad:
            raise SettingsError(
                "the outer objective does not depend on the parameters: `inner` has to return a solution that is "
                "differentiable in them, firmly.implicit(algorithm)(y, start), say"
            )
        parts = leaves(parameters)
        found = torch.autograd.grad(objective.sum(), (*parts, place), allow_unused=True)
        unused = [i for i, gradient in enumerate(found[:-1]) if gradient is None]
        if unused:
            raise SettingsError(f"the outer objective does not depend on the parameters number {unused}, from 0")
        return float(objective.detach()), found[-1]

    def bisect(self, count: int) -> Ending:
        number = max(1, count // 3)
        places = [self.low + (self.high - self.low) * i / (number + 1) for i in range(number + 2)]
        points = [self.solve(torch.full_like(self.first, place)) for place in reversed(places[1:-1])][::-1]
        best = min(range(number), key=lambda i: points[i].objective)
        point, low, high = points[best], places[best], places[best + 2]
        for _ in range(count - number):
            if float(point.gradient) >= 0:
                high = float(point.place)
            else:
                low = float(point.place)
            point = self.solve(torch.full_like(self.first, (low + high) / 2))
        return Ending.BRACKETED

    def descend(self, count: int) -> Ending:
        def attempt(place: Tensor) -> Point | None:
            try:
                return self.solve(place)
            except NotConverged:
                return None

        left = lambda: count - len(self.history)  # noqa: E731
        slack = lambda point: math.sqrt(self.next_tol()) * abs(point.objective)  # noqa: E731
        return Descent(attempt, self.low, self.high, left, slack).run(self.solve(self.first))


def entries(parameters: Any, positive: bool) -> Tensor:
    """All numbers of the parameters as one vector, once they are what a search can start from."""
    parts = leaves(parameters)
    if not parts or not all(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
        raise SettingsError("the parameters are real floating-point tensors, in tuples, lists and dictionaries")
    if len({(p.dtype, p.device) for p in parts}) > 1:
        raise DataError(f"the parameters share a dtype and a device, given {[(p.dtype, p.device) for p in parts]}")
    flat = torch.cat([p.detach().flatten() for p in parts])
    if flat.numel() == 0 or not bool(torch.isfinite(flat).all()):
        raise ConditionError("the parameters of a bilevel problem are finite numbers, at least one")
    if positive and not bool((flat > 0).all()):
        raise ConditionError(
            "the parameters of a bilevel problem are positive, they enter by their logs; numbers of any sign enter "
            "`bilevel` by `mapped`"
        )
    return flat


def shaped(flat: Tensor, like: Any) -> Any:
    """The numbers as a tree of tensors like this one."""
    parts = iter(flat.split([leaf.numel() for leaf in leaves(like)]))
    return rebuilt(like, lambda leaf: next(parts).reshape(leaf.shape))


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dictionaries, in order."""
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in leaves(branch)]
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, (tuple, list)) else [tree]


def rebuilt(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with every leaf changed."""
    if isinstance(tree, dict):
        return {key: rebuilt(branch, change) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        branches = [rebuilt(branch, change) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return change(tree)


def detached(solution: Any) -> Any:
    if not all(isinstance(leaf, Tensor) for leaf in leaves(solution)):
        raise SettingsError(
            f"`inner` returns tensors, in tuples, lists and dictionaries, given {type(solution).__name__}"
        )
    return rebuilt(solution, lambda leaf: leaf.detach())
