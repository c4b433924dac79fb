"""Sparse regression whose penalty is chosen by gradients, as a scikit-learn estimator; needs the extra `sklearn`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from firmly.algorithms import ForwardBackward
from firmly.fixedpoint import Anderson, BilevelSolution, Implicit, bilevel, implicit
from firmly.linear import Dense
from firmly.priors.lasso import lasso
from firmly.prox import L1

__all__ = ["SparseRegressionCV"]

SMALLEST = 1e-3  # of the weight above which nothing is active: where the search ends
DESCENTS = 30
GAP = 1e-13  # relative duality gap at which the differentiable iteration takes over


class SparseRegressionCV(RegressorMixin, BaseEstimator):
    """The Lasso |y - X b|^2 / (2 n) + sum_j weight_j |b_j| with the weights of least cross-validated squared error.

    One weight, by bisection, or with `per_feature` one for each, by descent from
    there (`firmly.bilevel`). So many weights can fit the folds themselves: `validation_error_` is then too good, and is
    to be measured on data that the fit has not seen. `cv` is what scikit-learn takes, None for five folds, and
    `max_solves` bounds the inner problems of each search (None: 12, and 30 for the weights of features).

    Fitted: `coef_`, `intercept_`, `alpha_` (a number, or (n_features,)), `validation_error_`, `search_` (the
    `BilevelSolution`, None where no feature goes with y).
    """

    def __init__(self, *, per_feature=False, cv=None, fit_intercept=True, max_solves=None):
        self.per_feature = per_feature
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.max_solves = max_solves

    def fit(self, X: Any, y: Any) -> SparseRegressionCV:
        """Choose the weights by cross-validation, then fit all samples (n_samples, n_features)."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        data, target = torch.tensor(X), torch.tensor(y, dtype=torch.float64)
        folds = [self._fold(data, target, *split) for split in check_cv(self.cv).split(X, y)]
        every = torch.arange(len(X))
        whole = self._fold(data, target, every.numpy(), every.numpy())
        largest = float((whole.A.weight.mT @ whole.y[0]).abs().max())
        self.search_ = None
        weight = torch.tensor(largest, dtype=torch.float64)
        if largest > 0:
            self.search_ = self._search(folds, largest)
            weight = self.search_.parameters
            self.validation_error_ = self.search_.objective
        with torch.no_grad():
            b = whole.solve(weight, None, 1e-10)[0] if largest > 0 else torch.zeros(X.shape[1], dtype=torch.float64)
            if largest == 0:
                zeros = [torch.zeros(1, X.shape[1], dtype=torch.float64) for _ in folds]
                self.validation_error_ = float(mean_error(folds, zeros))
        self.alpha_ = float(weight) if weight.dim() == 0 else weight.numpy()
        self.coef_ = b.numpy()
        self.intercept_ = float(whole.level - whole.centre @ b)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n_samples,)."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_

    def _fold(self, X: Tensor, y: Tensor, train: np.ndarray, test: np.ndarray) -> Fold:
        inside, outside = torch.from_numpy(train), torch.from_numpy(test)
        centre = X[inside].mean(0) if self.fit_intercept else torch.zeros_like(X[0])
        level = y[inside].mean() if self.fit_intercept else torch.zeros_like(y[0])
        scale = len(train) ** 0.5
        A = Dense((X[inside] - centre) / scale)
        return Fold(A, ((y[inside] - level) / scale)[None], X[outside] - centre, y[outside] - level, centre, level)

    def _search(self, folds: list[Fold], largest: float) -> BilevelSolution:
        def inner(weight: Tensor, start: Any, tol: float) -> tuple[Tensor, ...]:
            starts = start or [None] * len(folds)
            return tuple(fold.solve(weight, b, tol) for fold, b in zip(folds, starts, strict=True))

        def outer(solutions: tuple[Tensor, ...], weight: Tensor) -> Tensor:
            return mean_error(folds, solutions)

        first = torch.tensor(0.1 * largest, dtype=torch.float64)
        bounds = (SMALLEST * largest, 0.999 * largest)
        one = bilevel(inner, outer, first, bounds=bounds, max_solves=self.max_solves)
        if not self.per_feature:
            return one
        assert isinstance(one.parameters, Tensor)
        weights = one.parameters.repeat(folds[0].A.domain[0])
        return bilevel(inner, outer, weights, max_solves=self.max_solves or DESCENTS)


class Fold(NamedTuple):
    """Training samples, scaled by 1 / sqrt n, and test samples, both centred by the means of the training samples."""

    A: Dense
    y: Tensor
    test: Tensor
    target: Tensor
    centre: Tensor
    level: Tensor

    def solve(self, weight: Tensor, start: Tensor | None, tol: float) -> Tensor:
        """The coefficients (1, n_features), differentiable in the weight: Newton's method, and a few steps more."""
        if not bool(self.A.weight.any()):
            return torch.zeros(1, *self.A.domain, dtype=self.y.dtype)
        near = lasso(self.A, self.y, weight.detach(), GAP, start=start).code
        layer = implicit(ForwardBackward(self.A, L1(weight)), Implicit("manifold"), Anderson(10), tol, 100_000)
        return layer(self.y, near)


def mean_error(folds: list[Fold], solutions: Any) -> Tensor:
    """The mean over the folds of the mean squared error on their test samples."""
    errors = [(fold.test @ b[0] - fold.target).square().mean() for fold, b in zip(folds, solutions, strict=True)]
    return torch.stack(errors).mean()
