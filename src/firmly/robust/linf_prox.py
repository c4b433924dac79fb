"""The proximal map of the maximum norm in a diagonal metric, inside a box: exact, by sorting break points."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError

FEW = 2048  # entries; up to here sorting them all is faster
SAMPLE, RANKS = 512, 40  # break points that guess where the solution is, and by how many of them they may be wrong


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


def sorted_threshold(
    edge: Tensor, masses: Tensor, pulls: Tensor, lam: Tensor, bracket: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """The least t >= 0 with phi(t) <= 0, from phi on all its pieces; (batch, n), lam (batch, 1) -> (batch, 1).

    A bracket is a, b with phi(a) > 0 >= phi(b) (or a = 0), and the sums (batch, 2) of masses and pulls over the break
    points from b on; of the others only those between a and b have to be there.
    """
    if bracket is None:
        none = torch.zeros_like(lam)
        bracket = none, edge.amax(1, keepdim=True), none.expand(-1, 2)
        inside = torch.ones_like(edge, dtype=torch.bool)
    else:
        inside = (edge > bracket[0]) & (edge < bracket[1])
    a, b, above = bracket
    ordered, order = torch.where(inside, edge, -1).sort(dim=1, descending=True)
    inside = inside.gather(1, order)
    mass, pull = (
        torch.cat([start, start + torch.where(inside, part.gather(1, order), 0).cumsum(1)], 1)
        for part, start in ((masses, above[:, :1]), (pulls, above[:, 1:]))
    )
    upper = torch.cat([b, torch.where(inside, ordered, a)], 1)
    lower = torch.cat([upper[:, 1:], a], 1)
    # phi at the lower end of piece k, with the entries of that piece: the first that is positive holds the solution
    positive = pull - lam - lower * mass > 0
    piece = torch.argmax(positive.to(torch.uint8), dim=1, keepdim=True)
    root = (pull.gather(1, piece) - lam) / mass.gather(1, piece)
    t = torch.maximum(torch.minimum(root, upper.gather(1, piece)), lower.gather(1, piece))
    return torch.where(positive.any(1, keepdim=True), t, 0)


def bracketed_threshold(edge: Tensor, masses: Tensor, pulls: Tensor, lam: Tensor) -> Tensor:
    """The same t, sorting only break points between two guesses that a sample makes, once phi has confirmed them."""
    columns = torch.stack([masses, pulls], 1)

    def sums(active: Tensor) -> Tensor:
        return (columns @ active.to(columns.dtype).unsqueeze(2)).squeeze(2)

    a, b = torch.zeros_like(lam), edge.amax(1, keepdim=True)
    for t in guesses(edge, masses, pulls, lam):
        at_t = sums(edge > t)
        positive = at_t[:, 1:] - t * at_t[:, :1] - lam > 0
        a, b = torch.where(positive, torch.maximum(a, t), a), torch.where(positive, b, torch.minimum(b, t))
    bracket, inside = (a, b, sums(edge >= b)), (edge > a) & (edge < b)
    edge, columns = compacted(inside, edge, columns, int(inside.sum(1).max()))
    return sorted_threshold(edge, columns[:, 0], columns[:, 1], lam, bracket)


def guesses(edge: Tensor, masses: Tensor, pulls: Tensor, lam: Tensor) -> list[Tensor]:
    """Break points of a sample some ranks above and below the one at which phi of the sample changes sign."""
    stride = max(edge.shape[1] // SAMPLE, 1)
    ordered, order = edge[:, ::stride].sort(dim=1, descending=True)
    mass, pull = (part[:, ::stride].gather(1, order).cumsum(1) for part in (masses, pulls))
    share = ordered.shape[1] / edge.shape[1]
    rank = (pull - ordered * mass - share * lam <= 0).sum(1, keepdim=True)
    return [ordered.gather(1, (rank + k).clamp(0, ordered.shape[1] - 1)) for k in (RANKS, -RANKS)]


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
