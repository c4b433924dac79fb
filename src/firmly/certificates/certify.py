"""`certify`: trace, choose a basis, bound from above by several methods and from below by an attained pair."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from firmly.certificates.certificate import Certificate
from firmly.certificates.family import Family
from firmly.certificates.lower import lower_bound
from firmly.certificates.methods import METHODS, Problem, upper_bounds
from firmly.certificates.methods import spectral_bound as spectral_bound
from firmly.certificates.representation import represent
from firmly.certificates.signal import arguments, trace
from firmly.certificates.system import weights_hash
from firmly.errors import NotCertifiable, SettingsError, ShapeError
from firmly.linear.map import LinearMap

Method = Literal["auto", "product", "averaged", "direct", "virtual", "eclipse", "spectral", "lipsdp", "exact"]
Shapes = Sequence[int] | Mapping[str, Sequence[int]]


@torch.no_grad()
def certify(
    net: nn.Module,
    wrt: str | Sequence[str] = "data",
    method: Method = "auto",
    shape: Shapes | None = None,
    tolerance: float = 1e-4,
    budget_s: float = 60.0,
    solver: Literal["layered", "clarabel"] = "layered",
) -> Certificate:
    """A certified bracket of the Lipschitz constant of `net`, for perturbations of the inputs `wrt` in Euclidean norm.

    Networks of `firmly.unroll` know their inputs ("data", "start", or "both"); for any other module `shape` gives the
    shape of its input without the batch, or a dict from argument names of `forward` to shapes, and `wrt` names
    arguments ("data" is the first, "both" all). Weights are taken in double precision, as the network is now.

    `method`: "product", "averaged" ("direct"), "virtual" (forward-backward only), "spectral" (matrix inequality with
    shared multipliers), "lipsdp" (a multiplier per neuron), "eclipse" (one per layer in closed form), "exact" (about
    twenty neurons, or weights whose signs agree), or "auto": those that may help, cheap ones first, until the relative
    gap to the lower end is below `tolerance` or `budget_s` seconds have passed; the smallest bound is returned.
    `tolerance` is also the relative accuracy of the searches for multipliers; method="lipsdp" with
    solver="clarabel" takes a conic solver to its full accuracy, for narrow networks. Raises `NotCertifiable` for what
    no sound bound is known of.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose auto, {', '.join(METHODS)}")
    if solver not in ("layered", "clarabel") or (solver == "clarabel" and method != "lipsdp"):
        raise SettingsError(
            f"solver is 'layered', or 'clarabel' with method='lipsdp'; given {solver!r} with method={method!r}"
        )
    inputs = input_shapes(net, shape)
    names = perturbed_inputs(inputs, wrt)
    is_complex = any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))
    net = copy.deepcopy(net).double().cpu()
    system = trace(net, inputs, names, is_complex)
    deadline = time.monotonic() + budget_s
    choice, basis, blocked, relaxations = represent(system)
    family = Family(blocked, basis)
    problem = Problem(system, choice, family, relaxations, tolerance, deadline, solver)
    attained = lower_bound(net, inputs, names, is_complex, choice, family, max(0.2 * budget_s, 1.0))
    proofs = upper_bounds(problem, method, attained.ratio)
    best = min(proofs, key=lambda proof: proof.bound.value)
    upper = best.bound.value
    if not upper < float("inf"):
        tried = [proof.bound.method for proof in proofs]
        raise NotCertifiable(f"no finite bound was found for this network (methods tried: {tried})")
    if attained.ratio > upper * (1 + 1e-6):
        raise NotCertifiable(
            f"the network moves two inputs apart {attained.ratio:.9g} times, above the bound {upper:.9g} of its "
            f"trace by '{best.bound.method}': it does not compute the same each time (random numbers, a state that "
            "changes), or the trace is wrong, which we would like to hear of"
        )
    notes = relaxations if best.basis == choice else []
    return Certificate(
        lower=min(attained.ratio * (1 - 1e-12), upper),
        upper=upper,
        method=best.bound.method,
        bounds=[proof.bound for proof in proofs],
        wrt=names,
        inputs=inputs,
        is_complex=is_complex,
        basis=best.basis,
        per_channel=best.per_channel,
        assumptions=[*assumptions(net, inputs, names), *system.assumptions, *notes],
        weights_hash=weights_hash(net),
        system_hash=system.fingerprint(),
        point=attained.point,
        perturbation=attained.perturbation,
        multipliers=best.multipliers,
    )


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
