"""The upper bounds that `certify` knows, in order of cost, each with what `verify` needs to prove it again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from firmly.certificates.certificate import Bound
from firmly.certificates.conic import conic_multipliers
from firmly.certificates.eclipse import eclipse_multipliers
from firmly.certificates.elimination import elimination_cost, elimination_order
from firmly.certificates.exact import UNDECIDED, exact_bound, neurons, signs_agree
from firmly.certificates.family import Family
from firmly.certificates.layered_proof import layered_gain
from firmly.certificates.layers import LAYER_ENTRIES, Layers, layer_entries, layers
from firmly.certificates.lipsdp import lipsdp_multipliers
from firmly.certificates.norm_bounds import NORM_BOUNDS
from firmly.certificates.pencil import pencil
from firmly.certificates.representation import BasisChoice
from firmly.certificates.spectral import minimise_rho
from firmly.certificates.system import System
from firmly.certificates.verify import ROOM, certified_gain
from firmly.errors import NotCertifiable

MANY = 250  # multipliers from which 'auto' takes one per layer first, in case the time is short
EVALUATION = 1e11  # operations of one factorisation of the layers that 'auto' accepts: several seconds
ENUMERATED = 12  # neurons up to which 'auto' takes the exact constant
SHARES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5)  # an optimum on the boundary is not proved; a point inside is
DENSE = BasisChoice("dense")


@dataclass(frozen=True)
class Proof:
    """A bound, and what proves it: the basis and the multipliers, if any."""

    bound: Bound
    basis: BasisChoice
    per_channel: bool
    multipliers: Tensor | None = None


@dataclass
class Problem:
    """A traced system, its blocks in a basis, and its layers where they fit into memory."""

    system: System
    choice: BasisChoice
    family: Family
    relaxations: list[str]
    tolerance: float
    deadline: float
    solver: Literal["layered", "clarabel"] = "layered"
    known: list[Proof] = field(default_factory=list)

    @cached_property
    def layers(self) -> Layers:
        return layers(self.system)

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def worth_layers(self) -> bool:
        """Whether 'auto' looks at the layers: the basis loses something, and a factorisation takes seconds at most.

        A Fourier basis loses little even where it relaxes a map, so that only a quick look is worth it there.
        """
        exact_elsewhere = self.choice.name != "dense" and not self.relaxations
        if exact_elsewhere or self.system.is_complex or layer_entries(self.system) > LAYER_ENTRIES:
            return False
        limit = EVALUATION if self.choice.name in ("dense", "norms") else 0.001 * EVALUATION
        return elimination_cost(self.layers, elimination_order(self.layers)) <= limit


def norm_method(name: str) -> Callable[[Problem], Proof]:
    def run(problem: Problem) -> Proof:
        started = time.perf_counter()
        value = NORM_BOUNDS[name](problem.family)
        return Proof(Bound(name, value, time.perf_counter() - started), problem.choice, shared(problem))

    return run


def shared(problem: Problem) -> bool:
    """Whether separable nonlinearities have one multiplier per channel."""
    return problem.choice.name in ("dense", "fourier")


def spectral(problem: Problem) -> Proof:
    """Shared multipliers over all blocks of the basis."""
    bound, mu = spectral_bound(problem.family, shared(problem), problem.tolerance, problem.remaining)
    return Proof(bound, problem.choice, shared(problem), mu)


def eclipse(problem: Problem) -> Proof:
    """One multiplier per layer in closed form."""
    started = time.perf_counter()
    rho, nu = eclipse_multipliers(problem.layers)
    value = layered_gain(problem.layers, rho * nu, rho)
    note = "one multiplier per layer, in closed form"
    return Proof(Bound("eclipse", value, time.perf_counter() - started, note), DENSE, True, value**2 * nu)


def lipsdp(problem: Problem) -> Proof:
    """One multiplier per neuron."""
    started = time.perf_counter()
    if problem.solver == "clarabel":
        result = conic_multipliers(problem.layers, problem.remaining)
    else:
        result = lipsdp_multipliers(problem.layers, problem.tolerance, problem.remaining)
    value = layered_gain(problem.layers, result.mu, result.rho)
    note = f"{problem.layers.multipliers} multipliers, {result.evaluations} factorisations"
    mu = result.mu if math.isinf(value) else value**2 / result.rho * result.mu
    return Proof(Bound("lipsdp", value, time.perf_counter() - started, note), DENSE, True, mu)


def exact(problem: Problem) -> Proof:
    """The largest norm over all slopes."""
    started = time.perf_counter()
    mu = next((p.multipliers for p in problem.known if p.bound.method == "lipsdp"), None)
    if mu is None and 0 < neurons(problem.layers) <= UNDECIDED:
        mu = lipsdp_multipliers(problem.layers, 1e-3, problem.remaining).mu
    value = exact_bound(problem.system, mu)
    note = "the largest value over all slopes in their intervals"
    return Proof(Bound("exact", value, time.perf_counter() - started, note), DENSE, True, mu)


METHODS: dict[str, Callable[[Problem], Proof]] = {
    **{name: norm_method(name) for name in NORM_BOUNDS},
    "eclipse": eclipse,
    "spectral": spectral,
    "lipsdp": lipsdp,
    "exact": exact,
}


def automatic(problem: Problem) -> Iterator[str]:
    """The methods that may help, cheap ones first; the layers are looked at only when it comes to them."""
    yield from (name for name in NORM_BOUNDS if name != "direct")
    if problem.choice.name != "dense":
        yield "spectral"
    if problem.worth_layers():
        if signs_agree(layers(problem.system, reduced=False)):
            yield "exact"
            return
        if problem.layers.multipliers > MANY:
            yield "eclipse"
        yield "lipsdp"
        if neurons(problem.layers) <= ENUMERATED:
            yield "exact"
    elif problem.choice.name == "dense":
        yield "spectral"


def upper_bounds(problem: Problem, method: str, lower: float) -> list[Proof]:
    """The proofs of the method asked for, or of those that 'auto' tries until the gap is closed or time is up."""
    if method != "auto":
        return [reported(METHODS[method](problem))]
    for name in automatic(problem):
        if problem.remaining < 0 and problem.known and name not in NORM_BOUNDS:  # which take little
            break
        try:
            problem.known.append(METHODS[name](problem))
        except NotCertifiable:
            continue
        best = min(p.bound.value for p in problem.known)
        if best <= lower * (1 + problem.tolerance):
            break
    return [reported(proof) for proof in problem.known]


def reported(proof: Proof) -> Proof:
    """The proof of a bound that is large enough to be proved again with other rounding."""
    return replace(proof, bound=replace(proof.bound, value=proof.bound.value * ROOM))


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
    for share in SHARES:
        trial = (1 - share) * found.mu + share * found.interior
        proved = certified_gain(family, trial, per_channel)
        if proved < value:
            value, mu = proved, trial
        late = time.perf_counter() - started > budget_s and value < math.inf
        if late or value <= math.sqrt(found.rho) * (1 + 10 * tolerance):
            break
    return Bound("spectral", value, time.perf_counter() - started, note), mu
