"""Risks over label maps that lie near the given ones: every changed label has a cost, and the changes a budget."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.ambiguity import AmbiguitySet, Sense
from firmly.robust.rows import Rows
from firmly.robust.transport import Plans, transport

LARGEST = 4096  # atoms of a ball whose cost is a matrix


class LabelRisk(NamedTuple):
    """Risks, the label laws (batch, class, *spatial) that attain them (0 on void), and the price of a unit of cost."""

    risk: Tensor
    labels: Tensor
    price: Tensor


def label_risk(
    losses: Tensor,
    labels: Tensor,
    budget: float | Tensor,
    cost: Tensor | None = None,
    distance: Tensor | None = None,
    mask: Tensor | None = None,
    over: Literal["pixel", "image", "batch"] = "image",
    sense: Sense = "inf",
) -> LabelRisk:
    """inf (or sup) of the mean over pixels of sum_k Q_ik l_ik over label laws Q with mean W_C(P_i, Q_i) <= budget.

        sup: min over price >= 0 of price budget + mean over pixels of sum_j P_ij max_k (l_ik - price C_jk),

    exact, with one price per image. The optimistic risk is a correction of labels: with the 0/1 cost it changes those
    with the largest l_i,given - min_k l_ik, at most the fraction `budget` of the pixels; the price is the confidence
    from which a label is changed. The pessimistic one needs a bounded loss or a cost that forbids most changes.

    - `losses`: of every class, (batch, class, *spatial); `firmly.robust.cross_entropy(logits)`, say.
    - `labels`: given ones, (batch, *spatial) integers, or laws (batch, class, *spatial).
    - `cost`: (class, class), from the given class (row) to the believed one, 0 on the diagonal; infinity forbids. None
      is 1 for every change; see `ordinal_cost`, `tree_cost`.
    - `distance`: factors (batch, *spatial) of the cost of a pixel, infinity forbids; `boundary_distance`, say.
    - `mask`: (batch, *spatial), True at valid pixels; labels and losses may be anything elsewhere.
    - `over`: who shares a budget: each "image" -> risks (batch,), the "batch" -> (), each "pixel" -> (batch, *spatial).

    The gradient is Q / n on valid pixels (Danskin) and 0 elsewhere; it reaches a budget that is a tensor, too.
    Sources: docs/theory/robust_risks; the duality is that of Mohajerin Esfahani and Kuhn, Data-driven distributionally
    robust optimization using the Wasserstein metric, 2018.
    """
    allowed = torch.as_tensor(budget, dtype=torch.float64, device=losses.device)
    size = float(allowed.detach()) if allowed.numel() == 1 else float("nan")
    if not 0 <= size < float("inf"):
        raise SettingsError(f"the budget is one finite number of at least 0, given {budget}")
    if over not in ("pixel", "image", "batch") or sense not in ("sup", "inf"):
        raise SettingsError(f"over is pixel, image or batch and sense sup or inf, given {over!r} and {sense!r}")
    valid = valid_pixels(losses, labels, mask)
    classes = losses.shape[1]
    pixels = torch.where(valid.unsqueeze(1), losses, 0).movedim(1, -1)[valid]  # (pixels, class)
    if not bool(pixels.isfinite().all()):
        raise DataError("some losses of valid pixels are NaN or infinite; mask the pixels, or clip the loss")
    pixel, given, mass = atoms_of(labels, valid, classes)
    prices = given_costs(cost, classes).to(pixels.device)[given]
    if distance is not None:
        if distance.shape != valid.shape or distance.requires_grad or not bool((distance[valid] >= 0).all()):
            raise ShapeError(
                f"distance is not negative, {tuple(valid.shape)} and detached; given {tuple(distance.shape)}"
            )
        factor = distance.double()[valid][pixel].unsqueeze(1)  # infinity times 0, either way, would be NaN
        prices = torch.where(prices.isinf() | (prices == 0), prices, prices * factor)

    counts = valid.flatten(1).sum(1)
    if over == "pixel":
        owner, owners, number = pixel, len(pixels), torch.ones(len(pixels), device=losses.device)
    elif over == "image":
        owner, owners, number = valid.nonzero()[:, 0][pixel], len(valid), counts
    else:
        owner, owners, number = torch.zeros_like(pixel), 1, counts.sum().reshape(1)
    if bool((number == 0).any()):
        raise DataError(f"image {int((number == 0).nonzero()[0])} has no valid pixel: take it out of the batch")

    wide = pixels.double()
    sign = 1 if sense == "sup" else -1
    plans = transport(sign * wide.detach()[pixel], prices, mass / number[owner], owner, owners, size)
    law = mixed(plans, plans.share(allowed.reshape(())), pixel, owner, mass, wide.shape)
    believed = losses.new_zeros(*valid.shape, classes, dtype=torch.float64)
    believed[valid] = law
    expected = (law * wide).sum(1)
    if over == "pixel":
        risk = losses.new_zeros(valid.shape, dtype=torch.float64).masked_scatter(valid, expected)
        price = losses.new_zeros(valid.shape, dtype=torch.float64).masked_scatter(valid, plans.price)
    else:
        home = valid.nonzero()[:, 0] if over == "image" else torch.zeros(len(pixels), dtype=torch.long)
        risk = expected.new_zeros(owners).index_add(0, home.to(losses.device), expected) / number
        risk, price = (risk, plans.price) if over == "image" else (risk.squeeze(0), plans.price.squeeze(0))
    return LabelRisk(risk.to(losses.dtype), believed.movedim(-1, 1).to(losses.dtype), price.to(losses.dtype))


def mixed(plans: Plans, share: Tensor, pixel: Tensor, owner: Tensor, mass: Tensor, shape: torch.Size) -> Tensor:
    """The laws (pixels, class) that the mix of two plans makes of the masses of the atoms."""
    part, classes = share[owner], shape[1]
    flat = mass.new_zeros(shape[0] * classes)
    flat = flat.index_add(0, pixel * classes + plans.rich, mass * part)
    return flat.index_add(0, pixel * classes + plans.poor, mass * (1 - part)).reshape(shape)


def valid_pixels(losses: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """The mask (batch, *spatial), once the shapes of losses and labels fit."""
    if losses.dim() < 2 or not losses.is_floating_point():
        raise ShapeError(f"losses are floating-point (batch, class, *spatial), given {tuple(losses.shape)}")
    spatial = (losses.shape[0], *losses.shape[2:])
    if tuple(labels.shape) not in (spatial, tuple(losses.shape)):
        raise ShapeError(
            f"labels are {spatial}, or laws {tuple(losses.shape)} like the losses; given {tuple(labels.shape)}"
        )
    if mask is None:
        return torch.ones(spatial, dtype=torch.bool, device=losses.device)
    if mask.dtype != torch.bool or tuple(mask.shape) != spatial:
        raise ShapeError(f"the mask is boolean, of shape {spatial}; given {mask.dtype} {tuple(mask.shape)}")
    return mask


def atoms_of(labels: Tensor, valid: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel, the given class and the mass of every atom of the label laws: one for a label, several for a law."""
    if labels.shape == valid.shape:
        given = labels[valid]
        if given.is_floating_point() or bool(((given < 0) | (given >= classes)).any()):
            raise DataError(f"labels of valid pixels are integers from 0 to {classes - 1}; mask=labels != 255, say")
        return torch.arange(len(given), device=given.device), given.long(), torch.ones_like(given, dtype=torch.float64)
    if labels.requires_grad:
        raise DataError("no gradient goes through the given label laws: detach them")
    laws = labels.movedim(1, -1)[valid].double()
    sums = laws.sum(1, keepdim=True)
    if not bool((laws >= 0).all()) or not bool(((sums - 1).abs() <= 1e-3).all()):
        raise DataError("label laws are not negative and sum to one over the classes of every valid pixel")
    pixel, given = laws.nonzero(as_tuple=True)
    return pixel, given, (laws / sums)[pixel, given]


