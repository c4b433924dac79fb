"""Weights that keep a Bregman layer invertible whatever they learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, SettingsError
from firmly.linear.algebra import Compose, Scale, Stack
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense, matched
from firmly.linear.map import LinearMap
from firmly.linear.monotone import Monotone
from firmly.linear.symbol import Symbol


def invertible_weight(
    shape: int | Sequence[int],
    lipschitz: float,
    margin: float = 0.1,
    gain: float = 0.3,
    kernel_size: int = 3,
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> LinearMap:
    """A learnable W with lam_min(sym W) >= -(1 - margin) / L for L = `lipschitz`, of any norm.

    W = A'A + B - B' - ((1 - margin) / L) Id, and every W that satisfies the condition is of this form. `shape` is a
    number of features (A and B are matrices) or (channels, *spatial) (circular convolutions with `kernel_size` taps
    along each axis). With a `rank` r, W = A'A + P'Q - Q'P with r-row matrices, of rank at most 3 r, and margin 1. W is
    near zero at first, up to noise of relative size `gain`. Raises `ConditionError` for margins outside (0, 1] and for
    an L that is not positive and finite.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020 (the algebra).
    """
    shape = [shape] if isinstance(shape, int) else list(shape)
    if not (0 < margin <= 1 and 0 < lipschitz < math.inf):
        raise ConditionError(
            f"margin lies in (0, 1] and L is positive and finite, given margin {margin} and L = {lipschitz}"
        )
    if min(*shape, kernel_size, rank or 1) < 1 or not gain >= 0 or (rank is not None and len(shape) > 1):
        raise SettingsError(
            f"sizes are at least 1, the gain at least 0, a rank goes with features; given shape {shape}, kernel_size "
            f"{kernel_size}, rank {rank}, gain {gain}"
        )

    def noise(*size: int) -> Tensor:
        return gain / math.sqrt(math.prod(size[1:])) * torch.randn(size, generator=generator)

    n = shape[0]
    if rank is not None:
        A, P, Q = (Dense(nn.Parameter(noise(rank, n))) for _ in range(3))
        return Compose(Stack([A, P, Q]).T, Stack([A, Q, Scale(-1.0, P)]))
    taps = [kernel_size] * (len(shape) - 1)
    A, B = noise(n, n, *taps), noise(n, n, *taps)
    centre = (slice(None), slice(None), *[size // 2 for size in taps])
    A[centre] += math.sqrt(1 - margin) * torch.eye(n)
    maps = [Convolution(nn.Parameter(k), shape) if taps else Dense(nn.Parameter(k)) for k in (A, B)]
    return Scale(-1 / lipschitz, Monotone(maps[0], margin, maps[1]))


class Triangular(LinearMap):
    """Lower triangular W = strict lower part of `weight` + diag(exp(log_diagonal)) - ((1 - margin) / L) Id.

    Its layers are autoregressive: the diagonal is above -1/L, which is condition (c), and the log-determinant is a sum.
    """

    weight: Tensor
    log_diagonal: Tensor

    def __init__(self, weight: Tensor, log_diagonal: Tensor, lipschitz: float, margin: float = 0.1):
        super().__init__((len(weight),), (len(weight),))
        if not (0 < margin <= 1 and 0 < lipschitz < math.inf):
            raise ConditionError(f"margin lies in (0, 1], L is positive and finite; given {margin} and {lipschitz}")
        self.hold("weight", weight)
        self.hold("log_diagonal", log_diagonal)
        self.least = -(1 - margin) / lipschitz

    def matrix(self) -> Tensor:
        diagonal = self.log_diagonal.double().exp() + self.least
        return self.weight.double().tril(-1) + torch.diag(diagonal)

    def _apply_map(self, x: Tensor) -> Tensor:
        x, matrix = matched(x, self.matrix())
        return x @ matrix.mT

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        y, matrix = matched(y, self.matrix())
        return y @ matrix

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, DenseBasis):
            return super()._symbol(basis)
        matrix = self.matrix().to(basis.device)
        rounding = 4 * torch.finfo(matrix.dtype).eps * (matrix.detach().diagonal().abs().max() + abs(self.least))
        return basis.bounded(matrix[None], rounding.reshape(1))
