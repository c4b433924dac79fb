"""Finding wrong labels: a score of every pixel and image, and the pixels that are probably wrong."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.losses import VOID
from firmly.robust.noise_models import valid_labels

Score = Literal["self-confidence", "margin", "entropy-weighted"]
Prune = Literal["both", "class", "noise-rate", "rank", "confusion"]


def pixel_quality(probabilities: Tensor, labels: Tensor, score: Score = "self-confidence", void: int = VOID) -> Tensor:
    """How well predictions support the given labels: (batch, *spatial) in [0, 1], NaN on void.

        self-confidence  p_y
        margin           (p_y - max_{k != y} p_k + 1) / 2
        entropy-weighted (p_y / H) over its largest value in these pixels, H the entropy of p

    `probabilities` (batch, class, *spatial) come from a model that has not been trained on these labels (cross-
    validation), or has been stopped early; labels are (batch, *spatial).
    Source: Northcutt, Jiang and Chuang, Confident learning: estimating uncertainty in dataset labels, 2021; the first
    two are the definitions of cleanlab's rank functions. The third is our own variant of its confidence-weighted
    entropy, with H at least 1e-6.
    """
    if score not in get_args(Score):
        raise SettingsError(f"the score is one of {get_args(Score)}, given {score!r}")
    valid = checked(probabilities, labels, void)
    given = torch.where(valid, labels.long(), 0).unsqueeze(1)
    own = probabilities.gather(1, given).squeeze(1)
    if score == "margin":
        others = probabilities.scatter(1, given, -torch.inf).amax(1)
        own = (own - others + 1) / 2
    elif score == "entropy-weighted":
        entropy = -torch.xlogy(probabilities, probabilities).sum(1)
        ratio = own / entropy.clamp(min=1e-6)
        own = ratio / ratio[valid].max() if bool(valid.any()) else ratio
    return torch.where(valid, own, torch.nan)


def image_quality(quality: Tensor, temperature: float = 0.1) -> Tensor:
    """One score for each image, (batch,), from those of its pixels: a mean that looks at the worst ones.

        sum_i s_i w_i,  w = softmax((1 - s) / temperature) over the pixels that are not NaN.

    Temperature 0 is the minimum, infinity the mean. An image without a label has NaN. The lowest scores are those to
    look at first: `quality.argsort()`.
    Source: the soft minimum of cleanlab's segmentation and token ranks; Lad and Mueller, Estimating label quality and
    errors in semantic segmentation data via any model, 2023.
    """
    if not temperature >= 0:
        raise SettingsError(f"the temperature is not negative, given {temperature}")
    scores = quality.flatten(1)
    known = ~scores.isnan()
    if temperature == 0:
        lowest = torch.where(known, scores, torch.inf).amin(1)
        return torch.where(known.any(1), lowest, torch.nan)
    exponents = torch.where(known, (1 - scores) / temperature, -torch.inf)
    exponents = torch.where(known.any(1, keepdim=True), exponents, 0.0)
    weighted = (torch.where(known, scores, 0) * exponents.softmax(1)).sum(1)
    return torch.where(known.any(1), weighted, torch.nan)


class LabelErrors(NamedTuple):
    """`wrong` (batch, *spatial), True where a label is probably wrong, and what it is `believed` to be instead.

    `joint[j, k]` is the estimated fraction of valid pixels labelled j that are k in truth, of sum one; `thresholds`
    (class,) are the mean confidences in labels.
    """

    wrong: Tensor
    believed: Tensor
    joint: Tensor
    thresholds: Tensor


def label_errors(probabilities: Tensor, labels: Tensor, prune: Prune = "both", void: int = VOID) -> LabelErrors:
    """Confident learning: how many labels of every class are wrong, and which.

    With t_k = mean of p_k over the pixels labelled k, a pixel counts as its most probable class k if p_k >= t_k. The
    counts C[y, k], each row scaled to the number of labels y, are the `joint` J. Wrong are, by `prune`,

        "class"       of the pixels labelled j, sum_{k != j} J[j, k] with the lowest p_j,
        "noise-rate"  for every k != j, J[j, k] of the pixels labelled j with the largest p_k - p_j,
        "both"        those of both,
        "rank"        of all pixels, sum_{k != j} C[j, k] with the lowest p_y,
        "confusion"   those that count as a class other than their label,

    and only pixels whose most probable class is not their label. Void pixels are never wrong, never counted, and stay
    void.
    Source: Northcutt, Jiang and Chuang 2021, equations 1-3 and section 3.2. There a pixel counts as the most probable
    of the classes with p_k >= t_k, even if another class without that is more probable; the count here, and "rank",
    are those of cleanlab for segmentation.
    """
    if prune not in get_args(Prune):
        raise SettingsError(f"prune is one of {get_args(Prune)}, given {prune!r}")
    valid = checked(probabilities, labels, void)
    classes = probabilities.shape[1]
    pixels, given = probabilities.movedim(1, -1)[valid].double(), labels[valid].long()
    if len(given) == 0:
        raise DataError("all labels are void")
    own = pixels.gather(1, given[:, None]).squeeze(1)
    counts = torch.bincount(given, minlength=classes)
    sums = pixels.new_zeros(classes).index_add(0, given, own)
    thresholds = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
    probable, best = pixels.max(1)
    sure = probable >= thresholds[best]
    joint = torch.bincount(given[sure] * classes + best[sure], minlength=classes**2).reshape(classes, classes).double()
    missing = joint.sum(1) == 0
    joint[missing, missing.nonzero()[:, 0]] = 1.0
    joint = joint / joint.sum(1, keepdim=True) * counts[:, None]

    other = best != given
    chosen = sure & other
    if prune != "confusion":
        chosen = pruned(pixels, given, own, joint, int(chosen.sum()), prune) & other
    wrong = torch.zeros_like(valid)
    wrong[valid] = chosen
    believed = labels.clone()
    believed[wrong] = best[chosen].to(labels.dtype)
    return LabelErrors(wrong, believed, joint / joint.sum(), thresholds)


def pruned(pixels: Tensor, given: Tensor, own: Tensor, joint: Tensor, total: int, prune: Prune) -> Tensor:
    """The pixels to prune, (pixels,), for as many errors in every class, pair or all as are estimated."""
    if prune == "rank":
        return lowest(own, torch.ones_like(given, dtype=torch.bool), total)
    classes = torch.arange(joint.shape[0], device=given.device)
    by_class = torch.zeros_like(given, dtype=torch.bool)
    by_rate = torch.zeros_like(by_class)
    for j in classes:
        mine = given == j
        by_class |= lowest(own, mine, int((joint[j].sum() - joint[j, j]).round()))
        for k in classes[classes != j]:
            by_rate |= lowest(own - pixels[:, k], mine, int(joint[j, k].round()))
    return {"class": by_class, "noise-rate": by_rate, "both": by_class & by_rate}[prune]


def lowest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Where the `count` lowest scores among some are."""
    places = among.nonzero()[:, 0]
    found = torch.zeros_like(among)
    found[places[scores[places].topk(min(count, len(places)), largest=False, sorted=False).indices]] = True
    return found


def checked(probabilities: Tensor, labels: Tensor, void: int) -> Tensor:
    """Where labels are valid, once both fit each other and probabilities are laws."""
    if probabilities.dim() < 2 or labels.shape != (probabilities.shape[0], *probabilities.shape[2:]):
        raise ShapeError(
            f"labels {tuple(labels.shape)} do not fit probabilities {tuple(probabilities.shape)}: (batch, *spatial) "
            "and (batch, class, *spatial)"
        )
    valid = valid_labels(labels, probabilities.shape[1], void)
    refuse_other_than_laws(probabilities.movedim(1, -1)[valid])
    return valid


def refuse_other_than_laws(pixels: Tensor) -> None:
    """Raises `DataError` unless the rows are laws of the classes; scores and NaN are none."""
    if not bool((pixels >= 0).all()) or not bool(((pixels.sum(1) - 1).abs() <= 1e-3).all()):
        raise DataError("probabilities are not negative and sum to one over the classes: apply the softmax first")
