"""Hyperparameters of a segmentation, chosen by gradients on a few images whose labels are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.fixedpoint.bilevel import Ending, Trial, bilevel
from firmly.segment.energy import EntropicTV
from firmly.segment.features import PixelFeatures
from firmly.segment.grid import contrast_weights
from firmly.segment.labels import IGNORE, targets
from firmly.segment.linear_minimum import LinearMinimum, Objective
from firmly.segment.linear_segmenter import LinearSegmenter, linear_scores

SMALLEST = 1e-12  # a probability whose logarithm is taken
KEPT = {"coupling": 0.0, "contrast": 0.0, "temperature": 1.0}  # where they are not given
LINEAR_TOL = 1e-9  # of the gradient of the training objective

Loss = Callable[[Tensor, Tensor], Tensor]  # (probabilities (batch, classes, *spatial), labels) -> one number


class Range(NamedTuple):
    """A hyperparameter to be tuned: where it starts, and between what it stays; positive numbers."""

    start: float
    low: float
    high: float


ENERGY: Mapping[str, Range] = {"coupling": Range(0.1, 1e-3, 10.0), "temperature": Range(1.0, 0.05, 20.0)}
RIDGE: Mapping[str, Range] = {"ridge": Range(1e-4, 1e-8, 10.0)}
CONTRAST: Mapping[str, Range] = {"contrast": Range(10.0, 0.1, 1e4)}


class Labelled(NamedTuple):
    """Images (batch, channels, *spatial), and labels: class numbers (batch, *spatial), 255 where unknown, or
    distributions (batch, classes, *spatial), all zero where unknown.
    """

    images: Tensor
    labels: Tensor


class TuningStep(NamedTuple):
    """One trial: hyperparameters, the loss on the clean images, its gradient in the logarithms of the hyperparameters
    (NaN at the very end of a range), and the largest relative residual of the systems for the derivative of weights.
    """

    hyperparameters: dict[str, float]
    loss: float
    gradient: dict[str, float]
    residual: float


@dataclass(frozen=True)
class Tuned:
    """The best of all trials in `history`: its hyperparameters, its loss on the clean images, and its energy.

    `contrast` is that of the edge weights, 0 where there is none: `energy(scores, contrast_weights(images, contrast))`.
    """

    hyperparameters: dict[str, float]
    loss: float
    energy: EntropicTV
    contrast: float
    status: Ending
    history: list[TuningStep] = field(repr=False)


@dataclass(frozen=True)
class TunedSegmenter(Tuned):
    """And the `network` from images to probabilities, with the weights that these hyperparameters give."""

    network: LinearSegmenter


@dataclass(frozen=True)
class Search:
    """At most `max_solves` trials; minimisers of the energy to a root mean square error per pixel of `accuracy`;
    weights learned from so many labelled `pixels`, drawn with `seed` (None: from all).
    """

    max_solves: int = 25
    accuracy: float = 1e-3
    pixels: int | None = 5_000
    seed: int = 0


def log_loss(x: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log x_y over the pixels that have a label; the mean under label distributions."""
    y, valid = targets(labels, x)
    return -(y * x.clamp(min=SMALLEST).log()).sum() / valid.sum()


