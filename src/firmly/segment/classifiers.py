"""Segmentation of images by linear scores of features, as scikit-learn estimators (the extra `sklearn`)."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from firmly.errors import DataError, ShapeError
from firmly.segment.energy import EntropicTV
from firmly.segment.features import PixelFeatures
from firmly.segment.grid import contrast_weights, edge_bounds
from firmly.segment.labels import IGNORE
from firmly.segment.linear_segmenter import Batch, Fit, LinearSegmenter, fit_hinge, fit_logistic
from firmly.segment.structured_hinge import best_segmentation

__all__ = ["LogisticSegmenter", "SvmSegmenter"]


class _Segmenter(BaseEstimator):
    """fit, predict, predict_proba, decision_function; `network_`, a `LinearSegmenter`, and `fit_`, how it was found.

    Images are an array (n, *spatial) or (n, channels, *spatial), or a list of such images of different sizes; label
    maps are (n, *spatial), whose number of axes tells the two apart. Features are standardised on the training pixels.
    """

    C: float
    coupling: float | None
    features: nn.Module | None
    contrast: float
    tol: float
    max_iter: int

    def fit(self, images: Any, label_maps: Any, ignore: int = IGNORE) -> _Segmenter:
        """Learn from images and their label maps; pixels of class `ignore` have no label."""
        maps = [class_numbers(m) for m in label_maps]
        if len(maps) == 0 or len(maps) != len(images):
            raise ShapeError(f"one label map for every image, at least one; given {len(images)} and {len(maps)}")
        self.axes_ = maps[0].dim()
        self.channels_ = None  # those of the first image
        stacks = [self._image(image)[None] for image in images]
        for k, (image, labels) in enumerate(zip(stacks, maps)):
            if image.shape[2:] != labels.shape:
                raise ShapeError(f"image {k} is {tuple(image.shape[1:])} and its label map {tuple(labels.shape)}")
        values = torch.cat([m[m != ignore] for m in maps]).unique()
        if len(values) < 2:
            raise DataError(f"the labels have fewer than two classes: {values.tolist()}")
        self.classes_ = values.numpy()
        extract = PixelFeatures() if self.features is None else self.features
        batches = []
        with torch.no_grad():
            for shape in sorted({m.shape for m in maps}):  # images of one size are one batch
                stack = torch.cat([s for s in stacks if s.shape[2:] == shape])
                labels = torch.stack([m for m in maps if m.shape == shape])
                numbers = torch.searchsorted(values, labels).clamp(max=len(values) - 1)
                numbers = torch.where(labels == ignore, IGNORE_NUMBER, numbers)
                batches.append((extract(stack), numbers, self._edges(stack)))
        labelled = torch.cat([f.movedim(1, -1)[n != IGNORE_NUMBER] for f, n, _ in batches])
        mean, size = labelled.mean(0), labelled.std(0, correction=0)
        size = torch.where(size > 1e-12 * (1 + mean.abs()), size, 1)
        column = (-1, *[1] * self.axes_)
        found = self._train([Batch((f - mean.reshape(column)) / size.reshape(column), n, w) for f, n, w in batches])
        if not found.converged:
            message = (
                f"stopped after {found.iterations} iterations with a gap of {found.gap:.3g}: raise max_iter or tol"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        weight = found.weight / size
        energy = EntropicTV(found.coupling, accuracy=1e-3)
        self.network_ = LinearSegmenter(extract, weight, found.bias - weight @ mean, energy, self.contrast)
        self.fit_, self.coupling_ = found, found.coupling
        return self

    def decision_function(self, images: Any) -> Any:
        """The scores before the energy, (n, classes, *spatial), or a list."""
        return self._map(images, lambda stack: self.network_.scores(stack)[0])

    def predict_proba(self, images: Any) -> Any:
        """Probabilities (n, classes, *spatial), or a list."""
        return self._map(images, lambda stack: self.network_(stack)[0])

    def predict(self, images: Any) -> Any:
        """Label maps (n, *spatial), or a list."""
        return self._map(images, lambda stack: torch.from_numpy(self.classes_)[self._numbers(stack)[0]])

    def score(self, images: Any, label_maps: Any, ignore: int = IGNORE) -> float:
        """The mean intersection over union of the classes, over all pixels that have a label."""
        pairs = list(zip(self.predict(images), map(np.asarray, label_maps)))
        found, given = (np.concatenate([pair[k][pair[1] != ignore] for pair in pairs]) for k in (0, 1))
        both = [
            np.sum((found == c) & (given == c)) / max(1, np.sum((found == c) | (given == c))) for c in self.classes_
        ]
        return float(np.mean([b for b, c in zip(both, self.classes_) if np.any(given == c)]))

    @abstractmethod
    def _train(self, batches: list[Batch]) -> Fit:
        """What minimises the objective on standardised features."""

    def _numbers(self, stack: Tensor) -> Tensor:
        return self.network_(stack).argmax(1)

    def _edges(self, stack: Tensor) -> Tensor | None:
        return contrast_weights(stack, self.contrast) if self.contrast > 0 else None

    def _image(self, image: Any) -> Tensor:
        tensor = torch.from_numpy(np.array(image, dtype=np.float64))
        tensor = tensor[None] if tensor.dim() == self.axes_ else tensor
        if self.channels_ is None and tensor.dim() == self.axes_ + 1:
            self.channels_ = tensor.shape[0]
        if tensor.dim() != self.axes_ + 1 or tensor.shape[0] != self.channels_:
            raise ShapeError(f"images have {self.axes_} axes and {self.channels_} channels, given {np.shape(image)}")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError("an image contains NaN or infinite values")
        return tensor

    @torch.no_grad()
    def _map(self, images: Any, function: Any) -> Any:
        check_is_fitted(self, "network_")
        results = [function(self._image(image)[None]).numpy() for image in images]
        return np.stack(results) if len({r.shape for r in results}) == 1 and not isinstance(images, list) else results


IGNORE_NUMBER = 1 << 30  # no class has this number


class LogisticSegmenter(_Segmenter):
    """Linear scores of features under the entropic total variation, trained with the Fenchel-Young loss.

    Minimises |W|^2 / 2 + C (sum of losses) / (number of labelled pixels), which is convex in the weights W, the bias
    and the `coupling` (None: learned too). With coupling=0 it is multinomial logistic regression, whose C in
    scikit-learn is ours divided by the number of pixels. `features` is a module of images, (1, channels, *spatial) ->
    (1, features, *spatial), `PixelFeatures()` if None; `contrast` weakens edges of the energy across contours.
    """

    def __init__(self, C=1000.0, coupling=None, *, features=None, contrast=0.0, tol=1e-3, max_iter=200):
        self.C = C
        self.coupling = coupling
        self.features = features
        self.contrast = contrast
        self.tol = tol
        self.max_iter = max_iter

    def _train(self, batches: list[Batch]) -> Fit:
        return fit_logistic(
            batches, len(self.classes_), self.C, self.coupling, IGNORE_NUMBER, tol=self.tol, max_iter=self.max_iter
        )


class SvmSegmenter(_Segmenter):
    """Linear scores of features under total variation, trained with the structured hinge loss.

    Minimises (|W|^2 + |b|^2) / 2 + C (sum of losses) / (number of labelled pixels). With coupling=0 it is the linear
    SVM of Crammer and Singer, whose C in scikit-learn is ours divided by the number of pixels. `predict` is the best
    segmentation under the energy without entropy. For `predict_proba` the entropy has the `temperature_` at which the
    cross-entropy of softmax(scores / temperature) on the training pixels is least (Platt scaling, one number).
    """

    def __init__(self, C=1000.0, coupling=0.5, *, features=None, contrast=0.0, tol=1e-2, max_iter=200):
        self.C = C
        self.coupling = coupling
        self.features = features
        self.contrast = contrast
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, images: Any, label_maps: Any, ignore: int = IGNORE) -> SvmSegmenter:
        """Learn from images and their label maps; pixels of class `ignore` have no label."""
        super().fit(images, label_maps, ignore)
        accuracy = self.network_.energy.accuracy
        self.network_.energy = EntropicTV(self.coupling_, self.temperature_, accuracy)
        return self

    def _train(self, batches: list[Batch]) -> Fit:
        found = fit_hinge(
            batches, len(self.classes_), self.C, self.coupling, IGNORE_NUMBER, tol=self.tol, max_iter=self.max_iter
        )
        self.temperature_ = best_temperature(found, batches)
        return found

    def _numbers(self, stack: Tensor) -> Tensor:
        scores = self.network_.scores(stack)
        bounds = edge_bounds(self.coupling_, self.network_.edge_weights(stack), scores)
        return best_segmentation(scores, bounds, 1e-3, 20_000).x.argmax(1)


def class_numbers(label_map: Any) -> Tensor:
    given = np.asarray(label_map)
    if given.dtype.kind not in "iub":
        raise DataError(f"label maps are integers, one class number for every pixel; given {given.dtype}")
    return torch.from_numpy(given.astype(np.int64))


def best_temperature(found: Fit, batches: list[Batch]) -> float:
    """argmin over t of the cross-entropy of softmax(scores / t) on the labelled pixels, between 1e-3 and 1e3."""
    from scipy.optimize import minimize_scalar

    parts = [
        (b.features.movedim(1, -1)[b.labels != IGNORE_NUMBER], b.labels[b.labels != IGNORE_NUMBER]) for b in batches
    ]
    scores = torch.cat([f for f, _ in parts]) @ found.weight.mT + found.bias
    labels = torch.cat([n for _, n in parts])

    def entropy(log_t: float) -> float:
        return float(nn.functional.cross_entropy(scores / np.exp(log_t), labels))

    return float(np.exp(minimize_scalar(entropy, bounds=(np.log(1e-3), np.log(1e3)), method="bounded").x))
