"""Nonlinear torch operations with their exact slope intervals."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.prox.prior import Prior, Slope, conjugate_proximal, proximal
from firmly.prox.ridge import Ridge, ridge_gradient

# Irrational end points are rounded outwards by this much.
OUTWARD = 1e-12


def activation(x: Signal, low: float, high: float) -> Signal:
    """A function of every real entry; off the real line the same formula may have poles and no slopes at all."""
    if x.is_complex():
        raise x.tracer.refuse("an activation function of complex values")
    return x.nonlinear(Slope(low, high))


def register_fixed(slope: tuple[float, float], *functions: Any) -> None:
    @handles(*functions)
    def rule(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Signal:
        return activation(x, *slope)


register_fixed((0.0, 1.0), torch.relu, F.relu, F.relu6, torch.Tensor.relu, torch.tanh, F.tanh, torch.Tensor.tanh)
register_fixed((0.0, 1.0), F.hardtanh, F.softsign, F.tanhshrink, F.logsigmoid, torch.atan, F.softshrink, torch.asinh)
register_fixed((0.0, 0.25), torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
register_fixed((0.0, 1.0 / 6.0 + OUTWARD), F.hardsigmoid)
register_fixed((-0.5, 1.5), F.hardswish)
register_fixed((-1.0, 1.0), torch.sin, torch.cos)
register_fixed((0.0, 2.0 / math.sqrt(math.pi) + OUTWARD), torch.erf)


@handles(torch.abs, torch.Tensor.abs)
def magnitude(tracer: Tracer, x: Signal) -> Signal:
    """Real or complex: ||v| - |w|| <= |v - w|."""
    return x.nonlinear(Slope(-1.0, 1.0))


@handles(torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.clamp_max, torch.Tensor.clamp_min)
def clamp(tracer: Tracer, x: Signal, *args: Any, **kwargs: Any) -> Any:
    for end in [*args, *kwargs.values()]:
        if isinstance(end, torch.Tensor) and torch.broadcast_shapes(end.shape, x.shape) != x.shape:
            raise tracer.refuse(f"clamping {tuple(x.shape)} between tensors of shape {tuple(end.shape)}")
    return activation(x, 0.0, 1.0)


@handles(F.softplus)
def softplus(tracer: Tracer, x: Signal, beta: float = 1.0, threshold: float = 20.0) -> Signal:
    """Slope 1 / (1 + exp(-beta x)) of log(1 + exp(beta x)) / beta; torch jumps to x itself beyond the threshold."""
    if not (beta > 0 and threshold >= 20):
        raise tracer.refuse(f"softplus with beta {beta} and a jump at the threshold {threshold}, below 20")
    text = "softplus taken as the exact function, without the jump of about 1e-9 to its asymptote in torch"
    if text not in tracer.system.assumptions:
        tracer.system.assumptions.append(text)
    return activation(x, 0.0, 1.0)


@handles(torch.celu, F.celu)
def celu(tracer: Tracer, x: Signal, alpha: float = 1.0, inplace: bool = False) -> Signal:
    """Slope exp(x / alpha) for x < 0, which only alpha > 0 keeps below 1."""
    if not alpha > 0:
        raise tracer.refuse(f"celu with alpha = {alpha}: its slope is unbounded")
    return activation(x, 0.0, 1.0)


@handles(F.leaky_relu)
def leaky_relu(tracer: Tracer, x: Signal, negative_slope: float = 0.01, inplace: bool = False) -> Signal:
    return activation(x, min(negative_slope, 1.0), max(negative_slope, 1.0))  # in this order NaN stays


@handles(torch.prelu, F.prelu)
def prelu(tracer: Tracer, x: Signal, weight: torch.Tensor) -> Signal:
    return activation(x, min(float(weight.min()), 1.0), max(float(weight.max()), 1.0))


@handles(F.elu)
def elu(tracer: Tracer, x: Signal, alpha: float = 1.0, inplace: bool = False) -> Signal:
    """Slope 1 for x > 0 and alpha e^x in (0, alpha) below."""
    return activation(x, min(alpha, 0.0), max(alpha, 1.0))


@handles(torch.selu, F.selu)
def selu(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """scale * elu_alpha with scale 1.0507..., alpha 1.6732...: the steepest slope is scale * alpha, left of zero."""
    return activation(x, 0.0, 1.0507009873554805 * 1.6732632423543772 + OUTWARD)


@handles(F.gelu)
def gelu(tracer: Tracer, x: Signal, approximate: str = "none") -> Signal:
    """x Phi(x): its slope Phi(x) + x phi(x) is extremal where phi(x) (2 - x^2) = 0, at x = -sqrt 2 and sqrt 2.

    The tanh approximation has its extremal slopes, found with 30 digits, at -1.4185... and 1.4185...
    """
    if approximate == "tanh":
        return activation(x, -0.12899306866, 1.12899306866)
    density = math.exp(-1.0) / math.sqrt(2 * math.pi)
    high = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * density
    return activation(x, 1 - high - OUTWARD, high + OUTWARD)


@handles(F.silu)
def silu(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """x s(x), s the logistic function: slope 1/2 + t (1 - t tanh) at its extrema x tanh(x/2) = 2, x = +-2.39935728."""
    peak = 2.399357280520468
    s = 1 / (1 + math.exp(-peak))
    high = s * (1 + peak * (1 - s))
    return activation(x, 1 - high - OUTWARD, high + OUTWARD)


@handles(F.mish)
def mish(tracer: Tracer, x: Signal, inplace: bool = False) -> Signal:
    """x tanh(softplus x): extremal slopes, found with 30 digits, at -2.2563... and 1.4905..., rounded outwards."""
    return activation(x, -0.11252612239, 1.08849816126)


@handles(F.softmax, torch.softmax, torch.Tensor.softmax)
def softmax(tracer: Tracer, x: Signal, dim: int | None = None, **kwargs: Any) -> Signal:
    """The gradient of log-sum-exp, whose Hessian diag(p) - p p' has eigenvalues in [0, max 2 p (1 - p)] = [0, 1/2]."""
    if x.is_complex():
        raise tracer.refuse("softmax of complex values")
    return x.nonlinear(Slope(0.0, 0.5), "whole")


@handles(proximal)
def prior_prox(tracer: Tracer, prior: Prior, z: Signal, step: Any) -> Signal:
    low, high = prior.slope_at(step)
    if float(low) == float(high):
        return z.scaled(low)
    return z.nonlinear(Slope(float(low), float(high)), prior.structure)


@handles(conjugate_proximal)
def conjugate_prox(tracer: Tracer, prior: Prior, z: Signal, step: Any) -> Signal:
    """z - s prox_{g/s}(z / s): slopes 1 - [low, high]. Recorded as one nonlinearity, so that the dual variable is its
    output and no sum that runs on over the layers, whose error bounds would grow exponentially."""
    low, high = (float(end) for end in prior.slope_at(1.0 / step))
    if low == high:
        return z.scaled(1.0 - low)
    rounding = 0.0 if (low, high) == (0.0, 1.0) else 4e-16 * (1 + abs(low) + abs(high))
    return z.nonlinear(Slope(1.0 - high - rounding, 1.0 - low + rounding), prior.structure)


@handles(ridge_gradient)
def ridge(tracer: Tracer, regulariser: Ridge, x: Signal) -> Signal:
    """K^T phi(K x) as one scalar nonlinearity per frequency between two shift-invariant maps (docs/theory)."""
    gain = regulariser.gain(x.shape[2:])
    return x.linear(gain).nonlinear(regulariser.slope, "whole").linear(gain.T)
