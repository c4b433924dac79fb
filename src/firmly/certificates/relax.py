"""What a basis cannot diagonalise becomes a block with a quadratic constraint that it satisfies.

The result is a system in which every map is diagonal. It is looser than the original, never unsound:

- `A.T A` of any map is symmetric with spectrum in [0, |A|^2]: slopes [0, |A|^2].
- `A.T R(A .)` with slopes of R in [0, b] has slopes [0, b |A|^2]: <dp, dx> = <dv, A dx> >= |dv|^2 / b >= |dp|^2 / (b
  |A|^2).
- a self-adjoint map with spectrum in [a, b] (an entrywise product, a resolvent) has slopes [a, b].
- any other map has |v| <= |A| |z|: slopes [-|A|, |A|].
- a loop v = R(W v + w) is a nonlinearity of w with the slopes that its monotonicity gives.
- an input that is seen only through such maps is replaced by their outputs, whose norms |A_k| |d| add up in squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from firmly.certificates.embedding import EMBEDDED, embedded, torus_of
from firmly.certificates.system import Coefficient, Input, Linear, Nonlinear, Sum, System, parents
from firmly.errors import NotCertifiable, NotDiagonal
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Adjoint, LinearMap
from firmly.linear.mask import Diagonal
from firmly.linear.resolvent import Resolvent
from firmly.prox.prior import Slope


class Norms(Basis):
    """The coarsest basis: one coordinate per tensor, no map is diagonal in it, and all are known by their norm."""

    name = "norms"
    blocks = 1

    def __init__(self, track: bool = True):
        self.track = track
        self.device = torch.device("cpu")

    def channels(self, shape: Sequence[int]) -> int:
        return 1


@dataclass(frozen=True)
class Term:
    """coefficient * map(value), or coefficient * map(R(inner(value))) with slopes of R as given; map None: identity."""

    coefficient: Coefficient
    map: LinearMap | None
    value: int  # a node of the new system; -1 - k stands for hidden input k of the old one
    slope: Slope | None = None
    inner: LinearMap | None = None
    origin: int = -1  # the node of R in the old system

    def path(self) -> tuple[int, ...]:
        """What leads from the value to this term, so that one value is one block and two values are two."""
        return id(self.inner), self.origin, id(self.map)


class Relaxation:
    """Rewrites a system for one basis, node by node. A value is a node of the new system or a list of pending terms."""

    def __init__(self, system: System, basis: Basis):
        self.old = system
        self.basis = basis
        self.new = System(is_complex=system.is_complex, assumptions=list(system.assumptions))
        self.values: list[int | list[Term]] = []
        self.relaxed: list[str] = []
        self._hidden: dict[tuple[int, int], int] = {}
        self._direct: dict[int, bool] = {}
        self._blocks: dict[tuple[int, ...], int] = {}

    def run(self) -> System:
        for index, node in enumerate(self.old.nodes):
            if isinstance(node, Input):
                self.values.append(self.input(index, node))
            elif isinstance(node, Linear):
                self.values.append(self.linear(node))
            elif isinstance(node, Sum):
                self.values.append(self.sum(node))
            else:
                self.values.append(self.nonlinear(index, node))
        self.new.output = self.realised(self.values[self.old.output], self.old.nodes[self.old.output].shape)
        self.scale_hidden_inputs()
        return self.new.pruned()

    # -- the four kinds of nodes -------------------------------------------------------------------------------

    def input(self, index: int, node: Input) -> int | list[Term]:
        uses = [n for n in self.old.nodes if index in parents(n)]
        exact = all(isinstance(n, Linear) and self.is_diagonal(n.map) for n in uses)
        direct = any(not isinstance(n, Linear) for n in uses) or index == self.old.output
        if self.has_coordinates(node.shape) and (exact or direct):
            return self.new.append(node)
        return [Term(1.0, None, -1 - index)]

    def linear(self, node: Linear) -> int | list[Term]:
        value = self.values[node.parent]
        if isinstance(value, int):
            if self.is_diagonal(node.map):
                return self.new.append(Linear(node.map, value, node.shape))
            return [Term(1.0, node.map, value)]
        pieces = [(term.coefficient, self.through(node, term)) for term in value]
        return self.new.append(Sum(tuple(pieces), node.shape))

    def sum(self, node: Sum) -> int | list[Term]:
        values = [(coefficient, self.values[i]) for coefficient, i in node.terms]
        if all(isinstance(value, int) for _, value in values):
            return self.new.append(Sum(tuple((c, v) for c, v in values if isinstance(v, int)), node.shape))
        terms: list[Term] = []
        for coefficient, value in values:
            for term in [Term(1.0, None, value)] if isinstance(value, int) else value:
                terms.append(replace(term, coefficient=coefficient * term.coefficient))
        return terms

    def nonlinear(self, index: int, node: Nonlinear) -> int | list[Term]:
        value = self.values[node.parent]
        slope = Slope(float(node.slope.low), float(node.slope.high))
        if isinstance(value, list) and len(value) == 1 and value[0].map is not None and value[0].slope is None:
            only = value[0]
            if slope.low >= 0 and float(only.coefficient) == 1.0 and only.value >= 0:
                return [Term(1.0, None, only.value, slope, only.map, index)]
        parent = self.realised(value, self.old.nodes[node.parent].shape)
        if not self.has_coordinates(node.shape):  # pooling leaves the grid
            raise NotDiagonal(f"a value of shape {node.shape} has no coordinates in the {self.basis.name} basis")
        loop = node.loop
        if loop is not None and not self.is_diagonal(loop.map):
            self.relaxed.append(f"the loop of {node.where} known only by slopes in [0, {slope.high:.4g}]")
            loop = None
        return self.new.append(Nonlinear(parent, node.slope, node.structure, node.where, node.shape, loop=loop))

    # -- pending terms -----------------------------------------------------------------------------------------

    def through(self, node: Linear, term: Term) -> int:
        """The new node for node.map applied to one pending term without its coefficient."""
        shape = node.shape
        if term.value < 0:
            if term.map is not None:
                raise NotDiagonal("an input passes two maps before it meets the basis")
            return self.hidden_input(term.value, node)
        if term.slope is not None:  # node.map(map?(R(inner(x))))
            inner, high = term.inner, term.slope.high
            if inner is not None and term.map is None and node.map.T is inner:
                slope = Slope.outward(0.0, high * inner.norm().upper ** 2)
                return self.block(term.value, slope, inner, shape, (*term.path(), id(node.map)))
            return self.gain_of(node.map, self.realised([unit(term)], self.codomain_of(term)), shape)
        if term.map is None:
            return self.gain_of(node.map, term.value, shape)
        if node.map.T is term.map:
            slope = Slope.outward(0.0, term.map.norm().upper ** 2)
            return self.block(term.value, slope, term.map, shape, (*term.path(), id(node.map)))
        if self.has_coordinates(node.map.domain):
            return self.gain_of(node.map, self.gain_of(term.map, term.value, node.map.domain), shape)
        size = node.map.norm().upper * term.map.norm().upper
        return self.block(term.value, ball(size), node.map, shape, (*term.path(), id(node.map)))

    def realised(self, value: int | list[Term], shape: Sequence[int]) -> int:
        """A value as one node; pending maps become blocks of bounded norm."""
        if isinstance(value, int):
            return value
        pieces = [(term.coefficient, self.realised_term(term, tuple(shape))) for term in value]
        return self.new.append(Sum(tuple(pieces), tuple(shape)))

    def realised_term(self, term: Term, shape: tuple[int, ...]) -> int:
        if not self.has_coordinates(shape):
            raise NotDiagonal(f"a value of shape {shape} has no coordinates in the {self.basis.name} basis")
        if term.value < 0:
            raise NotDiagonal("an input without coordinates in the basis is used directly")
        if term.slope is not None:
            size = max(abs(term.slope.low), abs(term.slope.high)) * (term.inner.norm().upper if term.inner else 1.0)
            size *= term.map.norm().upper if term.map is not None else 1.0
            return self.block(term.value, ball(size), term.inner or term.map, shape, term.path())
        return term.value if term.map is None else self.gain_of(term.map, term.value, shape)

    def gain_of(self, linear_map: LinearMap, parent: int, shape: tuple[int, ...]) -> int:
        """A node for linear_map(parent): exact if diagonal, else a block."""
        if self.is_diagonal(linear_map):
            return self.new.append(Linear(linear_map, parent, shape))
        return self.block(parent, spectrum(linear_map), linear_map, shape, (id(linear_map),))

    def block(
        self, parent: int, slope: Slope, reason: LinearMap | None, shape: tuple[int, ...], path: tuple[int, ...]
    ) -> int:
        """The node for what `path` leads to from `parent`; the same path gives the same node."""
        if not math.isfinite(slope.high):
            raise NotCertifiable(f"no certified norm is known for {reason}")
        if not self.has_coordinates(shape):
            raise NotDiagonal(f"a value of shape {shape} has no coordinates in the {self.basis.name} basis")
        key = (parent, *path)
        if key not in self._blocks:
            name = type(reason).__name__
            self.relaxed.append(f"{name} known only by slopes in [{slope.low:.4g}, {slope.high:.4g}]")
            self._blocks[key] = self.new.append(Nonlinear(parent, slope, "whole", name, shape))
        return self._blocks[key]

    # -- inputs outside the basis ------------------------------------------------------------------------------

    def hidden_input(self, value: int, node: Linear) -> int:
        key = (value, id(node.map))
        if key not in self._hidden:
            if not self.has_coordinates(node.shape):
                raise NotDiagonal(f"a value of shape {node.shape} has no coordinates in the {self.basis.name} basis")
            old = self.old.nodes[-1 - value]
            name = old.name if isinstance(old, Input) else "input"  # kept, so that bounds know whose part it is
            source = self.new.append(Input(name, node.shape, self.old.is_complex))
            self._hidden[key] = self.new.append(Sum(((node.map.norm().upper, source),), node.shape))
            self.relaxed.append(
                f"the {name} through {type(node.map).__name__} known only by its norm {node.map.norm().upper:.4g}"
            )
        return self._hidden[key]

    def scale_hidden_inputs(self) -> None:
        """Several images of one input: sum_k |A_k d|^2 <= (sum_k |A_k|^2) |d|^2, so each gets the common factor."""
        for value in {value for value, _ in self._hidden}:
            nodes = [node for (v, _), node in self._hidden.items() if v == value]
            sums = [self.new.nodes[n] for n in nodes]
            total = math.sqrt(sum(float(s.terms[0][0]) ** 2 for s in sums if isinstance(s, Sum)))
            for position, old in zip(nodes, sums):
                if isinstance(old, Sum):
                    self.new.nodes[position] = Sum(((total, old.terms[0][1]),), old.shape)

    # -- what the basis knows ----------------------------------------------------------------------------------

    def has_coordinates(self, shape: Sequence[int]) -> bool:
        try:
            self.basis.channels(shape)
        except NotDiagonal:
            return False
        return True

    def is_diagonal(self, linear_map: LinearMap) -> bool:
        if id(linear_map) not in self._direct:
            self._direct[id(linear_map)] = is_diagonal(linear_map, self.basis)
        return self._direct[id(linear_map)]

    def codomain_of(self, term: Term) -> tuple[int, ...]:
        return term.inner.codomain if term.inner is not None else self.new.nodes[term.value].shape


def is_diagonal(linear_map: LinearMap, basis: Basis) -> bool:
    try:
        linear_map.symbol(basis)
    except NotDiagonal:
        return False
    return True


def spectrum(linear_map: LinearMap) -> Slope:
    """The interval of the spectrum of a map that is known to be self-adjoint, else the ball of its norm."""
    plain = linear_map.of if isinstance(linear_map, Adjoint) else linear_map
    if isinstance(plain, Diagonal) and not plain.is_complex:
        weight = plain.weight.double()
        return Slope(float(weight.min()), float(weight.max()))
    if isinstance(plain, Resolvent):
        weight = float(plain.weight.detach())
        return Slope.outward(1 / (plain.of.norm().upper ** 2 + weight), 1 / weight)
    return ball(linear_map.norm().upper)


def ball(size: float) -> Slope:
    """|v| <= size |z|, for a size that is a product of a few rounded numbers."""
    return Slope.outward(-size, size)


def unit(term: Term) -> Term:
    return replace(term, coefficient=1.0)


def relaxed(system: System, basis: Basis) -> tuple[System, list[str]]:
    """The system with every map diagonal in `basis`, and what was relaxed, in words; may raise `NotDiagonal`."""
    notes: list[str] = []
    if isinstance(basis, Fourier) and basis.spatial == torus_of(system):
        notes.append(f"{EMBEDDED} {basis.spatial}")
        system = embedded(system, basis.spatial)
    relaxation = Relaxation(system, basis)
    return relaxation.run(), [*notes, *sorted(set(relaxation.relaxed))]
