"""Linear maps with an adjoint, a norm that can be trusted, and an algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import NotCertifiable, NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Dense
from firmly.linear.symbol import Symbol

Shape = tuple[int, ...]


class Bracket(NamedTuple):
    """A certified interval: `lower <= true value <= upper`."""

    lower: float
    upper: float


def outward(lower: float, upper: float) -> Bracket:
    """The bracket, widened by the rounding of the few operations that its ends came from."""
    return Bracket(max(lower * (1 - 1e-15), 0.0), upper * (1 + 1e-15))


class LinearMap(nn.Module):
    """A linear map between spaces of tensors of shapes `domain` and `codomain` (both without the batch).

    A subclass gives `_apply_map` and `_apply_adjoint` (both on batched tensors), and where it can `_norm` and
    `_symbol`; it keeps its tensors with `hold`. It computes in the precision of its input, and maps complex input
    complex-linearly. `A(x)` applies, `A.T` is the adjoint map with `A.T.T is A`, `A @ B` composes, `A + B` adds, `2.0 *
    A` scales.
    """

    application_error = 1e-10
    """Bound of the rounding of one application in float64, relative to the norm: sums of fewer than 1e5 products."""

    def __init__(self, domain: Sequence[int], codomain: Sequence[int]):
        super().__init__()
        self.domain: Shape = tuple(int(n) for n in domain)
        self.codomain: Shape = tuple(int(n) for n in codomain)
        self.__dict__["_adjoint"] = None  # not a registered child: it would contain its own parent

    def hold(self, name: str, value: Tensor) -> None:
        """Keep a tensor of the map under this name: a parameter as parameter, any other as buffer."""
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)

    @property
    def is_complex(self) -> bool:
        """Whether the map gives complex data also for real input; so does a map built from such a map."""
        return any(m.is_complex for m in self.children() if isinstance(m, LinearMap))

    # -- what a subclass provides ------------------------------------------------------------------------------

    def _apply_map(self, x: Tensor) -> Tensor:  # (batch, *domain) -> (batch, *codomain)
        raise NotImplementedError

    def _apply_adjoint(self, y: Tensor) -> Tensor:  # (batch, *codomain) -> (batch, *domain)
        raise NotImplementedError

    def _norm(self) -> Bracket:
        from firmly.linear.norms import norm_bracket

        return norm_bracket(self)

    def _upper(self) -> float:
        """A proved upper bound of the norm, for maps too large for `norm_bracket` to treat exactly."""
        raise NotCertifiable(
            f"no certified norm of {self._get_name()} {self.domain} -> {self.codomain}: it is too large for a "
            "factorisation "
            "and no structure of it is known"
        )

    def _symbol(self, basis: Basis) -> Symbol:
        if isinstance(basis, Dense):
            return matrix_symbol(self, basis)
        raise NotDiagonal(f"{self._get_name()} is not diagonal in the {basis.name} basis")

    def gram_diagonal(self) -> Tensor | None:
        """d with A*A x = d * x entry by entry (d broadcasts to the domain) if the map is known to be so, else None."""
        return None

    def same_spectrum(self) -> LinearMap:
        """A smaller map with the same singular values, up to how often each occurs, if one is known."""
        return self

    # -- what a user calls -------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """A x for a batch x of shape (batch, *domain)."""
        return apply(self, x)

    @property
    def T(self) -> LinearMap:
        """The adjoint map: <A x, y> = <x, A.T y>."""
        if self.__dict__["_adjoint"] is None:
            self.__dict__["_adjoint"] = Adjoint(self)
        return self.__dict__["_adjoint"]

    @torch.no_grad()
    def norm(self) -> Bracket:
        """A certified interval for the operator norm max |A x| / |x|, computed in float64."""
        return self._norm()

    def symbol(self, basis: Basis) -> Symbol:
        """The action of this map on every block of `basis`; raises `NotDiagonal` if blocks mix."""
        known = basis.symbol_of(self)
        return self._symbol(basis) if known is None else known

    def matrix(self) -> Tensor:
        """The matrix of the map on flattened tensors, in float64 (complex128 for complex maps); for small maps."""
        return matrix_of(self)

    def __matmul__(self, other: LinearMap) -> LinearMap:
        from firmly.linear.algebra import Compose

        return Compose(self, other)

    def __add__(self, other: LinearMap) -> LinearMap:
        from firmly.linear.algebra import Sum

        return Sum(self, other)

    def __rmul__(self, factor: float) -> LinearMap:
        from firmly.linear.algebra import Scale

        return Scale(factor, self)

    def extra_repr(self) -> str:
        return f"{self.domain} -> {self.codomain}"


def apply(linear_map: LinearMap, x: Tensor) -> Tensor:
    """linear_map(x), open to `__torch_function__`: a traced input records the map instead of running it."""
    if has_torch_function((x,)):
        return handle_torch_function(apply, (x,), linear_map, x)
    if tuple(x.shape[1:]) != linear_map.domain:
        raise ShapeError(
            f"{linear_map._get_name()} takes (batch, {', '.join(map(str, linear_map.domain))}), given {tuple(x.shape)}"
            "; the first dimension is the batch (use x[None] for a single sample)"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise ShapeError(f"{linear_map._get_name()} takes floating-point data, given {x.dtype}; use x.float()")
    return linear_map._apply_map(x)


class Adjoint(LinearMap):
    """The adjoint of another map; made by `A.T`, never directly."""

    def __init__(self, of: LinearMap):
        super().__init__(of.codomain, of.domain)
        self.of = of

    @property
    def T(self) -> LinearMap:
        return self.of

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.of._apply_adjoint(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.of._apply_map(y)

    def _norm(self) -> Bracket:
        return self.of._norm()

    def _symbol(self, basis: Basis) -> Symbol:
        return self.of.symbol(basis).H


def matrix_of(linear_map: LinearMap) -> Tensor:
    size = math.prod(linear_map.domain)
    dtype = torch.complex128 if linear_map.is_complex else torch.float64
    tensors = [*linear_map.parameters(), *linear_map.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    columns = linear_map(torch.eye(size, dtype=dtype, device=device).reshape(size, *linear_map.domain))
    return columns.reshape(size, -1).T


def matrix_symbol(linear_map: LinearMap, basis: Basis) -> Symbol:
    matrix = linear_map.matrix().to(basis.device)
    eps = torch.finfo(torch.float64).eps
    error = 8 * eps * (math.log2(matrix.numel() + 2)) * torch.linalg.vector_norm(matrix.detach())
    return basis.bounded(matrix[None], error.reshape(1))
