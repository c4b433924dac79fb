"""Loops v = R(W v + w) that have exactly one solution: maps W with I - W strongly monotone, and their resolvents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ConditionError, ShapeError
from firmly.linear.algebra import Identity, Scale, Sum
from firmly.linear.basis import Basis
from firmly.linear.blocks import Blocks
from firmly.linear.convolution import Convolution
from firmly.linear.map import Adjoint, LinearMap
from firmly.linear.norms import EPS, exact_symbol, norm_of_blocks
from firmly.linear.symbol import Symbol
from firmly.linear.tiers import Tiers

FEWEST_CHANNELS = 8  # from which on products of frequencies are faster than sums over the taps of four convolutions
POWER_STEPS = 4


class Monotone(LinearMap):
    """W = (1 - margin) I - A*A + B - B*, for which <(I - W) v, v> = margin |v|^2 + |A v|^2 for every real v.

    Every W with <(I - W) v, v> >= margin |v|^2 is of this form. A takes the domain anywhere, B to itself; B may be left
    out. Raises `ConditionError` for a margin that is not positive, `ShapeError` for maps that do not fit.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, proposition 1.
    """

    margin: Tensor

    def __init__(self, A: LinearMap, margin: float, B: LinearMap | None = None):
        super().__init__(A.domain, A.domain)
        if not (margin > 0 and math.isfinite(margin)):
            raise ConditionError(f"the margin of a monotone map is positive and finite, given {margin}")
        if B is not None and (B.domain, B.codomain) != (A.domain, A.domain):
            raise ShapeError(f"B maps {A.domain} to itself like W, given {B.domain} -> {B.codomain}")
        self.A = A
        self.B = B
        self.hold("margin", torch.tensor(float(margin), dtype=torch.float64))
        self.blocks = Blocks(self)
        self._by_frequency = self.domain[0] >= FEWEST_CHANNELS and all(
            isinstance(part, Tiers) or (isinstance(part, Convolution) and part.padding == "circular")
            for part in (A, B)
            if part is not None
        )

    def _apply_map(self, x: Tensor) -> Tensor:
        if self._by_frequency:
            return self.blocks(x)
        value = x - self.margin.to(x.dtype) * x - self.A.T(self.A(x))
        return value if self.B is None else value + self.B(x) - self.B.T(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        if self._by_frequency:
            return self.blocks(y, adjoint=True)
        value = y - self.margin.to(y.dtype) * y - self.A.T(self.A(y))
        return value if self.B is None else value + self.B.T(y) - self.B(y)

    def _upper(self) -> float:
        turning = 0.0 if self.B is None else 2 * self.B.norm().upper
        return (abs(1 - float(self.margin)) + self.A.norm().upper ** 2 + turning) * (1 + 1e-15)

    def _symbol(self, basis: Basis) -> Symbol:
        A, eye = self.A.symbol(basis), basis.identity(self.domain)
        value = eye + eye.scale(-self.margin) + (A.H @ A).scale(-1.0)
        if self.B is None:
            return value
        B = self.B.symbol(basis)
        return value + B + B.H.scale(-1.0)


@torch.no_grad()
def monotonicity(loop: LinearMap) -> float:
    """A proved m with <(I - W) v, v> >= m |v|^2 for all v, for a map W to its own domain; negative if none is found.

    The margin of a `Monotone` map, by its construction. Else from the smallest eigenvalue of I - (W + W*) / 2, by a
    Cholesky factorisation that pays for its rounding, in Fourier or for small matrices; -infinity where the map is
    neither.
    """
    if loop.domain != loop.codomain:
        raise ShapeError(f"a loop closes on its own domain, given {loop.domain} -> {loop.codomain}")
    if isinstance(loop, Adjoint):
        return monotonicity(loop.T)
    if isinstance(loop, Monotone):
        return float(loop.margin)
    symbol = exact_symbol(loop)
    if symbol is None or symbol.error is None or symbol.rows != symbol.columns:
        return -math.inf
    part = 0.5 * (symbol.value + symbol.value.mH)
    size = float(torch.linalg.vector_norm(part, dim=(1, 2)).max())
    shifted = part + size * torch.eye(part.shape[1], dtype=part.dtype)  # no negative eigenvalues: its norm is the top
    return (1 + size) - norm_of_blocks(Symbol(shifted, symbol.error + 4 * EPS * size)).upper - 4 * EPS * (1 + size)


class LoopResolvent(LinearMap):
    """x -> (I + step (I - W))^-1 x, the resolvent of the strongly monotone map I - W, for step > 0.

    Applied by the inverse matrix of every frequency where W is shift-invariant, else by the matrix for domains of at
    most 4096 entries; else it raises `NotDiagonal`. The inverse is kept while no gradients are recorded and W is
    unchanged. `reflection` applies twice it minus the identity.
    Source: Ryu and Boyd, Primer on monotone operator methods, 2016.
    """

    step: Tensor

    def __init__(self, loop: LinearMap, step: float | Tensor):
        super().__init__(loop.domain, loop.codomain)
        self.loop = loop
        self.hold("step", step if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float64))
        self.__dict__["reflection"] = Blocks(Sum(Scale(2.0, self), Scale(-1.0, Identity(loop.domain))))
        self.blocks = Blocks(self)

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.blocks(y, adjoint=True)

    def _symbol(self, basis: Basis) -> Symbol:
        eye = basis.identity(self.domain)
        return (eye + (eye + self.loop.symbol(basis).scale(-1.0)).scale(self.step)).inverse()


def loop_resolvent(loop: LinearMap, step: float | Tensor) -> LinearMap:
    """`LoopResolvent(loop, step)`; the last with a number for its step is kept: algorithms ask for it in every step."""
    if isinstance(loop, Adjoint):
        return loop_resolvent(loop.T, step).T
    if isinstance(step, Tensor):
        return LoopResolvent(loop, step)
    kept = loop.__dict__.get("_resolvent")
    if kept is None or kept[0] != step:
        kept = loop.__dict__["_resolvent"] = (step, LoopResolvent(loop, step))
    return kept[1]


@torch.no_grad()
def balanced_step(loop: LinearMap) -> float:
    """About 1 / sqrt(m L), the step of a resolvent of I - W that treats eigenvalues m and L = |I - W| alike.

    L is estimated by power iteration from fixed vectors, and the step rounded to a power of sqrt(2): resolvents of any
    step converge, and one that stays the same is not computed again. 1 for a loop that is not proved to be monotone.
    Source: Giselsson and Boyd, Linear convergence and metric selection for Douglas-Rachford splitting, 2017.
    """
    m, size = monotonicity(loop), 1.0
    tensors = [t for t in (*loop.parameters(), *loop.buffers()) if t.is_floating_point()]
    like = max(tensors, key=lambda t: t.numel(), default=torch.zeros(1))
    v = torch.randn(1, *loop.domain, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    for _ in range(POWER_STEPS):
        image = v - loop(v)
        size = float(torch.linalg.vector_norm(image) / torch.linalg.vector_norm(v))
        v = image - loop.T(image)
        v = v / torch.linalg.vector_norm(v)
    return 2.0 ** (round(-math.log2(m * size)) / 2) if 0 < m * size < math.inf else 1.0
