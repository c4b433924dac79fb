"""The structured hinge loss with total variation, and the segmentation that it scores: a linear program, solved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.linear.gradient import Gradient
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.prox.simplex import onto_simplex
from firmly.segment.grid import both_ends, checked_scores, differences, divergence, edge_bounds
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
    norm = Gradient(scores.shape[1:]).norm().upper
    step = 1 / norm if norm > 0 else 1.0
    allowed = accuracy * math.prod(scores.shape[2:])
    if start is None:
        x = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1).to(scores)
        p = torch.zeros_like(differences(scores))
    else:
        x, p = start.x, start.dual.clamp(-bounds, bounds)
    gap = scores.new_full((len(scores),), torch.inf)
    for iteration in range(max_iterations + 1):
        if iteration % 10 == 0:
            upper = (scores - divergence(p)).amax(1).flatten(1).sum(1)
            gap = upper - sum_over_sample(scores * x) + sum_over_sample(bounds * differences(x).abs())
            if bool((gap <= allowed).all()):
                return Best(x, p, upper, iteration)
        new = onto_simplex(x + step * (scores - divergence(p)), 1.0, 1)
        p = (p + step * differences(2 * new - x)).clamp(-bounds, bounds)
        x = new
    raise NotConverged(
        f"the best segmentation is certified to {float(gap.max()) / math.prod(scores.shape[2:]):.3g} per pixel after "
        f"{max_iterations} iterations, asked for {accuracy:.3g}; allow more max_iterations or a larger accuracy"
    )


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
