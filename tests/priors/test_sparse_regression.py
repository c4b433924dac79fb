"""Sparse regression with weights chosen by gradients: the checks of scikit-learn, and beside its grid search."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, LassoCV
from sklearn.model_selection import KFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from firmly.priors.sparse_regression import SparseRegressionCV


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([SparseRegressionCV(cv=3, max_solves=5)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_real_data_beside_the_grid_of_scikit_learn():
    X, y = load_diabetes(return_X_y=True)
    folds = KFold(5, shuffle=True, random_state=0)
    found = SparseRegressionCV(cv=folds).fit(X, y)
    grid = LassoCV(cv=folds, tol=1e-8, max_iter=100_000).fit(X, y)
    assert found.validation_error_ <= 1.001 * grid.mse_path_.mean(1).min()
    same = Lasso(found.alpha_, tol=1e-12, max_iter=100_000).fit(X, y)
    np.testing.assert_allclose(found.coef_, same.coef_, rtol=1e-5, atol=1e-4)
    assert found.intercept_ == pytest.approx(same.intercept_, rel=1e-9)


def test_a_weight_for_every_feature():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 20))
    y = X[:, :3].sum(1) + 0.3 * rng.normal(size=60)
    one = SparseRegressionCV().fit(X, y)
    many = SparseRegressionCV(per_feature=True, max_solves=15).fit(X, y)
    assert many.alpha_.shape == (20,)
    assert many.validation_error_ < one.validation_error_
    pull = (X - X.mean(0)).T @ (y - many.predict(X)) / 60  # optimal for its weights: pull = weight sign(b)
    active = many.coef_ != 0
    assert 3 <= active.sum() < 20
    np.testing.assert_allclose(pull[active], (many.alpha_ * np.sign(many.coef_))[active], rtol=0, atol=1e-9)
    assert (np.abs(pull) <= many.alpha_ + 1e-9).all()


def test_nothing_to_explain():
    X = np.random.default_rng(0).normal(size=(20, 3))
    found = SparseRegressionCV().fit(X, np.full(20, 2.0))
    assert found.search_ is None and not found.coef_.any()
    np.testing.assert_allclose(found.predict(X), 2)
    assert found.validation_error_ == pytest.approx(0, abs=1e-20)
