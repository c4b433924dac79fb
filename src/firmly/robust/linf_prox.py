"""The proximal map of the maximum norm in a diagonal metric, inside a box: exact, by sorting or by a bracket."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError

FEW = 4096  # entries of a sample; up to here sorting them is faster


@torch.no_grad()
def linf_prox(
    delta: Tensor,
    weight: Tensor,
    lam: Tensor | float,
    low: Tensor | None = None,
    high: Tensor | None = None,
    sort: bool | None = None,
) -> Tensor:
    """argmin_p lam |p|_inf + 1/2 sum_i weight_i (p_i - delta_i)^2 with low <= p <= high, for every sample.

    `delta`, `weight` (not negative) and the box, which holds 0, are (batch, ...); lam >= 0 is a number or (batch,).
    The solution is clip(clip(delta, low, high), -t, t), where t is the least t >= 0 with

        phi(t) = sum over {i: |clip(delta_i, low_i, high_i)| > t} of weight_i (|delta_i| - t)  -  lam  <=  0.

    phi decreases, and jumps down where the box holds an entry back, so that Newton's method alone may pass over t. Here
    t is bracketed between break points, by Newton steps in turn with medians, until phi is linear in the bracket;
    `sort=True` takes prefix sums in order instead. Both are exact up to rounding, with sums in double precision.
    No gradient. Raises `ShapeError`, `DataError` (a box without 0, negative weights) and `SettingsError` (lam).
    Source: the problem is the step of Rony, Pesquet and Ben Ayed, Proximal splitting adversarial attack for semantic
    segmentation, CVPR 2023, who search for t in thirds; the exact search is derived in the documentation.
    """
    boxed, penalty = checked(delta, weight, lam, low, high)
    edge = boxed.abs().flatten(1).double()
    masses = weight.flatten(1).double()
    pulls = masses * delta.abs().flatten(1).double()
    if sort is None:
        sort = edge.shape[1] <= FEW
    t = (sorted_threshold if sort else bracketed_threshold)(edge, masses, pulls, penalty)
    t = t.to(delta.dtype).reshape(-1, *[1] * (delta.dim() - 1))
    return torch.minimum(torch.maximum(boxed, -t), t)


def checked(
    delta: Tensor, weight: Tensor, lam: Tensor | float, low: Tensor | None, high: Tensor | None
) -> tuple[Tensor, Tensor]:
    """clip(delta, low, high) and lam as a float64 vector, or a refusal."""
    given = {"weight": weight, "low": low, "high": high}
    if delta.dim() < 2 or any(g is not None and g.shape != delta.shape for g in given.values()):
        shapes = {name: tuple(g.shape) for name, g in given.items() if g is not None}
        raise ShapeError(
            f"delta is (batch, ...) and weights and box have its shape; delta is {tuple(delta.shape)}, given {shapes}"
        )
    penalty = torch.as_tensor(lam, dtype=torch.float64, device=delta.device)
    if penalty.shape not in ((), (len(delta),)):
        raise ShapeError(f"lam is a number or one for each of {len(delta)} samples, given {tuple(penalty.shape)}")
    if not bool((penalty >= 0).all() and penalty.isfinite().all()):
        raise SettingsError(f"lam is finite and not negative, given {penalty.tolist()}")
    extremes = torch.stack([*delta.aminmax(), *weight.aminmax()])  # NaN where there is one
    if not bool(extremes.isfinite().all() and extremes[2] >= 0):
        raise DataError("delta and weights are finite, and weights are not negative")
    if not bool((low is None or low.amax() <= 0) and (high is None or high.amin() >= 0)):
        raise DataError("the box holds 0: low <= 0 <= high")
    boxed = delta if low is None else torch.maximum(delta, low)
    boxed = boxed if high is None else torch.minimum(boxed, high)
    return boxed, penalty.expand(len(delta)).unsqueeze(1)


def sorted_threshold(edge: Tensor, masses: Tensor, pulls: Tensor, lam: Tensor) -> Tensor:
    """The least t >= 0 with phi(t) <= 0, from phi on all its pieces; (batch, n), lam (batch, 1) -> (batch, 1)."""
    ordered, order = edge.sort(dim=1, descending=True)
    mass, pull = masses.gather(1, order).cumsum(1), pulls.gather(1, order).cumsum(1)
    after = torch.cat([ordered[:, 1:], torch.zeros_like(ordered[:, :1])], 1)
    # phi at the left end of piece k, with the entries of that piece: the first that is positive holds the solution
    positive = pull - lam - after * mass > 0
    piece = torch.argmax(positive.to(torch.uint8), dim=1, keepdim=True)
    root = (pull.gather(1, piece) - lam) / mass.gather(1, piece)
    t = torch.minimum(root, ordered.gather(1, piece))
    return torch.where(positive.any(1, keepdim=True), t, 0)


def bracketed_threshold(edge: Tensor, masses: Tensor, pulls: Tensor, lam: Tensor) -> Tensor:
    """The same t in a few passes: phi(a) > 0 >= phi(b), until no break point lies strictly between."""
    columns = torch.stack([masses, pulls], 1)
    above = torch.zeros_like(
        columns[:, :, 0]
    )  # sums over break points that were left out because they lie at b or above

    def sums(active: Tensor) -> Tensor:
        return above + (columns @ active.to(columns.dtype).unsqueeze(2)).squeeze(2)

    def phi(t: Tensor, at: Tensor) -> Tensor:
        return at[:, 1:] - t * at[:, :1] - lam

    a = torch.zeros_like(lam)
    at_a = sums(edge > a)
    b = torch.where(phi(a, at_a) > 0, edge.amax(1, keepdim=True), 0)
    for turn in itertools.count(1):
        newton = (at_a[:, 1:] - lam) / at_a[:, :1]
        inside = (edge > a) & (edge < b)
        widest = int(inside.sum(1).max())
        if widest == 0:
            return torch.where(b > a, torch.maximum(torch.minimum(newton, b), a), a)
        if 4 * widest < edge.shape[1]:
            above = sums(edge >= b)
            edge, columns = compacted(inside, edge, columns, widest)
            inside = edge > a  # all that were kept; what fills the rows up is below every a
        t = newton
        if turn % 4 == 0 or not bool(((newton > a) & (newton < b)).any()):
            t = torch.where(inside, edge, torch.nan).nanmedian(1, keepdim=True).values
        at_t = sums(edge > t)
        moved = (t > a) & (t < b)
        positive = moved & (phi(t, at_t) > 0)
        a, at_a = torch.where(positive, t, a), torch.where(positive, at_t, at_a)
        b = torch.where(moved & ~positive, t, b)
    raise AssertionError


def compacted(inside: Tensor, edge: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Only the entries inside, rows filled up with break points -1 of no mass."""
    rows, places = inside.nonzero(as_tuple=True)
    counts = inside.sum(1)
    position = torch.arange(len(rows), device=edge.device) - (counts.cumsum(0) - counts)[rows]
    fewer = edge.new_full((len(edge), width), -1.0)
    fewer[rows, position] = edge[rows, places]
    kept = columns.new_zeros(len(edge), 2, width)
    kept[rows, :, position] = columns[rows, :, places]
    return fewer, kept
