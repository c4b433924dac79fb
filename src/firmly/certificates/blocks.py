"""A system in a basis: for every block, the matrices from (inputs, nonlinearities) to every z_i and to the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from firmly.certificates.propagation import Propagated, combined, spectral_norms
from firmly.certificates.system import Input, Linear, Sum, System, parents
from firmly.errors import NotCertifiable
from firmly.linear.basis import Basis
from firmly.linear.symbol import Symbol, meet
from firmly.prox.prior import Slope

Form = Literal["open", "closed", "averaged"]


@dataclass
class Blocks:
    """`z_i = Z_i (d, v)` and `output = O (d, v)` on every block; columns are ordered d, v_1, v_2, ...

    In the form "open" z_i has v_i among its own columns where there is a loop. In the form "closed" a loop is one
    nonlinearity of what enters it. In the form "averaged", also of closed loops, the columns are (d, q) instead, with
    v_i = (a+b)/2 z_i + (b-a)/2 q_i and |q_i| <= |z_i|.
    """

    system: System
    basis: Basis
    inputs: list[slice]
    columns: list[slice]  # of v_i (or q_i)
    slopes: list[Slope]
    separable: list[bool]
    rows: list[Symbol]  # Z_i
    output: Symbol
    form: Form = "open"

    @property
    def width(self) -> int:
        return self.columns[-1].stop if self.columns else self.inputs[-1].stop

    def parts(self, form: Form = "open") -> Iterator[Blocks]:
        """These blocks as one piece, in a form."""
        yield self if form == self.form else sweep(self.system, self.basis, form)


def sweep(system: System, basis: Basis, form: Form = "open") -> Blocks:
    """Propagate symbols through the graph, once; raises `NotDiagonal` if some map is not diagonal in the basis."""
    values: list[Propagated] = []
    last_use = {parent: index for index, node in enumerate(system.nodes) for parent in parents(node)}
    inputs: list[slice] = []
    columns: list[slice] = []
    slopes: list[Slope] = []
    separable: list[bool] = []
    rows: list[Symbol] = []
    coordinates = Coordinates()
    width = 0
    for node in system.inputs:  # their columns come first, wherever they stand in the graph
        inputs.append(slice(width, width + basis.channels(node.shape)))
        width = inputs[-1].stop
    sources = iter(inputs)
    for index, node in enumerate(system.nodes):
        if isinstance(node, Input):
            values.append(Propagated(unit(basis, next(sources))))
            coordinates.add(None)
        elif isinstance(node, Linear):
            symbol = node.map.symbol(basis)
            values.append(values[node.parent].mapped(untagged(symbol)))
            coordinates.mapped(symbol, node.parent)
        elif isinstance(node, Sum):
            values.append(combined([(coefficient, values[i]) for coefficient, i in node.terms]))
            coordinates.joined([i for _, i in node.terms])
        else:
            z = values[node.parent]
            columns.append(slice(width, width + basis.channels(node.shape)))
            width = columns[-1].stop
            v = Propagated(unit(basis, columns[-1]))
            loop = node.loop if form == "open" else None
            if loop is not None:
                symbol = loop.map.symbol(basis)
                coordinates.looped(symbol, node.parent)
                z = z.padded(width) + v.mapped(untagged(symbol))
            slopes.append(node.slope if loop is None else loop.slope)
            separable.append((node if loop is None else loop).structure in ("separable", "channel"))
            rows.append(z.whole)
            if form == "averaged":
                low, high = float(node.slope.low), float(node.slope.high)
                v = v.scaled((high - low) / 2)
                if high + low != 0:
                    v = z.padded(width).scaled((high + low) / 2) + v
            values.append(v)
            if node.slope.low + node.slope.high == 0:  # |v| <= c |z| alone: v may live in other coordinates
                coordinates.add(None)
            else:
                coordinates.joined([node.parent])
        values[-1] = values[-1].cut(values[j] for j in range(index) if last_use.get(j, -1) > index)
    rows = [real_if_close(padded(z, width)) for z in rows]
    output = real_if_close(padded(values[system.output].whole, width))
    if not all(bool(symbol.value.isfinite().all()) for symbol in [*rows, output]):
        raise NotCertifiable("the network has weights that are not finite numbers, or so large that they overflow")
    return Blocks(system, basis, inputs, columns, slopes, separable, rows, output, form)


class Coordinates:
    """Which coordinates every value is expressed in: each source may choose once, where it is first used."""

    def __init__(self) -> None:
        self.cells: list[int] = []  # of every value
        self.links: list[int] = []  # cell -> representative cell
        self.names: list[str | None] = []

    def add(self, name: str | None) -> None:
        self.cells.append(len(self.links))
        self.links.append(len(self.links))
        self.names.append(name)

    def find(self, value: int) -> int:
        cell = self.cells[value]
        while self.links[cell] != cell:
            cell = self.links[cell]
        return cell

    def mapped(self, symbol: Symbol, parent: int) -> None:
        if symbol.rows is None and symbol.columns is None:
            self.joined([parent])
            return
        cell = self.find(parent)
        self.names[cell] = symbol.columns if self.names[cell] is None else meet(self.names[cell], symbol.columns)
        self.add(symbol.rows)

    def looped(self, symbol: Symbol, parent: int) -> None:
        """A map from a value to itself, for which it has to be in the coordinates of the map."""
        if symbol.rows is not None or symbol.columns is not None:
            cell, name = self.find(parent), meet(symbol.rows, symbol.columns)
            self.names[cell] = name if self.names[cell] is None else meet(self.names[cell], name)

    def joined(self, values: list[int]) -> None:
        first = self.find(values[0])
        for value in values[1:]:
            other = self.find(value)
            if other != first:
                known = [name for name in (self.names[first], self.names[other]) if name is not None]
                self.names[first] = meet(known[0], known[-1]) if known else None
                self.links[other] = first
        self.cells.append(first)


def untagged(symbol: Symbol) -> Symbol:
    return Symbol(symbol.value, symbol.error)


def unit(basis: Basis, columns: slice) -> Symbol:
    """The value that is its own source: [0 I] with the identity in the given columns."""
    size = columns.stop - columns.start
    value = torch.zeros(1, size, columns.stop, dtype=torch.float64, device=basis.device)
    value[0, :, columns] = torch.eye(size, dtype=torch.float64, device=basis.device)
    return untagged(basis.exact(value))


def padded(symbol: Symbol, width: int) -> Symbol:
    missing = width - symbol.value.shape[2]
    if missing == 0:
        return symbol
    value = torch.nn.functional.pad(symbol.value, (0, missing))
    return Symbol(value, symbol.error)


def real_if_close(symbol: Symbol) -> Symbol:
    """Drop imaginary parts of the size of rounding errors, and count them as error."""
    if not symbol.value.is_complex():
        return symbol
    imaginary = torch.linalg.vector_norm(symbol.value.detach().imag, dim=(1, 2))
    if not float(imaginary.max()) <= 1e-12 * (1 + float(symbol.frobenius().max())):
        return symbol
    error = None if symbol.error is None else symbol.error + imaginary * (1 + 1e-12)
    return Symbol(symbol.value.real, error)


def block_norms(symbol: Symbol, columns: slice | None = None) -> Tensor:
    """Upper bounds of the spectral norms of all blocks, restricted to some columns; shape (blocks,)."""
    return spectral_norms(symbol if columns is None else Symbol(symbol.value[:, :, columns], symbol.error))
