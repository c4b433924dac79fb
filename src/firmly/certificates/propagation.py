"""Rows of a value over the columns of a block, with error bounds that do not grow along linear paths.

Bounds of errors that are multiplied from map to map forget that paths meet again: in u <- u + K x(u) the error of u
counts twice, although u -> u + K x(u) may be nonexpansive. So the error of some values is given a name, a *cut*, and
what follows carries the matrix S from there: an error E at the cut is S E later on, and |S| is the norm of the whole
path. A cut is where all that goes on comes from one value, such as the state between two layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from firmly.linear.symbol import Symbol

STEPS = 3  # operations since the last cut from which on another one is worth its columns
MOST_STEPS = 12  # and from which on it is worth that paths which meet again are counted twice


@dataclass(frozen=True)
class Propagated:
    """The exact rows are those of `symbol`, plus what has gone wrong since the cuts, of which its error is a bound,
    plus S E for every cut that the value depends on: `carried` has S, with its own error, and a bound of E, (blocks,).
    """

    symbol: Symbol
    carried: dict[object, tuple[Symbol, Tensor]] = field(default_factory=dict)
    steps: int = 0

    @property
    def whole(self) -> Symbol:
        """The rows with a bound of their whole error."""
        error = self.symbol.error
        if error is None:
            return self.symbol
        for S, E in self.carried.values():
            error = (error + spectral_norms(S) * E) * (1 + 1e-15)
        return Symbol(self.symbol.value, error)

    def mapped(self, symbol: Symbol) -> Propagated:
        """The value after a map with this symbol."""
        carried = {cut: (symbol @ S, E) for cut, (S, E) in self.carried.items()}
        return Propagated(symbol @ self.symbol, carried, self.steps + 1)

    def scaled(self, coefficient: float | Tensor) -> Propagated:
        if isinstance(coefficient, float) and coefficient == 1.0:
            return self
        carried = {cut: (S.scale(coefficient), E) for cut, (S, E) in self.carried.items()}
        return Propagated(self.symbol.scale(coefficient), carried, self.steps)

    def padded(self, width: int) -> Propagated:
        missing = width - self.symbol.value.shape[2]
        if missing == 0:
            return self
        value = torch.nn.functional.pad(self.symbol.value, (0, missing))
        return Propagated(Symbol(value, self.symbol.error), self.carried, self.steps)

    def __add__(self, other: Propagated) -> Propagated:
        carried = dict(self.carried)
        for cut, (S, E) in other.carried.items():
            carried[cut] = (carried[cut][0] + S if cut in carried else S, E)
        return Propagated(self.symbol + other.symbol, carried, max(self.steps, other.steps) + 1)

    def cut(self, live: Iterable[Propagated]) -> Propagated:
        """The same value with its error under a name of its own, where that is worth it; `live` are the others that are
        still needed."""
        if self.steps < STEPS or self.symbol.error is None:
            return self
        if self.steps < MOST_STEPS and any(self.carried.keys() & other.carried.keys() for other in live):
            return self
        value, error = self.symbol.value, self.whole.error
        assert error is not None
        eye = torch.eye(value.shape[1], dtype=torch.float64, device=value.device)[None]
        nothing = torch.zeros(1, dtype=torch.float64, device=value.device)
        return Propagated(Symbol(value, nothing), {object(): (Symbol(eye, nothing), error)})


def combined(terms: list[tuple[float | Tensor, Propagated]]) -> Propagated:
    """sum of coefficient * value, padded to the same columns."""
    width = max(value.symbol.value.shape[2] for _, value in terms)
    return reduce(Propagated.__add__, [value.padded(width).scaled(coefficient) for coefficient, value in terms])


def spectral_norms(symbol: Symbol) -> Tensor:
    """Upper bounds of the spectral norms of all blocks, errors included; (blocks,) or (1,)."""
    value = symbol.value.detach()
    if min(value.shape[1:]) == 1:
        norms = torch.linalg.vector_norm(value, dim=(1, 2))
    else:
        norms = torch.linalg.matrix_norm(value, ord=2)
    norms = norms * (1 + 1e-13 * max(value.shape[1:]))
    return norms if symbol.error is None else norms + symbol.error
