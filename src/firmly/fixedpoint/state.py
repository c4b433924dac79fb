"""States of an iteration, a tensor or a tuple of tensors, as one vector for each element of the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError

UNDERFLOW = 1e-150  # squares of smaller numbers vanish in double precision


class Layout:
    """How a state is laid out: one tensor (batch, ...), or a (named) tuple of them with the same batch and dtype."""

    def __init__(self, state: Any):
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        if not parts or not all(isinstance(part, Tensor) and part.dim() >= 1 for part in parts):
            raise ShapeError(
                f"a state is a tensor (batch, ...) or a tuple of such tensors, given {type(state).__name__}"
            )
        if len({(len(part), part.dtype) for part in parts}) > 1:
            found = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            raise ShapeError(f"the tensors of a state share their batch and dtype, given {found}")
        if not (parts[0].is_floating_point() or parts[0].is_complex()):
            raise DataError(f"a state has floating-point or complex entries, given {parts[0].dtype}")
        self.kind = type(state)
        self.shapes = [part.shape[1:] for part in parts]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def flat(self, state: Any) -> Tensor:
        """(batch, entries)."""
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        if [part.shape[1:] for part in parts] != self.shapes:
            raise ShapeError(
                f"the map returns shapes {[tuple(p.shape) for p in parts]}, its state has (batch, *shape) for the "
                f"shapes {[tuple(shape) for shape in self.shapes]}"
            )
        return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], 1)

    def state(self, flat: Tensor) -> Any:
        parts = [p.reshape(len(flat), *shape) for p, shape in zip(flat.split(self.sizes, 1), self.shapes)]
        if issubclass(self.kind, Tensor):
            return parts[0]
        return self.kind(*parts) if hasattr(self.kind, "_fields") else self.kind(parts)


def norms(flat: Tensor) -> Tensor:
    """The Euclidean norm of every row: (batch,)."""
    return torch.linalg.vector_norm(flat, dim=1)


def relative_residual(image: Tensor, x: Tensor) -> Tensor:
    """|T(x) - x| / max(|T(x)|, |x|) of every row, 0 where both vanish, NaN where a norm is not finite.

    Squares of large and of small numbers leave the range of a precision before the numbers do. So norms are taken in
    double precision; where one overflows x grows without bound, and where all underflow only equality counts.
    """
    wide = torch.complex128 if x.is_complex() else torch.float64
    size = torch.maximum(*(torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in (image, x)))
    size = torch.where(torch.isfinite(size), size, torch.nan)
    ratio = torch.linalg.vector_norm(image - x, dim=1, dtype=wide) / size
    return torch.where(size < UNDERFLOW, (image != x).any(1), ratio).to(x.real.dtype)
