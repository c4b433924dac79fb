"""The discrete gradient by forward differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from firmly.errors import NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol

Border = Literal["neumann", "circular"]


class Gradient(LinearMap):
    """(D x)[c * d + a, i] = x[c, i + e_a] - x[c, i] along each of the d spatial axes a.

    Images (c, *spatial) have gradients (c * d, *spatial).
    At the last pixel of an axis the difference is 0 ("neumann", the usual discretisation of total variation) or goes to
    the first pixel ("circular", diagonal in Fourier). Norms in closed form: |D|^2 = sum_a 4 cos(pi / (2 n_a))^2 for
    "neumann", and for "circular" 4 in place of the terms with even n_a; so |D|^2 <= 4 d.
    Source: Chambolle, An algorithm for total variation minimization and applications, 2004.
    """

    def __init__(self, shape: Sequence[int], padding: Border = "neumann"):
        if len(shape) < 2:
            raise ShapeError(f"Gradient takes a domain (channel, *spatial), given {tuple(shape)}")
        if padding not in get_args(Border):
            raise ValueError(f"unknown padding {padding!r}: choose one of {get_args(Border)}")
        self.axes = len(shape) - 1
        super().__init__(shape, (shape[0] * (len(shape) - 1), *shape[1:]))
        self.padding: Border = padding

    def _apply_map(self, x: Tensor) -> Tensor:
        return torch.stack([self._difference(x, axis) for axis in range(2, x.dim())], dim=2).flatten(1, 2)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        parts = y.unflatten(1, (self.domain[0], self.axes)).unbind(2)
        result = torch.zeros_like(parts[0])
        for axis, part in enumerate(parts, start=2):
            result = result + self._divergence(part, axis)
        return result

    def _difference(self, x: Tensor, axis: int) -> Tensor:
        if self.padding == "circular":
            return x.roll(-1, axis) - x
        return torch.cat([x.diff(dim=axis), torch.zeros_like(x.narrow(axis, 0, 1))], dim=axis)

    def _divergence(self, y: Tensor, axis: int) -> Tensor:
        if self.padding == "circular":
            return y.roll(1, axis) - y
        zero = torch.zeros_like(y.narrow(axis, 0, 1))
        inner = y.narrow(axis, 0, y.shape[axis] - 1)
        return torch.cat([zero, inner], dim=axis) - torch.cat([inner, zero], dim=axis)

    def _norm(self) -> Bracket:
        square = 0.0
        for n in self.domain[1:]:
            even = self.padding == "circular" and n % 2 == 0
            square += 0.0 if n == 1 else 4.0 if even else 4 * math.cos(math.pi / (2 * n)) ** 2
        return Bracket(math.sqrt(square) * (1 - 1e-14), math.sqrt(square) * (1 + 1e-14))

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, Fourier):
            return super()._symbol(basis)
        if self.padding != "circular" or basis.spatial != self.domain[1:]:
            raise NotDiagonal(
                f"Gradient with {self.padding} border on {self.domain} is not diagonal in Fourier on {basis.spatial}; "
                "padding='circular' is"
            )
        kernels = torch.zeros(self.axes, *[2] * self.axes, dtype=torch.float64)
        for axis in range(self.axes):
            kernels[(axis, *[0] * self.axes)] = -1.0
            kernels[(axis, *[int(a == axis) for a in range(self.axes)])] = 1.0
        response, error = basis.response(kernels, [0] * self.axes)  # (axes, blocks)
        eye = torch.eye(self.domain[0], dtype=torch.float64, device=basis.device)
        value = torch.kron(eye, response.T[:, :, None].contiguous())
        return basis.bounded(value, torch.linalg.vector_norm(error).reshape(1))
