"""When u -> u + V rho(K u + c) + b is a bijection: conditions that are proved, and weights that satisfy them.

A Bregman layer in dual coordinates is the case K = Id, V = W; with V and K it is a wide layer with rho in between.
docs/theory/bregman_invertibility has the proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, NotCertifiable, ShapeError
from firmly.linear.algebra import Compose, Scale
from firmly.linear.map import LinearMap
from firmly.linear.memo import Memo
from firmly.linear.monotone import Monotone, monotonicity
from firmly.linear.norms import is_small
from firmly.networks.bregman_scaling import Rescaled, diagonal_scaling

SLACK = 4e-16  # of the few operations after a proof


class Activation(Protocol):
    """An increasing function of every entry with slopes in (0, lipschitz]: a Legendre pair, for one."""

    @property
    def lipschitz(self) -> float: ...

    def __call__(self, u: Tensor) -> Tensor: ...

    def derivative(self, u: Tensor) -> Tensor: ...


class Residual(nn.Module):
    """g(u) = V rho(K u + c) + b, whose layer is F(u) = u + g(u), for a separable rho with slopes in (0, L].

    `outer` is V and `inner` is K (None: the identity), `shift` is c and `bias` is b; `activation` is rho, a Legendre
    pair of `firmly.prox.legendre`. u is (batch, *V.codomain).
    """

    def __init__(
        self,
        outer: LinearMap,
        activation: Activation,
        bias: Tensor | float = 0.0,
        inner: LinearMap | None = None,
        shift: Tensor | float = 0.0,
    ):
        super().__init__()
        if (outer.codomain if inner is None else inner.domain) != outer.codomain or (
            outer.domain != (outer.codomain if inner is None else inner.codomain)
        ):
            inside = outer.codomain if inner is None else f"{inner.domain} -> {inner.codomain}"
            raise ShapeError(
                f"an invertible layer has as many outputs as inputs: W maps {outer.domain} -> {outer.codomain}, what "
                f"stands before it {inside}; rectangular layers have no inverse"
            )
        self.outer, self.inner, self.activation = outer, inner, activation
        for name, value in (("bias", bias), ("shift", shift)):
            if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def inside(self, u: Tensor) -> Tensor:
        """K u + c, where the activation acts: (batch, *V.domain)."""
        return (u if self.inner is None else self.inner(u)) + self.shift

    def forward(self, u: Tensor) -> Tensor:
        return self.outer(self.activation(self.inside(u))) + self.bias

    def slopes(self, u: Tensor) -> Tensor:
        """rho'(K u + c), (batch, *V.domain); the Jacobian of g is V diag(slopes) K."""
        return self.activation.derivative(self.inside(u))

    def product(self) -> LinearMap:
        """K V: all conditions are on this square map, which is W itself for K = Id."""
        return self.outer if self.inner is None else Compose(self.inner, self.outer)


@dataclass(frozen=True)
class Invertibility:
    """Why a layer is a bijection: L <D K V h, h> >= (margin - 1) <D h, h> is proved, with margin > 0.

    `condition` is "contraction" (|K| |V| L < 1), "one-sided" (D = Id) or "diagonal" (D = diag(scale)^2). `lipschitz`
    bounds |u - u'| / |F(u) - F(u')| and `activation_lipschitz` bounds |rho(Ku+c) - rho(Ku'+c)| / |F(u) - F(u')|: the
    inverse in dual and in primal coordinates. `forward_lipschitz` bounds |F(u) - F(u')| / |u - u'|.
    """

    condition: Literal["contraction", "one-sided", "diagonal"]
    margin: float
    lipschitz: float
    activation_lipschitz: float
    forward_lipschitz: float
    scale: Tensor | None = None


class Known:
    """The proof of a layer, for as long as its maps, the values in them and L are what they were."""

    def __init__(self, residual: Residual):
        self.outer, self.inner, self.lipschitz = residual.outer, residual.inner, residual.activation.lipschitz
        self.memo: Memo[Invertibility] = Memo()

    def fits(self, residual: Residual) -> bool:
        same = self.outer is residual.outer and self.inner is residual.inner
        return same and self.lipschitz == residual.activation.lipschitz


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def residual_of(layer: nn.Module) -> Residual:
    """The residual g of a layer u -> u + g(u): itself, or what `layer.residual()` says."""
    if isinstance(layer, Residual):
        return layer
    if not hasattr(layer, "residual"):
        raise ConditionError(
            f"{type(layer).__name__} is not known to be invertible: square Bregman layers are, and the layers of "
            "firmly.networks.BregmanFlow; clamping, batch normalisation and changes of width are not"
        )
    return layer.residual()


