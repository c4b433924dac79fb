"""Is a map averaged, contractive, monotone? Do its iterates converge? (docs/theory/averagedness)

F is alpha-averaged if F = (1 - alpha) Id + alpha N with N nonexpansive, that is if the network F - (1 - alpha) Id has
Lipschitz constant at most alpha: a question that the certificates answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates.blocks import Blocks, block_norms
from firmly.certificates.certificate import Certificate
from firmly.certificates.certify import Shapes, certify, input_shapes, perturbed_inputs, spectral_bound
from firmly.certificates.family import Family
from firmly.certificates.lower import as_function, lower_bound
from firmly.certificates.norm_bounds import averaged_bound
from firmly.certificates.representation import BasisChoice, represent
from firmly.certificates.signal import arguments, trace
from firmly.certificates.verify import verify
from firmly.errors import NotCertifiable, ShapeError
from firmly.linear.map import LinearMap
from firmly.linear.symbol import Symbol

SLACK = 1e-6
"""N is proved (1 + SLACK)-Lipschitz: no computation with rounding can prove 1 where 1 is attained."""


class Recentred(nn.Module):
    """x -> net(x) - centre x for the input `wrt`, whose shape the output has."""

    def __init__(self, net: nn.Module, wrt: str, centre: float, shape: Shapes | None = None):
        super().__init__()
        shapes = input_shapes(net, shape)
        self.net, self.wrt, self.centre = net, wrt, centre
        self.inputs = {name: shapes[name] for name in arguments(net, shapes, (wrt,))}

    def forward(self, *first: Any, **others: Any) -> Any:
        given = {**dict(zip(self.inputs, first)), **others}
        x, names = given[self.wrt], iter(self.inputs)
        output = self.net(given.pop(next(names)), **given)
        if tuple(output.shape) != tuple(x.shape):
            raise ShapeError(
                f"averagedness compares the output with the input '{self.wrt}', but their shapes are "
                f"{tuple(output.shape)} and {tuple(x.shape)}"
            )
        return output - self.centre * x if self.centre else output


@dataclass(frozen=True)
class Averagedness:
    """What is proved of a map x -> F(x) from a space to itself.

    `alpha` is the smallest found with F = (1 - alpha) Id + alpha N, N nonexpansive (up to a factor 1 + 1e-6); infinite
    if none was. `alphas` has the value of each method and `lower` one below which no alpha holds, from an explicit
    pair. `contraction` bounds the Lipschitz constant of F, and <F x - F y, x - y> >= monotonicity |x - y|^2.
    `certificate` is that of F - (1 - alpha) Id for the alpha of the matrix inequality.
    """

    alpha: float
    lower: float
    method: str
    alphas: dict[str, float]
    contraction: float
    monotonicity: float
    wrt: str
    certificate: Certificate | None

    @property
    def converges(self) -> str:
        """What follows for the iterates x <- F(x)."""
        if self.contraction < 1:
            return f"the iterates converge to the only fixed point, by a factor {self.contraction:.6g} in every step"
        if self.alpha < 1:
            return "if F has a fixed point, the iterates converge to one (Krasnoselskii-Mann)"
        return "convergence of the iterates is not proved"

    def verify(self, net: nn.Module, shape: Shapes | None = None) -> None:
        """Prove the alpha of the matrix inequality again; `VerificationError` if it does not hold for these weights."""
        if self.certificate is None:
            raise NotCertifiable("no alpha was proved by the matrix inequality, so there is nothing to verify")
        verify(self.certificate, Recentred(net, self.wrt, 1 - self.alphas["inequality"], shape))


@torch.no_grad()
def averagedness(
    net: nn.Module, wrt: str = "start", shape: Shapes | None = None, tolerance: float = 1e-4, budget_s: float = 60.0
) -> Averagedness:
    """The smallest alpha for which the map from the input `wrt` to the output is proved alpha-averaged.

    Three methods, the smallest wins: "inequality" (the matrix inequality for F - (1 - alpha) Id, by bisection),
    "composition" (alpha of every layer, composed: Ogura and Yamada 2002; Combettes and Yamada 2015) and "expansion"
    (the condition of Combettes and Pesquet 2020 used by Chouzenoux, Della Valle and Pesquet 2025). The last two take
    chains. `tolerance` is the absolute accuracy of alpha. `ShapeError` if output and input differ in shape.
    """
    shapes = input_shapes(net, shape)
    wrt = next(iter(shapes)) if wrt == "start" and "start" not in shapes else perturbed_inputs(shapes, wrt)[0]
    deadline = time.monotonic() + budget_s
    share = budget_s / 20

    def lipschitz(centre: float) -> float:
        return upper_bound(represented(Recentred(net, wrt, centre, shapes), wrt)[1], share)

    chain = represented(Recentred(net, wrt, 0.0, shapes), wrt)[1]
    alphas = {"composition": math.inf, "expansion": math.inf}
    try:
        weights, slopes = layers(chain.blocks(torch.arange(len(chain)), "closed"))
        alphas = {"composition": composed_alpha(weights, slopes), "expansion": expansion_alpha(weights, slopes)}
    except NotCertifiable:
        pass
    contraction = lipschitz(0.0)
    known = min(alphas.values())
    alphas["inequality"] = least_root(lambda a: lipschitz(1 - a) - a, min(known, 1.0), tolerance, deadline)
    certificate, lower = None, 0.0
    if alphas["inequality"] < math.inf:
        smallest = alphas["inequality"]
        certificate = certify(Recentred(net, wrt, 1 - smallest, shapes), wrt=wrt, tolerance=1e-7, budget_s=share * 4)
        if certificate.upper > smallest * (1 + 2 * SLACK):  # the search found what the proof does not confirm
            alphas["inequality"], certificate = math.inf, None
        else:
            lower = least_alpha(net, wrt, shapes, smallest)
    method = min(alphas, key=lambda name: alphas[name])
    alpha = alphas[method]
    far = 8 * max(contraction, 1.0)  # <F d, d> >= (c - Lip(F - c Id)) |d|^2, sharper for larger c
    monotone = [(far - lipschitz(far)) - 4e-16 * far, -contraction]
    if alpha < math.inf:
        monotone.append(1 - 2 * alpha * (1 + SLACK))
    return Averagedness(alpha, lower, method, alphas, contraction, max(monotone), wrt, certificate)


def least_root(excess: Callable[[float], float], high: float, tolerance: float, deadline: float) -> float:
    """The smallest alpha <= 1 found with excess(alpha) <= SLACK alpha, to a tolerance; infinite if there is none.

    The excess is convex and falls towards its root, so that the line through two points left of the root meets zero
    left of it, and near it; where that does not help, the interval is halved.
    """
    start = [a for a in dict.fromkeys((high, 1.0)) if excess(a) <= SLACK * a]
    if not start:
        return math.inf
    high, left = start[0], [(0.0, excess(0.0))]
    if left[0][1] <= 0:
        return 0.0
    while high - left[-1][0] > tolerance and time.monotonic() < deadline:
        trial = 0.5 * (left[-1][0] + high)
        if len(left) > 1:
            (a, fa), (b, fb) = left[-2:]
            crossing = b + fb * (b - a) / (fa - fb) + 0.3 * tolerance if fa > fb > 0 else trial
            trial = crossing if b < crossing < trial else trial
        value = excess(trial)
        if value <= SLACK * trial:
            high = trial
        else:
            left.append((trial, value))
    return high


def represented(net: Recentred, wrt: str) -> tuple[BasisChoice, Family]:
    choice, basis, blocked, _ = represent(trace(net, net.inputs, (wrt,), is_complex(net)))
    return choice, Family(blocked, basis)


def is_complex(net: nn.Module) -> bool:
    return any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))


def upper_bound(family: Family, budget_s: float) -> float:
    per_channel = family.basis.name in ("dense", "fourier")
    return min(averaged_bound(family), spectral_bound(family, per_channel, SLACK, budget_s)[0].value)


def least_alpha(net: nn.Module, wrt: str, shapes: Shapes, proved: float) -> float:
    """An alpha that F needs: with T = Id - F, |T d|^2 <= 2 alpha <T d, d>; for pairs that strain smaller ones."""
    run, needed = None, 0.0
    for share in (0.0, 0.5, 0.98):
        trial = Recentred(net, wrt, 1 - share * proved, shapes)
        choice, family = represented(trial, wrt)
        pair = lower_bound(trial, trial.inputs, (wrt,), is_complex(net), choice, family, 1.0)
        run = as_function(net, trial.inputs, (wrt,), is_complex(net)) if run is None else run
        moved = pair.point + pair.perturbation
        step = moved - pair.point
        left = step - (run(moved) - run(pair.point))
        inner, square = float((left * step.conj()).real.sum()), float(left.abs().square().sum())
        if inner > 0 and square > 1e-12 * float(step.abs().square().sum()):  # else lost in rounding
            needed = max(needed, square / (2 * inner) * (1 - 1e-6))
    return needed


# -- chains of layers ----------------------------------------------------------------------------------------------


def layers(blocks: Blocks) -> tuple[list[Symbol], list[tuple[float, float]]]:
    """W_1, .., W_m (and W_{m+1} if the output is not R_m itself) and the slopes of R_1, .., R_m of a chain."""
    sources = [slice(0, blocks.inputs[-1].stop), *blocks.columns]
    weights = []
    for row, columns in zip([*blocks.rows, blocks.output], sources):
        rest = row.value.clone()
        rest[:, :, columns] = 0
        own = row.value[:, :, columns]
        if bool((rest != 0).any()) or own.shape[1] != own.shape[2]:
            raise NotCertifiable("the network is no chain of layers between spaces of one dimension")
        weights.append(Symbol(own, row.error))
    eye = torch.eye(weights[-1].value.shape[1], dtype=weights[-1].value.dtype)
    if blocks.rows and bool((weights[-1].value == eye).all()):
        weights.pop()
    return weights, [(float(s.low), float(s.high)) for s in blocks.slopes]


def largest(symbol: Symbol) -> float:
    return float(block_norms(symbol).max())


def minus(symbol: Symbol, centre: float) -> Symbol:
    size = symbol.value.shape[1]
    eye = torch.eye(size, dtype=symbol.value.dtype)[None]
    return symbol + Symbol(eye, torch.zeros(1, dtype=torch.float64)).scale(-centre)


def bisected(holds: Callable[[float], bool], low: float) -> float:
    """The smallest alpha in [low, 1] with holds(alpha), for a property that larger alphas share; infinite if none."""
    if holds(low):
        return low
    high = 1.0
    if not holds(high):
        return math.inf
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def composed_alpha(weights: list[Symbol], slopes: list[tuple[float, float]]) -> float:
    """alpha of a chain from those of its parts: (a + b - 2 a b) / (1 - a b) for two of them."""
    parts = [bisected(lambda a, W=W: largest(minus(W, 1 - a)) <= a + 1e-9, 0.0) for W in weights]
    parts += [(1 - low) / 2 if high <= 1 else math.inf for low, high in slopes]
    if any(not a <= 1 for a in parts):
        return math.inf
    total = 0.0
    for a in parts:
        total = 1.0 if total == 1 or a == 1 else (total + a - 2 * total * a) / (1 - total * a)
    return total * (1 + 1e-9) if total * (1 + 1e-9) <= 1 else math.inf


def expansion_alpha(weights: list[Symbol], slopes: list[tuple[float, float]]) -> float:
    """The smallest alpha with |W - 2^m (1 - alpha) Id| - |W| + 2 theta_m <= 2^m alpha, W = W_m .. W_1.

    theta_0 = 1 and theta_n = sum_{k<n} theta_k |W_n .. W_{k+1}|; layers R_n W_n with firmly nonexpansive R_n.
    """
    m = len(weights)
    if len(slopes) != m or any(not 0 <= low <= high <= 1 for low, high in slopes):
        return math.inf
    theta, product = [1.0], weights[0]
    for n in range(1, m + 1):
        total = 0.0
        for k in range(n - 1, -1, -1):
            product = weights[n - 1] if k == n - 1 else product @ weights[k]
            total += theta[k] * largest(product)
        theta.append(total * (1 + 1e-14))
    error = 0.0 if product.error is None else float(product.error.max())
    norm = largest(product) * (1 - 1e-12) - 2 * error
    scale = 2.0**m

    def holds(alpha: float) -> bool:
        left = largest(minus(product, scale * (1 - alpha))) - norm + 2 * theta[m]
        return left <= scale * alpha * (1 + 1e-9)

    return bisected(holds, 0.5)


def virtual_layers(beta: Tensor, steps: Tensor, eta: Tensor | None = None) -> tuple[list[Symbol], list]:
    """The chain of the virtual network (x_n, b_n) of forward-backward on eigenvalues, for the two rules above.

    U_n = [[beta_n, steps_n eta_0 / eta_{n-1}], [0, eta_n / eta_{n-1}]] with leakage factors eta (m + 1,), beta (m, P),
    steps (m,); its nonlinearity (R_n, Id) is firmly nonexpansive. Arguments as in `virtual_network_bound`.
    """
    m, size = beta.shape
    eta = torch.ones(m + 1, dtype=torch.float64) if eta is None else eta
    weights = []
    for n in range(m):
        U = torch.zeros(size, 2, 2, dtype=torch.float64)
        U[:, 0, 0] = beta[n]
        U[:, 0, 1] = steps[n] * eta[0] / eta[n]
        U[:, 1, 1] = eta[n + 1] / eta[n]
        weights.append(Symbol(U, torch.full((1,), 4e-16 * float(U.abs().max()), dtype=torch.float64)))
    return weights, [(0.0, 1.0)] * m
