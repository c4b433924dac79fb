"""What every variant of the LISTA family puts into its layers, and where its training starts."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.algorithm import Algorithm
from firmly.algorithms.certified import norm
from firmly.algorithms.forward_backward import ForwardBackward
from firmly.errors import SettingsError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.networks.analytic_weights import analytic_weights, like
from firmly.networks.lista_layers import (
    OperatorLayer,
    ResidualLayer,
    RotatedLayer,
    Symmetric,
    learn_step,
    learn_threshold,
)
from firmly.networks.support_selection import Selection
from firmly.networks.unroll import unroll
from firmly.networks.whitening import analytic_whitening, convolution_of, energies, weights_of, whitened
from firmly.prox.l1 import L1
from firmly.prox.prior import Prior

Parts = tuple[list[Algorithm], dict[str, nn.Module]]  # the layers, and the modules that they share


@dataclass(frozen=True)
class Problem:
    """min 1/2 |D z - y|^2 + weight |z|_1, to be solved in `depth` layers with this support selection, if any."""

    D: LinearMap
    depth: int
    weight: float
    selection: Selection | None

    @property
    def values(self) -> Tensor:
        """The matrix or the kernel of the dictionary."""
        return (self.D.weight if isinstance(self.D, Dense) else convolution_of(self.D).kernel).detach()

    @property
    def lipschitz(self) -> float:
        return norm(self.D) ** 2

    def number(self, value: float) -> Tensor:
        return self.values.new_full((), value)

    def each_atom(self, value: float) -> Tensor:
        """One number for every channel of a convolutional code, or every entry of a dense one."""
        return self.values.new_full((self.D.domain[0], *[1] * (len(self.D.domain) - 1)), value)

    def threshold(self, k: int, start: Tensor, metric: Tensor | None = None) -> Prior:
        """The learned threshold of layer k = 0, 1, ..."""
        if self.selection is None:
            return learn_threshold(L1(start))
        return learn_threshold(self.selection.prior(k + 1, math.prod(self.D.domain), start, metric))

    def learned_dictionary(self) -> LinearMap:
        """W, which starts as D / L."""
        return like(self.D, nn.Parameter(self.values / self.lipschitz))


def step(problem: Problem, certified: bool) -> Parts:
    """SLISTA: Ablin, Moreau, Massias and Gramfort, Learning step sizes for unfolded sparse coding, 2019."""
    algorithm = ForwardBackward(problem.D, L1(problem.weight))
    network = unroll(algorithm, problem.depth, ("step_size",), waive=() if certified else ("step_size",))
    network.to(problem.values)
    for layer in network.layers:
        layer.step_size = problem.number(1 / problem.lipschitz)  # in the precision of the dictionary
    return list(network.layers), {}  # type: ignore[arg-type]


def coupled(problem: Problem, each_atom: bool) -> Parts:
    """LISTA-CP: Chen, Liu, Wang and Yin, Theoretical linear convergence of unfolded ISTA and its practical weights and
    thresholds, 2018, equation 8."""
    start = problem.each_atom if each_atom else problem.number

    def layer(k: int) -> Algorithm:
        theta = start(problem.weight / problem.lipschitz)
        return ResidualLayer(problem.D, problem.learned_dictionary(), problem.threshold(k, theta))

    return [layer(k) for k in range(problem.depth)], {}


def hessian(problem: Problem) -> Parts:
    """W = D H with H symmetric: a learned metric, which changes the fixed points."""
    n = problem.D.domain[0]

    def layer(k: int) -> Algorithm:
        H = Dense(nn.Parameter(torch.eye(n).to(problem.values) / problem.lipschitz))
        parametrize.register_parametrization(H, "weight", Symmetric())
        prior = problem.threshold(k, problem.each_atom(problem.weight / problem.lipschitz))
        return ResidualLayer(problem.D, problem.D, prior, preconditioner=H)

    return [layer(k) for k in range(problem.depth)], {}


def tied_weights(problem: Problem) -> Parts:
    """TiLISTA: Liu, Chen, Wang and Yin, ALISTA, 2019, equation 17."""
    W = problem.learned_dictionary()

    def layer(k: int) -> Algorithm:
        prior = problem.threshold(k, problem.number(problem.weight / problem.lipschitz))
        return learn_step(ResidualLayer(problem.D, W, prior, problem.number(1.0)))

    return [layer(k) for k in range(problem.depth)], {"W": W}


def analytic(problem: Problem, whitening: Tensor | LinearMap | None, certified: bool) -> Parts:
    """ALISTA: Liu, Chen, Wang and Yin, ALISTA: analytic weights are as good as learned weights, 2019, equation 7."""
    D, metric = problem.D, None
    C = Dense(whitening) if isinstance(whitening, Tensor) else whitening
    if C is None and isinstance(D, Dense):
        C = analytic_whitening(D)
    shared: dict[str, LinearMap] = {}
    if C is not None:
        C = copy.deepcopy(C).to(problem.values)
        metric = energies(D, C)
        shared = {"W": weights_of(D, C), "whitening": C, "whitened": whitened(D, C)}
    elif certified:
        raise SettingsError(
            "no interval of certified steps is known for convolutional weights of bounded support; for circular "
            "convolutions give whitening=analytic_whitening(D), or leave out certified"
        )
    else:
        shared = {"W": analytic_weights(D)}

    def layer(k: int) -> Algorithm:
        prior = problem.threshold(k, problem.number(problem.weight / problem.lipschitz), metric)
        made = ResidualLayer(D, shared["W"], prior, problem.number(1.0), whitened=shared.get("whitened"))
        if certified and made.limit is not None and made.limit <= 1:
            made.step_size = problem.number(0.9 * made.limit)
        return learn_step(made, certified)

    return [layer(k) for k in range(problem.depth)], dict(shared)


def operators(problem: Problem, tied: bool) -> Parts:
    """LISTA: Gregor and LeCun, Learning fast approximations of sparse coding, 2010."""
    D, L = problem.values, problem.lipschitz
    data = Dense(nn.Parameter(D.T / L))
    start = torch.eye(D.shape[1]).to(D) - D.T @ D / L
    common = Dense(nn.Parameter(start)) if tied else None

    def layer(k: int) -> Algorithm:
        code = Dense(nn.Parameter(start.clone())) if common is None else common
        return OperatorLayer(code, data, problem.threshold(k, problem.number(problem.weight / L)))

    shared: dict[str, nn.Module] = {"data": data} if common is None else {"data": data, "code": common}
    return [layer(k) for k in range(problem.depth)], shared


def accelerated(problem: Problem) -> Parts:
    """L-FISTA: starts with the momentum (t_k - 1) / t_{k+1} of Beck and Teboulle, 2009, equation 4.2."""
    D, L = problem.values, problem.lipschitz
    gradient_step = torch.eye(D.shape[1]).to(D) - D.T @ D / L
    layers: list[Algorithm] = []
    before, t = 1.0, 1.0
    for k in range(problem.depth):
        momentum = 0.0 if k == 0 else (before - 1) / t
        before, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
        code, previous = ((1 + momentum) * gradient_step, -momentum * gradient_step)
        maps = [Dense(nn.Parameter(m)) for m in (code, D.T / L, previous)]
        prior = problem.threshold(k, problem.number(problem.weight / L))
        layers.append(OperatorLayer(maps[0], maps[1], prior, momentum=maps[2]))
    return layers, {}


def rotated(problem: Problem) -> Parts:
    """FacNet: Moreau and Bruna, Understanding trainable sparse coding via matrix factorization, 2017."""
    prior = L1(problem.weight)
    curvature = problem.each_atom(problem.lipschitz)
    return [RotatedLayer(problem.D, prior, curvature.clone()) for _ in range(problem.depth)], {}


def require_matrix(D: LinearMap, variant: str) -> None:
    if not isinstance(D, Dense):
        raise SettingsError(
            f"{variant!r} needs a dictionary that is a matrix (m, n), given {D._get_name()}; convolutional ones "
            "have the variants step, cp, cpss, coupled, ti and alista"
        )
