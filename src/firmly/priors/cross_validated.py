"""What `SparseRegressionCV` and `SparseLogisticCV` share: l1 weights by cross-validation and hypergradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from firmly.errors import SettingsError, ShapeError
from firmly.fixedpoint import BilevelSolution, bilevel
from firmly.priors.losses import Loss
from firmly.priors.sparse_linear import SparseLinear

SMALLEST = 1e-3  # of the weight above which nothing is active: where the search of one weight ends
DESCENTS = 30
PATH = 20  # multiples of the weights, down to one, whose coefficients are kept


class Fold(NamedTuple):
    """Training and test samples, both centred by the means of the training samples."""

    train: SparseLinear
    test: Tensor
    target: Tensor
    centre: Tensor

    def error(self, B: Tensor) -> Tensor:
        """The mean error on the test samples, differentiable in the coefficients (n_features + 1, K)."""
        loss = self.train.loss
        return loss.error * loss.value(self.test @ B[:-1] + B[-1], self.target).mean()


class SparseLinearCV(BaseEstimator):
    """Chooses the l1 weights of a generalised linear model; the estimators below say for which loss.

    `per_feature` gives every feature a weight of its own, `groups`, integers (n_features,), one to every group. `cv` is
    what scikit-learn takes, None for five folds, and `max_solves` bounds the inner problems of each search (None: 12,
    and 30 for several weights).
    """

    def __init__(self, *, per_feature=False, groups=None, cv=None, fit_intercept=True, max_solves=None):
        self.per_feature = per_feature
        self.groups = groups
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.max_solves = max_solves

    def _choose(self, X: np.ndarray, target: np.ndarray, loss: Loss, splits: Iterable[tuple[Any, Any]]) -> Tensor:
        """The coefficients of all samples with the weights chosen, (n_features + 1, K); sets what both have fitted."""
        data, values = torch.tensor(X), torch.tensor(target)
        groups = self._groups(X.shape[1])
        folds = [self._fold(data, values, loss, *(torch.as_tensor(part) for part in split)) for split in splits]
        every = torch.arange(len(X))
        whole = self._fold(data, values, loss, every, every)
        largest = whole.train.largest
        self.search_, weights = None, data.new_full((X.shape[1],), largest)
        if largest > 0:
            self.search_ = search(folds, largest, groups, self.max_solves)
            self.validation_error_ = self.search_.objective
            assert isinstance(self.search_.parameters, Tensor)
            weights = (
                self.search_.parameters.expand(weights.shape) if groups is None else self.search_.parameters[groups]
            )
        else:
            self.validation_error_ = float(mean_error(folds, [fold.train.origin for fold in folds]))
        self.alpha_ = float(weights[0]) if groups is None else weights.numpy()
        top = max(1.0, float((whole.train.pull / weights[:, None]).max())) if largest > 0 else 1.0
        self.path_factors_ = np.geomspace(top, 1.0, PATH)
        path, B = [], whole.train.origin
        for factor in self.path_factors_:
            B = whole.train.solve(factor * weights, B) if largest > 0 else B
            path.append(B)
        self.path_coefs_ = torch.stack(path)[:, :-1].mT.numpy()
        B = B.clone()
        B[-1] -= whole.centre @ B[:-1]
        return B

    def _groups(self, count: int) -> Tensor | None:
        """The number of every feature's weight, None for one weight."""
        if self.groups is None:
            return torch.arange(count) if self.per_feature else None
        if self.per_feature:
            raise SettingsError("per_feature and groups are two choices: give one of them")
        groups = torch.as_tensor(np.asarray(self.groups))
        if groups.shape != (count,):
            raise ShapeError(f"groups has one number for each of {count} features, given {tuple(groups.shape)}")
        if groups.is_floating_point() or bool((groups.unique() != torch.arange(len(groups.unique()))).any()):
            raise SettingsError("groups are whole numbers from 0 without a gap")
        return groups.long()

    def _fold(self, X: Tensor, y: Tensor, loss: Loss, train: Tensor, test: Tensor) -> Fold:
        centre = X[train].mean(0) if self.fit_intercept else torch.zeros_like(X[0])
        inside = SparseLinear(X[train] - centre, y[train], loss, self.fit_intercept)
        return Fold(inside, X[test] - centre, y[test], centre)


def search(folds: list[Fold], largest: float, groups: Tensor | None, max_solves: int | None) -> BilevelSolution:
    """One weight by bisection, then one for every group by descent from there."""

    def inner(weight: Tensor, start: Any, tol: float) -> tuple[Tensor, ...]:
        starts = start or [None] * len(folds)
        weight = weight if groups is None or weight.dim() == 0 else weight[groups]
        return tuple(fold.train.solve(weight, B, tol) for fold, B in zip(folds, starts, strict=True))

    def outer(solutions: tuple[Tensor, ...], weight: Tensor) -> Tensor:
        return mean_error(folds, solutions)

    first = torch.tensor(0.1 * largest, dtype=torch.float64)
    one = bilevel(inner, outer, first, bounds=(SMALLEST * largest, 0.999 * largest), max_solves=max_solves)
    if groups is None:
        return one
    assert isinstance(one.parameters, Tensor)
    return bilevel(inner, outer, one.parameters.repeat(int(groups.max()) + 1), max_solves=max_solves or DESCENTS)


def mean_error(folds: list[Fold], solutions: Any) -> Tensor:
    """The mean over the folds of the mean loss on their test samples."""
    return torch.stack([fold.error(B) for fold, B in zip(folds, solutions, strict=True)]).mean()
