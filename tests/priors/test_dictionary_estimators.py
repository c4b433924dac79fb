"""The scikit-learn estimators: the checks of scikit-learn, and that they learn what the functions learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from firmly.errors import ShapeError  # noqa: E402
from firmly.priors import KSvd, learn_dictionary, recovery  # noqa: E402
from firmly.priors.estimators import (  # noqa: E402
    KSVD,
    MOD,
    AlternatingDictionary,
    AnalysisDictionary,
    ConvolutionalDictionary,
    OnlineDictionary,
    UnrolledDictionary,
)

ESTIMATORS = [
    KSVD(max_iter=5), MOD(max_iter=5), OnlineDictionary(max_iter=2), AlternatingDictionary(max_iter=5),
    UnrolledDictionary(max_iter=3, steps=5), ConvolutionalDictionary(max_iter=3), AnalysisDictionary(max_iter=3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(ESTIMATORS)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def signals(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    D = rng.normal(size=(12, 20))
    D /= np.linalg.norm(D, axis=0)
    codes = (rng.random((count, 20)).argsort(1) < 3) * rng.normal(size=(count, 20))
    return codes @ D.T + 0.01 * rng.normal(size=(count, 12)), D


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_shapes_and_names(estimator):
    X, _ = signals(60)
    fitted = sklearn.clone(estimator).set_params(n_components=14, random_state=3).fit(X)
    codes = fitted.transform(X)
    assert codes.shape[1] == len(fitted.get_feature_names_out()) and len(codes) == 60
    assert fitted.components_.shape[0] == 14 and fitted.n_iter_ <= fitted.max_iter
    np.testing.assert_allclose(np.linalg.norm(fitted.components_, axis=1), 1, rtol=1e-9)
    assert fitted.fit(X.astype(np.float32)).transform(X.astype(np.float32)).dtype == np.float32


def test_same_as_the_function():
    X, _ = signals()
    fitted = KSVD(15, n_nonzero=3, max_iter=4, random_state=0).fit(X)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    learned = learn_dictionary(torch.from_numpy(X), KSvd(3), atoms=15, iterations=4, seed=seed)
    np.testing.assert_array_equal(fitted.components_, learned.dictionary.mT.numpy())
    assert fitted.objectives_ == learned.objectives
    rest = X - fitted.transform(X) @ fitted.components_
    assert 0.5 * (rest**2).sum(1).mean() <= learned.objectives[-1] * 1.1


def test_partial_fit_goes_on():
    X, D = signals(4000)
    online = OnlineDictionary(20, alpha=0.05, random_state=0)
    scores = []
    for batch in np.array_split(np.concatenate([X, X, X]), 48):
        online.partial_fit(batch)
        scores.append(recovery(torch.from_numpy(online.components_.T), torch.from_numpy(D)))
    assert online.n_iter_ == 48 and scores[-1] > scores[0] + 0.05
    with pytest.raises(ValueError, match="features"):
        online.partial_fit(X[:, :5])


def test_convolutional_images_and_misfits():
    X, _ = signals(20)
    codes = ConvolutionalDictionary(2, image_shape=(3, 4), max_iter=2).fit(X).transform(X)
    assert codes.shape == (20, 2 * 12)
    with pytest.raises(ShapeError, match="features"):
        ConvolutionalDictionary(2, image_shape=(3, 5)).fit(X)
    with pytest.raises(ShapeError, match="at least as many rows"):
        AnalysisDictionary(5, tight=True).fit(X)


def test_in_a_pipeline():
    X, _ = signals(80)
    codes = make_pipeline(StandardScaler(), KSVD(10, n_nonzero=2, max_iter=2)).fit_transform(X)
    assert codes.shape == (80, 10) and ((codes != 0).sum(1) <= 2).all()
