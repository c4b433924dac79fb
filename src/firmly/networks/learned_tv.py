"""Learned total variation: unrolled solvers of min_u 1/2 |A u - y|^2 + weight sum |u[i + 1] - u[i]| for signals."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms import CondatVu
from firmly.algorithms.algorithm import Algorithm, Condition
from firmly.algorithms.certified import norm
from firmly.algorithms.forward_backward import ForwardBackwardState
from firmly.errors import SettingsError, ShapeError
from firmly.linear import Cumulative, Dense, Differences, Identity
from firmly.linear.map import LinearMap
from firmly.networks.lista_layers import learn_threshold
from firmly.networks.unroll import Unrolled, unroll
from firmly.prox import L1, TV1D
from firmly.prox.l1 import soft_threshold
from firmly.prox.prior import Prior, Slope, positive, sum_over_sample

Variant = Literal["taut", "lista", "synthesis", "condat-vu"]


def learned_tv(
    A: LinearMap,
    depth: int,
    variant: Variant = "taut",
    weight: float = 0.1,
    inner_depth: int = 20,
    nonexpansive: bool = False,
) -> Unrolled:
    """A network of `depth` layers for signals (n,) seen through A, started at pinv(A) y, with |.|_TV the sum above.

    - "taut" (LPGD-Taut): u <- prox_{mu |.|_TV}(C u + E y), with the exact prox (`TV1D`); learns C, E, mu of each layer.
    - "lista" (LPGD-LISTA): the same, the prox replaced by `inner_depth` layers of "synthesis" for A = I.
    - "synthesis": u = L z with L the cumulative sum, z <- ST(C z + E y) with threshold mu on all but the first entry;
      learns C, E, mu.
    - "condat-vu": `unroll(CondatVu(A, K=Differences))`, learns the two step sizes of each layer inside their rule.

    Untrained, "taut" is proximal gradient descent (C = I - A*A / |A|^2, E = A* / |A|^2, mu = weight / |A|^2),
    "synthesis" ISTA in the jumps (the same with A L), and "condat-vu" the algorithm with dual step 1/2.
    `nonexpansive=True` keeps |C| <= 1 whatever is learned: every layer of "taut" and "synthesis" and every inner layer
    of "lista", a proximal map after C, is then nonexpansive in its state. It does not apply to "condat-vu".
    Sources: Cherkaoui, Sulam and Moreau, Learning to solve TV regularised problems with unrolled algorithms, 2020; in
    its Condat-Vu network we penalise all differences, and the step uses |Differences|^2 (docs/learned_tv.md).
    """
    if variant not in get_args(Variant):
        raise SettingsError(f"unknown variant {variant!r}: choose one of {', '.join(get_args(Variant))}")
    if len(A.domain) != 1 or len(A.codomain) != 1 or A.is_complex:
        raise ShapeError(f"learned_tv takes a real map of flat signals (n,) to flat data, given {A}")
    if depth < 1 or inner_depth < 1:
        raise SettingsError(f"depth and inner_depth are at least 1, given {depth} and {inner_depth}")
    positive("the weight of total variation", weight)
    if variant == "condat-vu":
        if nonexpansive:
            raise SettingsError("the layers of Condat-Vu are not nonexpansive in u alone: leave nonexpansive out")
        return unrolled_condat_vu(A, depth, weight)
    n = A.domain[0]
    jumps = Cumulative(n) if variant == "synthesis" else None
    seen = A if jumps is None else A @ jumps
    initial = Dense(torch.linalg.pinv(A.matrix()))
    layers = []
    for _ in range(depth):
        step = 1 / norm(seen) ** 2
        code, data = gradient_step(seen, step, nonexpansive)
        if variant == "lista":
            denoiser = learned_tv(Identity((n,)), inner_depth, "synthesis", step * weight, nonexpansive=nonexpansive)
        else:
            threshold = torch.tensor(step * weight, dtype=torch.float64, device=initial.weight.device)
            denoiser = learn_threshold(TV1D(threshold) if jumps is None else JumpL1(threshold))
        layers.append(LearnedLayer(code, data, denoiser, initial, jumps))
    shared = nn.Module()
    shared.initial = initial
    return Unrolled(layers, shared, checkpoint=0)


class LearnedLayer(Algorithm):
    """x <- R(C x + E y) with a denoiser R, started at pinv(A) y; with `jumps` L the signal is L x."""

    def __init__(
        self, code: LinearMap, data: LinearMap, denoiser: nn.Module, initial: LinearMap, jumps: LinearMap | None
    ):
        super().__init__()
        self.code = code
        self.data = data
        self.denoiser = denoiser
        self.__dict__["initial"] = initial  # one for all layers: registered by the network
        self.jumps = jumps
        self.data_shape, self.image_shape = initial.domain, initial.codomain

    def start(self, y: Tensor, x: Tensor | None = None) -> ForwardBackwardState:
        x = self.initial(y) if x is None else x
        return ForwardBackwardState(x if self.jumps is None else first_and_jumps(x))

    def step(self, state: ForwardBackwardState, y: Tensor, k: int) -> ForwardBackwardState:
        return ForwardBackwardState(self.denoiser(self.code(state.x) + self.data(y)))

    def read(self, state: ForwardBackwardState) -> Tensor:
        return state.x if self.jumps is None else self.jumps(state.x)

    def conditions(self) -> list[Condition]:
        """Whether the layer is known to be nonexpansive in x, the data held fixed."""
        size = norm(self.code)
        exact = isinstance(self.denoiser, Prior)
        return [
            Condition(
                name="nonexpansive",
                text=f"|C| = {size:.6g} is at most 1" + ("" if exact else ", and the denoiser is a proximal map"),
                holds=exact and size <= 1 + 1e-9,
                margin=1 - size,
                source="a proximal map is nonexpansive (Moreau 1965), and so is R o C",
            )
        ]


class JumpL1(Prior):
    """g(z) = weight sum_{i > 0} |z[i]|: total variation as a function of the first value and the jumps (..., n)."""

    real_only = True

    def __init__(self, weight: float | Tensor):
        super().__init__()
        self._hold("weight", positive("the weight of the jumps", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.weight * x[..., 1:].abs())

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        penalised = torch.ones(z.shape[-1], dtype=z.dtype, device=z.device)
        penalised[0] = 0
        return soft_threshold(z, step * self.weight * penalised)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of the jumps", self.weight, allow_zero=True)
        return super().slope_at(step)


class Contraction(nn.Module):
    """W / max(1, |W|): the parametrisation of a matrix of norm at most 1, which leaves such matrices alone."""

    def forward(self, weight: Tensor) -> Tensor:
        size = torch.linalg.matrix_norm(weight, 2) * (1 + 16 * torch.finfo(weight.dtype).eps * len(weight))
        return weight / size.clamp(min=1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def gradient_step(A: LinearMap, step: float, nonexpansive: bool) -> tuple[Dense, Dense]:
    """C and E of one step on 1/2 |A x - y|^2: x - t A*(A x - y) = (I - t A*A) x + t A* y, as learnable matrices."""
    matrix = A.matrix().detach()
    code = torch.eye(matrix.shape[1]).to(matrix) - step * matrix.mT @ matrix
    maps = Dense(nn.Parameter(code)), Dense(nn.Parameter(step * matrix.mT))
    if nonexpansive:
        parametrize.register_parametrization(maps[0], "weight", Contraction())
    return maps


def first_and_jumps(x: Tensor) -> Tensor:
    """z with L z = x for the cumulative sum L: the first value and the differences."""
    return torch.cat([x[..., :1], x[..., 1:] - x[..., :-1]], dim=-1)


def unrolled_condat_vu(A: LinearMap, depth: int, weight: float) -> Unrolled:
    """Condat-Vu in analysis form: dual step s = 1/2, step 0.99 / (|A|^2 / 2 + s |D|^2), inside the rule."""
    D, dual_step = Differences(A.domain[0]), 0.5
    step = 0.99 / (norm(A) ** 2 / 2 + dual_step * norm(D) ** 2)
    return unroll(CondatVu(A, L1(weight), D, step, dual_step), depth, learn=("step_size", "dual_step"))


def largest_tv_weight(A: LinearMap, y: Tensor) -> Tensor:
    """The smallest weight for which the best u is constant, for every signal: (batch,)."""
    constant = A(torch.ones(1, *A.domain, dtype=y.dtype, device=y.device))
    fitted = (y * constant).sum(-1, keepdim=True) / constant.square().sum() * constant
    return A.T(y - fitted).cumsum(-1).abs().amax(-1)


def tv_objective(A: LinearMap, weight: float, u: Tensor, y: Tensor) -> Tensor:
    """1/2 |A u - y|^2 + weight sum |u[i + 1] - u[i]| of every signal: (batch,)."""
    return (A(u) - y).square().sum(-1) / 2 + weight * u.diff(dim=-1).abs().sum(-1)
