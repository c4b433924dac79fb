"""All blocks of a system in a basis, merged where they are equal and worked through in pieces.

Symmetric kernels give the same block at many frequencies. One of them stands for its group, with error bounds
enlarged by how far the others are from it, so that what is proved for it holds for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from firmly.certificates.blocks import Blocks, Form, sweep
from firmly.certificates.system import Nonlinear, System
from firmly.linear.basis import Basis
from firmly.linear.map import Adjoint, LinearMap
from firmly.linear.symbol import Symbol

PIECE_ENTRIES = 2**19  # of all rows of one piece: what fits in the cache is worked through fastest
KEPT_ENTRIES = 2**26  # symbols up to this size are kept; beyond it they are computed again for every piece
SEARCH_ENTRIES = 2**24  # of the blocks that a search looks at


class Family:
    """The blocks of `system` in `basis`: `parts()` gives all of them, piece by piece, `blocks(index)` some."""

    def __init__(self, system: System, basis: Basis):
        self.system = system
        self.basis = basis
        self.representatives = torch.arange(basis.blocks)
        self.group = torch.arange(basis.blocks)  # position among the representatives of the one that stands for a block
        self._symbols: dict[int, Symbol] = {}
        originals = {id(m): m for m in (m.of if isinstance(m, Adjoint) else m for m in system.maps)}
        if sum(self._entries(m) for m in originals.values()) <= KEPT_ENTRIES:
            self._symbols = {key: linear_map.symbol(basis) for key, linear_map in originals.items()}
            self._merge()

    def __len__(self) -> int:
        return len(self.representatives)

    def blocks(self, index: Tensor, form: Form = "open") -> Blocks:
        """The blocks at some positions of `representatives`."""
        return sweep(self.system, Selection(self, index), form)

    def parts(self, form: Form = "open") -> Iterator[Blocks]:
        """All blocks, in pieces."""
        for piece in torch.arange(len(self)).split(max(1, PIECE_ENTRIES // self.block_entries)):
            yield self.blocks(piece, form)

    def search_index(self) -> Tensor:
        """Evenly spread blocks, as many as a search holds at once."""
        count = min(len(self), max(64, SEARCH_ENTRIES // self.block_entries))
        return torch.linspace(0, len(self) - 1, count).round().long().unique()

    @property
    def block_entries(self) -> int:
        """Entries of the rows of all z_i and of the output on one block."""
        nodes = self.system.nodes
        nonlinear = [n for n in nodes if isinstance(n, Nonlinear)]
        channels = self.basis.channels
        height = channels(nodes[self.system.output].shape) + sum(channels(nodes[n.parent].shape) for n in nonlinear)
        return height * sum(channels(n.shape) for n in [*self.system.inputs, *nonlinear])

    def symbol(self, linear_map: LinearMap) -> Symbol:
        """The symbol of a map on the representatives, with errors that cover the blocks that they stand for."""
        if isinstance(linear_map, Adjoint):
            return self.symbol(linear_map.of).H
        known = self._symbols.get(id(linear_map))
        return linear_map.symbol(self.basis) if known is None else known

    def _entries(self, linear_map: LinearMap) -> int:
        return self.basis.blocks * self.basis.channels(linear_map.domain) * self.basis.channels(linear_map.codomain)

    def _merge(self) -> None:
        """Group blocks on which all symbols agree to twelve digits, by two random projections of them."""
        generator = torch.Generator().manual_seed(0)
        marks = torch.zeros(self.basis.blocks, 2, dtype=torch.float64)
        for symbol in self._symbols.values():
            value = symbol.value.detach().flatten(1)
            value = value / value.abs().max().clamp(min=1e-300)
            for part in (value.real, value.imag) if value.is_complex() else (value,):
                marks = marks + part @ torch.randn(part.shape[1], 2, generator=generator, dtype=torch.float64)
        _, group = torch.unique(torch.round(marks * 1e12).to(torch.int64), dim=0, return_inverse=True)
        count = int(group.max()) + 1
        first = torch.full((count,), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), reduce="amin")
        self.representatives, self.group = first, group
        self._symbols = {key: self._merged(symbol, group) for key, symbol in self._symbols.items()}

    def _merged(self, symbol: Symbol, group: Tensor) -> Symbol:
        if symbol.value.shape[0] == 1:
            return symbol
        value, error = symbol.value[self.representatives], symbol.error
        if error is not None:
            away = torch.linalg.vector_norm(symbol.value.detach() - value.detach()[group], dim=(1, 2))
            zeros = torch.zeros(len(value), dtype=torch.float64)
            error = zeros.scatter_reduce(0, group, error + away * (1 + 1e-12), reduce="amax")
        return Symbol(value, error, symbol.rows, symbol.columns)


class Selection(Basis):
    """Some blocks of a family, as a basis."""

    def __init__(self, family: Family, index: Tensor):
        self.family = family
        self.index = index
        self.name = family.basis.name
        self.blocks = len(index)
        self.track = family.basis.track
        self.device = family.basis.device
        self.coordinates = family.basis.coordinates

    def channels(self, shape: Sequence[int]) -> int:
        return self.family.basis.channels(shape)

    def symbol_of(self, linear_map: LinearMap) -> Symbol | None:
        symbol = self.family.symbol(linear_map)
        if symbol.value.shape[0] == 1:
            return symbol
        error = symbol.error if symbol.error is None or len(symbol.error) == 1 else symbol.error[self.index]
        return Symbol(symbol.value[self.index], error, symbol.rows, symbol.columns)
