"""The linear system behind the derivative of the energy's minimiser, on the regions where that is flat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.segment.grid import differences
from firmly.segment.regions import region_means, regions

TOL = 1e-10  # relative residual of the system
ALLOWED = 1e-8  # of it, measured at the end
SMALLEST = 1e-6  # of the diagonal: beyond it the formula of Sherman and Morrison loses too many digits


def flat_edges(x: Tensor, dual: Tensor, bounds: Tensor, tau: Tensor) -> Tensor:
    """Where x* is equal on both sides of an edge: the dual stays inside its bounds after another step."""
    jumps = differences(x)
    following = dual + (2 * tau / (4 * (x.dim() - 2))) * jumps
    return (bounds > 0) & ((following.abs() <= bounds) | (jumps.abs() <= 1e-10))


def projected(v: Tensor, x: Tensor, flat: Tensor, tau: Tensor) -> Tensor:
    """u = argmin 1/2 u' diag(tau / x) u - <v, u> over u with sum_k u_ik = 0 that are equal across flat edges.

    With mu the multiplier of the sums and Pi_k the mean over the flat regions of class k, u_k = x_k Pi_k (v_k - mu) /
    tau, so that A mu = sum_k x_k Pi_k v_k with A = sum_k x_k Pi_k: symmetric with eigenvalues in [0, 1], and the
    identity at zero coupling. Conjugate gradients with `Preconditioner`, for each sample.
    """
    label, count = regions(flat, x.dim() - 2)
    places = label.flatten()
    size = torch.bincount(places, minlength=count).to(x)
    weight = x.new_zeros(count).index_copy(0, places, (1 / region_means(1 / x, label, count)).flatten()) / size

    def spread(w: Tensor) -> Tensor:
        """x_k Pi_k w."""
        total = x.new_zeros(count).index_add(0, places, w.expand_as(x).flatten())
        return (weight * total)[places].reshape(x.shape)

    easier = Preconditioner(x, flat, label, weight)
    source = spread(v)
    right = source.sum(1, keepdim=True)
    scale = sum_over_sample(right.square())
    mu, left = torch.zeros_like(right), right
    direction = easier(left)
    power = sum_over_sample(left * direction)
    for _ in range(10 * math.prod(x.shape[2:]) + 100):
        running = sum_over_sample(left.square()) > TOL**2 * scale
        if not bool(running.any()):
            break
        image = spread(direction).sum(1, keepdim=True)
        curvature = sum_over_sample(direction * image)
        length = over_entries(torch.where(running & (curvature > 0), power / curvature, 0), mu)
        mu, left = mu + length * direction, left - length * image
        ahead = easier(left)
        now = sum_over_sample(left * ahead)
        direction = ahead + over_entries(torch.where(power > 0, now / power, 0), mu) * direction
        power = now
    u = source - spread(mu)
    measured = sum_over_sample(u.sum(1).square()).sqrt()  # not that of the recursion
    allowed = ALLOWED * scale.sqrt() + 1e-14 * sum_over_sample(source.square()).sqrt()
    if not bool((measured <= allowed).all()):
        raise NotConverged(
            f"the gradient of the energy's minimiser has a residual of {float(measured.max()):.3g}, allowed "
            f"{float(allowed.min()):.3g}: the flat regions were not identified; lower `accuracy`"
        )
    return u / tau


class Preconditioner:
    """An approximate inverse of sum_k x_k Pi_k: the largest class of every pixel exactly, the others by a diagonal.

    Where one class is almost certain, in a large flat region R, A is x_k / |R| times a matrix of ones there, and much
    smaller in all other directions: diag(E) + sum_R (x_k / |R|) 1_R 1_R', inverted by the formula of Sherman and
    Morrison. A acts on functions that are equal on cells, the parts that no class divides: a pixel stands for its cell,
    and E_i = |cell| sum over the other classes of x_k / |region|.
    """

    def __init__(self, x: Tensor, flat: Tensor, label: Tensor, weight: Tensor):
        cells, number = regions(flat.all(1, keepdim=True), x.dim() - 2)
        of_cell = torch.bincount(cells.flatten(), minlength=number).to(x)[cells]
        largest = x.argmax(1, keepdim=True)
        others = weight[label].scatter(1, largest, 0.0).sum(1, keepdim=True)
        self.diagonal = (of_cell * others).clamp(min=SMALLEST)
        self.region = label.gather(1, largest).flatten()
        self.count = len(weight)
        self.share = weight / (1 + weight * self.totals(1 / self.diagonal))

    def totals(self, w: Tensor) -> Tensor:
        return w.new_zeros(self.count).index_add(0, self.region, w.flatten())

    def __call__(self, w: Tensor) -> Tensor:
        scaled = w / self.diagonal
        return scaled - (self.share * self.totals(scaled))[self.region].reshape(w.shape) / self.diagonal
