"""The random walker: labels that spread from marked pixels, differentiable in the weights of the edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, NotConverged, ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.segment.grid import checked_weights, differences, divergence
from firmly.segment.labels import IGNORE, targets
from firmly.segment.regions import regions


def random_walker(
    weights: Tensor,
    markers: Tensor,
    classes: int,
    ignore: int = IGNORE,
    tol: float = 1e-12,
    max_iterations: int = 10_000,
) -> Tensor:
    """x_ik, the probability that a walker from pixel i meets a pixel marked k first: (batch, classes, *spatial).

    `weights` (batch, axes, *spatial) are those of the edges from i to i + e_a (`contrast_weights`), `markers` (batch,
    *spatial) class numbers, `ignore` where there is none. x is one-hot at the markers and harmonic elsewhere,
    sum_j w_ij (x_i - x_j) = 0: the solution of L_U x_U = -E' x_M with the Laplacian of the unmarked pixels. It is found
    in float64 by conjugate gradients, to a residual of at most `tol` relative to the right-hand side, measured at the
    end; the gradient in the weights, by the same solver on the same matrix. Entries are in [0, 1] and sum to 1
    (the maximum principle): what the tolerance leaves outside is cut off, and `NotConverged` raised if it is more than
    1e-6. `ConditionError` if edges of positive weight connect some pixel with no marker, where x is not determined.
    Source: Grady, Random walks for image segmentation, 2006.
    """
    x, marked = start_of(weights, markers, classes, ignore)
    wide = checked_weights(weights, x).double()
    check_reached(wide, marked)
    solution = _Walker.apply(wide, x, marked, (tol, max_iterations))
    outside = float(torch.maximum(-solution.detach(), solution.detach() - 1).max())
    if outside > 1e-6:
        raise NotConverged(
            f"probabilities of the random walker leave [0, 1] by {outside:.3g}: the weights differ by too much for "
            "this tolerance; lower tol, or give contrast_weights a floor"
        )
    inside = solution.clamp(0, 1)
    return (inside / inside.sum(1, keepdim=True)).to(weights.dtype)


def start_of(weights: Tensor, markers: Tensor, classes: int, ignore: int) -> tuple[Tensor, Tensor]:
    """One-hot markers (batch, classes, *spatial) in float64, and where they are (batch, 1, *spatial)."""
    if markers.is_floating_point() or markers.dim() < 2 or weights.shape != (
        len(markers), markers.dim() - 1, *markers.shape[1:]
    ):  # fmt: skip
        raise ShapeError(
            "weights are (batch, axes, *spatial) and markers class numbers (batch, *spatial), given "
            f"{tuple(weights.shape)} and {tuple(markers.shape)}, {markers.dtype}"
        )
    if classes < 2:
        raise DataError(f"a random walker has at least two classes, given {classes}")
    like = torch.empty(len(markers), classes, *markers.shape[1:], dtype=torch.float64, device=weights.device)
    found = targets(markers, like, ignore)
    return found.distribution, found.valid[:, None]


def check_reached(weights: Tensor, marked: Tensor) -> None:
    label, count = regions(weights > 0, weights.shape[1])
    reached = torch.zeros(count, dtype=torch.bool, device=label.device)
    reached[label[marked[:, 0]]] = True
    lost = int((~reached[label]).sum())
    if lost:
        raise ConditionError(
            f"{lost} pixels are connected with no marker by edges of positive weight: mark one pixel of each of their "
            "components, or give contrast_weights a floor"
        )


def laplacian(x: Tensor, weights: Tensor) -> Tensor:
    """(L x)_i = sum_j w_ij (x_i - x_j)."""
    return divergence(weights[:, None] * differences(x))


@once_differentiable
class _Walker(torch.autograd.Function):
    """(weights, one-hot markers) -> x; with L_U u = v on the unmarked pixels, dx/dw_e gives -(D u)_e (D x)_e."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, marked: Tensor, settings: tuple[float, int]) -> Tensor:
        ctx.settings = settings
        x = harmonic(weights, x, marked, *settings)
        ctx.save_for_backward(weights, marked, x)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        weights, marked, x = ctx.saved_tensors
        of_others = cotangent[:, :-1] - cotangent[:, -1:]  # the last class is 1 - the others
        u = solve_unmarked(weights, marked, of_others * ~marked, *ctx.settings)
        return -(differences(u) * differences(x[:, :-1])).sum(1).sum_to_size(weights.shape), None, None, None


def harmonic(weights: Tensor, markers: Tensor, marked: Tensor, tol: float, max_iterations: int) -> Tensor:
    """One-hot markers continued to the unmarked pixels; the last class is what the others leave."""
    x = markers[:, :-1]
    x = x + solve_unmarked(weights, marked, -laplacian(x, weights) * ~marked, tol, max_iterations)
    return torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)


def solve_unmarked(weights: Tensor, marked: Tensor, right: Tensor, tol: float, max_iterations: int) -> Tensor:
    """u with (L u)_U = right, 0 at the markers: conjugate gradients with the diagonal as preconditioner.

    For each sample and class on its own. Weights of very different sizes are what the preconditioner is for.
    """
    samples = right.flatten(0, 1)[:, None]
    each = weights.repeat_interleave(right.shape[1], 0)
    free = (~marked).repeat_interleave(right.shape[1], 0)
    degree = (degrees(each) * free).clamp(min=torch.finfo(torch.float64).tiny)
    u, left = torch.zeros_like(samples), samples
    scaled = left / degree * free
    direction, power = scaled, sum_over_sample(left * scaled)
    goal = tol**2 * power
    for _ in range(max_iterations):
        if bool((power <= goal).all()):
            break
        image = laplacian(direction, each) * free
        curvature = sum_over_sample(direction * image)
        length = torch.where(power > goal, power / torch.where(curvature > 0, curvature, 1), 0)
        u = u + over_entries(length, u) * direction
        left = left - over_entries(length, left) * image
        scaled = left / degree * free
        now = sum_over_sample(left * scaled)
        direction = (
            scaled + over_entries(torch.where(power > 0, now / torch.where(power > 0, power, 1), 0), u) * direction
        )
        power = now
    rest = (samples - laplacian(u, each)) * free  # measured, not that of the recursion
    reached = sum_over_sample(rest * rest / degree).sqrt()
    allowed = 100 * tol * sum_over_sample(samples * samples * free / degree).sqrt()
    if not bool((reached <= allowed).all()):
        raise NotConverged(
            f"the random walker has a residual of {float(reached.max()):.3g} after {max_iterations} iterations, "
            f"allowed {float(allowed.min()):.3g}; allow more max_iterations, or give contrast_weights a floor"
        )
    return u.reshape(right.shape)


def degrees(weights: Tensor) -> Tensor:
    """The sum of the weights of all edges of a pixel: (batch, axes, *spatial) -> (batch, 1, *spatial)."""
    total = torch.zeros_like(weights[:, :1])
    for axis in range(weights.shape[1]):
        dim = axis + 2
        inner = weights[:, axis : axis + 1].narrow(dim, 0, weights.shape[dim] - 1)
        total.narrow(dim, 0, weights.shape[dim] - 1).add_(inner)
        total.narrow(dim, 1, weights.shape[dim] - 1).add_(inner)
    return total
