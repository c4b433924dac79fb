"""A checker for unrolled networks, other people's above all: do the steps stay in the nonexpansive range?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.certified import norm
from firmly.errors import ConditionError, DataError, SettingsError, StorageError
from firmly.linear.map import LinearMap

# the last parts of the names in public code: ISTA-Net, ISTA-Net+, LISTA and its relatives, deepinv, and ours
STEPS = ("lambda_step", "step", "step_size", "stepsize", "rho", "gamma", "alpha", "eta")
THRESHOLDS = ("soft_thr", "threshold", "thr", "theta", "theta_*", "prior.weight", "tau", "lambd")

Network = TypeVar("Network", nn.Module, dict[str, Tensor])


@dataclass(frozen=True)
class Entry:
    """One learned step or threshold: the range of its values, and the one allowed."""

    name: str
    kind: str  # "step" or "threshold"
    low: float
    high: float
    limit: float  # the allowed range is [0, limit]

    @property
    def holds(self) -> bool:
        """NaN does not hold."""
        return 0 <= self.low and self.high <= self.limit


@dataclass(frozen=True)
class UnrolledCheck:
    """What `check_unrolled` found: one entry for each step and threshold, in the order of the layers."""

    entries: Sequence[Entry]
    limit: float

    @property
    def holds(self) -> bool:
        return all(entry.holds for entry in self.entries)

    @property
    def broken(self) -> list[Entry]:
        """The entries outside their range."""
        return [entry for entry in self.entries if not entry.holds]

    def __str__(self) -> str:
        width = max(len(entry.name) for entry in self.entries)
        lines = [f"{'':{width}}  {'value':>18}  allowed"]
        for e in self.entries:
            value = f"{e.low:.4g}" if e.low == e.high else f"{e.low:.4g} .. {e.high:.4g}"
            allowed = f"[0, {e.limit:.6g}]" if e.kind == "step" else ">= 0"
            lines.append(f"{e.name:{width}}  {value:>18}  {allowed}" + ("" if e.holds else "   <- outside"))
        steps, thresholds = (sum(e.kind == kind for e in self.broken) for kind in ("step", "threshold"))
        lines.append(
            f"{steps} steps outside [0, 2 / |A|^2] = [0, {self.limit:.6g}] and {thresholds} negative thresholds, of "
            f"{len(self.entries)} values"
        )
        return "\n".join(lines)


def check_unrolled(
    network: nn.Module | Mapping[str, Tensor],
    A: LinearMap | float,
    steps: Sequence[str] = STEPS,
    thresholds: Sequence[str] = THRESHOLDS,
) -> UnrolledCheck:
    """Every learned step of x - rho A*(A x - y) against [0, 2 / |A|^2], and every threshold against [0, inf).

    x -> x - rho A*(A x - y) is nonexpansive if and only if rho lies in that interval; a soft threshold with theta < 0
    jumps at 0 and has no Lipschitz constant. That all hold is *necessary* for a proof of nonexpansiveness layer by
    layer, not sufficient: learned transforms around the threshold have norms of their own (`certify`).

    `network` is a module or its tensors by name (`read_tensors` for a file). `A` is the operator or its norm. A name
    counts as a step or a threshold if its end matches one of the patterns (`fnmatch`), from the whole name or after a
    dot. `SettingsError` if none is a step; `ConditionError` for a norm that is not positive.
    """
    size = norm(A) if isinstance(A, LinearMap) else float(A)
    if not (size > 0 and math.isfinite(size)):
        raise ConditionError(f"the norm of the operator is positive and finite, given {size}")
    limit = 2 / size**2
    entries = []
    tensors = values_of(network)
    for name, value in tensors.items():
        kind = "step" if matches(name, steps) else "threshold" if matches(name, thresholds) else None
        if kind is not None and value.numel() and value.is_floating_point():
            low, high = float(value.min()), float(value.max())
            entries.append(Entry(name, kind, low, high, limit if kind == "step" else math.inf))
    if not any(entry.kind == "step" for entry in entries):
        raise SettingsError(
            f"no name ends like a step ({', '.join(steps)}); the names are {', '.join(list(tensors)[:8])} ...; give "
            "the pattern of yours: check_unrolled(..., steps=('my_step',))"
        )
    return UnrolledCheck(entries, limit)


@torch.no_grad()
def project(network: Network, check: UnrolledCheck) -> Network:
    """A copy of the network, or of its tensors, with every entry of the check clamped to its range.

    `DataError` for values that are not numbers, and for a name of the check that the network does not have.
    """
    ranges = {entry.name: entry.limit for entry in check.entries}
    tensors = values_of(network)
    for name in ranges:
        if name not in tensors:
            raise DataError(f"the check has {name!r}, which this network has not: check it first")
        if bool(tensors[name].isnan().any()):
            raise DataError(f"{name} holds values that are not numbers: nothing to project")
    clamped = {name: tensors[name].clamp(0, rounded_down(limit, tensors[name])) for name, limit in ranges.items()}
    if not isinstance(network, nn.Module):
        return {**network, **clamped}
    result = copy.deepcopy(network)
    for name, value in clamped.items():
        if not torch.equal(value, tensors[name]):
            path, _, leaf = name.rpartition(".")
            owner = result.get_submodule(path)
            if parametrize.is_parametrized(owner, leaf):
                setattr(owner, leaf, value)
            else:
                getattr(owner, leaf).copy_(value)
    return result


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    A pickle (.pkl, .pt, .pth) is refused, since reading one can run code. Convert it once, where you trust it:
    `safetensors.torch.save_file(torch.load("net.pkl", weights_only=True), "net.safetensors")`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix in (".pkl", ".pt", ".pth", ".pickle", ".ckpt"):
        raise DataError(
            f"{path} is a pickle, and reading one can run code. Convert it once: safetensors.torch.save_file("
            "torch.load(path, weights_only=True), 'net.safetensors')"
        )
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise StorageError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or is not a safetensors file: {error}") from error


def rounded_down(limit: float, like: Tensor) -> float:
    """The largest number of the type of a tensor that is at most the limit."""
    rounded = torch.tensor(limit, dtype=like.dtype)
    return float(torch.nextafter(rounded, torch.zeros_like(rounded)) if float(rounded) > limit else rounded)


def values_of(network: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name; those that a parametrisation makes are given as what it makes."""
    if not isinstance(network, nn.Module):
        return dict(network)
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if path.rpartition(".")[2] == "parametrizations" or ".parametrizations." in f".{path}.":
            continue
        made = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for name in [*own, *made]:
            found[f"{path}.{name}" if path else name] = getattr(module, name).detach()
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)
