"""Products with a matrix for every frequency, by real matrix products alone: fast for many channels on small grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from firmly.errors import NotDiagonal
from firmly.linear.basis import Dense, Fourier
from firmly.linear.map import LinearMap
from firmly.linear.memo import Memo

LARGEST_DENSE = 4096  # entries of a domain whose matrix is inverted as a whole
LONGEST_AXIS = 128  # up to which a transform is a product with its matrix


class Blocks:
    """A map from a space (channel, *spatial) to itself, applied by its symbols: a matrix for every frequency, or one.

    The matrices are kept while no gradients are recorded and the tensors of the map are unchanged. `turn` brings real
    data to the layout (*reversed spatial, channel, batch), in which transforms and products with all matrices are real
    matrix products without a transposition between them; `product` takes and gives this layout. Raises `NotDiagonal`
    for a map that is not shift-invariant and has more than 4096 entries.
    """

    def __init__(self, linear_map: LinearMap):
        self.map = linear_map
        self._remembered: dict[tuple[torch.dtype, torch.device], Memo[Tensor]] = {}

    def __call__(self, x: Tensor, adjoint: bool = False) -> Tensor:
        if x.is_complex():
            return torch.complex(self(x.real, adjoint), self(x.imag, adjoint))
        return reversed_axes(self.product(turn(x), adjoint))

    def product(self, x: Tensor, adjoint: bool = False) -> Tensor:
        """The map, or its adjoint, of data in the layout of `turn`."""
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x, self.matrices(x).mT if adjoint else self.matrices(x))

    def _product(self, x: Tensor, blocks: Tensor) -> Tensor:
        batch = x.shape[-1]
        if len(blocks) == 1 and blocks.shape[1] == x.shape[:-1].numel():
            return (blocks[0] @ x.reshape(-1, batch)).reshape(x.shape)
        channels, spatial = x.shape[-2], x.shape[:-2]
        waves = transformed(x, len(spatial))
        image = torch.bmm(blocks, waves.reshape(-1, 2 * channels, batch))
        return restored(image.reshape(waves.shape), spatial)

    def matrices(self, like: Tensor) -> Tensor:
        """(blocks, 2 channel, 2 channel), real matrices of real and imaginary parts, in the order of `transformed`, or
        (1, entries, entries)."""
        tensors = (*self.map.parameters(), *self.map.buffers())
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._computed(like)
        kept = self._remembered.setdefault((like.dtype, like.device), Memo())
        return kept.get(self.map, lambda: self._computed(like))

    def _computed(self, like: Tensor) -> Tensor:
        domain = self.map.domain
        if domain[1:]:
            fourier = Fourier(domain[1:], track=False, device=like.device)
            try:
                value = self.map.symbol(fourier).value.expand(fourier.blocks, -1, -1)
            except NotDiagonal:
                pass
            else:
                value = value.to(torch.promote_types(like.dtype, torch.complex64))
                value = value.reshape(*fourier.grid, *value.shape[1:])
                axes = len(fourier.grid)
                value = value.permute(*reversed(range(axes)), axes, axes + 1).flatten(0, axes - 1)
                real, imaginary = value.real, value.imag
                return torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
        if math.prod(domain) > LARGEST_DENSE:
            raise NotDiagonal(
                f"no resolvent of a loop on {domain}: it is not shift-invariant and has over {LARGEST_DENSE} entries; "
                "use circular convolutions, or forward-backward splitting"
            )
        value = self.map.symbol(Dense(track=False, device=like.device)).value
        return value.to(like.dtype)


def turn(x: Tensor) -> Tensor:
    """(batch, channel, *spatial) to (*reversed spatial, channel, batch), or back, contiguous in memory."""
    return reversed_axes(x).contiguous()


def reversed_axes(x: Tensor) -> Tensor:
    """The same numbers in the same memory, with the axes in reversed order."""
    return x.permute(*reversed(range(x.dim())))


def transformed(x: Tensor, axes: int) -> Tensor:
    """The discrete Fourier transform of real data over its first axes: (*frequencies, 2, ...), the first frequency
    halved, 2 for the real and the imaginary part."""
    spatial, rest = x.shape[:axes], x.shape[axes:]
    if max(spatial) > LONGEST_AXIS:
        return torch.view_as_real(torch.fft.rfftn(x, dim=(*range(1, axes), 0))).movedim(-1, axes)
    y = _half(spatial[0], x.dtype, x.device) @ x.reshape(spatial[0], -1)  # rows: frequency, part
    done = [spatial[0] // 2 + 1]
    for size in spatial[1:]:
        y = _full(size, x.dtype, x.device) @ y.reshape(math.prod(done), 2 * size, -1)  # columns: part, position
        done.append(size)
    return y.reshape(*done, 2, *rest)


def restored(y: Tensor, spatial: Sequence[int]) -> Tensor:
    """The inverse of `transformed`: (*frequencies, 2, ...) to (*spatial, ...)."""
    axes = len(spatial)
    rest = y.shape[axes + 1 :]
    if max(spatial) > LONGEST_AXIS:
        waves = torch.view_as_complex(y.movedim(axes, -1).contiguous())
        return torch.fft.irfftn(waves, s=(*spatial[1:], spatial[0]), dim=(*range(1, axes), 0))
    done = [spatial[0] // 2 + 1, *spatial[1:]]
    for size in reversed(spatial[1:]):
        done.pop()
        y = _full(size, y.dtype, y.device).mT @ y.reshape(math.prod(done), 2 * size, -1)
    inverse = _half_inverse(spatial[0], y.dtype, y.device) / math.prod(spatial[1:])
    return (inverse @ y.reshape(2 * done[0], -1)).reshape(*spatial, *rest)


def _waves(size: int, frequencies: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi f j / size, (frequency, position), the angle reduced in integers."""
    turns = torch.arange(frequencies)[:, None] * torch.arange(size) % size
    angle = turns.double() * (2 * math.pi / size)
    return angle.cos(), angle.sin()


@lru_cache(maxsize=64)
def _half(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """From real values: rows (frequency up to size // 2, part)."""
    cos, sin = _waves(size, size // 2 + 1)
    return torch.stack([cos, -sin], 1).flatten(0, 1).to(device, dtype)


@lru_cache(maxsize=64)
def _full(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """From complex values: rows (frequency, part), columns (part, position)."""
    cos, sin = _waves(size, size)
    real, imaginary = torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)
    return torch.stack([real, imaginary], 1).flatten(0, 1).to(device, dtype)


@lru_cache(maxsize=64)
def _half_inverse(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Back to real values: the missing frequencies are conjugates of those that are there."""
    cos, sin = _waves(size, size // 2 + 1)
    weights = torch.full((size // 2 + 1, 1), 2.0, dtype=torch.float64)
    weights[0] = 1.0
    if size % 2 == 0:
        weights[-1] = 1.0
    return (torch.stack([cos * weights, -sin * weights], 1).flatten(0, 1).mT / size).contiguous().to(device, dtype)
