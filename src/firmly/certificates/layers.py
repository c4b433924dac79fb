"""A system with its blocks of zeros left out: for every nonlinearity, the matrices from the values that it sees.

`blocks.sweep` writes every row over all columns, which suits many small blocks. One network of thousands of neurons
is the opposite: one block, and mostly zeros, because a layer sees only the layers before it that it is connected to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from firmly.certificates.system import Input, Linear, Sum, System
from firmly.certificates.torch_maps import Rearrange
from firmly.errors import NotCertifiable
from firmly.linear.basis import Dense
from firmly.linear.map import LinearMap, Shape
from firmly.linear.symbol import Symbol
from firmly.prox.prior import Structure

# Entries of all matrices of the layers together (float64): half a gigabyte.
LAYER_ENTRIES = 2**26
EPS = torch.finfo(torch.float64).eps

Row = dict[int, Symbol]  # variable -> its matrix; a single number stands for that multiple of the identity


@dataclass
class Layers:
    """`z_i = sum_j rows[i][j] x_j` and `output = sum_j output[j] x_j`; variables x: the inputs, then v_1, v_2, ...

    A loop has v_i in its own row, with the slopes and the structure of what is inside. `owner[i]` gives, for every
    entry of v_i, its multiplier among those of nonlinearity i: an entry of its own where the nonlinearity is separable,
    one per pixel where it acts on groups of channels, a single one otherwise.
    """

    sizes: list[int]  # of all variables
    inputs: int  # how many of them are inputs
    outputs: int  # entries of the output
    rows: list[Row]
    output: Row
    slopes: list[tuple[float, float]]
    owner: list[Tensor]
    outer: list[tuple[float, float]]  # slopes of v_i as a function of all but itself

    def has_loop(self, i: int) -> bool:
        return self.inputs + i in self.rows[i]

    @cached_property
    def counts(self) -> list[int]:
        """The number of multipliers of every nonlinearity."""
        return [int(o.max()) + 1 for o in self.owner]

    @property
    def multipliers(self) -> int:
        return sum(self.counts)

    def weights(self, mu: Tensor) -> list[Tensor]:
        """The multipliers of the entries of every v_i."""
        return [part[o] for part, o in zip(mu.split(self.counts), self.owner)]

    def collected(self, parts: list[Tensor]) -> Tensor:
        """The adjoint of `weights`: sums over the entries of every multiplier."""
        sums = [part.new_zeros(n).index_add(0, o, part) for part, o, n in zip(parts, self.owner, self.counts)]
        return torch.cat(sums)


def layers(system: System, reduced: bool = True) -> Layers:
    """The layers of a system, wide inputs and outputs reduced if asked; raises `NotCertifiable` for complex systems and
    where they take too much memory."""
    if system.is_complex:
        raise NotCertifiable("layers are real, and this network computes with complex numbers: use method='spectral'")
    entries = layer_entries(system)
    if entries > LAYER_ENTRIES:
        raise NotCertifiable(
            f"the matrices of this network have {entries:.2g} entries, more than the {LAYER_ENTRIES:.2g} that are kept "
            "in memory: use method='spectral', 'averaged' or 'product'"
        )
    basis = Dense()
    symbols: dict[int, Symbol] = {}
    values: list[Row] = []
    sizes = [math.prod(node.shape) for node in system.inputs]
    sources = iter(range(len(sizes)))
    rows: list[Row] = []
    slopes: list[tuple[float, float]] = []
    owner: list[Tensor] = []
    outer: list[tuple[float, float]] = []

    def known(linear_map: LinearMap) -> Symbol:
        if id(linear_map) not in symbols:
            symbols[id(linear_map)] = symbol_of(linear_map, basis)
        return symbols[id(linear_map)]

    for node in system.nodes:
        size = math.prod(node.shape)
        if isinstance(node, Input):
            values.append({next(sources): scalar(1.0)})
        elif isinstance(node, Linear):
            symbol = known(node.map)
            values.append({j: after(symbol, block) for j, block in values[node.parent].items()})
        elif isinstance(node, Sum):
            total: Row = {}
            for coefficient, parent in node.terms:
                factor = float(coefficient.detach() if isinstance(coefficient, Tensor) else coefficient)
                for j, block in values[parent].items():
                    block = block if factor == 1.0 else block.scale(factor)
                    total[j] = plus(total[j], block, size) if j in total else block
            values.append(total)
        else:
            inner = node if node.loop is None else node.loop
            rows.append(dict(values[node.parent]))
            if node.loop is not None:
                rows[-1][len(sizes)] = known(node.loop.map)
            slopes.append((float(inner.slope.low), float(inner.slope.high)))
            outer.append((float(node.slope.low), float(node.slope.high)))
            owner.append(owners(inner.structure, node.shape))
            values.append({len(sizes): scalar(1.0)})
            sizes.append(size)
    output = dict(values[system.output])
    if not all(bool(b.value.isfinite().all()) for row in [*rows, output] for b in row.values()):
        raise NotCertifiable("the network has weights that are not finite numbers, or so large that they overflow")
    outputs = math.prod(system.nodes[system.output].shape)
    found = Layers(sizes, len(system.inputs), outputs, rows, output, slopes, owner, outer)
    if reduced:
        reduce_inputs(found)
        reduce_output(found)
    return found


def layer_entries(system: System) -> int:
    """Entries of the matrices of all maps."""
    return sum(math.prod(m.domain) * math.prod(m.codomain) for m in system.maps if not is_identity(m))


def owners(structure: Structure, shape: Shape) -> Tensor:
    size = math.prod(shape)
    if structure in ("separable", "channel"):
        return torch.arange(size)
    if structure == "group":
        return torch.arange(size) % math.prod(shape[1:])
    return torch.zeros(size, dtype=torch.long)


# -- matrices, and multiples of the identity -----------------------------------------------------------------------


def scalar(value: float) -> Symbol:
    return Symbol(torch.full((1, 1, 1), value, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def is_identity(linear_map: LinearMap) -> bool:
    return isinstance(linear_map, Rearrange) and linear_map.keeps_pixels()


def symbol_of(linear_map: LinearMap, basis: Dense) -> Symbol:
    if is_identity(linear_map):
        return scalar(1.0)
    symbol = linear_map.symbol(basis)
    return Symbol(symbol.value.detach(), symbol.error)


def after(symbol: Symbol, block: Symbol) -> Symbol:
    """symbol @ block, either of them perhaps a multiple of the identity."""
    for left, right in ((symbol, block), (block, symbol)):
        if right.value.numel() == 1:
            if float(right.value.abs()) == 1.0 and float(right.value.real) == 1.0 and not float(error(right)):
                return left
            product = left.scale(right.value[0, 0, 0])
            return Symbol(product.value, error(product) + left.size() * error(right) + error(left) * error(right))
    return symbol @ block


def plus(first: Symbol, second: Symbol, size: int) -> Symbol:
    if first.value.shape != second.value.shape:
        first, second = full(first, size), full(second, size)
    return first + second


def full(block: Symbol, size: int) -> Symbol:
    """The matrix of a block that may be a multiple of the identity of this size."""
    if block.value.numel() > 1 or size == 1:
        return block
    return Symbol(block.value * torch.eye(size, dtype=torch.float64), block.error)


def error(block: Symbol) -> Tensor:
    if block.error is None:
        raise ValueError("a certificate needs a basis that tracks errors: Basis(..., track=True)")
    return block.error


# -- wide inputs and outputs ---------------------------------------------------------------------------------------


def reduce_inputs(found: Layers) -> None:
    """Replace an input d by Q d, with fewer entries, where all that the network sees of it is L Q d.

    Q has orthonormal rows, so that every value of Q d is that of some d of the same norm, and no d has a larger one:
    the Lipschitz constant with respect to Q d is the same. `orthogonal_error` pays for the rounding of the
    factorisation.
    """
    for k in range(found.inputs):
        seeing = [row for row in [*found.rows, found.output] if k in row]
        heights = [row[k].value.shape[1] for row in seeing]
        if not seeing or sum(heights) >= found.sizes[k] or any(row[k].value.numel() == 1 for row in seeing):
            continue
        stacked = torch.cat([row[k].value[0] for row in seeing])
        Q, R = torch.linalg.qr(stacked.mH)
        lost = orthogonal_error(stacked.mH, Q, R)
        for row, L in zip(seeing, R.mH.split(heights)):
            row[k] = Symbol(L[None].contiguous(), error(row[k]) + lost)
        found.sizes[k] = sum(heights)


def reduce_output(found: Layers) -> None:
    """Replace the output O x by R x with O = Q R, which has the same norm, where R has fewer rows."""
    seen = sorted(found.output)
    width = sum(found.sizes[j] for j in seen)
    if found.outputs <= width or all(found.output[j].value.numel() == 1 for j in seen):
        return
    stacked = torch.cat([full(found.output[j], found.outputs).value[0] for j in seen], dim=1)
    Q, R = torch.linalg.qr(stacked)
    lost = orthogonal_error(stacked, Q, R)
    for j, part in zip(seen, R.split([found.sizes[j] for j in seen], dim=1)):
        found.output[j] = Symbol(part[None].contiguous(), error(found.output[j]) + lost)
    found.outputs = width


def orthogonal_error(A: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    """A bound of |A - P R| for a matrix P with exactly orthonormal columns, from the residuals of computed Q and R.

    P = Q (Q^H Q)^(-1/2), and |Q - P| <= |Q^H Q - I| if that is at most 1/2.
    """
    n, r = Q.shape
    rounding = 4 * (max(n, r) + 3) * EPS
    norm_Q, norm_R = torch.linalg.vector_norm(Q), torch.linalg.vector_norm(R)
    tilt = torch.linalg.vector_norm(Q.mH @ Q - torch.eye(r, dtype=Q.dtype)) + rounding * norm_Q**2
    if float(tilt) > 0.5:
        raise NotCertifiable("the orthogonal reduction of a wide input or output failed")
    residual = torch.linalg.vector_norm(A - Q @ R) + rounding * norm_Q * norm_R + EPS * torch.linalg.vector_norm(A)
    return 1.01 * (residual + tilt * norm_R).reshape(1)
