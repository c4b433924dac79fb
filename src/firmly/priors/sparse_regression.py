"""Sparse regression whose penalty is chosen by gradients, as a scikit-learn estimator; needs the extra `sklearn`."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data

from firmly.priors.cross_validated import SparseLinearCV
from firmly.priors.losses import Squared

__all__ = ["SparseRegressionCV"]


class SparseRegressionCV(RegressorMixin, SparseLinearCV):
    """The Lasso |y - X b|^2 / (2 n) + sum_j weight_j |b_j| with the weights of least cross-validated squared error.

    One weight, by bisection, or with `per_feature` one for each, or one for each of `groups` (integers (n_features,),
    from 0), by descent from there (`firmly.bilevel`). Many weights can fit the folds themselves: `validation_error_` is
    then too good, and is to be measured on data that the fit has not seen. `cv` is what scikit-learn takes, None for
    five folds, and `max_solves` bounds the inner problems of each search (None: 12, and 30 for several weights).

    Fitted: `coef_`, `intercept_`, `alpha_` (a number, or (n_features,)), `validation_error_`, `search_` (the
    `BilevelSolution`, None where no feature goes with y), and the path `path_coefs_` (steps, n_features) of the
    weights `path_factors_` times `alpha_`, from where all coefficients are zero to the solution.
    """

    def fit(self, X: Any, y: Any) -> SparseRegressionCV:
        """Choose the weights by cross-validation, then fit all samples (n_samples, n_features)."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        target = np.asarray(y, dtype=np.float64)[:, None]
        B = self._choose(X, target, Squared(), check_cv(self.cv).split(X, y))[:, 0].numpy()
        self.path_coefs_ = self.path_coefs_[:, 0]
        self.coef_, self.intercept_ = B[:-1], float(B[-1])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n_samples,)."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_
