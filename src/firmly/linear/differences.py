"""Differences of neighbours in a signal, and the cumulative sum that undoes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear.map import Bracket, LinearMap


class Differences(LinearMap):
    """(D x)[i] = x[i + 1] - x[i]: flat signals (n,) to (n - 1,). |D| = 2 cos(pi / (2 n)).

    `Gradient` is the same on images, where it keeps the shape by a zero at the end.
    """

    def __init__(self, n: int):
        if n < 2:
            raise ShapeError(f"differences need signals of at least 2 entries, given {n}")
        super().__init__((n,), (n - 1,))

    def _apply_map(self, x: Tensor) -> Tensor:
        return x.diff(dim=-1)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return -torch.nn.functional.pad(y, (1, 1)).diff(dim=-1)

    def _norm(self) -> Bracket:
        size = 2 * math.cos(math.pi / (2 * self.domain[0]))
        return Bracket(size * (1 - 1e-14), size * (1 + 1e-14))


class Cumulative(LinearMap):
    """(L z)[i] = z[0] + ... + z[i] on flat signals (n,): a signal from its first value and its jumps.

    |L| = 1 / (2 sin(pi / (4 n + 2))), about 2 n / pi. Source of the norm: the inverse of L L* is the second difference
    with one free and one clamped end, with eigenvalues 4 sin((2 k + 1) pi / (4 n + 2))^2.
    """

    def __init__(self, n: int):
        if n < 1:
            raise ShapeError(f"a cumulative sum needs signals of at least 1 entry, given {n}")
        super().__init__((n,), (n,))

    def _apply_map(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return y.flip(-1).cumsum(-1).flip(-1)

    def _norm(self) -> Bracket:
        size = 1 / (2 * math.sin(math.pi / (4 * self.domain[0] + 2)))
        return Bracket(size * (1 - 1e-13), size * (1 + 1e-13))
