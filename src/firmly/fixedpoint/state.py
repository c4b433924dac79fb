"""States of an iteration, a tensor or a tuple of tensors, as one vector for each element of the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from firmly.errors import DataError, ShapeError


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
    """|T(x) - x| / max(|T(x)|, |x|) of every row, 0 where both vanish, NaN where an entry is not finite.

    The squares in a norm overflow and underflow long before the numbers do, and a difference that vanishes or a size
    that is infinite would look like convergence: such rows are scaled first.
    """
    size = torch.maximum(norms(image), norms(x))
    if torch.compiler.is_exporting() or bool(in_range(size).all()):
        return torch.where(size > 0, norms(image - x) / size, size)
    scale = torch.maximum(image.abs().amax(1), x.abs().amax(1))
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    by = torch.where(scale == 0, 1, scale)[:, None]
    image, x = image / by, x / by
    size = torch.maximum(norms(image), norms(x))
    return torch.where(size == 0, 0, norms(image - x) / size)


def in_range(size: Tensor) -> Tensor:
    """Whether a difference that matters beside a norm of this size has a norm of its own."""
    limits = torch.finfo(size.dtype)
    return (size > limits.tiny**0.5 / limits.eps) & torch.isfinite(size)


def wants_derivative(tensor: Tensor) -> bool:
    """Does a derivative of it matter to somebody: backwards, or forwards as the tangent that it carries?"""
    return tensor.requires_grad or carries_tangent(tensor)


def carries_tangent(tensor: Tensor) -> bool:
    """Is it differentiated forwards?"""
    return unpack_dual(tensor).tangent is not None
