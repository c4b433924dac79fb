"""Maps built from maps: identity, scaling, composition, sum, stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from firmly.errors import NotDiagonal, ShapeError
from firmly.linear.basis import Basis
from firmly.linear.map import Bracket, LinearMap, outward
from firmly.linear.symbol import Symbol, meet


class Identity(LinearMap):
    """x -> x on tensors of the given shape."""

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape, shape)

    def _apply_map(self, x: Tensor) -> Tensor:
        return x

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return y

    def _norm(self) -> Bracket:
        return Bracket(1.0, 1.0)

    def gram_diagonal(self) -> Tensor:
        return torch.ones(())

    def _symbol(self, basis: Basis) -> Symbol:
        return basis.identity(self.domain)


class Compose(LinearMap):
    """x -> outer(inner(x)), written `outer @ inner`."""

    def __init__(self, outer: LinearMap, inner: LinearMap):
        if outer.domain != inner.codomain:
            raise ShapeError(f"cannot compose: the outer map takes {outer.domain}, the inner gives {inner.codomain}")
        super().__init__(inner.domain, outer.codomain)
        self.outer = outer
        self.inner = inner

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.inner.T(self.outer.T(y))

    def _norm(self) -> Bracket:
        if self.outer is self.inner.T:
            lower, upper = self.inner.norm()
            return outward(lower**2, upper**2)
        return super()._norm()

    def _upper(self) -> float:
        return self.outer.norm().upper * self.inner.norm().upper * (1 + 1e-15)

    def _symbol(self, basis: Basis) -> Symbol:
        return self.outer.symbol(basis) @ self.inner.symbol(basis)


class Sum(LinearMap):
    """x -> first(x) + second(x), written `first + second`."""

    def __init__(self, first: LinearMap, second: LinearMap):
        if (first.domain, first.codomain) != (second.domain, second.codomain):
            raise ShapeError(
                f"cannot add maps {first.domain} -> {first.codomain} and {second.domain} -> {second.codomain}"
            )
        super().__init__(first.domain, first.codomain)
        self.first = first
        self.second = second

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.first.T(y) + self.second.T(y)

    def _upper(self) -> float:
        return (self.first.norm().upper + self.second.norm().upper) * (1 + 1e-15)

    def _symbol(self, basis: Basis) -> Symbol:
        return self.first.symbol(basis) + self.second.symbol(basis)


class Scale(LinearMap):
    """x -> factor * of(x), written `factor * A`; the factor is a real number, or a scalar tensor that can learn."""

    factor: Tensor

    def __init__(self, factor: float | Tensor, of: LinearMap):
        super().__init__(of.domain, of.codomain)
        self.hold("factor", factor if isinstance(factor, Tensor) else torch.tensor(float(factor), dtype=torch.float64))
        if self.factor.numel() != 1 or self.factor.is_complex():
            raise ShapeError(f"Scale takes one real number, given {tuple(self.factor.shape)} of {self.factor.dtype}")
        self.of = of

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.factor.to(x.dtype) * self.of(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.factor.to(y.dtype) * self.of.T(y)

    def _norm(self) -> Bracket:
        lower, upper = self.of.norm()
        size = abs(float(self.factor.detach()))
        return outward(size * lower, size * upper)

    def gram_diagonal(self) -> Tensor | None:
        diagonal = self.of.gram_diagonal()
        return None if diagonal is None else self.factor.double() ** 2 * diagonal.to(self.factor.device).double()

    def _symbol(self, basis: Basis) -> Symbol:
        return self.of.symbol(basis).scale(self.factor)


class Stack(LinearMap):
    """x -> concatenation of A_1 x, A_2 x, ... along the channel (the first non-batch) dimension."""

    def __init__(self, maps: Sequence[LinearMap]):
        first = maps[0]
        if any(m.domain != first.domain or m.codomain[1:] != first.codomain[1:] for m in maps):
            raise ShapeError(f"cannot stack maps {[(m.domain, m.codomain) for m in maps]}: only channels may differ")
        super().__init__(first.domain, (sum(m.codomain[0] for m in maps), *first.codomain[1:]))
        self.maps = nn.ModuleList(maps)

    def _apply_map(self, x: Tensor) -> Tensor:
        return torch.cat([m(x) for m in self.maps], dim=1)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        parts = y.split([m.codomain[0] for m in self.maps], dim=1)
        return torch.stack([m.T(part) for m, part in zip(self.maps, parts)]).sum(0)

    def _upper(self) -> float:
        return math.hypot(*(m.norm().upper for m in self.maps)) * (1 + 1e-14)

    def _symbol(self, basis: Basis) -> Symbol:
        symbols = [m.symbol(basis) for m in self.maps]
        if sum(s.value.shape[1] for s in symbols) != basis.channels(self.codomain):
            raise NotDiagonal(f"the {basis.name} basis does not tell the parts of a stack to {self.codomain} apart")
        named = [s for s in symbols if s.rows is not None]
        columns = reduce(meet, (s.columns for s in named)) if named else None
        rows = reduce(meet, (columns if s.rows is None else s.rows for s in symbols))  # an identity gives what it takes
        blocks = max(s.value.shape[0] for s in symbols)
        values = [s.value.expand(blocks, -1, -1) for s in symbols]
        dtype = torch.complex128 if any(v.is_complex() for v in values) else torch.float64
        value = torch.cat([v.to(dtype) for v in values], dim=1)
        errors = [s.error.expand(blocks) for s in symbols if s.error is not None]
        error = torch.stack(errors).norm(dim=0) if basis.track else None
        return Symbol(value, error, rows, columns)
