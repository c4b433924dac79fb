"""Sparse logistic regression with weights chosen by gradients: the checks of scikit-learn, and beside its grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors.losses import Logistic
from firmly.priors.sparse_linear import SparseLinear
from firmly.priors.sparse_logistic import SparseLogisticCV


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([SparseLogisticCV(cv=3, max_solves=5)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def standardised(load):
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.mark.parametrize("load", [load_breast_cancer, load_iris])
def test_real_data_beside_the_solver_of_scikit_learn(load):
    X, y = standardised(load)
    found = SparseLogisticCV().fit(X, y)
    same = LogisticRegression(l1_ratio=1, solver="saga", C=1 / (len(X) * found.alpha_), tol=1e-9, max_iter=100_000).fit(
        X, y
    )
    np.testing.assert_allclose(found.coef_, same.coef_, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.predict_proba(X), same.predict_proba(X), rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.exp(found.predict_log_proba(X)), found.predict_proba(X))
    assert (found.predict(X) == same.predict(X)).all() and found.score(X, y) > 0.95


def test_the_error_is_that_of_the_folds_and_no_grid_finds_a_lower_one():
    X, y = standardised(load_breast_cancer)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    found = SparseLogisticCV(cv=folds).fit(X, y)
    errors = []
    for factor in (1.0, *np.geomspace(0.01, 30, 20)):
        losses = []
        for train, test in folds.split(X, y):
            model = SparseLinear(torch.tensor(X[train]), torch.tensor(y[train, None]).double(), Logistic())
            B = model.solve(torch.tensor(found.alpha_ * factor)).numpy()
            losses.append(log_loss(y[test], 1 / (1 + np.exp(-X[test] @ B[:-1, 0] - B[-1]))))
        errors.append(np.mean(losses))
    assert found.validation_error_ == pytest.approx(errors[0], rel=1e-6)
    assert found.validation_error_ <= 1.002 * min(errors)


@pytest.mark.parametrize("load", [load_breast_cancer, load_iris])
def test_weights_of_features_and_of_groups_lower_the_validation_error(load):
    X, y = standardised(load)
    one = SparseLogisticCV(cv=3).fit(X, y)
    groups = np.arange(X.shape[1]) % 3
    some = SparseLogisticCV(cv=3, groups=groups).fit(X, y)
    many = SparseLogisticCV(cv=3, per_feature=True, max_solves=20).fit(X, y)
    assert many.alpha_.shape == some.alpha_.shape == (X.shape[1],) and len(set(some.alpha_)) == 3
    assert max(some.validation_error_, many.validation_error_) < one.validation_error_
    for model in (one, some, many):  # optimal for its weights: pull = weight sign(b)
        P = model.predict_proba(X)
        target = (y[:, None] == model.classes_).astype(float)
        pull = (X.T @ (target - P) / len(X)).T[-len(model.coef_) :]
        weight = np.broadcast_to(model.alpha_, model.coef_.shape)
        active = model.coef_ != 0
        np.testing.assert_allclose(pull[active], (weight * np.sign(model.coef_))[active], rtol=0, atol=1e-9)
        assert (np.abs(pull) <= weight + 1e-9).all()


def test_the_path_ends_at_the_solution():
    X, y = standardised(load_iris)
    found = SparseLogisticCV(cv=3).fit(X, y)
    assert found.path_coefs_.shape == (20, 3, 4) and found.path_factors_[-1] == 1
    assert not found.path_coefs_[0].any()
    np.testing.assert_array_equal(found.path_coefs_[-1], found.coef_)


def test_labels_of_any_kind_and_one_uninformative_feature():
    labels = np.array(["no", "yes"])[np.arange(30) % 2]
    found = SparseLogisticCV(cv=3).fit(np.zeros((30, 1)), labels)
    assert found.search_ is None and not found.coef_.any() and set(found.predict(np.zeros((4, 1)))) <= {"no", "yes"}
    np.testing.assert_allclose(found.predict_proba(np.zeros((4, 1))), 0.5, rtol=1e-9)


def test_what_is_refused():
    X, y = standardised(load_iris)
    with pytest.raises(DataError, match="none of the classes"):
        SparseLogisticCV(cv=[(np.arange(100), np.arange(100, 150))]).fit(X, y)
    with pytest.raises(DataError, match="at least two classes"):
        SparseLogisticCV().fit(X, np.zeros(150))
    with pytest.raises(SettingsError, match="one of them"):
        SparseLogisticCV(per_feature=True, groups=[0, 0, 1, 1]).fit(X, y)
    with pytest.raises(ShapeError, match="each of 4 features"):
        SparseLogisticCV(groups=[0, 1]).fit(X, y)
    for groups in ([0, 0, 2, 2], [0.0, 0.0, 1.0, 1.0], [-1, 0, 0, 1]):
        with pytest.raises(SettingsError, match="without a gap"):
            SparseLogisticCV(groups=groups).fit(X, y)
