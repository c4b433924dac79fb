"""Normalising flows of invertible Bregman layers: a density whose likelihood is exact, and its samples."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.linear.symbol import Symbol
from firmly.networks.bregman_inverse import inverse
from firmly.networks.bregman_invertible import Invertibility, Residual, invertibility
from firmly.prox.legendre import Legendre, legendre

LayerCondition = Literal["one-sided", "contraction"]


class Tempered(nn.Module):
    """z -> exp(s) h(z exp(-s)) with a learned s for every entry: slopes as h, at another scale of z."""

    def __init__(self, activation: Legendre, s: Tensor):
        super().__init__()
        self.activation, self.s = activation, s

    @property
    def lipschitz(self) -> float:
        return self.activation.lipschitz

    def forward(self, z: Tensor) -> Tensor:
        return self.s.exp() * self.activation((-self.s).exp() * z)

    def derivative(self, z: Tensor) -> Tensor:
        return self.activation.derivative((-self.s).exp() * z)


class WideBregmanLayer(nn.Module):
    """u -> u + V rho(K u + c) with `width` activations, invertible whatever K, V, c and rho learn.

    By Sylvester's identity the conditions on the weight of a square layer hold here for K V. With condition
    "contraction" V is rescaled to |K| |V| L <= 1 - margin: a residual block of an i-ResNet. With "one-sided" P K' is
    added to such a V, P = A'A + B - B': then K V is K P K', which is monotone and of any norm, plus a contraction, so
    that lam_min(sym K V) >= -(1 - margin) / L. rho is the activation with a learned scale of each entry (`Tempered`),
    which leaves its slopes alone. Raises `ConditionError` for margins outside (0, 1) and activations with an unbounded
    slope.
    Source: derived in docs/theory/bregman_invertibility; the contraction: Behrmann et al., Invertible residual
    networks, ICML 2019.
    """

    def __init__(
        self,
        features: int,
        width: int,
        activation: str | Legendre = "tanh",
        condition: LayerCondition = "one-sided",
        margin: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if min(features, width) < 1 or condition not in get_args(LayerCondition):
            raise SettingsError(
                f"features and width are at least 1, the condition one of {get_args(LayerCondition)}; given "
                f"{features}, {width}, {condition!r}"
            )
        self.activation = legendre(activation) if isinstance(activation, str) else activation
        if not (0 < margin < 1 and math.isfinite(self.activation.lipschitz)):
            raise ConditionError(
                f"margin lies in (0, 1) and the slopes of the activation are bounded; given {margin} and "
                f"{self.activation}"
            )
        self.condition: LayerCondition = condition
        self.margin = margin

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        # |K| is about 1, so that K u is of the size of u; the temperature makes rho bend within it
        K = noise(width, features)
        self.K = nn.Parameter(K / math.sqrt(width))
        self.c = nn.Parameter(noise(width) / math.sqrt(width))
        self.s = nn.Parameter(torch.full((width,), -0.5 * math.log(width)))
        self.V = nn.Parameter(0.1 * noise(features, width) / math.sqrt(width))
        if condition == "one-sided":
            self.A = nn.Parameter(0.3 * torch.eye(features))
            self.B = nn.Parameter(torch.zeros(features, features))

    def outer(self) -> Tensor:
        """V, or V + P K', (features, width)."""
        limit = (1 - self.margin) / self.activation.lipschitz
        sizes = torch.linalg.matrix_norm(self.K, 2) * torch.linalg.matrix_norm(self.V, 2)
        V = self.V * (limit / sizes.clamp(min=limit))
        if self.condition == "contraction":
            return V
        return V + (self.A.mT @ self.A + self.B - self.B.mT) @ self.K.mT

    def residual(self) -> Residual:
        return Residual(Dense(self.outer()), Tempered(self.activation, self.s), 0.0, Dense(self.K), self.c)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.residual()(u)

    def with_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """F(u) and log det of its Jacobian, (batch,)."""
        V, z = self.outer(), u @ self.K.mT + self.c
        scale = self.s.exp()
        inside = z / scale
        J = (V * self.activation.derivative(inside)[:, None, :]) @ self.K
        J = J + torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        return u + (scale * self.activation(inside)) @ V.mT, torch.linalg.slogdet(J)[1]

    def inverse(self, v: Tensor) -> Tensor:
        return inverse(self, v)