def overlap_loss(x: Tensor, labels: Tensor) -> Tensor:
    """1 - the mean over classes k of sum x_k y_k / sum (x_k + y_k - x_k y_k): a smooth intersection over union.

    Sums are over all pixels that have a label, means over the classes that occur.
    """
    y, valid = targets(labels, x)
    axes = [0, *range(2, x.dim())]
    x = x * valid[:, None]
    both = (x * y).sum(axes)
    either = (x + y).sum(axes) - both
    occurs = y.sum(axes) > 0
    return 1 - (both / either)[occurs].mean()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of scores (pixels, classes), with labels (pixels,) or distributions (pixels, classes)."""
    return nn.functional.cross_entropy(scores, labels)


def learned_labels(scores: Tensor, labels: Tensor, kappa: Tensor) -> Tensor:
    """The mean of min over d of KL(p, d) - kappa log d_y, over log(1 + kappa): PENCIL with the labels d solved for.

    With the label step d = (p + kappa e_y) / (1 + kappa) (`firmly.robust.label_step`) it is a function of p_y alone,

        1 - p_y + (p_y log p_y - (p_y + kappa) log((p_y + kappa) / (1 + kappa))) / log(1 + kappa),

    for class numbers (pixels,): cross-entropy as kappa -> 0 and 1 - p_y as kappa -> infinity, the generalised
    Jensen-Shannon divergence of p and e_y. Sources: Yi and Wu, Probabilistic end-to-end noise correction for learning
    with noisy labels, 2019; Englesson and Azizpour, Generalized Jensen-Shannon divergence loss for learning with noisy
    labels, 2021; that the two are one: docs/theory/segment.
    """
    if labels.is_floating_point():
        raise DataError("labels to be learned are given as class numbers")
    logarithm = scores.log_softmax(1).gather(1, labels[:, None])
    p, whole = logarithm.exp(), torch.log1p(kappa)
    joint = (p + kappa) * ((p + kappa).log() - whole)
    return (1 - p + (p * logarithm - joint) / whole).mean()


def tune_segmenter(
    given: Labelled,
    clean: Labelled,
    features: nn.Module | None = None,
    hyperparameters: Mapping[str, Range | float] = {**RIDGE, **ENERGY},
    objective: Objective = cross_entropy,
    loss: Loss = log_loss,
    search: Search = Search(),
) -> TunedSegmenter:
    """A `LinearSegmenter` whose weights are learned from `given` labels, and its hyperparameters from `clean` ones.

        min over p of loss(x*(W(p) Phi; p), clean labels),
        W(p) = argmin objective(W Phi, given labels, **p) + ridge / 2 |W|^2,  x* the minimiser of `EntropicTV`,

    by `firmly.bilevel`, with derivatives through both minimisers by the implicit function theorem. `hyperparameters`
    are tuned where a `Range` is given, and kept where a number is: "ridge"; "coupling", "temperature" and "contrast" of
    the energy (0, 1, 0 where missing); every other name is an argument of the `objective(scores (pixels, classes),
    labels (pixels,), **p)`, a twice differentiable function: a robust loss with its parameter, or a risk with its
    radius. Phi are the `features` of the images (`PixelFeatures()` if None), standardised on the given images.

    Raises `NotConverged` where the objective has no smooth isolated minimum at the first hyperparameters: a hinge loss,
    for one. Later trials that fail are made shorter.
    """
    if "ridge" not in hyperparameters:
        raise SettingsError("the weights of a linear segmenter have a ridge: give hyperparameters['ridge']")
    extract = PixelFeatures() if features is None else features
    with torch.no_grad():
        known, seen = (extract(part.images.double()) for part in (given, clean))
    classes = count_classes(given, clean)
    rows, labels = drawn(known, given.labels, classes, search)
    mean, size = rows.mean(0), rows.std(0, correction=0)
    size = torch.where(size > 1e-12 * (1 + mean.abs()), size, 1)
    problem = LinearMinimum((rows - mean) / size, labels, classes, objective)
    names = [name for name in hyperparameters if name not in ("ridge", *KEPT)]

    def unscaled(W: Tensor) -> tuple[Tensor, Tensor]:
        weight = W[:, :-1] / size
        return weight, W[:, -1] - weight @ mean

    def scores(p: Mapping[str, Tensor], start: Any, tol: float) -> tuple[Tensor, Tensor]:
        W = problem.solve(p["ridge"], {name: p[name] for name in names}, start, min(tol, LINEAR_TOL))
        return linear_scores(seen, *unscaled(W)), W

    found, weights = tuned(scores, clean, hyperparameters, loss, search, problem.residuals)
    weight, bias = unscaled(weights)
    network = LinearSegmenter(extract, weight, bias, found.energy, found.contrast)
    return TunedSegmenter(**vars(found), network=network)


def tune_energy(
    scores: Tensor,
    clean: Labelled,
    hyperparameters: Mapping[str, Range | float] = ENERGY,
    loss: Loss = log_loss,
    search: Search = Search(),
) -> Tuned:
    """The `EntropicTV` that suits scores (batch, classes, *spatial) of clean images, from any network.

    `hyperparameters` are "coupling", "temperature" and "contrast", each tuned (`Range`) or kept (a number).
    """
    unknown = sorted(set(hyperparameters) - set(KEPT))
    if unknown:
        raise SettingsError(f"an energy has {', '.join(KEPT)}; given {', '.join(unknown)}")
    if len(scores) != len(clean.images) or scores.shape[2:] != clean.images.shape[2:]:
        raise ShapeError(f"scores {tuple(scores.shape)} do not fit images {tuple(clean.images.shape)}")
    fixed = scores.detach().double()
    found, _ = tuned(lambda p, start, tol: (fixed, fixed), clean, hyperparameters, loss, search, [])
    return found


def tuned(
    scores: Callable[[Mapping[str, Tensor], Any, float], tuple[Tensor, Tensor]],
    clean: Labelled,
    hyperparameters: Mapping[str, Range | float],
    loss: Loss,
    search: Search,
    residuals: list[float],
) -> tuple[Tuned, Tensor]:
    """Tune through `scores(p, start, tol) -> (scores of the clean images, what they were found with)`."""
    images = clean.images.double()
    known = clean.labels.sum(1) > 0 if clean.labels.is_floating_point() else clean.labels != IGNORE
    if not bool(known.any()):
        raise DataError("no pixel of the clean images has a label")
    ranges = {name: checked(name, r) for name, r in hyperparameters.items() if isinstance(r, Range)}
    if not ranges:
        raise SettingsError("nothing to tune: give a Range(start, low, high) for one hyperparameter at least")
    kept = {**KEPT, **{name: float(p) for name, p in hyperparameters.items() if not isinstance(p, Range)}}
    device = images.device

    def mapped(places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """low (high / low)^sigmoid(place)."""
        found = {name: torch.tensor(p, dtype=torch.float64, device=device) for name, p in kept.items()}
        for name, (_, low, high) in ranges.items():
            found[name] = low * (math.log(high / low) * places[name].sigmoid()).exp()
        return found

    def inner(p: Mapping[str, Tensor], start: Any, tol: float) -> tuple[Tensor, Tensor]:
        given, by = scores(p, None if start is None else start[1], tol)
        layer = EntropicTV(p["coupling"], p["temperature"], search.accuracy)
        weights = contrast_weights(images, p["contrast"]) if bool(p["contrast"] > 0) else None
        return layer(given, weights), by

    history: list[TuningStep] = []

    def record(trial: Trial) -> None:
        p = {name: float(value) for name, value in mapped(trial.parameters).items()}
        slopes = {}
        for name, (_, low, high) in ranges.items():
            share = float(trial.parameters[name].sigmoid())
            width = math.log(high / low) * share * (1 - share)  # 0 at an end of the range
            slopes[name] = float(trial.gradient[name]) / width if width > 0 else math.nan
        history.append(TuningStep(p, trial.objective, slopes, max(residuals, default=0.0)))
        residuals.clear()

    first = {name: torch.tensor(start_of(r), dtype=torch.float64, device=device) for name, r in ranges.items()}
    found = bilevel(
        inner,
        lambda solution, p: loss(solution[0], clean.labels),
        first,
        tol=search.accuracy**2,
        max_solves=search.max_solves,
        callback=record,
        mapped=mapped,
    )
    p = {name: float(value) for name, value in mapped(found.parameters).items()}
    energy = EntropicTV(p["coupling"], p["temperature"], search.accuracy)
    return Tuned(p, found.objective, energy, p["contrast"], found.status, history), found.solution[1]


def checked(name: str, given: Range) -> Range:
    if not 0 < given.low < given.start < given.high < math.inf:
        raise SettingsError(f"a Range has 0 < low < start < high; {name} is given {tuple(given)}")
    return given


def start_of(given: Range) -> float:
    share = math.log(given.start / given.low) / math.log(given.high / given.low)
    return math.log(share / (1 - share))


def count_classes(*parts: Labelled) -> int:
    """Of the distributions, or one more than the largest class number."""
    for part in parts:
        if part.labels.is_floating_point():
            return part.labels.shape[1]
    numbers = torch.cat([part.labels[part.labels != IGNORE].flatten() for part in parts])
    if numbers.numel() == 0 or int(numbers.max()) < 1:
        raise DataError("the labels have fewer than two classes")
    return int(numbers.max()) + 1


def drawn(features: Tensor, labels: Tensor, classes: int, search: Search) -> tuple[Tensor, Tensor]:
    """Features (pixels, features) and labels (pixels,) or (pixels, classes) of labelled pixels."""
    like = features.new_empty(len(features), classes, *features.shape[2:])
    distribution, valid = targets(labels, like)
    rows = features.movedim(1, -1)[valid]
    known = distribution.movedim(1, -1)[valid] if labels.is_floating_point() else labels.to(rows.device)[valid].long()
    if len(rows) == 0:
        raise DataError("no pixel has a label")
    if search.pixels is not None and search.pixels < len(rows):
        generator = torch.Generator().manual_seed(search.seed)
        some = torch.randperm(len(rows), generator=generator)[: search.pixels].to(rows.device)
        rows, known = rows[some], known[some]
    return rows, known
