"""Labels cleaned by what a few right ones tell of the errors: a convex model beside a network that learned them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.fixedpoint.bilevel import BilevelSolution, bilevel
from firmly.robust.contours import contour_heights
from firmly.robust.label_quality import checked
from firmly.robust.losses import VOID
from firmly.robust.pencil import given_laws, valid_labels
from firmly.segment.features import PixelFeatures
from firmly.segment.logistic_regression import logistic_regression

SCALES = (1.0, 2.0, 4.0)  # of the features of images, in pixels
REACH = 4.0  # pixels from a contour, beyond which distances are all alike
LEAST = -10.0  # log probability
SMOOTHING = 1e-3  # of right labels, which keeps weights finite where classes are separable
FIRST = (1e-3, 1e-3, 1e-3)  # ridges: of features of the image, of log probabilities, of distances
BOUNDS = (1e-6, 1e2)
TOL = 1e-8


class Seen(NamedTuple):
    """Images (n, channel, *spatial), the scores (n, class, *spatial) of a network on them, labels (n, *spatial)."""

    images: Tensor
    scores: Tensor
    labels: Tensor


class Cleaner(NamedTuple):
    """Multinomial logistic regression on standardised `cleaner_features`: cleaner(images, scores) -> laws.

    `weights` (features + 1, classes) with the bias last; `mean` and `size` (features,) are those of the clean pixels.
    """

    weights: Tensor
    mean: Tensor
    size: Tensor

    def __call__(self, images: Tensor, scores: Tensor) -> Tensor:
        return self.logits(cleaner_features(images, scores).movedim(1, -1)).softmax(-1).movedim(-1, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """Of features (..., features): (..., classes)."""
        return ((rows - self.mean) / self.size) @ self.weights[:-1] + self.weights[-1]


class CleanedLabels(NamedTuple):
    """Laws (n, class, *spatial) to train on in the place of the given labels, and how they were found.

    `laws` come from a cleaner fitted to all clean images, which is kept with its `transition` (class, class). Those of
    `fold_laws` come from one fold each: what is trained on fold_laws[i] has learned nothing from the clean images that
    are not in fold i, but for the three `ridges`.
    """

    laws: Tensor
    fold_laws: tuple[Tensor, ...]
    cleaner: Cleaner
    transition: Tensor
    ridges: tuple[float, ...]
    search: BilevelSolution


@torch.no_grad()
def cleaner_features(images: Tensor, scores: Tensor) -> Tensor:
    """`PixelFeatures` of images, log probabilities, signed distances to the contours of the prediction, in float64.

    (n, channel, *spatial) and (n, class, *spatial) -> (n, features, *spatial). Where contours are too far out by the
    same distance everywhere, right labels are separated by a threshold of a distance: linearly.
    """
    if images.dim() != scores.dim() or images.shape[::2] != scores.shape[::2] or images.shape[2:] != scores.shape[2:]:
        raise ShapeError(
            f"images (n, channel, *spatial) and scores (n, class, *spatial), given {tuple(images.shape)} and "
            f"{tuple(scores.shape)}"
        )
    laws = log_softmax(scores.double(), 1).clamp(min=LEAST)
    if not bool(images.isfinite().all() and laws.isfinite().all()):
        raise DataError("the images or the scores contain NaN or infinite values")
    heights = contour_heights(scores.argmax(1), scores.shape[1]).clamp(-REACH, REACH)
    image = PixelFeatures(SCALES, padding="replicate")(images.double())
    return torch.cat([image, laws, heights.to(image.device)], 1)


def clean_labels(
    given: Seen,
    clean: Seen,
    folds: Sequence[Sequence[int]] | None = None,
    rows: int = 10_000,
    max_solves: int = 15,
    void: int = VOID,
) -> CleanedLabels:
    """d_k = q_k T_ky / sum_j q_j T_jy (`label_posterior`), with laws q that a few right labels have taught.

    `given` has labels y that may be wrong, and the scores on its images of a network that was trained on them; `clean`
    has right labels, and the scores of the same network, which never saw these images. The cleaner learns from `clean`
    what is right where the network says what it says: a habit of contours, a class taken for another. Its laws q on
    `given` are the prior of Bayes' rule. T (`transition_from_laws`) says how much a label y tells beside it: nearly all
    where labels are right, little of classes that are taken for each other. Where y is of a class that the clean images
    do not show, nothing is known, and d = e_y.

    The cleaner has three ridges, for the features of the image, the log probabilities, and the distances. They are
    chosen by `bilevel`: the inner problems, convex, fit a cleaner to each fold of `clean`, and the outer objective is
    its cross-entropy on the rest of `clean`, the mean over folds. `folds` are numbers of clean images to fit to (None:
    their first and second half). Every fit sees at most so many `rows`, drawn by a fixed seed.

    Raises `ShapeError`, `DataError` (labels out of range, fewer than two clean images), `SettingsError` (folds).
    Source: after Veit et al., Learning from noisy large-scale datasets with minimal supervision, 2017, whose cleaning
    network sees given labels of the clean images, too; the convex cleaner, its features and the search are ours.
    """
    classes = given.scores.shape[1]
    for seen in (given, clean):
        if seen.scores.shape != (len(seen.labels), classes, *seen.labels.shape[1:]):
            raise ShapeError(f"scores {tuple(seen.scores.shape)} do not fit labels {tuple(seen.labels.shape)}")
        valid_labels(seen.labels, classes, void)
    if given.images.shape[1] != clean.images.shape[1]:
        raise ShapeError(f"images have {given.images.shape[1]} channels, the clean ones {clean.images.shape[1]}")
    parts = checked_folds(folds, len(clean.labels))
    if rows < 1:
        raise SettingsError(f"a regression sees at least one row, given {rows}")
    of_given, of_clean = (cleaner_features(seen.images, seen.scores).movedim(1, -1) for seen in (given, clean))
    generator = torch.Generator().manual_seed(0)

    def some(features: Tensor, labels: Tensor) -> Pixels:
        every = labels.flatten()
        if rows >= len(every):
            return Pixels(features.flatten(0, -2), every)
        kept = torch.randperm(len(every), generator=generator)[:rows].to(every.device)
        return Pixels(features.flatten(0, -2)[kept], every[kept])

    def right(part: Sequence[int]) -> Pixels:
        known = clean.labels[part] != void
        if not bool(known.any()):
            raise DataError(f"no pixel of the clean images {list(part)} has a label")
        return some(of_clean[part][known], clean.labels[part][known])

    known = [right(part) for part in parts]
    held_out = [right([i for i in range(len(clean.labels)) if i not in part]) for part in parts]

    def spread(ridges: Sequence[Tensor]) -> Tensor:
        """One ridge for every feature."""
        of_image = known[0].features.shape[1] - 2 * classes
        return torch.cat([r.expand(count) for r, count in zip(ridges, (of_image, classes, classes), strict=True)])

    def inner(ridges: Sequence[Tensor], start: Sequence[Tensor] | None, tol: float) -> tuple[Tensor, ...]:
        before = [None] * len(known) if start is None else start
        return tuple(
            fitted(pixels, classes, spread(ridges), w, tol).weights for pixels, w in zip(known, before, strict=True)
        )

    def by_fold(weights: Sequence[Tensor]) -> list[Cleaner]:
        return [Cleaner(w, *moments(pixels.features)) for w, pixels in zip(weights, known, strict=True)]

    def outer(weights: Sequence[Tensor], ridges: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [
                cross_entropy(cleaner.logits(others.features), others.labels.long())
                for cleaner, others in zip(by_fold(weights), held_out, strict=True)
            ]
        ).mean()

    first = tuple(torch.tensor(v, dtype=torch.float64, device=given.labels.device) for v in FIRST)
    search = bilevel(inner, outer, first, BOUNDS, TOL, max_solves)

    def laws_of(cleaner: Cleaner, part: Sequence[int]) -> tuple[Tensor, Tensor]:
        q = cleaner.logits(of_given).softmax(-1).movedim(-1, 1)
        transition = transition_from_laws(q, given.labels, void)
        unknown = (given.labels != void) & ~torch.isin(given.labels, clean.labels[part])
        own = given_laws(given.labels, classes, void)[0].to(q)
        return torch.where(unknown[:, None], own, label_posterior(q, given.labels, transition, void)), transition

    everything = list(range(len(clean.labels)))
    cleaner = fitted(right(everything), classes, spread(search.parameters))
    laws, transition = laws_of(cleaner, everything)
    fold_laws = tuple(laws_of(one, part)[0] for one, part in zip(by_fold(search.solution), parts, strict=True))
    return CleanedLabels(laws, fold_laws, cleaner, transition, tuple(float(r) for r in search.parameters), search)


def label_posterior(laws: Tensor, labels: Tensor, transition: Tensor, void: int = VOID) -> Tensor:
    """d_k = q_k T_ky / sum_j q_j T_jy, Bayes' rule: laws q (n, class, *spatial), labels y (n, *spatial) -> as q.

    T (class, class) has in row k the probabilities with which pixels of class k are given as each class. On void d = q.
    Raises `DataError` for a label that is impossible: one of probability 0 from every class that q leaves possible.
    """
    valid, classes = checked(laws, labels, void), laws.shape[1]
    if transition.shape != (classes, classes):
        raise ShapeError(f"the transition of {classes} classes is a square matrix, given {tuple(transition.shape)}")
    likelihood = transition.to(laws).mT[torch.where(valid, labels, 0).long()].movedim(-1, 1)
    joint = laws * torch.where(valid[:, None], likelihood, 1)
    total = joint.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        raise DataError("some labels are impossible: raise what is 0 in the transition")
    return joint / total


def transition_from_laws(laws: Tensor, labels: Tensor, void: int = VOID, steps: int = 100, tol: float = 1e-6) -> Tensor:
    """The T (class, class), rows of sum 1, with which labels y are most likely: max of sum log sum_k q_k T_ky.

    Laws q (n, class, *spatial), labels y (n, *spatial). Concave in T; by expectation-maximisation, whose steps are T_ky
    = the sum of `label_posterior` for k over the pixels that are given as y, over that of all, until no entry moves by
    more than `tol`, or for so many `steps`. It starts with q in the place of the posterior.
    """
    valid = checked(laws, labels, void)
    if not bool(valid.any()):
        raise DataError("no pixel has a label")
    given = one_hot(labels[valid].long(), laws.shape[1]).to(laws)
    q = laws.movedim(1, -1)[valid]
    transition, posterior = torch.zeros_like(given[:1].mT @ given[:1]), q
    for _ in range(steps):
        counts = posterior.mT @ given
        new = counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        moved = float((new - transition).abs().max())
        transition = new
        if moved <= tol:
            break
        joint = q * (given @ transition.mT)
        posterior = joint / joint.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return transition


class Pixels(NamedTuple):
    """Features (pixels, features) and classes (pixels,)."""

    features: Tensor
    labels: Tensor


def fitted(pixels: Pixels, classes: int, ridges: Tensor, start: Tensor | None = None, tol: float = 1e-8) -> Cleaner:
    """The cleaner that learns these labels, with gradients in its ridges, one for each feature."""
    mean, size = moments(pixels.features)
    laws = (1 - SMOOTHING) * one_hot(pixels.labels.long(), classes).double() + SMOOTHING / classes
    weights = logistic_regression((pixels.features - mean) / size, laws, ridges, start, tol)
    return Cleaner(weights, mean, size)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature, 1 for those that do not vary."""
    size = features.std(0, correction=0)
    return features.mean(0), torch.where(size > 1e-9, size, 1.0)


def checked_folds(folds: Sequence[Sequence[int]] | None, count: int) -> list[list[int]]:
    """Lists of clean images to fit to, each with some left over to judge by."""
    if count < 2:
        raise DataError(f"at least two clean images are needed, some to fit to and some to judge by; given {count}")
    parts = [list(range(count // 2)), list(range(count // 2, count))] if folds is None else [list(f) for f in folds]
    if not parts or not all(
        len(set(part)) == len(part) and 0 < len(part) < count and set(part) <= set(range(count)) for part in parts
    ):
        raise SettingsError(f"folds are numbers of some of the {count} clean images, and not of all; given {parts}")
    return parts