def invertibility(layer: nn.Module) -> Invertibility:
    """A proof that a layer is a bijection of the whole space in dual coordinates, else `ConditionError`.

    Tried in turn, for rho with slopes in (0, L]: (a) |V| |K| L < 1; (b) lam_min(sym KV) > -1/L, where the norm may be
    as large as it likes; (c) the same for S KV S^-1 with a positive diagonal S that is searched for (small maps).
    Eigenvalues are bounded in float64 with their rounding, by Cholesky factorisations. The answer is kept while the
    weights are unchanged. Raises `ConditionError` with the condition that failed and by how much, and `NotCertifiable`
    for maps without a certified norm.
    Source: docs/theory/bregman_invertibility; (a) is Behrmann et al., Invertible residual networks, ICML 2019.
    """
    residual = residual_of(layer)
    known = _known.get(layer)
    if known is None or not known.fits(residual):
        known = _known[layer] = Known(residual)
    return known.memo.get(residual, lambda: _prove(residual))


@torch.no_grad()
def _prove(residual: Residual) -> Invertibility:
    L = float(residual.activation.lipschitz)
    if not math.isfinite(L):
        raise ConditionError(
            f"{residual.activation} has an unbounded slope (L = {L}): no weight but a monotone one keeps a layer "
            "invertible, and no bound of its inverse is known; use an activation with finite L"
        )
    if not all(bool(torch.isfinite(t).all()) for t in residual.state_dict().values() if isinstance(t, Tensor)):
        raise ConditionError("the layer has weights that are NaN or infinite, and no inverse")
    V, K = residual.outer.norm().upper, 1.0 if residual.inner is None else residual.inner.norm().upper
    gain = V * K * L * (1 + SLACK)
    square = residual.product()
    margin = proved_margin(square, L)
    condition, scale, stretch = "one-sided", None, 1.0
    if gain < 1 and 1 - gain >= margin:
        margin = 1 - gain
    if gain < 1:
        condition = "contraction"
    if not margin > 0 and square.domain[1:] == () and is_small(square):
        scale = diagonal_scaling(torch.eye(square.domain[0], dtype=torch.float64) + L * square.matrix().cpu())
        if scale is not None and (found := proved_margin(Rescaled(square, scale, scale), L)) > 0:
            condition, stretch, margin = "diagonal", float(scale.max() / scale.min()), found
    if margin == -math.inf:
        raise ConditionError(
            f"the layer is not proved to be invertible: no eigenvalue bound of {type(square).__name__} {square.domain} "
            f"is known, which is neither a circular convolution nor small, and (a) |W| L = {gain:.6g} < 1 fails; use "
            "firmly.networks.invertible_weight, which satisfies (b) by its form"
        )
    if not margin > 0:
        raise ConditionError(
            f"the layer is not proved to be invertible: lam_min(sym W) > -1/L = {-1 / L:.6g} is condition (b), and all "
            f"that is proved is lam_min(sym W) >= {(margin - 1) / L:.6g}, {-margin / L:.3g} too little; (a) "
            f"|W| L = {gain:.6g} < 1 fails, and no diagonal scaling (c) helps. Weights made by "
            "firmly.networks.invertible_weight satisfy (b) whatever they learn"
        )
    inside = stretch * L * K / margin
    dual = 1 + V * inside
    if gain < 1:
        dual, inside = min(dual, 1 / (1 - gain)), min(inside, L * K / (1 - gain))
    outward = 1 + 1e-14
    return Invertibility(condition, margin, dual * outward, inside * outward, (1 + gain) * outward, scale)


def proved_margin(square: LinearMap, L: float) -> float:
    """A proved m with <(I + L W) h, h> >= m |h|^2, also if L is off by a rounding; negative if none is found."""
    if isinstance(square, Scale) and isinstance(square.of, Monotone):
        # W = f M with f close to -1/L, so I + L W = (I - M) + (1 + L f) M
        f = float(square.factor)
        off = abs(1 + L * f) + 2 * SLACK * (1 + abs(L * f))
        margin = float(square.of.margin) - off * square.of.norm().upper * (1 + SLACK)
        if margin > 0:
            return margin
    try:
        return monotonicity(Scale(-L, square)) - 2 * SLACK * L * square.norm().upper
    except NotCertifiable:
        return -math.inf
