"""Loops v = R(W v + w) that have exactly one solution: maps W with I - W strongly monotone, and their resolvents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ConditionError, NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Dense, Fourier
from firmly.linear.map import LinearMap
from firmly.linear.memo import Memo
from firmly.linear.norms import EPS, exact_symbol, norm_of_blocks
from firmly.linear.symbol import Symbol

LARGEST_DENSE = 4096


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

    def _apply_map(self, x: Tensor) -> Tensor:
        value = x - self.margin.to(x.dtype) * x - self.A.T(self.A(x))
        return value if self.B is None else value + self.B(x) - self.B.T(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
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
    unchanged. Source: Ryu and Boyd, Primer on monotone operator methods, 2016.
    """

    step: Tensor

    def __init__(self, loop: LinearMap, step: float | Tensor):
        super().__init__(loop.domain, loop.codomain)
        self.loop = loop
        self.hold("step", step if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float64))
        self._inverse: Memo[tuple[Basis, Tensor]] = Memo()

    def _apply_map(self, x: Tensor) -> Tensor:
        return self._by_blocks(x, adjoint=False)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._by_blocks(y, adjoint=True)

    def _by_blocks(self, x: Tensor, adjoint: bool) -> Tensor:
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (*self.parameters(), *self.buffers()))
        anew = learning or x.is_complex()
        basis, inverse = self._blocks(x) if anew else self._inverse.get(self, lambda: self._blocks(x))
        inverse = inverse.mH if adjoint else inverse
        if not isinstance(basis, Fourier):
            flat = x.flatten(1)
            return (flat @ inverse[0].to(flat.dtype).mT).reshape(x.shape)
        axes, spatial = tuple(range(2, x.dim())), self.domain[1:]
        frequencies = torch.fft.fftn(x, dim=axes) if basis.full else torch.fft.rfftn(x, dim=axes)
        inverse = inverse.expand(basis.blocks, -1, -1).to(frequencies.dtype)
        product = torch.einsum("foi,bif->bof", inverse, frequencies.flatten(2)).reshape(frequencies.shape)
        return torch.fft.ifftn(product, dim=axes) if basis.full else torch.fft.irfftn(product, s=spatial, dim=axes)

    def _blocks(self, x: Tensor) -> tuple[Basis, Tensor]:
        if self.domain[1:]:
            fourier = Fourier(self.domain[1:], full=x.is_complex(), track=False, device=x.device)
            try:
                return fourier, self._symbol(fourier).value
            except NotDiagonal:
                pass
        if math.prod(self.domain) > LARGEST_DENSE:
            raise NotDiagonal(
                f"no resolvent of {self.loop._get_name()} on {self.domain}: it is not shift-invariant and has over "
                f"{LARGEST_DENSE} entries; use circular convolutions, or forward-backward splitting"
            )
        dense = Dense(track=False, device=x.device)
        return dense, self._symbol(dense).value

    def _symbol(self, basis: Basis) -> Symbol:
        eye = basis.identity(self.domain)
        return (eye + (eye + self.loop.symbol(basis).scale(-1.0)).scale(self.step)).inverse()


def loop_resolvent(loop: LinearMap, step: float | Tensor) -> LoopResolvent:
    """`LoopResolvent(loop, step)`, kept on the loop where the step is a number: algorithms ask for it in every step."""
    if isinstance(step, Tensor):
        return LoopResolvent(loop, step)
    made = loop.__dict__.setdefault("_resolvents", {})
    if step not in made:
        made[step] = LoopResolvent(loop, step)
    return made[step]
