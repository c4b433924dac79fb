"""Which basis a system is certified in, as a value that a certificate can store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from firmly.certificates.embedding import torus_of
from firmly.certificates.relax import Norms, is_diagonal, relaxed
from firmly.certificates.system import Nonlinear, System
from firmly.errors import NotCertifiable, NotDiagonal
from firmly.linear.algebra import Identity
from firmly.linear.basis import Basis, Dense, Fourier
from firmly.linear.map import LinearMap

# One dense block of `DENSE_COLUMNS` takes seconds in every method. In a larger one, up to `LARGE_COLUMNS`, norms and
# multipliers of layers are still quick: it is tried after the singular values of one operator, and where
# no torus does the same with small blocks.
DENSE_COLUMNS, LARGE_COLUMNS = 400, 2000


@dataclass(frozen=True)
class BasisChoice:
    """`name` is dense, fourier, singular or norms; `spatial` the grid of fourier; `operator` the index of K among the
    maps."""

    name: str
    spatial: tuple[int, ...] = ()
    operator: int = -1


def make_basis(choice: BasisChoice, system: System, track: bool = True) -> Basis:
    if choice.name == "dense":
        return Dense(track)
    if choice.name == "fourier":
        return Fourier(choice.spatial, full=system.is_complex, track=track)
    if choice.name == "singular":
        from firmly.linear.spectrum import singular_basis

        return singular_basis(system.maps[choice.operator], track=track)
    return Norms(track)


def choices(system: System) -> Iterator[BasisChoice]:
    """The bases worth trying, in order of preference among equally exact ones.

    Fourier comes before dense: for shift-invariant systems the multipliers of a neuron's shifts may be averaged, the
    problem being convex: one for each channel gives the bound of one for each neuron, at a fraction of the cost.
    Zero-padded networks have the frequencies of a larger torus. Where all maps are made of one operator, its singular
    values are enough, or a bound of its norm.
    """
    torus = torus_of(system)
    if torus is not None:
        yield BasisChoice("fourier", torus)
    for spatial in dict.fromkeys(tuple(n.shape[1:]) for n in system.nodes if len(n.shape) > 1):
        yield BasisChoice("fourier", spatial)
    columns = sum(math.prod(n.shape) for n in [*system.inputs, *(n for n in system.nodes if isinstance(n, Nonlinear))])
    columns = max(columns, *(math.prod(n.shape) for n in system.nodes))
    if columns <= DENSE_COLUMNS:
        yield BasisChoice("dense")
    if (operator := only_operator(system)) is not None:
        yield BasisChoice("singular", operator=operator)
    if torus is None and DENSE_COLUMNS < columns <= LARGE_COLUMNS and not system.is_complex:
        yield BasisChoice("dense")
    yield BasisChoice("norms")


def only_operator(system: System) -> int | None:
    """The position among the maps of the one operator K that all of them are made of, with its adjoint; else None."""
    parts = [part for m in system.maps for part in m.modules() if isinstance(part, LinearMap)]
    leaves = {id(p): p for p in parts if not any(isinstance(child, LinearMap) for child in p.children())}
    operators = [leaf for leaf in leaves.values() if not isinstance(leaf, Identity)]
    if len(operators) != 1:
        return None
    found = (i for i, m in enumerate(system.maps) if m is operators[0] or m.T is operators[0])
    return next(found, None)


def represent(system: System) -> tuple[BasisChoice, Basis, System, list[str]]:
    """The basis in which least has to be relaxed, the relaxed system, and what was relaxed, in words."""
    best: tuple[int, BasisChoice, Basis, System, list[str]] | None = None
    for choice in choices(system):
        try:
            basis = make_basis(choice, system)
            if best is not None and best[0] == 1 and not all(is_diagonal(m, basis) for m in system.maps):
                continue  # something would be relaxed here too, and norms take their time
            candidate, notes = relaxed(system, basis)
        except NotDiagonal:
            continue
        if best is None or len(notes) < best[0]:
            best = (len(notes), choice, basis, candidate, notes)
        if not notes:
            break
    if best is None:
        raise NotCertifiable("no basis gives every value of this network coordinates; its maps have no certified norms")
    return best[1:]
