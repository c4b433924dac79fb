"""Bounds on a ball around given data: |F(y + d) - F(y + d')| <= upper |d - d'| for |d|, |d'| <= radius.

Certified row bounds say how far the input of every unit can move on the ball. Units whose slope cannot change there
become linear, the others keep the slopes that they can have, and the network with these slopes is bounded again
(docs/theory/local).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from firmly.certificates.certify import Shapes, spectral_bound
from firmly.certificates.family import Family
from firmly.certificates.lower import Attack, ascend, measured
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.certificates.representation import represent
from firmly.certificates.rows import LARGEST_DENSE, columns_of, entry_bounds
from firmly.certificates.signal import arguments, trace
from firmly.certificates.slopes import WIDER, interval_slopes
from firmly.certificates.system import Linear, Nonlinear, Sum, System, parents, renumbered
from firmly.certificates.torch_maps import Rearrange
from firmly.errors import DataError, NotCertifiable, ShapeError
from firmly.linear.basis import Dense
from firmly.linear.map import LinearMap
from firmly.linear.mask import Diagonal
from firmly.prox.prior import Slope


@dataclass(frozen=True)
class LocalCertificate:
    """lower <= sup |F(y + d) - F(y + d')| / |d - d'| <= upper over |d|, |d'| <= radius, for this network at this y.

    `error_map` bounds the change of every output entry, |F(y + d) - F(y)|, for every |d| <= radius; `attacked` is the
    change that the worst perturbation found really causes. `decided` is the share of units of every nonlinearity whose
    slope is fixed on the ball, by the module it was found in.
    """

    lower: float
    upper: float
    radius: float
    error_map: Tensor  # (*output shape)
    attacked: Tensor  # (*output shape)
    perturbation: Tensor  # (1, *input shape)
    decided: list[tuple[str, float]]
    wrt: str
    assumptions: list[str]

    @property
    def gap(self) -> float:
        return self.upper / self.lower if self.lower > 0 else math.inf

    @property
    def change(self) -> float:
        """A bound of |F(y + d) - F(y)| for |d| <= radius."""
        return min(self.upper * self.radius, float(self.error_map.norm()) * (1 + 1e-12)) * (1 + 1e-15)

    def __str__(self) -> str:
        share = ", ".join(f"{where} {100 * part:.0f} %" for where, part in self.decided)
        return (
            f"within {self.radius:.6g} of the data: {self.lower:.6g} <= L <= {self.upper:.6g}\n"
            f"  no output entry changes by more than {float(self.error_map.max()):.6g}\n"
            f"  units with a fixed slope: {share or 'none to decide'}"
        )


@dataclass(frozen=True)
class ErrorMap:
    """|F(y + d)_i - F(y)_i| <= gain_i |d| for every |d| <= radius and every entry i of the output, at this y.

    `decided` is the share of units of every nonlinearity whose slope is fixed on the ball, by the module it was found
    in; without one the gains are those of `rows`, which hold for every y.
    """

    gain: Tensor  # (*output shape)
    radius: float
    decided: list[tuple[str, float]]
    wrt: str
    assumptions: list[str]

    @property
    def bound(self) -> Tensor:
        """A bound of the change of every output entry, for every |d| <= radius."""
        return self.radius * self.gain * (1 + 1e-15)

    def tolerated(self, change: float) -> float:
        """A norm of d, at most the radius, up to which no output entry moves by more than `change`."""
        if not change > 0:
            raise ValueError(f"the change of an entry to tolerate is positive, given {change}")
        steepest = float(self.gain.max())
        return self.radius if steepest * self.radius <= change else change / steepest * (1 - 1e-15)


@torch.no_grad()
def error_map(
    net: nn.Module,
    around: Tensor | Mapping[str, Tensor],
    radius: float,
    wrt: str = "data",
    shape: Shapes | None = None,
    budget_s: float = 10.0,
) -> ErrorMap:
    """How far every single entry of the output can move for |d| <= radius; arguments and errors as in `local`.

    It is the map of `local` without the bound of the whole output and without its attack, for large images.
    """
    _, _, name, system = traced(net, around, radius, wrt, shape)
    narrowed = Narrowing(system, radius, budget_s / 2)
    gain = narrowed.rows(budget_s / 2)
    return ErrorMap(gain, radius, narrowed.decided, name, notes_of(name, radius, system, narrowed))


@torch.no_grad()
def local(
    net: nn.Module,
    around: Tensor | Mapping[str, Tensor],
    radius: float,
    wrt: str = "data",
    shape: Shapes | None = None,
    budget_s: float = 60.0,
) -> LocalCertificate:
    """A certified bracket of the Lipschitz constant of `net` on the ball |d| <= radius around data y.

    `around` is y, (1, *shape), or a dict from names of inputs to their values where others than `wrt` are given too;
    these are held fixed, and an input that is left out keeps its default. Up to some thousands of units everyone gets
    its own slopes; in Fourier a channel gets the hull of the slopes of its pixels, elsewhere a layer that of its units,
    and only the error map knows them one by one. Raises `NotCertifiable` where `certify` does: the network has to have
    global slope bounds.
    """
    net, values, name, system = traced(net, around, radius, wrt, shape)
    narrowed = Narrowing(system, radius, 0.2 * budget_s)
    rows = narrowed.rows(0.2 * budget_s)
    bounds = [lipschitz(s, 0.2 * budget_s) for s in (narrowed.system, system)]
    upper = min(*bounds, float(rows.norm()) * (1 + 1e-12))
    worst, changed = strongest(net, values, name, radius, time.monotonic() + 0.2 * budget_s)
    if worst.ratio > upper * (1 + 1e-6) or bool((changed > radius * rows * (1 + 1e-6) + 1e-9).any()):
        raise NotCertifiable(
            f"an attack moves the output by {worst.ratio:.9g} |d|, above what the trace allows ({upper:.9g}): "
            "the network does not compute the same each time, or the trace is wrong, which we would like to hear of"
        )
    return LocalCertificate(
        lower=min(worst.ratio * (1 - 1e-12), upper),
        upper=upper,
        radius=radius,
        error_map=radius * rows * (1 + 1e-15),
        attacked=changed,
        perturbation=worst.perturbation,
        decided=narrowed.decided,
        wrt=name,
        assumptions=notes_of(name, radius, system, narrowed),
    )


def traced(
    net: nn.Module, around: Tensor | Mapping[str, Tensor], radius: float, wrt: str, shape: Shapes | None
) -> tuple[nn.Module, dict[str, Tensor], str, System]:
    """The network in double precision, the values of its inputs, the name of the perturbed one, and its system."""
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"the radius of a ball is positive and finite, given {radius}")
    net = copy.deepcopy(net).double().cpu()
    shapes, values, name = located(net, around, wrt, shape)
    is_complex = values[name].is_complex() or any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))
    values = {n: v.to("cpu", torch.complex128 if is_complex else torch.float64) for n, v in values.items()}
    return net, values, name, trace(net, shapes, (name,), is_complex, around=values)


def notes_of(name: str, radius: float, system: System, narrowed: Narrowing) -> list[str]:
    return [
        f"Euclidean norms; '{name}' moves by at most {radius:.6g} from the given value, all else is held fixed",
        f"inputs of the units at the centre are computed in double precision and trusted to {WIDER:.0e} of their size",
        "exact arithmetic on the stored weights; rounding inside the network itself is not covered",
        *system.assumptions,
        *narrowed.notes,
    ]


def located(
    net: nn.Module, around: Tensor | Mapping[str, Tensor], wrt: str, shape: Shapes | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor], str]:
    """Shapes of all inputs, values of those that are given, and the name of the perturbed one."""
    known = shape if shape is not None else getattr(net, "inputs", None)
    if isinstance(known, Mapping):
        shapes = {n: tuple(s) for n, s in known.items()}
    else:
        named = {wrt: around} if isinstance(around, Tensor) else around
        shapes = {n: tuple(v.shape[1:]) for n, v in named.items()}
    name = next(iter(shapes)) if wrt == "data" and "data" not in shapes else wrt
    values = {name: around} if isinstance(around, Tensor) else dict(around)
    unknown = [n for n in (*values, name) if n not in shapes]
    if unknown:
        raise ShapeError(f"the network has no input {unknown}; its inputs are {list(shapes)}")
    for n, value in values.items():
        if tuple(value.shape) != (1, *shapes[n]):
            raise ShapeError(f"'{n}' is one sample (1, {', '.join(map(str, shapes[n]))}), given {tuple(value.shape)}")
        if not bool(torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all()):
            raise DataError(f"'{n}' contains NaN or infinite values")
    shapes = {n: s for n, s in shapes.items() if n in values or n in arguments(net, shapes, (name,))}
    missing = [n for n in shapes if n not in values]
    if missing:
        raise DataError(f"the value of {missing} decides which slopes are fixed: give it in around={{...}}")
    order = arguments(net, shapes, tuple(values))
    return {n: shapes[n] for n in order}, {n: values[n] for n in order}, name


def strongest(
    net: nn.Module, values: Mapping[str, Tensor], name: str, radius: float, deadline: float
) -> tuple[Attack, Tensor]:
    """The perturbation found with the largest ratio, on the sphere or deep inside the ball, and the largest change of
    every output entry that was met."""
    first = next(iter(values))

    def run(x: Tensor) -> Tensor:
        given = {**values, name: x}
        return net(given.pop(first), **given)

    y = values[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    origin, found = run(y), []
    for size in (radius, 1e-3 * radius):
        size = size * (1 - 1e-6) - 4e-16 * float(y.norm())
        if size > 0:
            found.append(ascend(run, y, size * start / start.norm(), 30, deadline))
            start = found[-1].perturbation
    found = found or [measured(run, y, torch.zeros_like(y), origin)]
    changes = [(run(y + a.perturbation) - origin)[0].abs() for a in found]
    return max(found, key=lambda a: a.ratio), torch.stack(changes).amax(0)


def lipschitz(system: System, budget_s: float) -> float:
    """The smallest bound of a traced system."""
    choice, basis, blocked, _ = represent(system)
    family = Family(blocked, basis)
    bounds = [product_bound(family), averaged_bound(family)]
    if min(bounds) < 1e-100:  # the output does not move
        return min(bounds)
    bounds.append(spectral_bound(family, choice.name in ("dense", "fourier"), 1e-4, budget_s)[0].value)
    if choice.name == "norms" and columns_of(system) <= LARGEST_DENSE:
        bounds.append(averaged_bound(Family(system, Dense())))
    return min(bounds)


class Narrowing:
    """A system in which every nonlinearity has the slopes that it can have on a ball, rewritten node by node."""

    def __init__(self, system: System, radius: float, budget_s: float):
        self.old = system
        self.radius = radius
        known = sum(isinstance(node, Nonlinear) and node.call is not None for node in system.nodes)
        self.share = budget_s / max(known, 1)  # for the bounds of one layer
        self.system = System(is_complex=system.is_complex, assumptions=list(system.assumptions))
        self.decided: list[tuple[str, float]] = []
        self.notes: list[str] = []
        choice, _, _, relaxations = represent(system)
        if choice.name == "fourier" and not relaxations:
            self.detail = "channel"
        else:
            self.detail = "unit" if columns_of(system) <= LARGEST_DENSE else "whole"
        self._rows: dict[int, Tensor] = {}  # of nonlinearities, by their place in the old system
        places: dict[int, int] = {}
        for index, node in enumerate(system.nodes):
            if isinstance(node, Nonlinear) and node.call is not None:
                places[index] = self.narrowed(index, node, places[node.parent])
            else:
                places[index] = self.system.append(renumbered(node, places) if parents(node) else node)
        self.system.output = places[system.output]
        self.system = self.system.pruned()

    def narrowed(self, index: int, node: Nonlinear, parent: int) -> int:
        """The new node for a nonlinearity: v = c z + h N(z) for slopes c -+ h, where N has slopes in [-1, 1]."""
        rows = self.bounds(parent, self.share)
        low, high = (slopes[0] for slopes in interval_slopes(node, self.radius * rows[None]))
        self.decided.append((node.where, float((low == high).double().mean())))
        self._rows[index] = torch.maximum(low.abs(), high.abs()) * rows
        if self.detail != "unit":
            axes = tuple(range(self.detail == "channel", low.dim()))
            low, high = low.amin(axes, keepdim=True), high.amax(axes, keepdim=True)
        if bool((low == low.flatten()[0]).all() and (high == high.flatten()[0]).all()):
            slope = Slope(float(low.flatten()[0]), float(high.flatten()[0]))
            if slope.low == slope.high:
                return self.system.append(Sum(((slope.low, parent),), node.shape))
            return self.system.append(replace(node, parent=parent, slope=slope, call=None))
        centre, half = (low + high) / 2, (high - low) / 2
        half = torch.where(half > 0, half * (1 + 4e-16) + 2e-16 * centre.abs() + 1e-300, half)  # rounded outwards
        linear = self.mapped(Diagonal(centre, node.shape), parent)
        if self.detail == "channel":
            return self.spread(node, linear, parent, Diagonal(half, node.shape))
        free = half.flatten().nonzero().squeeze(1)  # only the undecided units stay, so that matrices stay small
        if len(free) == 0:
            return linear
        back = torch.full((half.numel(),), -1)
        back[free] = torch.arange(len(free))
        source = self.mapped(Rearrange(node.shape, free), parent)
        weight, embedding = Diagonal(half.flatten()[free]), Rearrange((len(free),), back.reshape(node.shape))
        return self.spread(node, linear, source, weight, embedding)

    def spread(self, node: Nonlinear, linear: int, source: int, *maps: LinearMap) -> int:
        """linear + maps(N(source))."""
        shape = self.system.nodes[source].shape
        v = self.system.append(Nonlinear(source, Slope(-1.0, 1.0), "separable", node.where, shape))
        for linear_map in maps:
            v = self.mapped(linear_map, v)
        return self.system.append(Sum(((1.0, linear), (1.0, v)), node.shape))

    def mapped(self, linear_map: LinearMap, parent: int) -> int:
        return self.system.append(Linear(linear_map, parent, linear_map.codomain))

    def bounds(self, index: int, budget_s: float) -> Tensor:
        """Row bounds of one value of the new system."""
        part = System(list(self.system.nodes), index, self.system.is_complex).pruned()
        rows, _, notes = entry_bounds(part, budget_s)
        self.notes = sorted({*self.notes, *notes})
        return rows

    def rows(self, budget_s: float) -> Tensor:
        """Row bounds of the output; right after a nonlinearity also those of its input times its steepest slope."""
        rows = self.bounds(self.system.output, budget_s)
        known = self._rows.get(self.old.output)
        return rows if known is None else torch.minimum(rows, known * (1 + 1e-15))
