"""How far a sample may move before its class changes: a proof of at least, and an attack that shows at most."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import firmly as fm
from firmly.errors import NotCertifiable
from firmly.lab.experiments.bregman_data import Samples, Split
from firmly.lab.experiments.bregman_networks import KINDS, Budget, Fitted, Kind, Shape, fit
from firmly.lab.flows import Interval, interval
from firmly.lab.run_folder import RunFolder

What = Literal["certified", "attacked"]
OUTWARD = 1e-9  # relative, for the rounding of margins and differences of weights
BISECTIONS = 12


class Constants(NamedTuple):
    """Lipschitz constants of a classifier: a bracket, the product of norms, and bounds of differences of outputs.

    `pairs[i, j]` bounds the constant of output i less output j, (classes, classes), with zeros on the diagonal.
    """

    lower: float
    upper: float
    product: float
    pairs: Tensor


@torch.no_grad()
def constants(net: nn.Sequential, budget_s: float) -> Constants:
    """Bounds by `certify` and `certificates.rows`; the first and the last module of the network are linear."""
    small, slack = with_fewer_inputs(net, budget_s)
    first, last = small[0], small[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    shape = (first.in_features,)
    whole = fm.certify(small, shape=shape, budget_s=budget_s)
    upper = whole.upper * (1 + OUTWARD) + slack
    i, j = torch.triu_indices(last.out_features, last.out_features, 1)
    differences = nn.Linear(last.in_features, len(i), dtype=last.weight.dtype)
    differences.weight.copy_(last.weight[i] - last.weight[j])
    differences.bias.copy_(last.bias[i] - last.bias[j])
    found = fm.certificates.rows(nn.Sequential(*list(small)[:-1], differences), shape=shape, budget_s=budget_s).bounds
    pairs = torch.zeros(last.out_features, last.out_features, dtype=torch.float64)
    # a difference of two outputs is a product with a vector of norm sqrt(2)
    root = math.sqrt(2) * (1 + OUTWARD)
    pairs[i, j] = torch.clamp(found * (1 + OUTWARD) + root * slack, max=root * upper)
    product = next((b.value for b in whole.bounds if b.method == "product"), math.inf)
    return Constants(whole.lower * (1 - OUTWARD), upper, product, pairs + pairs.mT)


@torch.no_grad()
def with_fewer_inputs(net: nn.Sequential, budget_s: float) -> tuple[nn.Sequential, float]:
    """M(R' z) for M(A x), A = R'Q' with orthonormal columns of Q: the same constants, up to a slack for rounding.

    Only if A has more columns than rows; |A - R'Q'| times a bound of M is the slack. Bounds hold for any bias, so that
    it does not matter which points R' reaches.
    """
    first = net[0]
    assert isinstance(first, nn.Linear)
    A = first.weight.double()
    if A.shape[1] <= A.shape[0]:
        return net, 0.0
    Q, R = torch.linalg.qr(A.mT)
    if float((Q.mT @ Q - torch.eye(len(A), dtype=A.dtype)).norm()) > OUTWARD / 10:
        return net, 0.0
    small = nn.Linear(len(A), len(A), dtype=A.dtype)
    small.weight.copy_(R.mT)
    small.bias.copy_(first.bias)
    rest = nn.Sequential(*list(net)[1:])
    error = float((A - R.mT @ Q.mT).norm()) + 1e-13 * float(A.norm())
    return nn.Sequential(small, *rest), error * fm.certify(rest, shape=(len(A),), budget_s=budget_s).upper


@torch.no_grad()
def certified_radii(net: nn.Module, samples: Samples, pairs: Tensor) -> Tensor:
    """No perturbation of a smaller Euclidean norm changes the class of the sample; 0 where the class is wrong."""
    x, labels = samples.x.double(), samples.labels
    outputs = net(x)
    own = outputs.gather(1, labels[:, None])
    margins = own - outputs - OUTWARD * (1 + own.abs() + outputs.abs())
    radii = margins / pairs[labels]
    radii[torch.arange(len(x)), labels] = math.inf
    return radii.amin(1).clamp(min=0)


def attacked_radii(net: nn.Module, samples: Samples, sizes: Tensor, steps: int, seed: int) -> Tensor:
    """The norm of the smallest perturbation found that makes the class wrong; 0 where it is, infinite if none is found.

    Projected gradient ascent of the largest wrong output less the right one, on balls of the rising radii `sizes`,
    each from the last perturbation, and from a random one; then bisection towards the sample.
    """
    x, labels = samples.x.double(), samples.labels
    net = copy.deepcopy(net).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    radii = torch.where(wrong(net, x, labels), 0.0, torch.full((len(x),), math.inf, dtype=torch.float64))
    d = torch.zeros_like(x)
    for size in sizes.tolist():
        for fresh in (False, True):
            left = torch.isinf(radii)
            if not bool(left.any()):
                return radii
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            start = size * unit(noise) if fresh else d
            moved = ascend(net, x[left], labels[left], start[left], size, steps)
            broken = wrong(net, x[left] + moved, labels[left])
            shrunk = smallest(net, x[left], labels[left], moved)
            radii[left] = torch.where(broken, shrunk.norm(dim=1), radii[left])
            if not fresh:
                d[left] = moved
    return radii


def ascend(net: nn.Module, x: Tensor, labels: Tensor, start: Tensor, size: float, steps: int) -> Tensor:
    own = nn.functional.one_hot(labels, net(x[:1]).shape[1]).bool()
    d = start
    for _ in range(steps):
        d = d.detach().requires_grad_(True)
        outputs = net(x + d)
        gain = outputs.masked_fill(own, -math.inf).amax(1) - outputs[own]
        (slope,) = torch.autograd.grad(gain.sum(), d)
        moved = d.detach() + 2.5 * size / steps * unit(slope)
        d = moved * (size / moved.norm(dim=1, keepdim=True).clamp(min=size))
    return d.detach()


def smallest(net: nn.Module, x: Tensor, labels: Tensor, d: Tensor) -> Tensor:
    """The shortest part of d that still makes the class wrong, by bisection; d itself where it does not."""
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.ones(len(x), 1, dtype=x.dtype)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        broken = wrong(net, x + middle * d, labels)[:, None]
        low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)
    return high * d


@torch.no_grad()
def wrong(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return net(x).argmax(1) != labels


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)


class Robustness(NamedTuple):
    """What is known of one classifier on test samples: radii (count,), and why they are as they are."""

    certified: Tensor
    attacked: Tensor
    margins: Tensor  # of the right output to the largest other one
    constants: Constants
    steepest: float  # the largest norm of a Jacobian at a test sample

    @property
    def accuracy(self) -> float:
        return float((self.attacked > 0).double().mean())

    def curve(self, what: What, radii: Sequence[float]) -> list[float]:
        """The proportions of samples whose class is proved, or was not changed, within radii."""
        found = self.certified if what == "certified" else self.attacked
        return [float((found > radius).double().mean()) for radius in radii]

    def mean(self, what: What, radius: float) -> float:
        """The mean of radii cut off at `radius`: the area under the curve."""
        return float((self.certified if what == "certified" else self.attacked).clamp(max=radius).mean())


class Effort(NamedTuple):
    """Attacks in balls up to `radius`, of `steps` each, and `budget_s` seconds for a certificate."""

    radius: float
    steps: int
    budget_s: float


def robustness(net: nn.Sequential, samples: Samples, effort: Effort, seed: int) -> Robustness:
    """Certified and attacked radii; an attack inside a proof is an error."""
    known = constants(net, effort.budget_s)
    certified = certified_radii(net, samples, known.pairs)
    attacked = attacked_radii(net, samples, effort.radius * torch.arange(1, 9) / 8, effort.steps, seed)
    if bool((attacked < certified).any()):
        worst = int((attacked - certified).argmin())
        raise NotCertifiable(
            f"an attack of norm {float(attacked[worst]):.9g} changed the class of sample {worst}, which is proved up "
            f"to {float(certified[worst]):.9g}: please report this"
        )
    x = samples.x.double().requires_grad_(True)
    outputs = net(x)
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in outputs.unbind(1)]
    steepest = float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())
    outputs = outputs.detach()
    own = nn.functional.one_hot(samples.labels, outputs.shape[1]).bool()
    margins = outputs[own] - outputs.masked_fill(own, -math.inf).amax(1)
    return Robustness(certified, attacked, margins, known, steepest)


class Compared(NamedTuple):
    """All networks of every kind, one for each seed, and what is known of their robustness up to `radius`."""

    radius: float
    fitted: dict[Kind, list[Fitted]]
    robust: dict[Kind, list[Robustness]]

    def means(self, kind: Kind, what: What) -> list[float]:
        """The mean radius of every seed."""
        return [r.mean(what, self.radius) for r in self.robust[kind]]

    def gain(self, over: Kind, what: What, of: Kind = "BregmaNet") -> Interval:
        """The mean radius of one kind less that of another, seed by seed."""
        return interval([a - b for a, b in zip(self.means(of, what), self.means(over, what))])


def compare(
    split: Split, shape: Shape, budget: Budget, effort: Effort, seeds: Sequence[int], run: RunFolder, name: str,
    after_each: Callable[[], None], kinds: Sequence[Kind] = KINDS,
) -> Compared:  # fmt: skip
    """Train these kinds of networks with every seed on a split, and find out how robust it is on the test samples."""
    fitted: dict[Kind, list[Fitted]] = {kind: [] for kind in kinds}
    robust: dict[Kind, list[Robustness]] = {kind: [] for kind in kinds}
    for seed in seeds:
        for kind in kinds:
            fitted[kind].append(fit(kind, split, shape, budget, seed, run, name))
            robust[kind].append(robustness(fitted[kind][-1].net, split.test, effort, seed))
            after_each()
    return Compared(effort.radius, fitted, robust)
