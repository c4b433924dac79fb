"""Nonlinear torch operations with their exact slope intervals."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.prox.prior import Prior, Slope, proximal
from firmly.prox.ridge import Ridge, ridge_gradient

# Irrational end points are rounded outwards by this much.
OUTWARD = 1e-12


def register_fixed(slope: tuple[float, float], *functions: Any) -> None:
    @handles(*functions)
    def rule(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Signal:
        return x.nonlinear(Slope(*slope))


register_fixed((0.0, 1.0), torch.relu, F.relu, torch.relu_, F.relu6, torch.Tensor.relu, torch.tanh, F.tanh)
register_fixed((0.0, 1.0), torch.Tensor.tanh, F.hardtanh, F.softsign, F.tanhshrink, F.logsigmoid, torch.atan)
register_fixed((0.0, 1.0), F.softplus, F.softshrink, torch.celu, F.celu, torch.asinh)
register_fixed((0.0, 0.25), torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
register_fixed((0.0, 1.0 / 6.0 + OUTWARD), F.hardsigmoid)
register_fixed((-0.5, 1.5), F.hardswish)
register_fixed((-1.0, 1.0), torch.abs, torch.Tensor.abs, torch.sin, torch.cos)
register_fixed((0.0, 2.0 / math.sqrt(math.pi) + OUTWARD), torch.erf)


@handles(torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.clamp_max, torch.Tensor.clamp_min)
def clamp(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(a, Signal) for a in [*args, *kwargs.values()]):
        return NotImplemented
    return x.nonlinear(Slope(0.0, 1.0))


@handles(F.leaky_relu)
def leaky_relu(tracer: Tracer, x: Signal, negative_slope: float = 0.01, inplace: bool = False) -> Signal:
    return x.nonlinear(Slope(min(1.0, negative_slope), max(1.0, negative_slope)))


@handles(torch.prelu, F.prelu)
def prelu(tracer: Tracer, x: Signal, weight: torch.Tensor) -> Signal:
    return x.nonlinear(Slope(min(1.0, float(weight.min())), max(1.0, float(weight.max()))))


@handles(F.elu)
def elu(tracer: Tracer, x: Signal, alpha: float = 1.0, inplace: bool = False) -> Signal:
    """Slope 1 for x > 0 and alpha e^x in (0, alpha) below."""
    return x.nonlinear(Slope(min(0.0, alpha), max(1.0, alpha)))


@handles(torch.selu, F.selu)
def selu(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """scale * elu_alpha with scale 1.0507..., alpha 1.6732...: the steepest slope is scale * alpha, left of zero."""
    return x.nonlinear(Slope(0.0, 1.0507009873554805 * 1.6732632423543772 + OUTWARD))


@handles(F.gelu)
def gelu(tracer: Tracer, x: Signal, approximate: str = "none") -> Signal:
    """x Phi(x): its slope Phi(x) + x phi(x) is extremal where phi(x) (2 - x^2) = 0, at x = -sqrt 2 and sqrt 2.

    The tanh approximation has been bounded on a fine grid with the Lipschitz constant of its slope: 1.12902 and
    -0.12902.
    """
    if approximate == "tanh":
        return x.nonlinear(Slope(-0.1291, 1.1291))
    density = math.exp(-1.0) / math.sqrt(2 * math.pi)
    high = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * density
    return x.nonlinear(Slope(1 - high - OUTWARD, high + OUTWARD))


@handles(F.silu)
def silu(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """x s(x), s the logistic function: slope 1/2 + t (1 - t tanh) at its extrema x tanh(x/2) = 2, x = +-2.39935728."""
    peak = 2.399357280520468
    s = 1 / (1 + math.exp(-peak))
    high = s * (1 + peak * (1 - s))
    return x.nonlinear(Slope(1 - high - OUTWARD, high + OUTWARD))


@handles(F.mish)
def mish(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """x tanh(softplus x): extremal slopes -0.1127... and 1.0884..., bounded on a fine grid and rounded outwards."""
    return x.nonlinear(Slope(-0.1128, 1.0885))


@handles(F.softmax, torch.softmax, torch.Tensor.softmax)
def softmax(tracer: Tracer, x: Signal, dim: int | None = None, **kwargs: Any) -> Signal:
    """The gradient of log-sum-exp, whose Hessian diag(p) - p p' has eigenvalues in [0, max 2 p (1 - p)] = [0, 1/2]."""
    return x.nonlinear(Slope(0.0, 0.5), "whole")


@handles(proximal)
def prior_prox(tracer: Tracer, prior: Prior, z: Signal, step: Any) -> Signal:
    low, high = prior.slope_at(step)
    if float(low) == float(high):
        return z.scaled(low)
    return z.nonlinear(Slope(float(low), float(high)), prior.structure)


@handles(ridge_gradient)
def ridge(tracer: Tracer, regulariser: Ridge, x: Signal) -> Signal:
    """K^T phi(K x) as one scalar nonlinearity per frequency between two shift-invariant maps (docs/theory)."""
    gain = regulariser.gain(x.shape[2:])
    return x.linear(gain).nonlinear(regulariser.slope, "whole").linear(gain.T)
