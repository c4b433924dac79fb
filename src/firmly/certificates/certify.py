"""`certify`: trace, choose a basis, bound from above by several methods and from below by an attained pair."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from firmly.certificates.certificate import Bound, Certificate
from firmly.certificates.family import Family
from firmly.certificates.lower import lower_bound
from firmly.certificates.norm_bounds import NORM_BOUNDS
from firmly.certificates.pencil import pencil
from firmly.certificates.representation import represent
from firmly.certificates.signal import arguments, trace
from firmly.certificates.spectral import minimise_rho
from firmly.certificates.system import weights_hash
from firmly.certificates.verify import certified_gain
from firmly.errors import NotCertifiable, ShapeError
from firmly.linear.map import LinearMap

Method = Literal["auto", "product", "averaged", "direct", "virtual", "spectral"]
Shapes = Sequence[int] | Mapping[str, Sequence[int]]


@torch.no_grad()
def certify(
    net: nn.Module,
    wrt: str | Sequence[str] = "data",
    method: Method = "auto",
    shape: Shapes | None = None,
    tolerance: float = 1e-4,
    budget_s: float = 60.0,
) -> Certificate:
    """A certified bracket of the Lipschitz constant of `net`, for perturbations of the inputs `wrt` in Euclidean norm.

    Networks of `firmly.unroll` know their inputs ("data", "start", or "both"); for any other module `shape` gives the
    shape of its input without the batch, or a dict from argument names of `forward` to shapes, and `wrt` names
    arguments ("data" is the first, "both" all). Weights are taken in double precision, as the network is now.

    `method`: "product", "averaged" ("direct"), "virtual" (forward-backward only), "spectral" (matrix inequality with
    shared multipliers), or "auto" for all that apply; the smallest bound is returned. `tolerance` is the relative
    accuracy of the spectral bound and `budget_s` the seconds it may take. Raises `NotCertifiable` for what no sound
    bound is known of.
    """
    if method != "auto" and method != "spectral" and method not in NORM_BOUNDS:
        raise ValueError(f"unknown method {method!r}: choose auto, spectral, {', '.join(NORM_BOUNDS)}")
    inputs = input_shapes(net, shape)
    names = perturbed_inputs(inputs, wrt)
    is_complex = any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))
    net = copy.deepcopy(net).double().cpu()
    system = trace(net, inputs, names, is_complex)
    choice, basis, blocked, relaxations = represent(system)
    family = Family(blocked, basis)
    bounds: list[Bound] = []
    for name, bound in NORM_BOUNDS.items():
        if method == name or (method == "auto" and name != "direct"):
            started = time.perf_counter()
            try:
                bounds.append(Bound(name, bound(family), time.perf_counter() - started))
            except NotCertifiable:
                if method == name:
                    raise
    multipliers, per_channel = None, choice.name in ("dense", "fourier")
    if method in ("auto", "spectral"):
        found, multipliers = spectral_bound(family, per_channel, tolerance, budget_s)
        bounds.append(found)
    best = min(bounds, key=lambda b: b.value)
    if not best.value < float("inf"):
        raise NotCertifiable(
            f"no finite bound was found for this network (methods tried: {[b.method for b in bounds]})"
        )
    attained = lower_bound(net, inputs, names, is_complex, choice, family, max(0.2 * budget_s, 1.0))
    if attained.ratio > best.value * (1 + 1e-6):
        raise NotCertifiable(
            f"the network moves two inputs apart {attained.ratio:.9g} times, above the bound {best.value:.9g} of its "
            f"trace by '{best.method}': it does not compute the same each time (random numbers, a state that changes), "
            "or the trace is wrong, which we would like to hear of"
        )
    return Certificate(
        lower=min(attained.ratio * (1 - 1e-12), best.value),
        upper=best.value,
        method=best.method,
        bounds=bounds,
        wrt=names,
        inputs=inputs,
        is_complex=is_complex,
        basis=choice,
        per_channel=per_channel,
        assumptions=[*assumptions(net, inputs, names), *system.assumptions, *relaxations],
        weights_hash=weights_hash(net),
        system_hash=system.fingerprint(),
        point=attained.point,
        perturbation=attained.perturbation,
        multipliers=multipliers if best.method == "spectral" else None,
    )


def spectral_bound(family: Family, per_channel: bool, tolerance: float, budget_s: float) -> tuple[Bound, Tensor]:
    """The matrix inequality over all blocks: solved on those that a search holds, checked and verified on all."""
    started = time.perf_counter()
    index, start, cuts = family.search_index(), None, 0
    while True:
        searched = pencil(family.blocks(index), per_channel)
        remaining = budget_s - (time.perf_counter() - started)
        found = minimise_rho(searched, tolerance, remaining, start)
        start, cuts = found.mu, cuts + found.cuts
        if len(index) == len(family) or remaining < 0:
            break
        values = torch.cat([pencil(part, per_channel).required(found.mu) for part in family.parts()])
        if float(values.max()) <= found.rho * (1 + tolerance):
            break
        index = torch.cat([index, values.topk(min(64, len(values))).indices]).unique()
    note = f"{len(family)} blocks of width {searched.width}, {searched.multipliers} multipliers, {cuts} cuts"
    value, mu = math.inf, found.mu
    for share in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):  # an optimum on the boundary is not proved; a point inside is
        trial = (1 - share) * found.mu + share * found.interior
        proved = certified_gain(family, trial, per_channel)
        if proved < value:
            value, mu = proved, trial
        if value <= math.sqrt(found.rho) * (1 + 10 * tolerance):
            break
    return Bound("spectral", value, time.perf_counter() - started, note), mu


def input_shapes(net: nn.Module, shape: Shapes | None) -> dict[str, tuple[int, ...]]:
    known = getattr(net, "inputs", None)
    if shape is None and isinstance(known, Mapping):
        shape = known
    if shape is None:
        raise ShapeError(
            "this module does not know the shape of its input: certify(module, shape=(channels, height, width))"
        )
    named = shape if isinstance(shape, Mapping) else {"data": shape}
    return {name: tuple(int(n) for n in s) for name, s in named.items()}


def perturbed_inputs(inputs: Mapping[str, Sequence[int]], wrt: str | Sequence[str]) -> tuple[str, ...]:
    if wrt == "both":
        return tuple(inputs)
    if wrt == "data" and "data" not in inputs:
        return (next(iter(inputs)),)
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    unknown = [name for name in names if name not in inputs]
    if unknown or not names:
        raise ValueError(f"cannot certify with respect to {unknown or names}: the inputs are {list(inputs)}")
    return names


def assumptions(net: nn.Module, inputs: Mapping[str, Sequence[int]], names: Sequence[str]) -> list[str]:
    given = arguments(net, inputs, names)
    perturbed = " and ".join(f"'{n}' of shape {tuple(inputs[n])}" for n in names)
    fixed = ", ".join(f"'{n}'" for n in given if n not in names)
    default = ", ".join(f"'{n}'" for n in inputs if n not in given)
    return [
        f"Euclidean norms; perturbed: {perturbed}"
        + (f"; held fixed: {fixed}" if fixed else "")
        + (f"; left to its default: {default}" if default else ""),
        "exact arithmetic on the stored weights; rounding inside the network itself is not covered",
    ]
