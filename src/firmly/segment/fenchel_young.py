"""The Fenchel-Young loss of the entropic energy: convex in scores, coupling and edge weights, with simple gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.segment.dual_ascent import Minimum, ascend
from firmly.segment.energy import EntropicTV
from firmly.segment.grid import both_ends, checked_scores, differences, divergence
from firmly.segment.labels import IGNORE, targets


def fenchel_young(
    scores: Tensor,
    labels: Tensor,
    energy: EntropicTV,
    weights: Tensor | None = None,
    ignore: int = IGNORE,
) -> Tensor:
    """L(s; y) = Om*(s) + Om(y) - <s, y> with Om the energy on the simplex: (batch,), one number for each sample.

    `labels` are class numbers (batch, *spatial), `ignore` where unknown, or distributions (batch, classes, *spatial),
    all zero where unknown. L >= 0, with 0 where x*(s) = y; dL/ds = x*(s) - y, dL/dcoupling = TV(y) - TV(x*), and alike
    for the edge weights: no implicit differentiation. L is jointly convex in scores and coupling (or coupling times
    weights). Unknown pixels are left out with their edges. At zero coupling and one-hot labels, L is `temperature`
    times the sum of cross-entropies of softmax(s / temperature).
    The value is that of the dual, above L by at most temperature |x - x*|^2 (`energy.accuracy`). Raises `SettingsError`
    for a temperature that requires a gradient: L is homogeneous in (s, coupling, temperature), so that 0 would be best.
    Source: Blondel, Martins and Niculae, Learning with Fenchel-Young losses, 2020; this energy: docs/theory/segment.
    """
    value, _ = loss_and_minimum(scores, labels, energy, weights, ignore)
    return value


def loss_and_minimum(
    scores: Tensor,
    labels: Tensor,
    energy: EntropicTV,
    weights: Tensor | None = None,
    ignore: int = IGNORE,
    start: Tensor | None = None,
) -> tuple[Tensor, Minimum]:
    """The loss, and the minimum that it was found with, whose dual is a `start` for scores nearby."""
    if isinstance(energy.temperature, Tensor) and energy.temperature.requires_grad:
        raise SettingsError("the temperature of a Fenchel-Young loss is fixed: learning it too makes zero optimal")
    wide = checked_scores(scores)
    y, valid = targets(labels, scores, ignore)
    bounds = energy.bounds(wide, weights)
    if not bool(valid.all()):
        bounds = bounds * both_ends(valid)[:, None]
    tau = energy.tau(wide)
    with torch.no_grad():
        found = ascend(wide.detach(), bounds.detach(), tau, energy.accuracy, energy.max_iterations, start)
    return _Loss.apply(wide, bounds, tau, y, valid, found).to(scores.dtype), found


@once_differentiable
class _Loss(torch.autograd.Function):
    """(scores, bounds) -> L, by the envelope theorem at the minimum that was found."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, bounds: Tensor, tau: Tensor, y: Tensor, valid: Tensor, found: Minimum
    ) -> Tensor:
        ctx.save_for_backward(found.x, y, valid, bounds)
        conjugate = tau * ((scores - divergence(found.dual)) / tau).logsumexp(1)
        label_energy = tau * sum_over_sample(torch.xlogy(y, y)) + sum_over_sample(bounds * differences(y).abs())
        return sum_over_sample(conjugate * valid) + label_energy - sum_over_sample(scores * y)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, y, valid, bounds = ctx.saved_tensors
        of_scores = over_entries(cotangent, x) * (x - y) * valid[:, None]
        change = differences(y).abs() - differences(x).abs()
        of_bounds = (over_entries(cotangent, change) * change).sum_to_size(bounds.shape)
        return of_scores, of_bounds, None, None, None, None
