"""Scores on a grid of pixels or voxels, and the weighted edges between neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, ShapeError
from firmly.linear.gradient import Gradient
from firmly.prox.prior import largest, positive


def differences(x: Tensor) -> Tensor:
    """x[i + e_a] - x[i] for every axis a, 0 at its end: (batch, classes, *spatial) -> (batch, classes, axes, ...)."""
    return Gradient(x.shape[1:])(x).unflatten(1, (x.shape[1], -1))


def divergence(p: Tensor) -> Tensor:
    """The adjoint of `differences`."""
    return Gradient((p.shape[1], *p.shape[3:])).T(p.flatten(1, 2))


def split(p: Tensor) -> list[Tensor]:
    """(batch, classes, axes, *spatial) -> for each axis the edges (batch, classes, *spatial), without its last row."""
    return [p.select(2, a).narrow(2 + a, 0, p.shape[3 + a] - 1) for a in range(p.shape[2])]


def joined(parts: list[Tensor]) -> Tensor:
    """The inverse of `split`, with zeros in the last rows."""
    spatial = [part.shape[2 + a] + 1 for a, part in enumerate(parts)]
    p = parts[0].new_zeros(*parts[0].shape[:2], len(parts), *spatial)
    for place, part in zip(split(p), parts):
        place.copy_(part)
    return p


def jumps(x: Tensor) -> list[Tensor]:
    """`differences` as `split` gives them."""
    return [x.diff(dim=axis) for axis in range(2, x.dim())]


def less_divergence(s: Tensor, p: list[Tensor]) -> Tensor:
    """s - divergence(p), of edges as `split` gives them."""
    z = s.clone()
    for axis, part in enumerate(p, start=2):
        n = z.shape[axis] - 1
        z.narrow(axis, 0, n).add_(part)
        z.narrow(axis, 1, n).sub_(part)
    return z


def contrast_weights(images: Tensor, contrast: float | Tensor, floor: float = 0.0) -> Tensor:
    """w[a, i] = floor + exp(-contrast |I[i + e_a] - I[i]|^2): (batch, channels, *spatial) -> (batch, axes, *spatial).

    |.| is over the channels. Differentiable in the images and in the contrast.
    """
    positive("the contrast", contrast, allow_zero=True)
    return floor + (-contrast * differences(images).square().sum(1)).exp()


def checked_scores(scores: Tensor) -> Tensor:
    """The scores in float64."""
    if scores.dim() < 3 or scores.shape[1] < 2:
        raise ShapeError(
            f"scores are (batch, classes, *spatial) with at least two classes, given {tuple(scores.shape)}"
        )
    if not scores.is_floating_point():
        raise DataError(f"scores are real floating-point numbers, given {scores.dtype}")
    if not bool(torch.isfinite(scores).all()):
        raise DataError("the scores contain NaN or infinite values")
    return scores.double()


def checked_coupling(coupling: float | Tensor) -> None:
    positive("the coupling", coupling, allow_zero=True)
    if not math.isfinite(largest(coupling)):
        raise ConditionError(f"the coupling is finite, given {largest(coupling)}")


def edge_bounds(coupling: float | Tensor, weights: Tensor | None, scores: Tensor) -> Tensor:
    """coupling_k w[a, i], broadcastable against differences(scores), in float64 with gradients."""
    checked_coupling(coupling)
    classes, axes = scores.shape[1], scores.dim() - 2
    wide = torch.as_tensor(coupling, dtype=torch.float64, device=scores.device)
    if wide.dim() > 1 or wide.numel() not in (1, classes):
        raise ShapeError(f"the coupling is one number, or one for each of {classes} classes; given {tuple(wide.shape)}")
    wide = wide.reshape(1, -1, 1, *[1] * axes)
    return wide if weights is None else wide * checked_weights(weights, scores).double()[:, None]


def checked_weights(weights: Tensor, scores: Tensor) -> Tensor:
    """The edge weights as (batch or 1, axes, *spatial)."""
    shape = (scores.dim() - 2, *scores.shape[2:])
    wide = weights[None] if weights.dim() == len(shape) else weights
    if wide.shape[1:] != shape or wide.shape[0] not in (1, scores.shape[0]):
        raise ShapeError(f"edge weights are {shape} or {(scores.shape[0], *shape)}, given {tuple(weights.shape)}")
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ConditionError("edge weights are finite and not negative")
    return wide.to(scores.device)


def both_ends(valid: Tensor) -> Tensor:
    """Which edges (batch, axes, *spatial) join two pixels of `valid` (batch, *spatial)."""
    inside = torch.ones_like(differences(valid[:, None].double())[:, 0], dtype=torch.bool)
    for axis in range(valid.dim() - 1):
        dim = axis + 1
        following = torch.zeros_like(valid)
        following.narrow(dim, 0, valid.shape[dim] - 1).copy_(valid.narrow(dim, 1, valid.shape[dim] - 1))
        inside[:, axis] = valid & following
    return inside
