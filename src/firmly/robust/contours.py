"""Contours moved by an offset for each class, and the offsets that a habit of annotators asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.losses import VOID


def move_contours(labels: Tensor, offsets: Tensor, void: int = VOID) -> Tensor:
    """argmax_k of s_k + 2 offsets_k, with s_k the signed distance to the contour of class k, positive inside.

    Labels (batch, *spatial), offsets (classes,) in pixels: the contour between classes j and k moves by offsets_j -
    offsets_k away from j. Classes that an image does not have stay out of it; void pixels stay void, and no contour
    sees them.
    """
    if offsets.dim() != 1 or not bool(offsets.isfinite().all()):
        raise ShapeError(f"offsets are finite, one for each class, given {tuple(offsets.shape)}")
    heights = contour_heights(labels, len(offsets), void)
    moved = (heights + 2 * offsets.double().cpu().reshape(-1, *[1] * (labels.dim() - 1))).argmax(1)
    return torch.where(labels == void, void, moved.to(labels))


def contour_offsets(
    found: Tensor, right: Tensor, classes: int, largest: float = 3.0, step: float = 0.25, void: int = VOID
) -> Tensor:
    """The offsets (classes,) that make maps `found` overlap most with the `right` ones: a habit, to be undone.

    `found` are predictions, on a few images with right labels, of a model that learned from somebody's labels, or that
    person's own. The mean intersection over union over the classes of `right` is maximised over one offset after the
    other, changed by multiples of `step` up to `largest` pixels, until none changes: a local maximum. Only their
    differences matter, and the first one is 0.
    """
    if found.shape != right.shape:
        raise ShapeError(f"maps found {tuple(found.shape)} and right {tuple(right.shape)} differ")
    if not 0 < step <= largest:
        raise SettingsError(f"the step is positive and at most the largest offset, given {step} and {largest}")
    heights, truth = contour_heights(found, classes, void), right.cpu()
    valid = truth != void
    present = [k for k in range(classes) if bool((truth == k).any())]
    if not present:
        raise DataError("all right labels are void")

    def overlap(offsets: Tensor) -> float:
        moved = (heights + 2 * offsets.reshape(-1, *[1] * (truth.dim() - 1))).argmax(1)
        parts = [(moved == k, truth == k) for k in present]
        return sum(float((a & b).sum()) / float(((a | b) & valid).sum()) for a, b in parts) / len(present)

    count = int(largest / step)
    tried = [step * i for i in range(-count, count + 1)]
    offsets = torch.zeros(classes, dtype=torch.float64)
    best, before = overlap(offsets), -1.0
    while best > before:
        before = best
        for k in range(classes):
            for value in tried:
                one = offsets.clone()
                one[k] += value
                if (quality := overlap(one)) > best:
                    best, offsets = quality, one
    return offsets - offsets[0]


def contour_heights(labels: Tensor, classes: int, void: int = VOID) -> Tensor:
    """Signed distances (batch, class, *spatial) to the contours of all classes, in float64 on the CPU."""
    images = labels.cpu()
    out = torch.full((len(images), classes, *images.shape[1:]), -torch.inf, dtype=torch.float64)
    for image, heights in zip(images, out, strict=True):
        known = image != void
        for k in image[known].unique().tolist():
            if not 0 <= k < classes:
                raise DataError(f"labels lie between 0 and {classes - 1}, or are {void} where there is none")
            heights[k] = signed_distance(image == k, known)
    return out


def signed_distance(inside: Tensor, known: Tensor) -> Tensor:
    """The distance to the known outside where inside, minus that to the inside where outside; in pixels, float64."""
    from scipy.ndimage import distance_transform_edt

    edt: Callable[..., Any] = distance_transform_edt
    outside = known & ~inside
    if not bool(outside.any()):
        return torch.full(inside.shape, float(sum(inside.shape)), dtype=torch.float64)
    distance = torch.from_numpy(edt((~outside).numpy()) - edt((~inside).numpy()))
    return distance - 0.5 * distance.sign()  # contours run between pixels
