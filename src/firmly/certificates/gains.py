"""Multivariate bounds: |change of output|^2 <= sum_k rho_k |d_k|^2 for perturbations d_k of groups of inputs.

One matrix inequality with a diagonal gain matrix covers all trade-offs between the groups (docs/theory/multivariate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from firmly.certificates.blocks import Blocks
from firmly.certificates.certificate import Certificate
from firmly.certificates.certify import Shapes, certify
from firmly.certificates.family import Family
from firmly.certificates.groups import Grouped, Groups
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.representation import represent
from firmly.certificates.signal import trace
from firmly.certificates.spectral import minimise_rho
from firmly.certificates.verify import verify
from firmly.errors import NotCertifiable
from firmly.linear.map import LinearMap


@dataclass(frozen=True)
class Gains:
    """|F(x + d) - F(x)|^2 <= sum_k rho[k] |d_k|^2, proved by `certificate`.

    The certificate is that of the network with group k multiplied by `scales[k]` on its way in, whose joint Lipschitz
    constant it brackets: rho[k] = (upper / scales[k])^2, and its lower end is attained, so that no inequality with
    these proportions has factors smaller than rho[k] / gap^2.
    """

    rho: dict[str, float]
    scales: dict[str, float]
    certificate: Certificate

    def bound(self, sizes: Mapping[str, float]) -> float:
        """sqrt(sum_k rho_k size_k^2): how far the output moves when group k moves by at most size_k."""
        unknown = [name for name in sizes if name not in self.rho]
        if unknown:
            raise ValueError(f"no gains are known for {unknown}; the groups are {list(self.rho)}")
        total = sum(self.rho[name] * size**2 for name, size in sizes.items())
        return math.sqrt(total) * (1 + 1e-14)

    def verify(self, net: nn.Module, groups: Groups, shape: Shapes | None = None) -> None:
        """Prove the inequality again without a solver; `VerificationError` if it does not hold for these weights."""
        verify(self.certificate, Grouped(net, groups, shape, self.scales))

    def __str__(self) -> str:
        terms = " + ".join(f"{value:.6g} |{name}|^2" for name, value in self.rho.items())
        return f"|output|^2 <= {terms}   (tight within {self.certificate.gap:.4g} of its square root)"


@dataclass(frozen=True)
class Star:
    """The sensitivity to every group alone, the others fixed, and the joint one: the star of Gupta et al. 2022.

    max_k groups[k] <= joint <= sqrt(sum_k groups[k]^2) holds for the true constants of disjoint groups.
    """

    groups: dict[str, Certificate]
    joint: Certificate

    @property
    def lower(self) -> float:
        """A lower bound of the joint constant, from all that was attained."""
        return max(self.joint.lower, *(c.lower for c in self.groups.values()))

    @property
    def upper(self) -> float:
        """An upper bound of the joint constant, from all that was proved."""
        together = math.sqrt(sum(c.upper**2 for c in self.groups.values())) * (1 + 1e-14)
        return min(self.joint.upper, together)


@torch.no_grad()
def gains(
    net: nn.Module,
    groups: Groups = ("data", "start"),
    shape: Shapes | None = None,
    weights: Mapping[str, float] | None = None,
    tolerance: float = 1e-4,
    budget_s: float = 60.0,
) -> Gains:
    """The rho_k with |change of output|^2 <= sum_k rho_k |d_k|^2 and the smallest sum_k weights[k] rho_k found.

    `groups` are names of inputs, or parts of them as `Grouped` takes them; what is in no group is held fixed. `weights`
    (default 1) say how much a group counts: for a perturbation with E |d_k|^2 = w_k, sum_k w_k rho_k bounds the mean
    square of the change. Raises `NotCertifiable` where `certify` does.
    """
    split = Grouped(net, groups, shape)
    given = {} if weights is None else dict(weights)
    if set(given) - set(split.groups) or not all(w > 0 and math.isfinite(w) for w in given.values()):
        raise ValueError(f"weights are positive numbers for the groups {split.groups}, given {given}")
    factors = [float(given.get(name, 1.0)) for name in split.groups]
    rho = smallest_gains(split, factors, tolerance, budget_s / 2)
    floor = 1e-12 * float(rho.max())  # a group without influence
    scales = {name: 1 / math.sqrt(max(float(r), floor)) for name, r in zip(split.groups, rho)}
    proof = certify(
        Grouped(net, groups, shape, scales), wrt=split.groups, tolerance=0.1 * tolerance, budget_s=budget_s / 2
    )
    proved = {name: (proof.upper / scale) ** 2 * (1 + 1e-15) for name, scale in scales.items()}
    return Gains(proved, scales, proof)


@torch.no_grad()
def star(
    net: nn.Module,
    groups: Groups = ("data", "start"),
    shape: Shapes | None = None,
    tolerance: float = 1e-4,
    budget_s: float = 60.0,
) -> Star:
    """Certificates of the sensitivity to every group alone (all else held fixed) and to all of them together."""
    split = Grouped(net, groups, shape)
    share = budget_s / (len(split.groups) + 1)
    alone = {name: certify(split, wrt=(name,), tolerance=tolerance, budget_s=share) for name in split.groups}
    return Star(alone, certify(split, wrt=split.groups, tolerance=tolerance, budget_s=share))


def smallest_gains(split: Grouped, weights: list[float], tolerance: float, budget_s: float) -> Tensor:
    """The rho_k that floating point finds, one per group of `split`; what is returned is proved elsewhere."""
    is_complex = any(m.is_complex for m in split.modules() if isinstance(m, LinearMap))
    system = trace(split, split.inputs, split.groups, is_complex)
    choice, basis, blocked, _ = represent(system)
    family = Family(blocked, basis)
    blocks = family.blocks(family.search_index())
    single = pencil(blocks, choice.name in ("dense", "fourier"))
    joint = minimise_rho(single, tolerance, budget_s / 2)
    if not 0 < joint.rho < math.inf:
        raise NotCertifiable("no multipliers prove a finite bound for this network, or its output does not move")
    together = with_group_gains(single, group_columns(blocks, split.groups), weights)
    start = torch.cat([torch.full((len(weights),), 1.05 * joint.rho, dtype=torch.float64), joint.mu])
    return minimise_rho(together, tolerance, budget_s / 2, start).mu[: len(weights)]


def group_columns(blocks: Blocks, names: tuple[str, ...]) -> Tensor:
    """The group of every column of d: relaxation may replace one input by several, which keep its name."""
    owners = [names.index(node.name) for node in blocks.system.inputs]
    return torch.cat([torch.full((s.stop - s.start,), k) for s, k in zip(blocks.inputs, owners)])


def with_group_gains(family: Pencil, group: Tensor, weights: list[float]) -> Pencil:
    """The pencil of `min sum_k w_k rho_k` over sum_k rho_k |d_k|^2 - |output|^2 + sum_i mu_i (...) >= 0.

    It is the same problem with one more scalar input s: r |s|^2 + sum_k rho_k (|d_k|^2 - w_k |s|^2) - ... >= 0. The
    rho_k are multipliers like the mu_i, those of entries with slopes 0 (|d_k|^2) and -+sqrt(w_k) (-w_k |s|^2), and
    the smallest r is the minimum.
    """
    count, columns = len(weights), torch.arange(family.inputs)
    Z = torch.nn.functional.pad(family.Z, (1, 0, 0, 1))  # column of s in front; the last row becomes that of s
    no_row, s_row, no_column = family.Z.shape[1], family.Z.shape[1] - 1, family.width + 1
    Z[:, s_row] = 0.0
    Z[:, s_row, 0] = 1.0
    root = torch.tensor(weights, dtype=torch.float64).sqrt()
    row = torch.where(family.row == s_row, no_row, family.row)
    return replace(
        family,
        Z=Z,
        O=torch.nn.functional.pad(family.O, (1, 0)),
        column=torch.cat([1 + columns, torch.full((count,), no_column), 1 + family.column]),
        row=torch.cat([torch.full((len(columns),), no_row), torch.full((count,), s_row), row]),
        owner=torch.cat([group, torch.arange(count), count + family.owner]),
        low=torch.cat([torch.zeros(len(columns)), -root, family.low]).double(),
        high=torch.cat([torch.zeros(len(columns)), root, family.high]).double(),
        inputs=1,
        multipliers=count + family.multipliers,
        layer=None,
    )
