"""Calibration without backpropagation: a few numbers of a network, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.networks.hyper_lista import HyperConstants
from firmly.networks.lista_layers import ResidualLayer, zeros
from firmly.networks.positive import MARGIN
from firmly.networks.sparse_network import SparseNetwork

FIRST = (1.0, 0.5)  # step and threshold that the search of the first layer starts from
HYPER_STARTS = ((5e-3, 1e-3, 10.0), (1e-2, 2e-3, 15.0), (3e-3, 1e-3, 20.0))


def nmse_db(code: Tensor, truth: Tensor) -> float:
    """10 log10(sum |code - truth|^2 / sum |truth|^2) over the batch, in dB."""
    error = (code - truth).detach().square().sum() / truth.square().sum()
    return 10 * math.log10(max(float(error), 1e-300))


@torch.no_grad()
def calibrate(
    net: SparseNetwork, y: Tensor, truth: Tensor, evaluations: int = 40,
    callback: Callable[[int, float], None] | None = None,
) -> list[float]:  # fmt: skip
    """Set the step and the threshold of every layer, one layer after the other, so that its code is nearest to `truth`.

    Nelder-Mead on the NMSE of the codes `truth` (batch, n) of data `y` (batch, m), with `evaluations` per layer,
    started at the pair of the layer before. Steps that a certificate keeps in an interval stay in it. Returns the NMSE
    after every layer, dB; `callback` gets (layer, NMSE). For the variants "ti", "alista", "cp" and "cpss".
    """
    if not all(isinstance(layer, ResidualLayer) and layer.preconditioner is None for layer in net.layers):
        raise SettingsError(f"calibrate fits a step and a threshold per layer, which {net.variant!r} does not have")
    pair, reached = FIRST, []
    z = zeros(net.layers[0], y)
    for k, layer in enumerate(net.layers):
        z, pair = fit(layer, z, y, truth, pair, evaluations)
        reached.append(nmse_db(z, truth))
        if callback is not None:
            callback(k, reached[-1])
    return reached


def fit(
    layer: ResidualLayer, z: Tensor, y: Tensor, truth: Tensor, pair: tuple[float, float], evaluations: int
) -> tuple[Tensor, tuple[float, float]]:  # fmt: skip
    """Set the step and the threshold of one layer, searched from `pair`; returns its code of z and what was found.

    A layer without a step of its own has its weights scaled instead.
    """
    own_step = "step_size" in getattr(layer, "parametrizations", {})
    kept_in_rule = own_step and not layer.parametrizations["step_size"][0].waived
    end = layer.limit * (1 - MARGIN) if layer.limit is not None and kept_in_rule else math.inf
    correlation = layer.W.T(y - layer.D(z)) * (1.0 if own_step else layer.step_size)

    def code(step: float, threshold: float) -> Tensor:
        layer.prior.weight = torch.full_like(layer.prior.weight, threshold)
        return layer.prior.prox(z + min(step, end) * correlation)

    def cost(values: Sequence[float]) -> float:
        return nmse_db(code(*values), truth) if min(values) > 0 else math.inf

    g, theta = pair
    step, threshold = map(float, nelder_mead(cost, [(g, theta), (1.2 * g, theta), (g, 0.6 * theta)], evaluations))
    step = min(step, end)
    if own_step:
        layer.step_size = torch.full_like(layer.step_size, step)
    else:
        layer.W.weight.mul_(step)
    return code(step, threshold), (step, threshold)


@torch.no_grad()
def calibrate_hyper(
    net: SparseNetwork, y: Tensor, truth: Tensor, evaluations: int = 45,
    starts: Sequence[Sequence[float]] = HYPER_STARTS, callback: Callable[[int, float], None] | None = None,
) -> float:  # fmt: skip
    """Set the three constants of HyperLISTA by Nelder-Mead on the NMSE of its last code, the best of several starts.

    Returns that NMSE in dB; `callback` gets (start, NMSE).
    """
    constants = getattr(net.shared, "constants", None)
    if not isinstance(constants, HyperConstants):
        raise SettingsError(f"the three constants are those of the variant 'hyper', given {net.variant!r}")

    def cost(values: Sequence[float]) -> float:
        if min(values) <= 0:
            return math.inf
        constants.c = torch.tensor(list(values), dtype=constants.c.dtype, device=constants.c.device)
        return nmse_db(net(y), truth)

    found = []
    for k, start in enumerate(starts):
        simplex = [tuple(start), *(tuple(1.5 * v if i == j else v for i, v in enumerate(start)) for j in range(3))]
        best = nelder_mead(cost, simplex, evaluations)
        found.append((cost(best), best))
        if callback is not None:
            callback(k, found[-1][0])
    value, best = min(found, key=lambda pair: pair[0])
    cost(best)
    return value


def nelder_mead(cost: Callable[[Any], float], simplex: Sequence[Sequence[float]], evaluations: int) -> Any:
    """The best point found by the Nelder-Mead method of SciPy from this simplex."""
    from scipy.optimize import minimize

    options = {"initial_simplex": [list(p) for p in simplex], "maxfev": evaluations, "xatol": 0.0, "fatol": 0.0}
    return minimize(cost, list(simplex[0]), method="Nelder-Mead", options=options).x
