"""Lower bounds: pairs of inputs that a network really moves apart, and the attack that finds them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firmly.certificates.family import Family
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.representation import BasisChoice
from firmly.certificates.signal import arguments
from firmly.errors import DataError, NotConverged
from firmly.fixedpoint.equilibrium import finest_equilibria
from firmly.linear.basis import Singular
from firmly.linear.norms import krylov_vector

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """The perturbation of y found to move the output most, within the radius asked for."""

    perturbation: Tensor
    change: float  # |net(y + perturbation) - net(y)|
    ratio: float  # change / |perturbation|


def attack(net: nn.Module, y: Tensor, radius: float, steps: int = 30, seed: int = 0) -> Attack:
    """Search max |net(y + d) - net(y)| over |d| <= radius, for one sample y of shape (1, *shape).

    Each step moves d to the point of the ball furthest along the gradient of the change, d <- radius g / |g| with
    g = J(y + d)^T (net(y + d) - net(y)): the power method where the network is linear, and never worse than its start
    where it is not, since the best d met is returned. The result is a lower bound of the true worst case.
    """
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"the radius of an attack is positive and finite, given {radius}")
    if y.shape[0] != 1:
        raise DataError(f"an attack takes one sample (1, *shape), given {tuple(y.shape)}; call it for each sample")
    if not bool(torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all()):
        raise DataError("the data to attack contains NaN or infinite values")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    rounding = 2 * torch.finfo(y.dtype).eps * (float(y.norm()) + radius)  # of y + d
    if not rounding < 0.5 * radius:
        raise DataError(f"a perturbation of size {radius:.3g} is lost in the rounding of {y.dtype}; use y.double()")
    return ascend(net, y, (radius - rounding) * start / start.norm(), steps)


def ascend(net: Network, y: Tensor, start: Tensor, steps: int, deadline: float = math.inf) -> Attack:
    """Improve a perturbation at fixed radius |start|; stops when two steps gain less than one part in 10^5."""
    radius = float(start.norm())
    with torch.no_grad():
        origin = finest(net, y)[0]
    best = measured(net, y, start, origin)
    d, stalled = start, 0
    for _ in range(steps):
        gradient, change = change_gradient(net, y, d, origin)
        size = float(gradient.norm())
        if change > best.change * (1 + 1e-5):
            stalled = 0
        else:
            stalled += 1
        if change > best.change:
            best = measured(net, y, d, origin)
        if not (size > 0 and math.isfinite(size)) or stalled >= 3 or time.monotonic() > deadline:
            break
        d = radius * gradient / size
    final = measured(net, y, d, origin)
    return final if final.change > best.change else best


def change_gradient(net: Network, y: Tensor, d: Tensor, origin: Tensor) -> tuple[Tensor, float]:
    """J(y + d)^T (net(y + d) - net(y)) and the norm of the change."""
    with torch.enable_grad():
        point = (y + d).detach().requires_grad_(True)
        difference = net(point) - origin
        objective = 0.5 * (difference * difference.conj()).real.sum()
        (gradient,) = torch.autograd.grad(objective, point)
    return gradient.detach(), float(torch.sqrt(2 * objective.detach()))


@torch.no_grad()
def measured(net: Network, y: Tensor, d: Tensor, origin: Tensor | None = None) -> Attack:
    """The change that d causes, with d as the difference of the two inputs in floating point.

    The rounding of the two outputs, a few units of their last place, is taken off the change, and what their equilibria
    are off by.
    """
    origin = finest(net, y)[0] if origin is None else origin
    moved = y + d
    actual, (output, error) = moved - y, finest(net, moved)
    rounding = (16 * torch.finfo(output.dtype).eps + 2 * error) * float(output.norm() + origin.norm())
    change, size = max(float((output - origin).norm()) - rounding, 0.0), float(actual.norm())
    return Attack(actual, change, change / size if size > 0 and math.isfinite(change) else 0.0)


def finest(net: Network, x: Tensor) -> tuple[Tensor, float]:
    """The output with equilibria inside as fine as their precision allows, and a bound of their relative errors."""
    with finest_equilibria() as errors:
        return net(x), max(errors, default=0.0)


def as_function(net: nn.Module, inputs: Mapping[str, Sequence[int]], names: Sequence[str], is_complex: bool) -> Network:
    """The network as a function of one tensor: the perturbed input, or all of them flattened and joined.

    Of the others, those with a default are left to it and the rest are zero.
    """
    net = copy.deepcopy(net).double().cpu()
    dtype = torch.complex128 if is_complex else torch.float64
    fixed = {name: torch.zeros(1, *inputs[name], dtype=dtype) for name in arguments(net, inputs, names)}
    first = next(iter(inputs))

    def run(x: Tensor) -> Tensor:
        given = dict(fixed)
        if len(names) == 1:
            given[names[0]] = x
        else:
            parts = x.split([math.prod(inputs[name]) for name in names], dim=1)
            given.update({name: part.reshape(1, *inputs[name]) for name, part in zip(names, parts)})
        return net(given.pop(first), **given)

    return run


@dataclass(frozen=True)
class AttainedPair:
    """|net(point + perturbation) - net(point)| = ratio |perturbation|."""

    point: Tensor
    perturbation: Tensor
    ratio: float


def lower_bound(
    net: nn.Module,
    inputs: Mapping[str, Sequence[int]],
    names: Sequence[str],
    is_complex: bool,
    choice: BasisChoice,
    family: Family,
    budget_s: float,
) -> AttainedPair:
    """The largest ratio found: worst directions of linear regimes at several sizes, ascent from the best, and
    small perturbations of two points away from the origin.

    A piecewise-linear network acts as one linear map on large inputs and as another near zero; the blocks give the
    worst direction when all slopes are at their upper or at their lower ends. Every ratio is measured on the network
    itself.
    """
    deadline = time.monotonic() + budget_s
    run = as_function(net, inputs, names, is_complex)
    dtype = torch.complex128 if is_complex else torch.float64
    shape = (1, *inputs[names[0]]) if len(names) == 1 else (1, sum(math.prod(inputs[n]) for n in names))
    origin = torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    waves = regime_directions(choice, family, is_complex)
    if len(names) == 1:  # a zero-padded network has its waves on a larger torus
        waves = [wave[tuple(slice(n) for n in shape[1:])] if wave.dim() == len(shape) - 1 else wave for wave in waves]
    directions = [wave.reshape(shape) for wave in waves if wave.numel() == origin.numel()]
    directions.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    trials: list[Attack] = []
    output = finest(run, origin)[0]
    for size in SIZES:  # every direction saturated is tried whatever the deadline: there the bracket closes, if it does
        for direction in directions:
            if time.monotonic() > deadline and len(trials) >= len(directions):
                break
            unit = direction / direction.norm()
            with suppress(NotConverged):  # an inner solver may refuse data of some sizes
                trials.append(measured(run, origin, size * math.sqrt(direction.numel()) * unit, output))
    trials.sort(key=lambda a: -a.ratio)
    best = trials[0] if trials else Attack(origin, 0.0, 0.0)
    for trial in trials[:2]:
        if time.monotonic() < deadline:
            with suppress(NotConverged):
                improved = ascend(run, origin, trial.perturbation, 40, deadline)
                best = improved if improved.ratio > best.ratio else best
    at = origin
    for level in LEVELS:
        with suppress(NotConverged):
            point = level * (1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            there = finest(run, point)[0]
            steps = [1e-4 * level * math.sqrt(d.numel()) * d / d.norm() for d in directions]
            trial = max((measured(run, point, step, there) for step in steps), key=lambda a: a.ratio)
            for length in (6, 30):  # a short ascent, and a long one if that is better already
                if time.monotonic() < deadline:
                    improved = ascend(run, point, trial.perturbation, length, deadline)
                    trial = improved if improved.ratio > trial.ratio else trial
                if trial.ratio <= best.ratio * (1 + 1e-6):
                    break
                at, best = point, trial
    return AttainedPair(at, best.perturbation, best.ratio)


# Root-mean-square sizes of trial inputs: where saturating activations are saturated, of the size of data, and so small
# that none is.
SIZES = (1e6, 1e3, 1.0, 1e-3, 1e-8)

# Sizes of points away from the origin, where a constraint such as x >= 0 blocks no direction.
LEVELS = (1e3, 1.0)


def regime_directions(choice: BasisChoice, family: Family, is_complex: bool) -> list[Tensor]:
    """Worst inputs of the linear regimes with all slopes at one end, for a dense or a Fourier basis; for the singular
    vectors of one operator, those of its norm."""
    if isinstance(family.basis, Singular):
        vector = krylov_vector(family.basis.operator)
        return [vector, family.basis.operator(vector)]
    if choice.name not in ("dense", "fourier"):
        return []
    index = family.search_index()
    searched = pencil(family.blocks(index), per_channel=False)
    found = []
    for slopes in (searched.high, searched.low):
        block, direction = worst_direction(searched, slopes)
        if choice.name == "dense":
            found.append(direction)
            continue
        last = choice.spatial[-1] if is_complex else choice.spatial[-1] // 2 + 1
        place = torch.unravel_index(family.representatives[index[block]], (*choice.spatial[:-1], last))
        spectrum = torch.zeros(len(direction), *choice.spatial, dtype=torch.complex128)
        spectrum[(slice(None), *place)] = direction.to(torch.complex128)
        wave = torch.fft.ifftn(spectrum, dim=tuple(range(1, spectrum.dim())))
        found += [wave, spectrum] if is_complex else [wave.real, wave.imag]
    return [wave for wave in found if float(wave.norm()) > 0]


def worst_direction(family: Pencil, slopes: Tensor) -> tuple[int, Tensor]:
    """The block and the unit input d with the largest gain when every v_e = slope_e z_e."""
    best, index, direction, offset = -1.0, 0, torch.zeros(0), 0
    n = family.inputs
    for part in family.chunks():
        system = torch.eye(part.width, dtype=part.O.dtype).expand(len(part), -1, -1).clone()
        paired = ((part.column < part.width) & (part.row < part.Z.shape[1] - 1)).nonzero().squeeze(1)
        system[:, part.column[paired], :] -= slopes[paired][:, None] * part.Z[:, part.row[paired], :]
        inputs = torch.eye(part.width, dtype=part.O.dtype)[:, :n].expand(len(part), -1, -1)
        gain = part.O @ torch.linalg.solve(system, inputs)
        norms = torch.linalg.matrix_norm(gain, ord=2) if min(gain.shape[1:]) > 1 else torch.linalg.matrix_norm(gain)
        if float(norms.max()) > best:
            best, local = float(norms.max()), int(norms.argmax())
            index, direction = offset + local, torch.linalg.svd(gain[local], full_matrices=False)[2][0].conj()
        offset += len(part)
    return index, direction
