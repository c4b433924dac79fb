"""log |det| of the Jacobian of F(u) = u + V rho(K u + c) + b: exact where it is, else unbiased with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, NotConverged, NotDiagonal, SettingsError
from firmly.fixedpoint.gmres import gmres
from firmly.linear.algebra import Compose
from firmly.linear.basis import Fourier
from firmly.linear.map import LinearMap
from firmly.networks.bregman_invertible import Residual, invertibility, residual_of
from firmly.networks.bregman_weights import Triangular
from firmly.once_differentiable import once_differentiable
from firmly.replaced_tensors import call_with

LARGEST_MATRIX = 1024  # rows of determinants that are factorised


def log_det(layer: nn.Module, u: Tensor) -> Tensor:
    """log det(Id + V diag(rho'(K u + c)) K), (batch,), exact; u is (batch, *shape), in dual coordinates.

    Triangular weights need a sum only. The determinant of a product around a circle is the same wherever the circle is
    cut (Sylvester): it is formed where it is narrowest, which is the rank of V and K as they are composed. Matrices of
    up to 1024 rows are factorised. Convolutions beyond that are treated frequency by frequency where the slopes of
    every channel are constant over the pixels, since only there the product is diagonal, without a gradient in u.
    Others raise `NotDiagonal`: `estimate_log_det` is for them.

    Gradients reach u and all weights. Raises `ConditionError` for layers that are not proved to be invertible; of those
    that are, the determinant is positive. In primal coordinates add sum log rho'(u+) - sum log rho'(u).
    Source: docs/theory/bregman_invertibility; van den Berg et al., Sylvester normalizing flows, 2018 (low rank).
    """
    invertibility(layer)
    return log_det_of(residual_of(layer), u)


def log_det_of(residual: Residual, u: Tensor) -> Tensor:
    """`log_det` for a layer that is invertible by construction, or whose proof was made before."""
    slopes = residual.slopes(u)
    if isinstance(residual.outer, Triangular) and residual.inner is None:
        return torch.log1p(slopes * residual.outer.matrix().diagonal().to(slopes)).sum(1)
    circle = [*factors(residual.outer), None, *([] if residual.inner is None else factors(residual.inner))]
    widths = [math.prod(f.codomain if f is not None else residual.outer.domain) for f in circle]
    narrow = min(range(len(circle)), key=widths.__getitem__)
    if widths[narrow] <= LARGEST_MATRIX:
        return by_matrix([*circle[narrow:], *circle[:narrow]], slopes.flatten(1))
    return by_frequency(residual, slopes)


def factors(linear_map: LinearMap) -> list[LinearMap]:
    """The maps that a composition is made of, the outermost first."""
    if isinstance(linear_map, Compose):
        return [*factors(linear_map.outer), *factors(linear_map.inner)]
    return [linear_map]


def by_matrix(circle: list[LinearMap | None], slopes: Tensor) -> Tensor:
    """log det(Id + product of the circle), None standing for diag(slopes)."""
    product: Tensor | None = None
    for f in circle:
        if f is not None:
            matrix = f.matrix().to(slopes)
            product = matrix if product is None else product @ matrix
        else:
            product = torch.diag_embed(slopes) if product is None else product * slopes[:, None, :]
    assert product is not None
    return torch.linalg.slogdet(product + torch.eye(product.shape[-1], dtype=slopes.dtype, device=slopes.device))[1]


def by_frequency(residual: Residual, slopes: Tensor) -> Tensor:
    """One determinant per frequency, for slopes that do not vary over the pixels: Id + V(f) diag(slopes) K(f)."""
    spatial = residual.outer.domain[1:]
    per_channel = slopes.flatten(2)
    if not spatial or not bool((per_channel == per_channel[:, :, :1]).all()):
        raise NotDiagonal(
            f"no exact log-determinant: W diag(rho') on {residual.outer.domain} has over {LARGEST_MATRIX} entries, is "
            "of no low rank, and rho' varies over the pixels, so that frequencies mix; use estimate_log_det"
        )
    if slopes.requires_grad:
        raise NotDiagonal(
            "the determinant is a product over frequencies only while rho' is constant over the pixels, which a change "
            "of u ends: no gradient in u; detach u, or use estimate_log_det"
        )
    basis = Fourier(spatial, full=True, track=False, device=slopes.device)
    V = residual.outer.symbol(basis).value  # (frequencies, out, in)
    blocks = V[None] * per_channel[:, None, None, :, 0].to(V.dtype)
    if residual.inner is not None:
        blocks = blocks @ residual.inner.symbol(basis).value
    blocks = blocks + torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    return torch.linalg.slogdet(blocks)[1].expand(-1, basis.blocks).sum(1).to(slopes.dtype)


class LogDet(NamedTuple):
    """An unbiased estimate (batch,) with its standard error (batch,) over the probes."""

    value: Tensor
    standard_error: Tensor


def estimate_log_det(layer: nn.Module, u: Tensor, probes: int = 16, generator: torch.Generator | None = None) -> LogDet:
    """An estimate of `log_det(layer, u)` without a matrix, unbiased up to the tolerance of its linear solves.

    log det(Id + G) = int_0^1 tr((Id + t G)^-1 G) dt for G = V diag(rho') K, because a layer that satisfies a condition
    of `invertibility` does so with t V for every t in [0, 1]. Each probe draws t and a random sign vector e and takes
    e'(Id + t G)^-1 G e, with t stratified over the probes, which makes the standard error, that of independent probes,
    an overestimate. No power series is involved, so that |V| |K| L may be larger than 1. The gradient in u and all
    weights is unbiased, too: that of a' G e for a = (Id + G)^-T e held fixed, which can be taken once. Raises
    `NotConverged` where GMRES does not reach its tolerance.
    Source: derived in docs/theory/bregman_invertibility; Hutchinson 1990 for the trace.
    """
    if probes < 2:
        raise SettingsError(f"a standard error needs at least 2 probes, given {probes}")
    invertibility(layer)
    residual = residual_of(layer)
    tensors = {**dict(residual.named_parameters()), **dict(residual.named_buffers())}
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    inputs = (u, *(tensors[name] for name in names))
    with torch.no_grad():
        value, signs, back = path_integral(residual, u, probes, generator, any(x.requires_grad for x in inputs))
    return summary(FirstOrder.apply(value, Probes(residual), names, (signs, back), *inputs), probes)


def path_integral(
    residual: Residual, u: Tensor, probes: int, generator: torch.Generator | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """e'(Id + t G)^-1 G e for every probe and element, the signs e, and (Id + G)^-T e where a gradient is wanted."""
    G, transposed, signs = probed(residual, u, probes, generator)
    where = torch.rand(probes, generator=generator, dtype=u.dtype, device=signs.device)
    t = ((torch.arange(probes, device=signs.device) + where) / probes).to(u).repeat_interleave(len(u))
    t = t.reshape(-1, *[1] * (u.dim() - 1))
    e = signs.to(u)
    value = (e * solve(lambda x: x + t * G(x), G(e))).flatten(1).sum(1)
    return value, e, solve(lambda x: x + transposed(x), e) if gradient else e


class Probes(nn.Module):
    """a' G e for every probe and element."""

    def __init__(self, of: Residual):
        super().__init__()
        self.of = of

    def forward(self, u: Tensor, e: Tensor, a: Tensor) -> Tensor:
        slopes = self.of.slopes(u).repeat(len(e) // len(u), *[1] * (u.dim() - 1))
        return (a * self.of.outer(slopes * (e if self.of.inner is None else self.of.inner(e)))).flatten(1).sum(1)


@once_differentiable
class FirstOrder(torch.autograd.Function):
    """A value with the gradient of another function of u and the weights, which is right once and not twice."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, probes: Probes, names: list[str], fixed: tuple[Tensor, ...], *inputs: Tensor):
        ctx.probes, ctx.names, ctx.fixed = probes, names, fixed
        ctx.save_for_backward(*inputs)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            weights = {f"of.{name}": tensor for name, tensor in zip(ctx.names, inputs[1:])}
            output = call_with(ctx.probes, weights, (inputs[0], *ctx.fixed))
        found = torch.autograd.grad(output, inputs, gradients[0], allow_unused=True)
        return None, None, None, None, *found


def series_log_det(
    layer: nn.Module, u: Tensor, probes: int = 16, terms: int = 4, generator: torch.Generator | None = None
) -> LogDet:
    """The estimate of residual flows: sum_k (-1)^(k+1) tr(G^k) / k with a Russian roulette, unbiased, for contractions.

    The first `terms` are always taken; later ones with probability 1/2 each and weights that undo it. Raises
    `ConditionError` unless |V| |K| L < 1. Source: Chen et al., Residual flows, NeurIPS 2019, equation 6.
    """
    if probes < 2 or terms < 1:
        raise SettingsError(f"the series needs at least 2 probes and 1 term, given {probes} and {terms}")
    if invertibility(layer).condition != "contraction":
        raise ConditionError(
            "the power series of log det(Id + G) converges for contractions, |V| |K| L < 1, which is not proved here; "
            "use estimate_log_det, which has no such condition"
        )
    G, _, signs = probed(residual_of(layer), u, probes, generator)
    # geometric, by inversion: P(extra >= j) = 2^-j
    draw = torch.rand(probes, generator=generator, dtype=torch.float64, device=signs.device)
    extra = torch.floor(-torch.log2(1 - draw)).to(u).repeat_interleave(len(u))
    e = power = signs.to(u)
    total = torch.zeros_like(extra)
    for k in range(1, terms + int(extra.max()) + 1):
        power = G(power)
        weight = torch.where(extra >= k - terms, 2.0 ** max(k - terms, 0), 0.0)  # 1 / probability of coming here
        total = total + (-1) ** (k + 1) / k * weight * (e * power).flatten(1).sum(1)
    return summary(total, probes)


Apply = Callable[[Tensor], Tensor]


def probed(
    residual: Residual, u: Tensor, probes: int, generator: torch.Generator | None
) -> tuple[Apply, Apply, Tensor]:
    """G = V diag(rho') K and its adjoint on `probes` copies of the batch, and random signs of that shape."""
    slopes = residual.slopes(u).repeat(probes, *[1] * (u.dim() - 1))
    outer, inner = residual.outer, residual.inner

    def G(e: Tensor) -> Tensor:
        return outer(slopes * (e if inner is None else inner(e)))

    def transposed(e: Tensor) -> Tensor:
        back = slopes * outer.T(e)
        return back if inner is None else inner.T(back)

    device = u.device if generator is None else generator.device
    signs = 2 * torch.randint(0, 2, (probes * len(u), *u.shape[1:]), generator=generator, device=device) - 1
    return G, transposed, signs


def summary(values: Tensor, probes: int) -> LogDet:
    """Mean and standard error over the probes of values (probes * batch,)."""
    each = values.reshape(probes, -1)
    return LogDet(each.mean(0), (each.detach().var(0) / probes).sqrt())


def solve(apply: Apply, right: Tensor) -> Tensor:
    tol = torch.finfo(right.dtype).eps ** 0.75
    x, residual = gmres(apply, right, tol)
    if not residual <= 10 * tol:
        raise NotConverged(
            f"a linear system of a log-determinant has the relative residual {residual:.3g}, the tolerance is "
            f"{10 * tol:.3g}; a larger margin or float64 helps"
        )
    return x
