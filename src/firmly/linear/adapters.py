"""Maps of other libraries: scipy, PyLops, deepinv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, NotCertifiable, ShapeError
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.linear_function import Action, apply_linear
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.norms import krylov_lower_bound, norm_bracket
from firmly.linear.sparse import Sparse
from firmly.linear.symbol import Symbol


class External(LinearMap):
    """A map given by two functions on batches, A and its adjoint, in arithmetic of type `dtype`; made by the adapters.

    That the two are adjoint is checked on random input; `ConditionError` with the mismatch if they are not. `norm` is a
    declared upper bound of |A|: the caller vouches for it, and a vector that contradicts it raises `ConditionError`.
    Without it, maps too large for a factorisation refuse `norm()` by `NotCertifiable`.
    """

    def __init__(
        self,
        forward: Action,
        adjoint: Action,
        domain: Sequence[int],
        codomain: Sequence[int],
        dtype: torch.dtype = torch.float64,
        norm: float | None = None,
        source: object = None,
    ):
        super().__init__(domain, codomain)
        self.source = source  # registered as a child if it is a module, so that it moves and is saved with this map
        self.dtype = dtype
        self.declared_norm = norm
        self._functions = (forward, adjoint)
        self.application_error = 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-3
        self._check_adjoint()

    @property
    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def _apply_map(self, x: Tensor) -> Tensor:
        return self._call(x, *self._functions)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._call(y, *reversed(self._functions))

    def _call(self, x: Tensor, forward: Action, adjoint: Action) -> Tensor:
        if x.is_complex() and not self.is_complex:
            return torch.complex(self._call(x.real, forward, adjoint), self._call(x.imag, forward, adjoint))
        result = apply_linear(x.to(self.dtype), forward, adjoint)
        return result.to(x.dtype.to_complex() if self.is_complex else x.dtype)

    @torch.no_grad()
    def _check_adjoint(self) -> None:
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *self.domain, generator=generator, dtype=self.dtype).to(device)
        y = torch.randn(1, *self.codomain, generator=generator, dtype=self.dtype).to(device)
        image, back = self(x), self.T(y)
        if tuple(image.shape) != (1, *self.codomain) or tuple(back.shape) != (1, *self.domain):
            raise ShapeError(
                f"the map was declared {self.domain} -> {self.codomain} but gives {tuple(image.shape[1:])}, "
                f"and its adjoint {tuple(back.shape[1:])}"
            )
        left, right = (image * y.conj()).sum(), (x * back.conj()).sum()
        scale = float(image.norm() * y.norm() + x.norm() * back.norm())
        mismatch = float((left - right).abs())
        if not mismatch <= (1e-8 if self.application_error < 1e-6 else 1e-3) * scale:
            raise ConditionError(
                f"the two functions are not adjoint: <A x, y> and <x, A* y> differ by {mismatch:.3g} where |A x| |y| + "
                f"|x| |A* y| is {scale:.3g}; give the exact adjoint (an approximate inverse or filtered "
                "back-projection is none)"
            )

    def _norm(self) -> Bracket:
        try:
            bracket = norm_bracket(self)
        except NotCertifiable:
            if self.declared_norm is None:
                raise
            lower = krylov_lower_bound(self, scale=self.declared_norm)
            bracket = Bracket(lower, self.declared_norm)
        if self.declared_norm is not None and bracket.lower > self.declared_norm:
            raise ConditionError(
                f"the norm was declared to be at most {self.declared_norm:.6g}, but some vector is amplified "
                f"{bracket.lower:.6g} "
                "times; declare a true bound"
            )
        return bracket

    def _upper(self) -> float:
        raise NotCertifiable(
            f"no certified norm of a foreign map {self.domain} -> {self.codomain}: only its action is known, and it "
            "is too "
            "large for a factorisation; declare a bound that you can prove with norm=..."
        )

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, DenseBasis):
            return super()._symbol(basis)
        matrix = self.matrix().detach().to(basis.device)
        return basis.bounded(matrix[None], (self.application_error * torch.linalg.vector_norm(matrix)).reshape(1))


def from_scipy(
    operator: Any, domain: Sequence[int] | None = None, codomain: Sequence[int] | None = None, norm: float | None = None
) -> LinearMap:
    """A scipy sparse matrix or array (giving `Sparse`), or a `scipy.sparse.linalg.LinearOperator`, flattened.

    Shapes default to flat features. A LinearOperator runs on the CPU through numpy. `norm` is for operators: a declared
    upper bound.
    """
    from scipy.sparse import issparse

    if issparse(operator):
        if norm is not None:
            raise ConditionError("the norm of a sparse matrix is computed, not declared: leave norm out")
        return Sparse(operator, domain, codomain)
    rows, columns = operator.shape
    domain, codomain = domain or (columns,), codomain or (rows,)
    if (math.prod(codomain), math.prod(domain)) != (rows, columns):
        raise ShapeError(f"an operator {rows} x {columns} does not map {tuple(domain)} to {tuple(codomain)}")

    def action(product: Any, shape: Sequence[int]) -> Action:
        def act(x: Tensor) -> Tensor:
            columns = x.detach().cpu().flatten(1).mT.numpy()
            return torch.as_tensor(product(columns).T.copy(), device=x.device).reshape(-1, *shape)

        return act

    dtype = torch.as_tensor(operator.matvec(torch.zeros(columns).numpy().astype(operator.dtype or "float64"))).dtype
    forward, adjoint = action(operator.matmat, codomain), action(operator.rmatmat, domain)
    return External(forward, adjoint, domain, codomain, dtype, norm, operator)


def from_pylops(operator: Any, norm: float | None = None) -> LinearMap:
    """A PyLops operator, from its `dims` to its `dimsd` with one channel in front unless they have one axis only."""
    domain, codomain = (tuple(d) if len(d) == 1 else (1, *d) for d in (operator.dims, operator.dimsd))
    return from_scipy(operator, domain, codomain, norm)


def from_deepinv(
    physics: Any, domain: Sequence[int], codomain: Sequence[int] | None = None, norm: float | None = None
) -> LinearMap:
    """Any object with `A(x)` and `A_adjoint(y)` on batches, such as deepinv's linear physics, in its own precision.

    Its weights are taken as constants: gradients reach x, not them.
    `domain` is the shape of an image without the batch; `codomain` is found by one application if it is not given.
    """
    held = [*physics.parameters(), *physics.buffers()] if isinstance(physics, nn.Module) else []
    floating = [t.dtype for t in held if t.is_floating_point() or t.is_complex()]
    dtype = floating[0].to_real() if floating else torch.float64
    device = held[0].device if held else torch.device("cpu")
    with torch.no_grad():
        sample = physics.A(torch.zeros(1, *domain, dtype=dtype, device=device))
    if sample.is_complex():
        dtype = dtype.to_complex()
    return External(physics.A, physics.A_adjoint, domain, codomain or sample.shape[1:], dtype, norm, physics)
