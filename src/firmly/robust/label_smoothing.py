"""Labels that are soft near contours, where annotators disagree."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from firmly.errors import SettingsError
from firmly.robust.losses import VOID
from firmly.robust.noise_models import valid_labels


def smoothed_labels(labels: Tensor, classes: int, sigma: float = 1.0, void: int = VOID) -> Tensor:
    """Spatially varying label smoothing: labels (batch, *spatial) -> laws (batch, class, *spatial), 0 on void.

        d_i = e_{y_i} / 2 + sum over neighbours j != i of g_j e_{y_j} / (2 sum over j of g_j),  g = Gauss of sigma,

    over the 3 x 3 (x 3) window, the image continued by its border: one class all around is hard, a pixel at a contour
    keeps at least half. Void neighbours do not count. Feed `of_labels`, or any loss of laws.
    Source: Islam and Glocker, Spatially varying label smoothing: capturing uncertainty from expert annotations, 2021.
    """
    if not sigma > 0:
        raise SettingsError(f"sigma is a positive number of pixels, given {sigma}")
    valid = valid_labels(labels, classes, void)
    laws = one_hot(torch.where(valid, labels, 0).long(), classes).movedim(-1, 1) * valid.unsqueeze(1)
    laws = laws.to(torch.get_default_dtype())
    axes = labels.dim() - 1
    wide = pad(laws, (1, 1) * axes, mode="replicate")
    around = torch.zeros_like(laws)
    for offset in itertools.product((-1, 0, 1), repeat=axes):
        distance = sum(o * o for o in offset)
        if distance:
            window = tuple(slice(1 + o, 1 + o + n) for o, n in zip(offset, labels.shape[1:], strict=True))
            around += math.exp(-distance / (2 * sigma**2)) * wide[(slice(None), slice(None), *window)]
    total = around.sum(1, keepdim=True)
    around = torch.where(total > 0, around / torch.where(total > 0, total, 1), laws)  # none is known: as given
    return (laws + around) / 2 * valid.unsqueeze(1)
