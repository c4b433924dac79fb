"""Sparse logistic regression with weights chosen by gradients: the checks of scikit-learn, and beside its grid."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors.sparse_logistic import SparseLogisticCV


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([SparseLogisticCV(cv=3, max_solves=5)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