class Affine(nn.Module):
    """u -> M u + t with M = lower @ upper, unit and positive diagonals: always invertible, log det M = sum of logs."""

    def __init__(self, features: int):
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.t = nn.Parameter(torch.zeros(features))

    def matrix(self) -> Tensor:
        eye = torch.eye(len(self.t), dtype=self.t.dtype, device=self.t.device)
        return (self.lower.tril(-1) + eye) @ (self.upper.triu(1) + torch.diag(self.log_scale.exp()))

    def forward(self, u: Tensor) -> Tensor:
        return Dense(self.matrix())(u) + self.t

    def with_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self(u), self.log_scale.sum().expand(len(u))

    def inverse(self, v: Tensor) -> Tensor:
        return InverseMatrix(Dense(self.matrix()))(v - self.t)

    @torch.no_grad()
    def whiten(self, u: Tensor) -> None:
        """Set scale and shift so that this batch leaves with mean 0 and deviation 1 in every feature."""
        deviation = u.std(0).clamp(min=1e-6)
        self.lower.zero_()
        self.upper.zero_()
        self.log_scale.copy_(-deviation.log())
        self.t.copy_(-u.mean(0) / deviation)


class InverseMatrix(LinearMap):
    """x -> M^-1 x for a square matrix map M, with the error of the inverse in its symbol."""

    def __init__(self, of: LinearMap):
        super().__init__(of.codomain, of.domain)
        self.of = of

    def _apply_map(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.of.matrix().to(x), x.mT).mT

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.of.matrix().to(y).mT, y.mT).mT

    def _symbol(self, basis: Basis) -> Symbol:
        return self.of.symbol(basis).inverse() if isinstance(basis, DenseBasis) else super()._symbol(basis)


class BregmanFlow(nn.Module):
    """x -> z = F(x), affine maps and invertible Bregman layers by turns; the density of x if z is standard normal.

    log p(x) = -|z|^2 / 2 - (d / 2) log(2 pi) + sum of log-determinants, exact. `depth` layers of `width` activations
    each stand between depth + 1 affine maps. `condition` is that of `WideBregmanLayer`: "contraction" makes an i-ResNet
    of the same size. x and z are (batch, features).
    """

    def __init__(
        self,
        features: int,
        depth: int,
        width: int,
        activation: str | Legendre = "tanh",
        condition: LayerCondition = "one-sided",
        margin: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if depth < 1:
            raise SettingsError(f"depth is at least 1, given {depth}")
        self.features = features
        self.inputs = {"data": (features,)}
        self.layers = nn.ModuleList([Affine(features)])
        for _ in range(depth):
            wide = WideBregmanLayer(features, width, activation, condition, margin, generator)
            self.layers.extend([wide, Affine(features)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """The x with F(x) = z, by Newton's method layer by layer; raises as `firmly.networks.inverse`."""
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z

    def log_det(self, x: Tensor) -> Tensor:
        """log |det dF/dx|, (batch,), exact."""
        return self.encode(x)[1]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z = F(x) and log |det dF/dx|."""
        if tuple(x.shape[1:]) != (self.features,):
            raise ShapeError(f"this flow takes (batch, {self.features}), given {tuple(x.shape)}")
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, part = layer.with_log_det(x)
            total = total + part
        return x, total

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,)."""
        z, total = self.encode(x)
        return total - 0.5 * z.square().sum(1) - 0.5 * self.features * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws from the density, (count, features): the inverse at standard normal z."""
        parameter = self.layers[0].t
        device = parameter.device if generator is None else generator.device
        z = torch.randn(count, self.features, generator=generator, dtype=parameter.dtype, device=device)
        return self.inverse(z.to(parameter.device))

    @torch.no_grad()
    def start_at(self, x: Tensor) -> None:
        """Set the affine maps so that this batch, at least two rows, is whitened before every layer and at the end."""
        if len(x) < 2 or not bool(torch.isfinite(x).all()):
            raise DataError(f"a flow starts at two or more finite rows, given {tuple(x.shape)}")
        for layer in self.layers:
            if isinstance(layer, Affine):
                layer.whiten(x)
            x = layer(x)

    def proofs(self) -> list[Invertibility]:
        """The proof that each wide layer is a bijection; `ConditionError` if one is not."""
        return [invertibility(layer) for layer in self.layers if isinstance(layer, WideBregmanLayer)]

    def inverse_lipschitz(self) -> float:
        """A certified bound of |x - x'| / |F(x) - F(x')|: the product over the layers; `Inverse(flow)` proves more."""
        bound = 1.0
        for layer in self.layers:
            if isinstance(layer, Affine):
                bound *= InverseMatrix(Dense(layer.matrix().detach())).norm().upper * (1 + 1e-15)
            else:
                bound *= invertibility(layer).lipschitz * (1 + 1e-15)
        return bound
