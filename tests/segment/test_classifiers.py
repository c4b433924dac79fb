"""The estimators: what they are at zero coupling, images and label maps of all kinds, bad input."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

import firmly as fm
from firmly.errors import DataError, SettingsError, ShapeError
from firmly.segment import PixelFeatures
from firmly.segment.classifiers import LogisticSegmenter, SvmSegmenter
from firmly.segment.linear_segmenter import Batch, fit_hinge, fit_logistic
from firmly.segment.pixel_classifier import PixelClassifier


def rows(n=300, features=5, classes=3):
    generator = np.random.default_rng(0)
    X = generator.normal(size=(n, features))
    y = (X @ generator.normal(size=(features, classes)) + generator.normal(size=(n, classes))).argmax(1)
    return X, y


def blobs(count=4, size=20, noise=0.4):
    """Discs of two sizes on a background, noisy."""
    generator = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    maps, images = [], []
    for _ in range(count):
        label = np.zeros((size, size), dtype=np.int64)
        for value, radius in ((1, 5), (2, 3)):
            centre = generator.uniform(4, size - 4, size=2)
            label[((grid - centre[:, None, None]) ** 2).sum(0) < radius**2] = value
        maps.append(label)
        images.append(label + noise * generator.normal(size=label.shape))
    return np.stack(images), np.stack(maps)


def test_without_coupling_it_is_logistic_regression():
    X, y = rows()
    batch = Batch(torch.from_numpy(X.T.copy())[None], torch.from_numpy(y)[None], None)
    ours = fit_logistic([batch], 3, C=30.0, coupling=0.0, tol=1e-8, max_iter=1000)
    theirs = LogisticRegression(C=30.0 / len(X), tol=1e-12, max_iter=100_000).fit(X, y)
    assert ours.converged
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 1e-6
    assert np.abs(ours.bias.numpy() - theirs.intercept_).max() < 1e-6
    probability = theirs.predict_proba(X)[np.arange(len(X)), y]
    objective = (theirs.coef_**2).sum() / 2 - 30 * np.log(probability).mean()
    assert ours.objective == pytest.approx(objective, abs=1e-10)


def test_without_coupling_it_is_the_svm_of_crammer_and_singer():
    X, y = rows()
    batch = Batch(torch.from_numpy(X.T.copy())[None], torch.from_numpy(y)[None], None)
    ours = fit_hinge([batch], 3, C=30.0, tol=1e-8, max_iter=500)
    theirs = LinearSVC(C=30.0 / len(X), multi_class="crammer_singer", tol=1e-10, max_iter=1_000_000).fit(X, y)
    scores = theirs.decision_function(X)
    hinge = (scores + 1 - np.eye(3)[y]).max(1) - scores[np.arange(len(X)), y]
    objective = ((theirs.coef_**2).sum() + (theirs.intercept_**2).sum()) / 2 + 30 * hinge.mean()
    assert ours.converged
    assert ours.objective == pytest.approx(objective, rel=1e-7)
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 1e-4


def test_the_coupled_svm_converges_where_few_pixels_have_a_label():
    images, maps = (torch.from_numpy(part) for part in blobs(2))
    features = PixelFeatures()(images[:, None])
    known = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    known[:, 10] = True  # a scribble, whose neighbours are coupled
    labels = torch.where(known, maps, 255)
    fit = fit_hinge([Batch(features, labels, None)], 3, 100.0, coupling=0.5)
    assert fit.converged


def test_the_segmenter_without_coupling_is_logistic_regression_of_its_features():
    images, maps = blobs()
    segmenter = LogisticSegmenter(coupling=0.0, C=100.0, tol=1e-6, max_iter=2000).fit(images, maps)
    features = PixelFeatures()(torch.from_numpy(images)[:, None]).movedim(1, -1).flatten(0, -2).numpy()
    scaled = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=100.0 / maps.size, tol=1e-12, max_iter=100_000).fit(scaled, maps.ravel())
    found = segmenter.predict_proba(images).transpose(0, 2, 3, 1).reshape(-1, 3)
    assert np.abs(found - theirs.predict_proba(scaled)).max() < 1e-6


def test_coupling_helps_where_pixels_are_noisy():
    images, maps = blobs(6, size=16, noise=1.0)
    plain = LogisticSegmenter(coupling=0.0, features=torch.nn.Identity(), C=100.0).fit(images[:4], maps[:4])
    learned = LogisticSegmenter(features=torch.nn.Identity(), C=100.0).fit(images[:4], maps[:4])
    assert learned.coupling_ > 0.1
    assert learned.fit_.objective < plain.fit_.objective
    assert learned.score(images[4:], maps[4:]) > plain.score(images[4:], maps[4:]) + 0.05
    svm = SvmSegmenter(coupling=0.5, features=torch.nn.Identity(), C=100.0, tol=0.05).fit(images[:4], maps[:4])
    single = SvmSegmenter(coupling=0.0, features=torch.nn.Identity(), C=100.0, tol=0.05).fit(images[:4], maps[:4])
    assert svm.score(images[4:], maps[4:]) > single.score(images[4:], maps[4:])
    probability = svm.predict_proba(images[4:])
    assert probability.shape == (2, 3, 16, 16)
    assert np.abs(probability.sum(1) - 1).max() < 1e-12


def test_images_of_all_kinds():
    images, maps = blobs(3)
    given = [images[0], images[1][:15], images[2][:, :12]]
    labels = [maps[0] * 10, maps[1][:15] * 10, maps[2][:, :12] * 10]
    segmenter = LogisticSegmenter(C=10.0, coupling=0.1, contrast=1.0, tol=0.1).fit(given, labels)
    assert segmenter.classes_.tolist() == [0, 10, 20]
    predicted = segmenter.predict(given)
    assert isinstance(predicted, list) and [p.shape for p in predicted] == [m.shape for m in labels]
    assert set(np.unique(predicted[0])) <= {0, 10, 20}
    colours = np.stack([images, images**2], 1)
    assert LogisticSegmenter(coupling=0.0, tol=1e-2).fit(colours, maps).predict(colours).shape == maps.shape
    holes = maps.copy()
    holes[:, :5] = 255
    apart = LogisticSegmenter(C=10.0, coupling=0.1, tol=0.1).fit(images, holes)
    again = holes.copy()
    again[again == 255] = 99
    same = LogisticSegmenter(C=10.0, coupling=0.1, tol=0.1).fit(images, again, ignore=99)
    assert (apart.network_.weight - same.network_.weight).abs().max() < 1e-12


def test_volumes():
    generator = np.random.default_rng(0)
    maps = np.zeros((2, 6, 7, 8), dtype=np.int64)
    maps[:, :, :, 4:] = 1
    images = maps + 0.3 * generator.normal(size=maps.shape)
    segmenter = LogisticSegmenter(features=PixelFeatures((1.0,)), C=10.0, tol=0.1).fit(images, maps)
    assert segmenter.score(images, maps) > 0.9


def test_the_network_is_certified():
    images, maps = blobs(2, size=12)
    segmenter = LogisticSegmenter(coupling=0.2, features=PixelFeatures((1.0,)), C=10.0, tol=1e-2).fit(images, maps)
    certificate = fm.certify(segmenter.network_, shape=(1, 6, 6), budget_s=2)
    assert 0 < certificate.lower <= certificate.upper < 100


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([PixelClassifier(tol=1e-3), PixelClassifier(loss="hinge", tol=1e-3, max_iter=1000)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_bad_input_is_refused():
    images, maps = blobs(2)
    with pytest.raises(ShapeError, match="one label map"):
        LogisticSegmenter().fit(images, maps[:1])
    with pytest.raises(ShapeError, match="label map"):
        LogisticSegmenter().fit(images, maps[:, :10])
    with pytest.raises(DataError, match="fewer than two classes"):
        LogisticSegmenter().fit(images, np.zeros_like(maps))
    with pytest.raises(DataError, match="NaN"):
        LogisticSegmenter().fit(images * np.nan, maps)
    with pytest.raises(DataError, match="label maps are integers"):
        LogisticSegmenter().fit(images, maps / 2)
    fitted = LogisticSegmenter(coupling=0.0, tol=1e-1).fit(np.stack([images] * 2, 1), maps.astype(np.uint8))
    fitted.fit(images, maps)  # again, on images with another number of channels
    with pytest.raises(ShapeError, match="axes"):
        fitted.predict(images[:, :, 0])
    with pytest.raises(SettingsError, match="loss"):
        PixelClassifier(loss="huber").fit(*rows())
    with pytest.raises(SettingsError, match="scales"):
        PixelFeatures((0.0,))
    with pytest.raises(ShapeError, match="2 or 3-D"):
        PixelFeatures()(torch.ones(1, 1, 5))


def test_cutting_planes_with_coupling():
    """Rough and fine training prove intervals that hold the same minimum, in a moderate number of planes."""
    images, maps = blobs(2, size=14, noise=0.8)
    features = torch.from_numpy(images)[:, None]
    batch = Batch(torch.cat([features, features**2], 1), torch.from_numpy(maps), None)
    rough, fine = (fit_hinge([batch], 3, C=100.0, coupling=0.5, tol=tol) for tol in (3e-2, 3e-3))
    assert rough.converged and fine.converged and rough.iterations < fine.iterations < 80
    assert fine.objective <= rough.objective <= fine.objective + rough.gap + 1e-9
    assert rough.objective - rough.gap <= fine.objective
    easy = fit_hinge([Batch(batch.features, torch.from_numpy(maps * 0 + (maps > 5)), None)], 2, C=100.0, coupling=0.5)
    assert easy.converged  # one class only: however small the objective is
