"""ALISTA is forward-backward splitting in a metric of its own: the network in which that metric is Euclidean."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.algorithms.forward_backward import ForwardBackward
from firmly.errors import NotCertifiable
from firmly.linear.algebra import Scale
from firmly.linear.map import LinearMap
from firmly.networks.lista_layers import ResidualLayer
from firmly.networks.sparse_network import SparseNetwork
from firmly.networks.support_selection import ContinuousSelection, HardSelection
from firmly.networks.whitening import energies, weights_of, whitened
from firmly.prox.l1 import L1
from firmly.prox.prior import Prior


class InMetric(NamedTuple):
    """net(y) = network(whitening(y)) / scale: the same network between other coordinates of data and code."""

    network: SparseNetwork
    whitening: LinearMap
    scale: Tensor

    def euclidean(self, bound: float) -> float:
        """A Lipschitz constant of the original network in Euclidean norms, from one of `network`."""
        return bound * self.whitening.norm().upper / float(self.scale.min()) * (1 + 1e-14)


@torch.no_grad()
def in_metric(net: SparseNetwork) -> InMetric:
    """The ALISTA network `net` on whitened data C y and scaled codes u = diag(p)^(1/2) z, in double precision.

    With F = C D diag(p)^(-1/2), every layer z <- R(z + g W*(y - D z)) becomes

        u <- R'(u - g F*(F u - C y)),    R' = diag(p)^(1/2) R diag(p)^(-1/2),

    forward-backward for a soft threshold R (then R' has the thresholds theta sqrt(p)): nonexpansive in u for 0 < g <
    2 / |F|^2 = 2 / lambda_max(W* D). Its Euclidean certificates are certificates of `net` in the norms |C y| of data
    and (sum p_i z_i^2)^(1/2) of codes, and its conditions are those of the layers. Derived in docs/lista.

    Raises `NotCertifiable` for other variants, for convolutional weights of bounded support, which are self-adjoint in
    no such metric, for published support selection, and for weights W that are not the analytic ones (any more).
    Stored weights are analytic up to rounding: the network that is returned, and certified, has the exact ones.
    """
    if net.variant != "alista" or not hasattr(net.shared, "whitening"):
        raise NotCertifiable(
            f"only ALISTA with a whitening is forward-backward in a metric, given {net.variant!r} without one: "
            "certify(net) bounds the network as it is, in Euclidean norms; for circular convolutions there is "
            "lista(D, depth, 'alista', whitening=analytic_whitening(D))"
        )
    shared = copy.deepcopy(net.shared).double().cpu()
    D, C = shared.D, shared.whitening
    drift = (weights_of(D, C) + Scale(-1.0, shared.W)).norm().upper / shared.W.norm().upper
    if not drift < 1e-5:
        raise NotCertifiable(
            f"the weights W differ from the analytic ones by {drift:.3g} of their norm: the metric is not theirs"
        )
    scale, F = energies(D, C).sqrt(), whitened(D, C)
    layers = [forward_backward(F, layer, scale) for layer in net.layers]
    common = nn.Module()
    common.D = F
    return InMetric(SparseNetwork(layers, common, "alista in its metric"), C, scale)


def forward_backward(F: LinearMap, layer: nn.Module, scale: Tensor) -> ForwardBackward:
    if not isinstance(layer, ResidualLayer):
        raise NotCertifiable(f"a layer of ALISTA is a ResidualLayer, given {type(layer).__name__}")
    step = float(layer.step_size)
    return ForwardBackward(F, in_scale(layer.prior, scale, step), step_size=step)


def in_scale(prior: Prior, scale: Tensor, step: float) -> Prior:
    """R' as the prox of a prior with this step."""
    if isinstance(prior, HardSelection):
        prior.slope_at()  # refuses, with the reason
    if isinstance(prior, (L1, ContinuousSelection)):
        weight = scale * prior.weight.detach().double().cpu() / step
        if isinstance(prior, L1):
            return L1(weight)
        return ContinuousSelection(weight, prior.count, prior.ramp)
    raise NotCertifiable(f"the {type(prior).__name__} of this layer is not known in the metric")
