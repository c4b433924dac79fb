"""Maps built from maps: identity, scaling, composition, sum, stack, and the resolvent (A*A + r I)^-1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.errors import ShapeError
from firmly.linear.basis import Basis
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol


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

    def _symbol(self, basis: Basis) -> Symbol:
        return basis.identity(self.domain)


class Compose(LinearMap):
    """x -> outer(inner(x)), written `outer @ inner`."""

    def __init__(self, outer: LinearMap, inner: LinearMap):
        if outer.domain != inner.codomain:
            raise ShapeError(f"cannot compose: the outer map takes {outer.domain}, the inner one gives {inner.codomain}")
        super().__init__(inner.domain, outer.codomain)
        self.outer = outer
        self.inner = inner

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.inner.T(self.outer.T(y))

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

    def _symbol(self, basis: Basis) -> Symbol:
        return self.first.symbol(basis) + self.second.symbol(basis)


class Scale(LinearMap):
    """x -> factor * of(x), written `factor * A`."""

    def __init__(self, factor: float | Tensor, of: LinearMap):
        super().__init__(of.domain, of.codomain)
        self.factor = factor
        self.of = of

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.factor * self.of(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.of.T(y)

    def _norm(self) -> Bracket:
        lower, upper = self.of._norm()
        size = abs(float(self.factor))
        return Bracket(size * lower, size * upper)

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

    def _symbol(self, basis: Basis) -> Symbol:
        basis.channels(self.codomain)
        symbols = [m.symbol(basis) for m in self.maps]
        blocks = max(s.value.shape[0] for s in symbols)
        values = [s.value.expand(blocks, -1, -1) for s in symbols]
        dtype = torch.complex128 if any(v.is_complex() for v in values) else torch.float64
        value = torch.cat([v.to(dtype) for v in values], dim=1)
        errors = [s.error for s in symbols]
        error = None if any(e is None for e in errors) else torch.stack([e.expand(blocks) for e in errors]).norm(dim=0)
        return Symbol(value, error, symbols[0].rows, symbols[0].columns)
