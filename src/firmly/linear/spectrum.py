"""The singular values of a map: all of them where they can be known, else intervals that cover them."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ConditionError
from firmly.linear.basis import Singular
from firmly.linear.map import LinearMap
from firmly.linear.norms import EPS, exact_symbol
from firmly.linear.symbol import Symbol

MERGE = 1e-11  # relative width within which singular values share a block


def singular_basis(operator: LinearMap, cells: int | None = None, track: bool = True) -> Singular:
    """The basis in which every polynomial in `operator` and its adjoint acts by one number per singular value.

    With `cells=None` the spectrum is computed, with proved error bounds, from the operator's diagonal, Fourier symbol
    or matrix; singular values that agree to 1e-11 share a block, and 0 is among them (for null spaces). Where that
    cannot be done, or if `cells` is given, that many equal intervals cover [0, operator.norm().upper], and what is
    proved holds for any operator with that norm. `ConditionError` for fewer than one cell.
    """
    if cells is None:
        diagonal = operator.gram_diagonal()
        if diagonal is not None:
            squares = diagonal.detach().to("cpu", torch.float64).flatten()
            return Singular(operator, *_merged(squares.sqrt(), 4 * EPS * squares.sqrt()), track)
        symbol = exact_symbol(operator)
        if symbol is not None:
            return Singular(operator, *_merged(*singular_values(symbol)), track)
        cells = 8192
    if cells < 1:
        raise ConditionError(f"the interval of singular values is cut into at least one cell, given {cells}")
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64) * operator.norm().upper
    centres, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    return Singular(operator, centres, radius + 4 * EPS * edges[1:], track)


def singular_values(symbol: Symbol) -> tuple[Tensor, Tensor]:
    """All singular values of all blocks, and a bound of the error of each; both flat.

    From any computed U S V*: with U and V orthonormal up to u and v, and B = U S V* + R, Weyl's inequality gives
    |sigma_i(B) - S_i| <= |R| + S_1 (u + v + u v).
    """
    value = symbol.value.detach().to("cpu", torch.complex128 if symbol.value.is_complex() else torch.float64)
    if symbol.error is None:
        raise ConditionError("certified singular values need a symbol with error bounds: use a basis with track=True")
    error = symbol.error.detach().to("cpu").expand(len(value))
    if min(value.shape[1:]) == 1:
        sizes = torch.linalg.vector_norm(value, dim=(1, 2))
        return sizes, error + 4 * (value[0].numel() + 4) * EPS * sizes
    left, values, right = torch.linalg.svd(value, full_matrices=False)
    count = values.shape[1]
    rounding = 4 * (max(value.shape[1:]) + 4) * EPS
    eye = torch.eye(count, dtype=value.dtype)
    size = torch.linalg.vector_norm(value, dim=(1, 2))
    u = torch.linalg.vector_norm(left.mH @ left - eye, dim=(1, 2)) + rounding * 2 * count
    v = torch.linalg.vector_norm(right @ right.mH - eye, dim=(1, 2)) + rounding * 2 * count
    residual = torch.linalg.vector_norm((left * values[:, None]) @ right - value, dim=(1, 2))
    residual = residual + rounding * 4 * count * size
    bound = residual + values[:, 0] * (u + v + u * v) + error
    return values.flatten(), bound[:, None].expand_as(values).flatten()


def _merged(values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of the few intervals that hold all values with their errors, and 0."""
    values, error = torch.cat([values.new_zeros(1), values]), torch.cat([error.new_zeros(1), error])
    top = float(values.max())
    if top == 0:
        return values.new_zeros(1), error.max().reshape(1)
    _, block = torch.unique((values / (MERGE * top)).round(), return_inverse=True)
    count = int(block.max()) + 1
    low = values.new_full((count,), torch.inf).scatter_reduce(0, block, values - error, "amin")
    high = values.new_zeros(count).scatter_reduce(0, block, values + error, "amax")
    low = low.clamp(min=0)  # a singular value is not negative
    centre = (low + high) / 2
    return centre, (high - low) / 2 + 4 * EPS * high
