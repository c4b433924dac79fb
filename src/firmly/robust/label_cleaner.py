"""Labels cleaned by what a few right ones tell of the errors: a convex model beside a network that learned them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.fixedpoint.bilevel import BilevelSolution, bilevel
from firmly.robust.contours import contour_heights
from firmly.robust.logistic_regression import logistic_regression
from firmly.robust.losses import VOID
from firmly.robust.pencil import given_laws, label_step, valid_labels
from firmly.segment.features import PixelFeatures

SCALES = (1.0, 2.0, 4.0)  # of the features of images, in pixels
REACH = 4.0  # pixels from a contour, beyond which distances are all alike
LEAST = -10.0  # log probability
SMOOTHING = 1e-3  # of right labels, which keeps weights finite where classes are separable
FIRST = (1e-3, 1e-3, 0.1)  # ridge of the cleaner, ridge of the learner, kappa
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
        return self.laws(cleaner_features(images, scores).movedim(1, -1)).movedim(-1, 1)

    def laws(self, rows: Tensor) -> Tensor:
        """Of features (..., features): (..., classes)."""
        return (self.standard(rows) @ self.weights[:-1] + self.weights[-1]).softmax(-1)

    def standard(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.size


class CleanedLabels(NamedTuple):
    """Laws (n, class, *spatial) to train on in the place of the given labels, and how they were found.

    `laws` come from a cleaner fitted to all clean images. Those of `fold_laws` come from one fold each: what is trained
    on fold_laws[i] has learned nothing from the clean images that are not in fold i, but for `kappa` and `ridge`.
    """

    laws: Tensor
    fold_laws: tuple[Tensor, ...]
    cleaner: Cleaner
    kappa: float
    ridge: float
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
    """d = (q + kappa e_y) / (1 + kappa), `label_step` from the laws q of a cleaner that a few right labels have taught.

    `given` has labels y that may be wrong, and the scores on its images of a network that was trained on them; `clean`
    has right labels, and the scores of the same network, which never saw these images. The cleaner learns from `clean`
    what is right where the network says what it says: a habit of contours, a class taken for another. It is applied to
    `given`. Where y is of a class that the clean images do not show, nothing is known, and d = e_y.

    The ridge of the cleaner, kappa, and the ridge of a learner are chosen by `bilevel`, of which both levels are
    convex given the one before: the cleaner is fitted to one fold of `clean`; the learner, logistic regression on the
    same features, to the laws d on `given`; and the cross-entropy of the learner on the rest of `clean` is the outer
    objective, its mean over folds. The learner stands for the network that is to be trained on d, through whose
    training no gradient comes at a reasonable price. `folds` are numbers of clean images to fit to (None: their first
    and second half). Every regression of the search sees at most so many `rows`, drawn by a fixed seed.

    Raises `ShapeError`, `DataError` (labels out of range, fewer than two clean images), `SettingsError` (folds).
    Source: after Veit et al., Learning from noisy large-scale datasets with minimal supervision, 2017, whose cleaning
    network sees given labels of the clean images, too; the convex cleaner, its features and the search are ours.
    """
    classes = given.scores.shape[1]
    for seen in (given, clean):
        if seen.scores.shape != (len(seen.labels), classes, *seen.labels.shape[1:]):
            raise ShapeError(f"scores {tuple(seen.scores.shape)} do not fit labels {tuple(seen.labels.shape)}")
        valid_labels(seen.labels, classes, void)
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

    learned = some(of_given, given.labels)
    known = [right(part) for part in parts]
    held_out = [right([i for i in range(len(clean.labels)) if i not in part]) for part in parts]

    def inner(p: Sequence[Tensor], start: Sequence[Tensor] | None, tol: float) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for number, pixels in enumerate(known):
            before = (None, None) if start is None else start[2 * number : 2 * number + 2]
            cleaner = fitted(pixels, classes, p[0], before[0], tol)
            laws = label_step(cleaner.laws(learned.features).mT[None], learned.labels[None], p[2], void)[0].mT
            found += [
                cleaner.weights,
                logistic_regression(cleaner.standard(learned.features), laws, p[1], before[1], tol),
            ]
        return tuple(found)

    def outer(solution: Sequence[Tensor], p: Sequence[Tensor]) -> Tensor:
        losses = []
        for pixels, others, learner in zip(known, held_out, solution[1::2], strict=True):
            laws = Cleaner(learner, *moments(pixels.features)).laws(others.features)
            right_ones = laws.gather(1, others.labels[:, None].long())
            losses.append(-right_ones.clamp(min=torch.finfo(laws.dtype).tiny).log().mean())
        return torch.stack(losses).mean()

    first = tuple(torch.tensor(v, dtype=torch.float64, device=given.labels.device) for v in FIRST)
    search = bilevel(inner, outer, first, BOUNDS, TOL, max_solves)
    ridge, _, kappa = (float(v) for v in search.parameters)

    def laws_of(cleaner: Cleaner, part: Sequence[int]) -> Tensor:
        laws = label_step(cleaner.laws(of_given).movedim(-1, 1), given.labels, kappa, void)
        unknown = (given.labels != void) & ~torch.isin(given.labels, clean.labels[part])
        return torch.where(unknown[:, None], given_laws(given.labels, classes, void)[0].to(laws), laws)

    everything = list(range(len(clean.labels)))
    cleaner = fitted(right(everything), classes, ridge)
    by_fold = (
        Cleaner(weights, *moments(pixels.features)) for weights, pixels in zip(search.solution[::2], known, strict=True)
    )
    return CleanedLabels(
        laws_of(cleaner, everything),
        tuple(laws_of(one, part) for one, part in zip(by_fold, parts, strict=True)),
        cleaner, kappa, ridge, search,
    )  # fmt: skip


class Pixels(NamedTuple):
    """Features (pixels, features) and classes (pixels,)."""

    features: Tensor
    labels: Tensor


def fitted(
    pixels: Pixels, classes: int, ridge: Tensor | float, start: Tensor | None = None, tol: float = 1e-8
) -> Cleaner:
    """The cleaner that learns these labels, with gradients in its ridge."""
    mean, size = moments(pixels.features)
    laws = (1 - SMOOTHING) * one_hot(pixels.labels.long(), classes).double() + SMOOTHING / classes
    weights = logistic_regression((pixels.features - mean) / size, laws, ridge, start, tol)
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
