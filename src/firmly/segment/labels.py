"""Label maps: class numbers or distributions, with pixels of unknown class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError

IGNORE = 255


class Targets(NamedTuple):
    """Label distributions (batch, classes, *spatial) in float64, and the pixels that have one (batch, *spatial)."""

    distribution: Tensor
    valid: Tensor


def targets(labels: Tensor, scores: Tensor, ignore: int = IGNORE) -> Targets:
    """Targets for scores (batch, classes, *spatial) from class numbers (batch, *spatial), `ignore` where unknown, or
    from distributions of the shape of the scores, all zero where unknown.

    Raises `ShapeError` and `DataError`: shapes, classes that do not exist, distributions that do not sum to 1 or that
    require a gradient, which none of the losses has.
    """
    classes = scores.shape[1]
    if labels.requires_grad:
        raise DataError("no gradient goes through label distributions: detach them")
    if labels.is_floating_point():
        if labels.shape != scores.shape:
            raise ShapeError(f"label distributions have the shape of the scores, {tuple(scores.shape)}; "
                             f"given {tuple(labels.shape)}")  # fmt: skip
        wide = labels.to(scores.device).double()
        total = wide.sum(1)
        valid = total != 0
        if not bool((wide >= 0).all()) or not bool(((total - 1).abs()[valid] <= 1e-5).all()):
            raise DataError("label distributions are not negative and sum to 1 over the classes, or are all zero")
        return Targets(wide / torch.where(valid, total, 1)[:, None], valid)
    if labels.shape != (scores.shape[0], *scores.shape[2:]):
        expected = (scores.shape[0], *scores.shape[2:])
        raise ShapeError(f"class numbers are {expected} for scores {tuple(scores.shape)}; given {tuple(labels.shape)}")
    labels = labels.to(scores.device).long()
    valid = labels != ignore
    if not bool(((labels >= 0) & (labels < classes))[valid].all()):
        raise DataError(
            f"class numbers are 0 ... {classes - 1}, or {ignore} where unknown; given {labels[valid].unique().tolist()}"
        )
    one_hot = torch.nn.functional.one_hot(labels.where(valid, 0), classes).movedim(-1, 1).double()
    return Targets(one_hot * valid[:, None], valid)