def given_costs(cost: Tensor | None, classes: int) -> Tensor:
    """The matrix of costs in float64."""
    if cost is None:
        return 1 - torch.eye(classes, dtype=torch.float64)
    if tuple(cost.shape) != (classes, classes):
        raise ShapeError(f"the cost is a matrix ({classes}, {classes}), given {tuple(cost.shape)}")
    wide = cost.detach().double()
    if cost.requires_grad or not bool((wide >= 0).all()) or bool((wide.diagonal() != 0).any()):
        raise DataError("a cost is not negative, 0 on the diagonal, and takes no gradient")
    return wide


class Wasserstein(AmbiguitySet):
    """W_C(p, q) <= radius between laws on atoms (classes, annotators, images) with ground costs C, 1 if not given.

    sup = min over price >= 0 of price radius + sum_j p_j max_k (l_k - price C_jk); with the 0/1 cost this is total
    variation. At most 4096 atoms: the memory is their square.
    """

    def __init__(self, radius: float | Tensor = 0.1, cost: Tensor | None = None):
        super().__init__(radius)
        self.cost = cost

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        losses, nominal = rows.dense()
        plans, row, given = self._plans(losses, nominal)
        weights = mixed(plans, plans.share(self.size), row, row, nominal[row, given], losses.shape)
        return weights.to(rows.losses.dtype), (weights * losses).sum(1)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        plans, row, given = self._plans(losses, nominal)
        rate = torch.where(plans.slack, 0, 1 / torch.where(plans.slack, 1, plans.rich_cost - plans.poor_cost))
        flat = torch.zeros_like(losses).flatten()
        moved = nominal[row, given] * rate[row]
        flat = flat.index_add(0, row * losses.shape[1] + plans.rich, moved)
        return flat.index_add(0, row * losses.shape[1] + plans.poor, -moved).reshape(losses.shape)

    def _plans(self, losses: Tensor, nominal: Tensor) -> tuple[Plans, Tensor, Tensor]:
        if losses.shape[1] > LARGEST:
            raise SettingsError(
                f"a Wasserstein ball has at most {LARGEST} atoms, given {losses.shape[1]}: "
                "take 'tv', which is the same for 0/1 costs, or label_risk"
            )
        row, given = (nominal > 0).nonzero(as_tuple=True)
        exists = torch.where(nominal > 0, losses, -torch.inf)
        costs = given_costs(self.cost, losses.shape[1]).to(losses.device)[given]
        costs = torch.where(exists[row].isinf(), torch.inf, costs)  # nothing moves to an atom that does not exist
        return transport(exists[row], costs, nominal[row, given], row, len(losses), self.size), row, given
