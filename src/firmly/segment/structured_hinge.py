"""The structured hinge loss with total variation, and the segmentation that it scores: a linear program, solved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.prox.simplex import onto_simplex
from firmly.segment.grid import (
    both_ends,
    checked_scores,
    differences,
    edge_bounds,
    joined,
    jumps,
    less_divergence,
    split,
)
from firmly.segment.labels import IGNORE, targets


class Best(NamedTuple):
    """x in the simplex, the dual p, and upper >= max_x' <s, x'> - TV(x') >= <s, x> - TV(x), for each sample."""

    x: Tensor
    dual: Tensor
    upper: Tensor
    iterations: int


def structured_hinge(
    scores: Tensor,
    labels: Tensor,
    coupling: float | Tensor = 0.0,
    weights: Tensor | None = None,
    ignore: int = IGNORE,
    accuracy: float = 1e-3,
    max_iterations: int = 20_000,
) -> Tensor:
    """max over x in the simplex of <s, x - y> + sum_i (1 - <x_i, y_i>) - TV(x) + TV(y): (batch,), for each sample.

    TV(x) = sum_k coupling_k TV_w(x_k), and arguments as in `fenchel_young`. At zero coupling it is the hinge loss of
    Crammer and Singer, summed over the pixels, exactly. Convex in (scores, coupling). The value is an upper bound
    within `accuracy` per pixel, found by a primal-dual method (`NotConverged` after `max_iterations`); the gradient is
    that of the x found, which cuts the loss from below.
    Sources: Crammer and Singer, On the algorithmic implementation of multiclass kernel-based vector machines, 2001;
    Tsochantaridis et al., Large margin methods for structured and interdependent output variables, 2005.
    """
    wide = checked_scores(scores)
    y, valid = targets(labels, scores, ignore)
    bounds = edge_bounds(coupling, weights, wide)
    if not bool(valid.all()):
        bounds = bounds * both_ends(valid)[:, None]
    with torch.no_grad():
        augmented = (wide.detach() + 1 - y) * valid[:, None]
        found = best_segmentation(augmented, bounds.detach(), accuracy, max_iterations)
    return _Hinge.apply(wide, bounds, y, valid, found).to(scores.dtype)


def best_segmentation(
    scores: Tensor, bounds: Tensor, accuracy: float, max_iterations: int, start: Best | None = None
) -> Best:
    """max over x in the simplex of <s, x> - sum bounds |D x|, to a gap of `accuracy` per pixel for every sample.

    Its dual is the minimum over |p| <= bounds of sum_i max_k (s - D* p)_ik. First the best x for p = 0 is tried, which
    is exact at zero coupling. Source: Chambolle and Pock, A first-order primal-dual algorithm, 2011.
    """
    size = 1 / math.sqrt(4 * (scores.dim() - 2))  # |D|^2 <= 4 axes
    common = scores.amax(1, keepdim=True)  # to all classes: without effect but on rounding
    scores = scores - common
    allowed = accuracy * math.prod(scores.shape[2:])
    if start is None:
        x = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1).to(scores)
        dual = torch.zeros_like(differences(scores))
    else:
        x, dual = start.x, start.dual.clamp(-bounds, bounds)
    p, limits = split(dual), split(bounds.expand_as(dual))
    gap = scores.new_full((len(scores),), torch.inf)
    for iteration in range(max_iterations + 1):
        z = less_divergence(scores, p)
        if iteration % 10 == 0:
            upper = z.amax(1).flatten(1).sum(1)
            tv = [sum_over_sample(limit * jump.abs()) for limit, jump in zip(limits, jumps(x))]
            gap = upper - sum_over_sample(scores * x) + torch.stack(tv).sum(0)
            if bool((gap <= allowed).all()):
                return Best(x, joined(p), upper + sum_over_sample(common), iteration)
        new = onto_simplices(z.mul_(size).add_(x))
        ahead = jumps(2 * new - x)
        p = [(part + size * jump).clamp_(-limit, limit) for part, jump, limit in zip(p, ahead, limits)]
        x = new
    raise NotConverged(
        f"the best segmentation is certified to {float(gap.max()) / math.prod(scores.shape[2:]):.3g} per pixel after "
        f"{max_iterations} iterations, asked for {accuracy:.3g}; allow more max_iterations or a larger accuracy"
    )


def onto_simplices(z: Tensor) -> Tensor:
    """max(z - t, 0) with entries that sum to 1 over the classes, for every pixel.

    The sum is convex and decreasing in t: Newton's method from below ends after at most as many steps as classes, which
    for a few of them takes half of the time of sorting.
    """
    if z.shape[1] > 8:
        return onto_simplex(z, 1.0, 1)
    t = z.amax(1, keepdim=True) - 1
    for _ in range(z.shape[1]):
        rest = (z - t).clamp_(min=0)
        t = t + (rest.sum(1, keepdim=True) - 1) / (rest > 0).sum(1, keepdim=True)
    return (z - t).clamp_(min=0)


@once_differentiable
class _Hinge(torch.autograd.Function):
    """(scores, bounds) -> the loss, with the subgradient of the x that was found."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, bounds: Tensor, y: Tensor, valid: Tensor, found: Best) -> Tensor:
        ctx.save_for_backward(found.x, y, valid, bounds)
        return found.upper + sum_over_sample(bounds * differences(y).abs()) - sum_over_sample(scores * y)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, y, valid, bounds = ctx.saved_tensors
        of_scores = over_entries(cotangent, x) * (x - y) * valid[:, None]
        change = differences(y).abs() - differences(x).abs()
        return of_scores, (over_entries(cotangent, change) * change).sum_to_size(bounds.shape), None, None, None
