"""How robust a segmentation network is at every radius: attacks from above, certified pixels from below."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.certificates.certify import certify
from firmly.errors import SettingsError, ShapeError, VerificationError
from firmly.robust.attacked_model import evaluating
from firmly.robust.pgd import PGD
from firmly.segment.certified import certified_pixels


class RobustnessCurves(NamedTuple):
    """For every radius the pixels that are right, all (radii,) in double precision: certified <= true <= attacked.

    The first two are the fraction of the valid pixels, the others the mean intersection over union.
    """

    radii: Tensor
    certified_accuracy: Tensor
    attacked_accuracy: Tensor
    certified_miou: Tensor
    attacked_miou: Tensor


def robustness_curves(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    attack: PGD | None = None,
    bound: float | Tensor | None = None,
    output_error: float | None = None,
) -> RobustnessCurves:
    """Accuracy and mean intersection over union under perturbations of every image of at most a radius, in "l2".

    True values lie between what `certified_pixels` proves and what `attack` reaches (None: `PGD` in "l2" with 40 steps;
    an image keeps the worst perturbation of the smaller radii). Everything runs in double precision and eval mode.
    `bound` and `output_error` are those of `certified_pixels`; the bound None is certified once. For the classes, a
    pixel that is not certified is taken for wrong, and for a member of every other class. Labels `attack.ignore` do not
    count. Raises `VerificationError` if an attack moves a certified pixel: one of the two is then in error.
    """
    attack = attack if attack is not None else PGD(radius=1.0, norm="l2")
    if attack.norm != "l2" or attack.targeted:
        raise SettingsError("certificates are about Euclidean norms and all wrong classes: PGD(norm='l2'), no targets")
    if len(radii) == 0 or not all(r >= 0 for r in radii):
        raise SettingsError(f"radii are one or more numbers that are not negative, given {list(radii)}")
    wide, images = copy.deepcopy(model).double().eval(), images.double()
    labels = labels.to(images.device)
    valid = labels != attack.ignore
    if bound is None:
        bound = certify(wide, shape=tuple(images.shape[1:])).upper
    with torch.no_grad(), evaluating(wide):
        clean = wide(images)
    classes, worst = clean.shape[1], clean.argmax(1)
    found: dict[float, tuple[float, ...]] = {}
    for radius in sorted(set(map(float, radii))):
        sure = certified_pixels(wide, images, radius, bound, output_error)
        if radius > 0:
            reached = replace(attack, radius=radius)(wide, images, labels)
            with torch.no_grad():
                prediction = wide(reached.images).argmax(1)
            if bool((sure.certified & (prediction != sure.prediction)).any()):
                raise VerificationError(
                    f"an attack of radius {radius} moved a pixel that is certified: the bound is not one of this model"
                )
            wrong = (valid & (prediction != labels)).flatten(1).sum(1)
            before = (valid & (worst != labels)).flatten(1).sum(1)
            worst = torch.where((wrong > before)[:, None, None], prediction, worst)
        right = sure.certified & (sure.prediction == labels) & valid
        found[radius] = (
            int(right.sum()) / int(valid.sum()),
            int(((worst == labels) & valid).sum()) / int(valid.sum()),
            certified_iou(sure.prediction, sure.certified, labels, classes, attack.ignore),
            mean_iou(worst, labels, classes, attack.ignore),
        )
    rows = torch.tensor([(float(r), *found[float(r)]) for r in radii], dtype=torch.float64)
    return RobustnessCurves(*rows.unbind(1))


def mean_iou(prediction: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> float:
    """Intersection over union of predicted and labelled pixels, mean over the classes that have labels.

    `prediction` and `labels` are class numbers of equal shape; all images are counted together, without the pixels
    labelled `ignore`.
    """
    return certified_iou(prediction, torch.ones_like(prediction, dtype=torch.bool), labels, classes, ignore)


def certified_iou(prediction: Tensor, certified: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> float:
    """The least `mean_iou` of all predictions that agree with this one on the `certified` pixels.

    For class k, at least |certified as k, labelled k| / (|labelled k| + |not labelled k, not certified as another|).
    """
    if not prediction.shape == certified.shape == labels.shape:
        raise ShapeError(
            f"predictions, certified pixels and labels have one shape, given {tuple(prediction.shape)}, "
            f"{tuple(certified.shape)} and {tuple(labels.shape)}"
        )
    valid = labels != ignore
    found = []
    for k in labels[valid].unique().tolist():
        if not 0 <= k < classes:
            raise SettingsError(f"labels lie between 0 and {classes - 1}, or are {ignore}; given {k}")
        labelled = valid & (labels == k)
        sure = int((labelled & certified & (prediction == k)).sum())
        others = int((valid & ~labelled & ~(certified & (prediction != k))).sum())
        found.append(sure / (int(labelled.sum()) + others))
    if not found:
        raise ShapeError("no pixel has a label")
    return sum(found) / len(found)
