"""Ways to choose the weights of an l1 penalty on validation samples: by gradients, on a grid, at random."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.fixedpoint import BilevelSolution, bilevel
from firmly.lab.experiments.bilevel_problems import Split, Table

LOWEST, HIGHEST = 1e-3, 0.999  # of the weight above which nothing is active


class Choice(NamedTuple):
    """Weights for all features, what they were chosen by, and what they cost."""

    name: str
    numbers: int
    weights: Tensor
    B: Tensor
    validation: float
    test: float
    solves: int
    seconds: float
    progress: list[tuple[float, float]]  # seconds, best validation error so far
    found: BilevelSolution | None = None


class Chooser:
    """All ways to choose weights on one draw; every search of several weights begins at the best one weight."""

    def __init__(self, table: Table, draw: Split, solves: int, seed: int):
        self.table, self.draw, self.solves, self.seed = table, draw, solves, seed
        self.largest = draw.train.largest
        self.one: Any = None
        self.one = self.gradient("one weight", 1, lambda w: w, torch.tensor(0.1 * self.largest, dtype=torch.float64))

    def error(self, B: Tensor) -> Tensor:
        return self.draw.error(B, self.draw.validation)

    def gradient(self, name: str, numbers: int, spread: Callable[[Any], Tensor], first: Any, **options: Any) -> Choice:
        """By hypergradients: a bisection of one weight, or a descent from its end."""
        began, progress = time.perf_counter(), []
        before = 0.0 if self.one is None else self.one.seconds

        def note(trial: Any) -> None:
            best = min([trial.objective, *(p[1] for p in progress[-1:])])
            progress.append((before + time.perf_counter() - began, best))

        if numbers == 1:
            options = {"bounds": (LOWEST * self.largest, HIGHEST * self.largest)}
        else:
            options = {"max_solves": self.solves, **options}
        found = bilevel(
            lambda w, start, tol: self.draw.train.solve(spread(w), start, tol), lambda B, w: self.error(B), first,
            callback=note, **options,
        )  # fmt: skip
        with torch.no_grad():
            given = options["mapped"](found.parameters) if "mapped" in options else found.parameters
            weights = spread(given).expand(len(self.table.names)).clone()
        seconds = before + time.perf_counter() - began
        count = len(found.history) + (0 if self.one is None else self.one.solves)
        return self.choice(name, numbers, weights, found.solution, found.objective, count, seconds, progress, found)

    def choice(
        self, name: str, numbers: int, weights: Tensor, B: Tensor, validation: float, solves: int, seconds: float,
        progress: list[tuple[float, float]], found: BilevelSolution | None = None,
    ) -> Choice:  # fmt: skip
        test = float(self.draw.error(B, self.draw.test))
        return Choice(name, numbers, weights, B, validation, test, solves, seconds, progress, found)

    def by_group(self) -> Choice:
        groups, start = self.table.groups, self.one.weights[0]
        return self.gradient(
            "one for every group", len(self.table.group_names), lambda w: w[groups],
            start.repeat(len(self.table.group_names)),
        )  # fmt: skip

    def by_function(self) -> Choice:
        Z = self.table.descriptions
        first = torch.cat([self.one.weights[:1].log(), torch.zeros(Z.shape[1], dtype=torch.float64)])
        return self.gradient(
            "a function of the feature", len(first), lambda w: w, first, mapped=lambda q: (q[0] + Z @ q[1:]).exp()
        )

    def by_feature(self) -> Choice:
        return self.gradient("one for every feature", len(self.one.weights), lambda w: w, self.one.weights.clone())

    @torch.no_grad()
    def without_gradients(self, name: str, numbers: int, candidates: Iterable[Tensor], seconds: float) -> Choice:
        """The best of the candidates, weights for all features, that the time allows; at least one is tried."""
        began, progress, best, start, count = time.perf_counter(), [], None, None, 0
        for weights in candidates:
            start = self.draw.train.solve(weights, start, 1e-6)
            value, count = float(self.error(start)), count + 1
            if best is None or value < best[0]:
                best = value, weights, start
            progress.append((time.perf_counter() - began, best[0]))
            if progress[-1][0] > seconds:
                break
        assert best is not None
        weights = best[1].expand(len(self.table.names)).clone()
        return self.choice(name, numbers, weights, best[2], best[0], count, time.perf_counter() - began, progress)

    def grid(self, count: int, seconds: float) -> Choice:
        levels = self.largest * torch.logspace(math.log10(HIGHEST), math.log10(LOWEST), count, dtype=torch.float64)
        return self.without_gradients("grid of one weight", 1, levels, seconds)

    def random(self, seconds: float) -> Choice:
        generator = torch.Generator().manual_seed(self.seed)

        def candidates() -> Iterator[Tensor]:
            while True:
                part = torch.rand(len(self.table.group_names), generator=generator, dtype=torch.float64)
                yield (self.largest * LOWEST * (HIGHEST / LOWEST) ** part)[self.table.groups]

        return self.without_gradients("random weights of groups", len(self.table.group_names), candidates(), seconds)
