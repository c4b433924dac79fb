"""Linear classification of rows of features by the losses of segmentation at zero coupling, for scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from firmly.errors import SettingsError
from firmly.segment.linear_segmenter import Batch, fit_hinge, fit_logistic

__all__ = ["PixelClassifier"]


class PixelClassifier(ClassifierMixin, BaseEstimator):
    """Scores X W' + b for rows X (n_pixels, n_features), trained as the segmenters are, without neighbours.

    loss="logistic" is multinomial logistic regression, |W|^2 / 2 + C (mean cross-entropy); loss="hinge" is the linear
    SVM of Crammer and Singer, (|W|^2 + |b|^2) / 2 + C (mean hinge loss). C is n_pixels times that of scikit-learn.
    """

    def __init__(self, C=100.0, *, loss="logistic", tol=1e-5, max_iter=500):
        self.C = C
        self.loss = loss
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> PixelClassifier:
        """Learn from features (n_pixels, n_features) and classes (n_pixels,)."""
        if self.loss not in ("logistic", "hinge"):
            raise SettingsError(f"loss is 'logistic' or 'hinge', given {self.loss!r}")
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least two classes, given one class: {self.classes_}")
        batch = Batch(torch.from_numpy(X.T.copy())[None], torch.from_numpy(numbers)[None], None)
        train = fit_logistic if self.loss == "logistic" else fit_hinge
        ignore = -1  # no row is without a class
        found = train([batch], len(self.classes_), self.C, 0.0, ignore, tol=self.tol, max_iter=self.max_iter)
        if not found.converged:
            message = (
                f"stopped after {found.iterations} iterations with a gap of {found.gap:.3g}: raise max_iter or tol"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        self.coef_, self.intercept_ = found.weight.numpy(), found.bias.numpy()
        self.n_iter_, self.objective_ = found.iterations, found.objective
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The scores (n_pixels, n_classes); with two classes their difference (n_pixels,)."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The class of every row."""
        best = self._scores(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """softmax of the scores: (n_pixels, n_classes). Those of a hinge loss are not calibrated."""
        return torch.from_numpy(self._scores(X)).softmax(1).numpy()

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
