"""Convolutions between features on grids of several scales, as one shift-invariant map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear.basis import Basis
from firmly.linear.convolution import Convolution
from firmly.linear.map import LinearMap
from firmly.linear.symbol import Symbol


class Tier(NamedTuple):
    """Features (channels, *scale * grid), where `grid` is that of the coarsest tier."""

    channels: int
    scale: int


class Tiers(LinearMap):
    """Circular convolutions between tiers, each from a tier to one that is as fine or coarser:

        y_i[o, n] = sum_j sum_c sum_t K_ij[o, c, t] x_j[c, (s_j / s_i) n + t - centre],    centre = size // 2,

    a convolution with stride s_j / s_i, for tiers of scales s. A tier of scale s is stored by its phases, the s^d
    subgrids of spacing s, as `phases` makes them: (channels s^d, *grid). The map takes and gives the tiers of `domain`
    and of `codomain` stacked along the channels, on the grid of the coarsest scale, 1. Shifts of that grid commute with
    it, so that it has a matrix for every frequency of that grid. Kernels K_ij are (out, in, *size) under the key
    (i, j); blocks that are not named vanish. Raises `ShapeError` for scales and kernels that do not fit.
    Source: P. P. Vaidyanathan, Multirate systems and filter banks, 1993, chapter 4 (polyphase components).
    """

    def __init__(
        self,
        kernels: Mapping[tuple[int, int], Tensor],
        domain: Sequence[Tier],
        codomain: Sequence[Tier],
        grid: Sequence[int],
    ):
        axes = len(grid)
        if not kernels:
            raise ShapeError("tiers are connected by at least one block")
        for (i, j), kernel in kernels.items():
            if not (0 <= i < len(codomain) and 0 <= j < len(domain)):
                raise ShapeError(f"block {i, j} of {len(codomain)} x {len(domain)} tiers")
            into, of = codomain[i], domain[j]
            if of.scale % into.scale:
                raise ShapeError(f"block {i, j} leads from scale {of.scale} to {into.scale}, which does not divide it")
            if kernel.dim() != axes + 2 or tuple(kernel.shape[:2]) != (into.channels, of.channels):
                raise ShapeError(
                    f"block {i, j} takes a kernel ({into.channels}, {of.channels}, *size) with {axes} axes of size, "
                    f"given {tuple(kernel.shape)}"
                )
        super().__init__(*((sum(t.channels * t.scale**axes for t in tiers), *grid) for tiers in (domain, codomain)))
        self.tiers = tuple(domain), tuple(codomain)
        self.keys = tuple(kernels)
        for (i, j), kernel in kernels.items():
            self.hold(f"kernel_{i}_{j}", kernel)

    def convolution(self) -> Convolution:
        """The map as a convolution of phases on the coarsest grid."""
        axes, grid = len(self.domain) - 1, self.domain[1:]
        domain, codomain = self.tiers
        kernels = {key: getattr(self, f"kernel_{key[0]}_{key[1]}") for key in self.keys}
        like = next(iter(kernels.values()))
        reach = 0
        for (i, j), kernel in kernels.items():
            for size in kernel.shape[2:]:
                ahead = domain[j].scale - domain[j].scale // codomain[i].scale + size - 1 - size // 2
                reach = max(reach, ahead // domain[j].scale, -(-(size // 2) // domain[j].scale))
        rows = []
        for i, into in enumerate(codomain):
            row = []
            for j, of in enumerate(domain):
                kernel = kernels.get((i, j))
                if kernel is None:
                    shape = into.channels * into.scale**axes, of.channels * of.scale**axes
                    row.append(like.new_zeros(*shape, *[2 * reach + 1] * axes))
                else:
                    row.append(_of_phases(kernel, into.scale, of.scale, reach))
            rows.append(torch.cat(row, 1))
        return Convolution(torch.cat(rows), (self.domain[0], *grid))

    def _apply_map(self, x: Tensor) -> Tensor:
        return self.convolution()(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self.convolution().T(y)

    def _upper(self) -> float:
        return self.convolution()._upper()

    def _symbol(self, basis: Basis) -> Symbol:
        return self.convolution().symbol(basis)


def _of_phases(kernel: Tensor, into: int, of: int, reach: int) -> Tensor:
    """The kernel (out, in, *size) between tiers of these scales, between their phases: (out into^d, in of^d, *taps).

    Phase q of n = into N + q reads x at stride n + t - centre = of (N + T) + p: one tap T and one phase p.
    """
    axes, stride = kernel.dim() - 2, of // into
    out, channels = kernel.shape[:2]
    value = kernel
    for size in kernel.shape[2:]:  # takes the first axis of taps, appends (phase of the output, of the input, tap)
        position = stride * torch.arange(into)[:, None] + torch.arange(size) - size // 2
        place = torch.zeros(size, into, of, 2 * reach + 1, dtype=kernel.dtype)
        t, q = torch.arange(size)[None].expand(into, size), torch.arange(into)[:, None].expand(into, size)
        place[t, q, position % of, position // of + reach] = 1.0
        value = torch.tensordot(value, place.to(kernel.device), dims=([2], [0]))
    order = [0, *range(2, 2 + 3 * axes, 3), 1, *range(3, 2 + 3 * axes, 3), *range(4, 2 + 3 * axes, 3)]
    return value.permute(order).reshape(out * into**axes, channels * of**axes, *[2 * reach + 1] * axes)


def phases(x: Tensor, scale: int) -> Tensor:
    """(batch, channels, *scale * grid) as (batch, channels scale^d, *grid): the subgrids of spacing `scale`."""
    axes = x.dim() - 2
    split = x.reshape(*x.shape[:2], *(n for size in x.shape[2:] for n in (size // scale, scale)))
    order = [0, 1, *range(3, 2 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)]
    return split.permute(order).reshape(x.shape[0], -1, *(size // scale for size in x.shape[2:]))


def from_phases(x: Tensor, scale: int) -> Tensor:
    """The inverse of `phases`."""
    axes = x.dim() - 2
    split = x.reshape(x.shape[0], -1, *[scale] * axes, *x.shape[2:])
    order = [0, 1, *(place for a in range(axes) for place in (2 + axes + a, 2 + a))]
    return split.permute(order).reshape(x.shape[0], split.shape[1], *(size * scale for size in x.shape[2:]))


def halved(grid: Sequence[int], times: int) -> tuple[int, ...]:
    """The grid after so many halvings, which all have to be even: `ShapeError` otherwise."""
    if any(size % 2**times for size in grid):
        raise ShapeError(f"a grid {tuple(grid)} cannot be halved {times} times: every size is a multiple of {2**times}")
    return tuple(math.ceil(size / 2**times) for size in grid)
