"""Sparse logistic regression whose penalty is chosen by gradients, for scikit-learn; needs the extra `sklearn`."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.model_selection import check_cv
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from firmly.errors import DataError
from firmly.priors.cross_validated import SparseLinearCV
from firmly.priors.losses import Logistic, Softmax

__all__ = ["SparseLogisticCV"]


class SparseLogisticCV(ClassifierMixin, SparseLinearCV):
    """Logistic regression, mean log loss + sum_j weight_j sum_k |b_jk|, with the weights of least cross-validated loss.

    Two classes have one vector of coefficients, more classes one each (multinomial, softmax). One weight, by bisection,
    or with `per_feature` one for each feature, or one for each of `groups` (integers (n_features,), from 0), by descent
    from there (`firmly.bilevel`). Many weights can fit the folds themselves: `validation_error_` is then too good, and
    is to be measured on data that the fit has not seen. `cv` is what scikit-learn takes, None for five stratified
    folds, and `max_solves` bounds the inner problems of each search (None: 12, and 30 for several weights). The
    intercepts are not penalised; features should have similar scales.

    Fitted: `classes_`, `coef_` (1 or n_classes, n_features), `intercept_`, `alpha_` (a number, or (n_features,)),
    `validation_error_` (mean log loss over the folds), `search_` (the `BilevelSolution`, None where no feature goes
    with y), and the path `path_coefs_` (steps, 1 or n_classes, n_features) of the weights `path_factors_` times
    `alpha_`, from where all coefficients are zero to the solution. Raises `DataError` for training samples of one fold
    that miss a class.
    """

    def fit(self, X: Any, y: Any) -> SparseLogisticCV:
        """Choose the weights by cross-validation, then fit all samples (n_samples, n_features)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, label = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise DataError(f"a classifier needs samples of at least two classes, given 1 class: {self.classes_}")
        splits = list(check_cv(self.cv, y, classifier=True).split(X, y))
        for train, _ in splits:
            missing = np.setdiff1d(np.arange(count), label[train])
            if len(missing):
                raise DataError(
                    f"the training samples of a fold have none of the classes {self.classes_[missing]}: "
                    "take fewer folds, stratified ones, or leave these classes out"
                )
        target = (label == 1)[:, None] if count == 2 else label[:, None] == np.arange(count)
        B = self._choose(X, target.astype(np.float64), Logistic() if count == 2 else Softmax(), splits).numpy()
        self.coef_, self.intercept_ = B[:-1].T, B[-1]
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The scores: (n_samples,) for two classes, positive for the second, else (n_samples, n_classes)."""
        check_is_fitted(self)
        scores = validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """(n_samples,): the classes of the largest scores."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n_samples, n_classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.stack([-scores / 2, scores / 2], 1)
        power = np.exp(scores - scores.max(1, keepdims=True))
        return power / power.sum(1, keepdims=True)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """(n_samples, n_classes)."""
        return np.log(self.predict_proba(X))
