"""Pixels whose class no perturbation of the image inside a ball can change."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from firmly.certificates.certify import certify
from firmly.errors import SettingsError, ShapeError
from firmly.fixedpoint.layer import ImplicitLayer
from firmly.networks.bregman_inverse import Inverse
from firmly.networks.monotone import MonotoneLayer
from firmly.segment.energy import EntropicTV

OTHER_MODE = "the model is in training mode, where it is another function: call .eval() first"
ROUNDING = 1e-9  # of the size of the output: what double precision leaves open, with a wide margin


class CertifiedPixels(NamedTuple):
    """`certified` (batch, *spatial): the class of the pixel is that of `prediction` for every perturbed image too.

    `margin` (batch, *spatial) is the largest output of the pixel less the second largest, `bound` the Lipschitz
    constant, or gains, it was compared with.
    """

    certified: Tensor
    prediction: Tensor
    margin: Tensor
    bound: float | Tensor


@torch.no_grad()
def certified_pixels(
    model: nn.Module,
    images: Tensor,
    radius: float,
    bound: float | Tensor | None = None,
    output_error: float | None = None,
    budget_s: float = 60.0,
) -> CertifiedPixels:
    """The pixels of images (batch, channels, *spatial) whose argmax no perturbation |d| <= radius of the image changes.

    `model` gives scores or probabilities F (batch, classes, *spatial). `bound` is a Lipschitz constant L of F that was
    proved (`certify(model).upper`), and a pixel is certified if margin > sqrt(2) L radius: a difference of two outputs
    is the product with e_a - e_b, of length sqrt 2. Or it is a gain for every output, (classes, *spatial) or one for
    each image (`firmly.certificates.rows`, `error_map`), and a pixel is certified if margin > (gain_a + gain_b) radius
    for every other class b. None: the constant is certified here, in `budget_s` seconds.
    The model runs in double precision. `output_error` is how far its computed output may be from the exact one, in
    Euclidean norm: known of `EntropicTV` and `LinearSegmenter`, asked for (`SettingsError`) where another model has a
    layer with a solver inside, 0 for all others; give it where a `forward` calls a solver as a function, which is not
    seen from outside. A model that is another function in training mode is refused in it.
    """
    if any(m.training and isinstance(m, (_DropoutNd, _BatchNorm)) for m in model.modules()):
        raise SettingsError(OTHER_MODE)
    if not (radius >= 0 and math.isfinite(radius)):
        raise SettingsError(f"the radius is a finite number that is not negative, given {radius}")
    if bound is None:
        bound = certify(model, shape=tuple(images.shape[1:]), budget_s=budget_s).upper
    wide, images = copy.deepcopy(model).double(), images.double()
    error = solver_error(wide, images) if output_error is None else float(output_error)
    if not 0 <= error < math.inf:
        raise SettingsError(f"output_error is a finite number that is not negative, given {error}")
    output = wide(images)
    if any(m.training for m in wide.modules()) and not same(output, wide.eval()(images)):
        raise SettingsError(OTHER_MODE)
    if output.dim() != images.dim() or output.shape[2:] != images.shape[2:] or output.shape[1] < 2:
        raise ShapeError(
            f"the model gives an output for each of two or more classes and each pixel; for images "
            f"{tuple(images.shape)} this one gave {tuple(output.shape)}"
        )
    best, prediction = output.max(1)
    chosen = torch.zeros_like(output, dtype=torch.bool).scatter(1, prediction[:, None], True)
    margins = best[:, None] - output
    slack = math.sqrt(2) * error + ROUNDING * (1 + output.abs().amax())
    if isinstance(bound, Tensor):
        if not bool((bound >= 0).all()):
            raise SettingsError("gains are not negative, given some that are, or NaN")
        if bound.dim() and bound.shape not in (output.shape[1:], output.shape):  # (classes,) would fit the last axis
            raise ShapeError(f"gains are one for each output, {tuple(output.shape[1:])}, given {tuple(bound.shape)}")
        gains = bound.to(output).expand_as(output)
        allowed = radius * (gains + gains.gather(1, prediction[:, None])) * (1 + 1e-14)
    else:
        if not (bound >= 0 and math.isfinite(bound)):
            raise SettingsError(f"the bound is a finite number that is not negative, given {bound}")
        allowed = torch.full_like(output, math.sqrt(2) * bound * radius * (1 + 1e-14))
    certified = ((margins > allowed + slack) | chosen).all(1)
    return CertifiedPixels(certified, prediction, margins.masked_fill(chosen, torch.inf).amin(1), bound)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def solver_error(model: nn.Module, images: Tensor) -> float:
    """How far the output may be from that of the exact model, for each image."""
    known = getattr(model, "output_error", None)
    if callable(known):
        return float(known(images))
    last = list(model.children())[-1] if isinstance(model, nn.Sequential) and len(model) else None
    solvers = [m for m in model.modules() if isinstance(m, (EntropicTV, MonotoneLayer, ImplicitLayer, Inverse))]
    if not solvers:
        return 0.0
    if len(solvers) == 1 and isinstance(last, EntropicTV):
        return last.output_error(images)
    raise SettingsError(
        f"{type(model).__name__} has solvers inside, which stop at a tolerance: give output_error, a bound of the "
        "distance of its output from the exact one, or a method output_error(images)"
    )
