"""A batch of sparse coding problems, flattened: what all solvers and the duality gap work on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.priors.penalty import Penalty


@dataclass(frozen=True)
class Problem:
    """min over z of 1/2 |D z - y|^2 + h(z) for every row of y (batch, m); codes are (batch, n)."""

    D: LinearMap
    y: Tensor  # (batch, m)
    penalty: Penalty

    @classmethod
    def of(cls, D: Tensor | LinearMap, y: Tensor, penalty: Penalty) -> Problem:
        """The problem in float64, refused with the reason if the shapes do not fit or an entry is not finite."""
        if isinstance(D, Tensor):
            finite("the dictionary", D)
            D = Dense(D.detach())
        if D.is_complex:
            raise DataError("the dictionary is complex; codes are real: stack its real and imaginary parts")
        expected = tuple(D.codomain)
        if y.dim() != len(expected) + 1 or tuple(y.shape[1:]) != expected or len(y) == 0:
            raise ShapeError(
                f"y has shape {tuple(y.shape)}, the dictionary {tuple(D.domain)} -> {expected} takes (batch, "
                f"{', '.join(map(str, expected))}) with a batch of at least one; a single problem is y[None]"
            )
        finite("y", y)
        if y.dtype not in (torch.float32, torch.float64):
            raise DataError(f"sparse coding runs in float32 or float64, given {y.dtype}; use .float()")
        D = Dense(D.weight.detach().double()) if isinstance(D, Dense) else D
        return cls(D, y.detach().double().flatten(1), penalty.on(y, math.prod(D.domain)))

    def flat_code(self, what: str, z: Tensor) -> Tensor:
        """A code (batch, *domain) as (batch, n)."""
        expected = (len(self.y), *self.D.domain)
        if tuple(z.shape) != expected:
            raise ShapeError(f"{what} has shape {tuple(z.shape)}, expected {expected}")
        finite(what, z)
        return z.detach().to(self.y.device).flatten(1)

    def apply(self, z: Tensor) -> Tensor:
        """D z, (batch, m)."""
        return self.D(z.unflatten(1, self.D.domain)).flatten(1)

    def correlate(self, r: Tensor) -> Tensor:
        """D' r, (batch, n)."""
        return self.D.T(r.unflatten(1, self.D.codomain)).flatten(1)

    def residual(self, z: Tensor) -> Tensor:
        """y - D z, (batch, m)."""
        if isinstance(self.D, Dense):
            return torch.addmm(self.y, z, self.D.weight.mT, alpha=-1)
        return self.y - self.apply(z)

    def ascend(self, u: Tensor, step: float) -> Tensor:
        """u + step D'(y - D u), (batch, n)."""
        if isinstance(self.D, Dense):
            return torch.addmm(u, self.residual(u), self.D.weight, alpha=step)
        return u + step * self.correlate(self.residual(u))

    def rows(self, chosen: Tensor) -> Problem:
        """These problems of the batch (indices or a mask)."""
        return replace(self, y=self.y[chosen], penalty=self.penalty.rows(chosen))

    def to(self, dtype: torch.dtype) -> Problem:
        """The problem in another precision; a linear map that is not a matrix follows its input by itself."""
        if self.y.dtype == dtype:
            return self
        D = Dense(self.D.weight.detach().to(dtype)) if isinstance(self.D, Dense) else self.D
        return replace(self, D=D, y=self.y.to(dtype), penalty=self.penalty.to(dtype))


def finite(what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise DataError(f"{what} has dtype {tensor.dtype}, expected real floating-point numbers; use .float()")
    if bool(torch.isfinite(tensor.sum())):  # one pass; an overflow is looked at again
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise DataError(f"{what} has {bad} of {tensor.numel()} entries that are NaN or infinite; clean it first")
