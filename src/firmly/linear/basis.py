"""Bases in which linear maps become small blocks: `Dense`, `Fourier` and `Singular`.

A basis says how many coordinates per block a tensor has, and knows the symbols of some maps.
The maps themselves know the rest (`LinearMap.symbol`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firmly.errors import NotDiagonal
from firmly.linear.symbol import Symbol

if TYPE_CHECKING:
    from firmly.linear.map import LinearMap


class Basis:
    """Coordinates in which maps are block diagonal: `blocks` blocks, `channels(shape)` coordinates in each.

    `track=False` leaves out error bounds: for searches, whose result a tracked basis then verifies.
    """

    name: str
    blocks: int
    track: bool
    device: torch.device
    coordinates: str | None = None  # what `rows` and `columns` are called when a map does not say

    def channels(self, shape: Sequence[int]) -> int:
        """Coordinates per block of a tensor of this shape (without batch), or `NotDiagonal`."""
        raise NotImplementedError

    def symbol_of(self, linear_map: LinearMap) -> Symbol | None:
        """The symbol of a map that the basis itself knows, else None."""
        return None

    def exact(self, value: Tensor, rows: str | None = None, columns: str | None = None) -> Symbol:
        """A symbol without error."""
        return self.bounded(value, torch.zeros(1, dtype=torch.float64, device=self.device), rows, columns)

    def bounded(self, value: Tensor, error: Tensor, rows: str | None = None, columns: str | None = None) -> Symbol:
        """A symbol with the given bound of its error, (blocks,) or (1,)."""
        rows, columns = rows or self.coordinates, columns or self.coordinates
        return Symbol(value, error.detach() if self.track else None, rows, columns)

    def identity(self, shape: Sequence[int]) -> Symbol:
        """The identity, which fits any coordinates."""
        eye = torch.eye(self.channels(shape), dtype=torch.float64, device=self.device)
        return Symbol(eye[None], torch.zeros(1, dtype=torch.float64, device=self.device) if self.track else None)


class Dense(Basis):
    """The coordinates themselves: one block, all entries."""

    name = "dense"

    def __init__(self, track: bool = True, device: torch.device | str = "cpu"):
        self.blocks = 1
        self.track = track
        self.device = torch.device(device)

    def channels(self, shape: Sequence[int]) -> int:
        return math.prod(shape)


class Fourier(Basis):
    """Discrete frequencies of tensors (channel, *spatial): shift-invariant maps act on each one alone.

    For real data the frequencies f and -f give complex-conjugate blocks, so that half of them suffice; with
    `full=True` (complex data) all are kept. The coordinates are those of the *unitary* transform. Images are said to
    have "pixel" coordinates, data of a Fourier sampling "frequency" coordinates: the same blocks, but they do not mix.
    """

    name = "fourier"
    coordinates = "pixel"

    def __init__(
        self, spatial: Sequence[int], full: bool = False, track: bool = True, device: torch.device | str = "cpu"
    ):
        self.spatial = tuple(spatial)
        self.full = full
        self.track = track
        self.device = torch.device(device)
        last = self.spatial[-1] if full else self.spatial[-1] // 2 + 1
        self.grid = (*self.spatial[:-1], last)
        self.blocks = math.prod(self.grid)

    def channels(self, shape: Sequence[int]) -> int:
        if tuple(shape[-len(self.spatial) :]) != self.spatial or len(shape) > len(self.spatial) + 1:
            raise NotDiagonal(f"a tensor of shape {tuple(shape)} has no frequencies on the grid {self.spatial}")
        return shape[0] if len(shape) > len(self.spatial) else 1

    def multiplier(self, kernel: Tensor) -> Tensor:
        """Frequency response of real kernels (..., *spatial) placed with their origin at index 0: (..., blocks)."""
        axes = tuple(range(-len(self.spatial), 0))
        transform = torch.fft.fftn(kernel, dim=axes) if self.full else torch.fft.rfftn(kernel, dim=axes)
        return transform.flatten(-len(self.spatial))

    def response(self, kernel: Tensor, origin: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frequency response of x -> sum_j kernel[j] x[. + j - origin], and a bound of its error.

        For real kernels (..., *size): values (..., blocks), error (...). A sum over the few taps, axis by axis, has a
        smaller and simpler error than a fast transform: at most a few units of rounding times the sum of |kernel|.
        """
        axes = len(self.spatial)
        taps = kernel.shape[-axes:]
        kernel = kernel.to(self.device, torch.float64)
        value = kernel.to(torch.complex128)
        for size, kept, count, centre in zip(self.spatial, self.grid, taps, origin):
            value = torch.tensordot(value, _waves(size, kept, count, centre, self.device), dims=([-axes], [0]))
        rounding = 4 * torch.finfo(torch.float64).eps * (sum(taps) + 4 * axes + 4)
        return value.flatten(-axes), rounding * kernel.detach().abs().flatten(-axes).sum(-1)

    def sample(self, values: Tensor) -> Tensor:
        """Values on the full grid of frequencies (..., *spatial), restricted to the blocks kept: (..., blocks)."""
        return values[..., : self.grid[-1]].flatten(-len(self.spatial))


def _waves(size: int, kept: int, count: int, centre: int, device: torch.device) -> Tensor:
    """exp(2 pi i f (j - centre) / size), taps j against frequencies f; the angle is reduced in integers, exactly."""
    turns = (torch.arange(count, device=device) - centre)[:, None] * torch.arange(kept, device=device) % size
    turns = torch.where(2 * turns > size, turns - size, turns)
    angle = turns.to(torch.float64) * (2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


class Singular(Basis):
    """Singular vectors of one operator K: every polynomial in K and its adjoint acts by a number on each.

    `values` holds one centre per block and `radius` the half-width of the interval of singular values that
    the block stands for: 0 for a known spectrum, positive when the intervals cover [0, upper bound of ||K||].
    """

    name = "singular"

    def __init__(self, operator: LinearMap, values: Tensor, radius: Tensor, track: bool = True):
        self.operator = operator
        self.values = values  # (blocks,)
        self.radius = radius  # (blocks,)
        self.blocks = len(values)
        self.track = track
        self.device = values.device

    def channels(self, shape: Sequence[int]) -> int:
        if tuple(shape) not in (tuple(self.operator.domain), tuple(self.operator.codomain)):
            raise NotDiagonal(f"a tensor of shape {tuple(shape)} is in neither side of {self.operator}")
        return 1

    def symbol_of(self, linear_map: LinearMap) -> Symbol | None:
        if linear_map is self.operator:
            return self.bounded(self.values[:, None, None], self.radius, rows="left", columns="right")
        if linear_map is self.operator.T:
            return self.bounded(self.values[:, None, None], self.radius, rows="right", columns="left")
        return None
