"""The layers of the LISTA family: what stands in the place of the gradient step of ISTA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar
from firmly.algorithms.certified import norm
from firmly.algorithms.fista import FistaState
from firmly.algorithms.forward_backward import ForwardBackwardState
from firmly.linear.algebra import Identity, Scale
from firmly.linear.map import LinearMap
from firmly.networks.positive import Positive, Within
from firmly.prox.prior import Prior


class ResidualLayer(Algorithm):
    """z <- R(z + g W*(y - D z)), or R(z + g H W*(y - D z)) with a preconditioner H.

    The weights W, a map from codes to data as D is, stand in the place of the dictionary D. R is the prox of `prior`
    with unit step: a soft threshold, or a support selection. `whitened` is a map F, if one is known, for which W* D and
    F* F are similar: then the argument of R is nonexpansive in some metric for 0 < g < `limit` = 2 / |F|^2.
    """

    learnable = ("step_size",)

    def __init__(
        self,
        D: LinearMap,
        W: LinearMap,
        prior: Prior,
        step_size: Scalar = 1.0,
        preconditioner: LinearMap | None = None,
        whitened: LinearMap | None = None,
    ):
        super().__init__()
        self.D = D
        self.W = W
        self.prior = prior
        self.preconditioner = preconditioner
        self.whitened = whitened
        self.step_size = step_size
        self.data_shape, self.image_shape = D.codomain, D.domain

    def start(self, y: Tensor, x: Tensor | None = None) -> ForwardBackwardState:
        return ForwardBackwardState(zeros(self, y) if x is None else x)

    def step(self, state: ForwardBackwardState, y: Tensor, k: int) -> ForwardBackwardState:
        z = state.x
        if not (isinstance(z, Tensor) and isinstance(y, Tensor)):  # traced: one map has one norm, parts have three
            code, data = self.linear_part()
            return ForwardBackwardState(self.prior.prox(code(z) + data(y)))
        correlation = self.W.T(y - self.D(z))
        if self.preconditioner is not None:
            correlation = self.preconditioner(correlation)
        return ForwardBackwardState(self.prior.prox(z + self.step_size * correlation))

    def linear_part(self) -> tuple[LinearMap, LinearMap]:
        """The maps Id - g H W* D and g H W* of the code and of the data, whose sum is the argument of R."""
        back = self.W.T if self.preconditioner is None else self.preconditioner @ self.W.T
        return Identity(self.D.domain) + Scale(-self.step_size, back @ self.D), Scale(self.step_size, back)

    def read(self, state: ForwardBackwardState) -> Tensor:
        return state.x

    @property
    def limit(self) -> float | None:
        """The end of the interval of steps, from a certified norm, None where no F is known."""
        return None if self.whitened is None else 2 / norm(self.whitened) ** 2

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        limit = float("inf") if self.limit is None else self.limit
        return Rule(0.0, limit, "0 < step_size < 2 / lambda_max(W* D)", "docs/lista, section on the metric")

    def conditions(self) -> list[Condition]:
        return [] if self.limit is None else super().conditions()


class OperatorLayer(Algorithm):
    """z <- R(G z + P z_previous + E y) with matrices G, E, and P where there is momentum (LISTA and L-FISTA)."""

    def __init__(self, code: LinearMap, data: LinearMap, prior: Prior, momentum: LinearMap | None = None):
        super().__init__()
        self.code = code
        self.data = data
        self.momentum = momentum
        self.prior = prior
        self.data_shape, self.image_shape = data.domain, data.codomain

    def start(self, y: Tensor, x: Tensor | None = None) -> FistaState:
        x = zeros(self, y) if x is None else x
        return FistaState(x, x)

    def step(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        u = self.code(state.x) + self.data(y)
        if self.momentum is not None:
            u = u + self.momentum(state.previous)
        return FistaState(self.prior.prox(u), state.x)

    def undamped(self, state: FistaState, y: Tensor, k: int) -> FistaState:
        """The layer at rest: z is its own predecessor."""
        return self.step(FistaState(state.x, state.x), y, k)

    def read(self, state: FistaState) -> Tensor:
        return state.x

    def conditions(self) -> list[Condition]:
        return []


class RotatedLayer(Algorithm):
    """z <- U R(U* z + S^-1 U* D*(y - D z)), R the prox in the metric S, with U orthogonal by construction, S > 0.

    FacNet: Moreau and Bruna, Understanding trainable sparse coding via matrix factorization, 2017, where U is pulled
    towards orthogonal matrices by a penalty. `curvature` is the diagonal of S (n,).
    """

    def __init__(self, D: LinearMap, prior: Prior, curvature: Tensor):
        super().__init__()
        self.D = D
        self.prior = prior
        self.rotation = nn.Parameter(torch.eye(len(curvature), dtype=curvature.dtype, device=curvature.device))
        nn.utils.parametrizations.orthogonal(self, "rotation")
        self.curvature = nn.Parameter(curvature)
        parametrize.register_parametrization(self, "curvature", Positive())
        self.data_shape, self.image_shape = D.codomain, D.domain

    def start(self, y: Tensor, x: Tensor | None = None) -> ForwardBackwardState:
        return ForwardBackwardState(zeros(self, y) if x is None else x)

    def step(self, state: ForwardBackwardState, y: Tensor, k: int) -> ForwardBackwardState:
        z, U, steps = state.x, self.rotation, 1 / self.curvature
        rotated = z @ U + steps * (self.D.T(y - self.D(z)) @ U)
        return ForwardBackwardState(self.prior.prox(rotated, steps) @ U.T)

    def read(self, state: ForwardBackwardState) -> Tensor:
        return state.x

    def conditions(self) -> list[Condition]:
        return []


def zeros(layer: Algorithm, y: Tensor) -> Tensor:
    """The code 0 (batch, *image_shape) in the precision and place of the data."""
    return torch.zeros(y.shape[0], *layer.image_shape, dtype=y.dtype, device=y.device)


def learn_threshold(prior: Prior) -> Prior:
    """The prior with its weight as a parameter that stays positive."""
    weight = nn.Parameter(torch.as_tensor(prior.weight).detach().clone())
    del prior.weight
    prior.weight = weight
    parametrize.register_parametrization(prior, "weight", Positive())
    return prior


def learn_step(layer: ResidualLayer, certified: bool = False) -> ResidualLayer:
    """The layer with its step as a parameter that stays positive, and if `certified` inside its rule."""
    start = torch.as_tensor(layer.step_size).detach().clone()
    del layer.step_size
    layer.step_size = nn.Parameter(start)
    parametrize.register_parametrization(layer, "step_size", Step(layer, certified), unsafe=True)
    return layer


class Step(Within):
    """A step that is read in double precision, as steps are, and may be assigned in any."""

    def __init__(self, layer: ResidualLayer, certified: bool):
        super().__init__(layer, "step_size", free=(), waived=not certified)

    def right_inverse(self, value: Tensor) -> Tensor:
        known = getattr(self.layer, "parametrizations", {})
        stored = known[self.name].original.dtype if self.name in known else value.dtype
        return super().right_inverse(value).to(stored)


class Symmetric(nn.Module):
    """(X + X*) / 2."""

    def forward(self, raw: Tensor) -> Tensor:
        return (raw + raw.mT) / 2

    def right_inverse(self, value: Tensor) -> Tensor:
        return value
