"""Logistic regression against wrong features and labels as a scikit-learn estimator (the extra `sklearn`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from firmly.robust.linear_wasserstein import wasserstein_logistic

__all__ = ["WassersteinLogistic"]


class WassersteinLogistic(ClassifierMixin, BaseEstimator):
    """The linear classifier of two classes that `wasserstein_logistic` finds.

    `radius` is how far samples are moved on average, in the `norm` of features ("l1", "l2", "linf"), and `kappa` the
    distance that turning over a label counts for; infinity trusts labels, and `radius` is then the weight of the dual
    norm as a penalty. Standardise the features, or let their units be distances. `coef_`, `intercept_`, `risk_` (the
    worst-case mean loss) and `price_` (how fast it grows with the radius) are what was found.
    """

    def __init__(self, radius=0.01, kappa=math.inf, norm="l2", *, fit_intercept=True, tol=1e-8):
        self.radius = radius
        self.kappa = kappa
        self.norm = norm
        self.fit_intercept = fit_intercept
        self.tol = tol

    def fit(self, X: Any, y: Any) -> WassersteinLogistic:
        """Learn from features (n_samples, n_features) and labels of two classes (n_samples,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"a classifier needs two classes, given one class: {self.classes_}")
        if len(self.classes_) > 2:
            raise ValueError(f"Only binary classification is supported, the labels have {len(self.classes_)} classes")
        signs = torch.tensor(2.0 * numbers - 1)
        found = wasserstein_logistic(
            torch.tensor(X), signs, self.radius, self.kappa, self.norm, self.fit_intercept, self.tol
        )
        self.coef_, self.intercept_ = found.weight.numpy()[None], found.bias.numpy()[None]
        self.risk_, self.price_ = float(found.risk), float(found.price)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The score of the second class (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: Any) -> np.ndarray:
        """The class of every sample."""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of both classes (n_samples, 2)."""
        second = torch.from_numpy(self.decision_function(X)).sigmoid().numpy()
        return np.stack([1 - second, second], 1)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
