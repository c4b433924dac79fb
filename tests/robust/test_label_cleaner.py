"""Labels cleaned by what a few right ones tell: the convex models, their derivatives, what is recovered, folds."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from firmly.errors import ConditionError, DataError, NotDifferentiable, SettingsError, ShapeError
from firmly.robust import (
    BoundaryShift,
    Seen,
    clean_labels,
    cleaner_features,
    label_cleaner,
    label_posterior,
    logistic_regression,
    transition_from_laws,
)
from firmly.segment.pixel_classifier import PixelClassifier


def rows(seed=0, count=60, features=3, classes=4):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, features, generator=generator, dtype=torch.float64)
    laws = torch.rand(count, classes, generator=generator, dtype=torch.float64)
    return X, laws / laws.sum(1, keepdim=True)


def discs(count, size=24, noise=0.15, seed=0):
    """Images of two overlapping discs of different brightness, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(count, size, size, dtype=torch.long)
    for i in range(count):
        for k in (1, 2):
            centre = 6 + (size - 12) * torch.rand(2, generator=generator)
            labels[i][(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 20] = k
    images = labels[:, None] / 2 + noise * torch.randn(count, 1, size, size, generator=generator)
    return images, labels


def scores_of(labels, classes=3, seed=1):
    """What a network may say that learned these labels."""
    sure = 3 * torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()
    return sure + 0.3 * torch.randn(sure.shape, generator=torch.Generator().manual_seed(seed))


def study(given_by, count=6, clean_count=4, learned_by=None):
    """Given labels by one habit, and a network that learned one (the same if None)."""
    images, right = discs(count)
    clean_images, clean = discs(clean_count, seed=7)
    learned = given_by if learned_by is None else learned_by
    given = Seen(images, scores_of(learned(right)), given_by(right))
    return given, Seen(clean_images, scores_of(learned(clean)), clean), right


def dilated(labels):
    return BoundaryShift(1.5)(labels, 3).labels


def as_they_are(labels):
    return labels


def test_logistic_regression_is_stationary_and_that_of_the_pixel_classifier():
    X, laws = rows()
    W = logistic_regression(X, laws, 0.05)
    residual = X.mT @ ((X @ W[:-1] + W[-1]).softmax(1) - laws) / len(X) + 0.05 * W[:-1]
    assert residual.abs().max() < 1e-9 and W.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(logistic_regression(X, laws, 0.05, start=W + 0.3 * (W - W.mean(1, True))), W)
    classes = laws.argmax(1)
    ours = logistic_regression(X, torch.nn.functional.one_hot(classes).double(), 0.05)
    theirs = PixelClassifier(C=1 / 0.05, tol=1e-7).fit(X.numpy(), classes.numpy())
    np.testing.assert_allclose(ours[:-1].mT.numpy(), theirs.coef_, atol=1e-6)
    np.testing.assert_allclose((ours[-1] - ours[-1, 0]).numpy(), theirs.intercept_ - theirs.intercept_[0], atol=1e-6)


def test_gradients_of_logistic_regression():
    X, laws = rows(count=20)
    logits = laws.log().requires_grad_()
    ridge = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    ridges = torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    for one in (ridge, ridges):
        torch.autograd.gradcheck(lambda z, r: logistic_regression(X, z.softmax(1), r), (logits, one))
    (first,) = torch.autograd.grad(logistic_regression(X, laws, ridge).square().sum(), ridge, create_graph=True)
    with pytest.raises(NotDifferentiable):
        first.backward()


def test_logistic_regression_refuses():
    X, laws = rows()
    with pytest.raises(ShapeError):
        logistic_regression(X, laws[:-1], 0.1)
    with pytest.raises(ShapeError):
        logistic_regression(X, laws, 0.1, start=torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="ridge"):
        logistic_regression(X, laws, torch.ones(2))
    with pytest.raises(ConditionError):
        logistic_regression(X, laws, 0.0)
    with pytest.raises(DataError, match="sum to one"):
        logistic_regression(X, 2 * laws, 0.1)
    with pytest.raises(DataError, match="NaN"):
        logistic_regression(X / 0, laws, 0.1)
    with pytest.raises(DataError, match="detach"):
        logistic_regression(X.clone().requires_grad_(), laws, 0.1)


def test_a_habit_of_contours_is_undone():
    given, clean, right = study(dilated)
    before = float((given.labels != right).double().mean())
    found = clean_labels(given, clean)
    assert found.laws.shape == (6, 3, 24, 24) and len(found.fold_laws) == 2
    for laws in (found.laws, *found.fold_laws):
        torch.testing.assert_close(laws.sum(1), torch.ones(6, 24, 24, dtype=torch.float64))
        assert float((laws.argmax(1) != right).double().mean()) < 0.2 * before
    first, best = found.search.history[0].objective, found.search.objective
    assert best <= first
    # the cleaner itself, applied to other images of the same network
    images, labels = discs(2, seed=11)
    scores = scores_of(dilated(labels))
    assert float((found.cleaner(images, scores).argmax(1) != labels).double().mean()) < 0.2 * before


def test_right_labels_are_believed_however_wrong_the_network_is():
    given, clean, right = study(as_they_are, learned_by=dilated)
    found = clean_labels(given, clean)
    assert bool((found.laws.argmax(1) == right).all())
    torch.testing.assert_close(found.transition, torch.eye(3, dtype=torch.float64), atol=1e-2, rtol=0)


def test_posterior_by_hand_and_transition_of_known_labels():
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    T = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([[[1, 255]]])
    expected = torch.tensor([0.5 * 0.1, 0.3 * 0.6, 0.0], dtype=torch.float64)
    found = label_posterior(q, labels, T)
    torch.testing.assert_close(found[0, :, 0, 0], expected / expected.sum())
    torch.testing.assert_close(found[..., 1], q[..., 1])
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (1, 40, 40), generator=generator)
    sure = torch.nn.functional.one_hot(truth, 3).movedim(-1, 1).double()
    given = torch.randint(0, 3, (1, 40, 40), generator=generator)
    given[:, 0] = 255
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for k, y in zip(truth[:, 1:].flatten(), given[:, 1:].flatten()):
        counts[k, y] += 1
    torch.testing.assert_close(transition_from_laws(sure, given), counts / counts.sum(1, keepdim=True))


def test_the_transition_is_that_of_largest_likelihood():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 3, 100, 100, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    truth = torch.multinomial(q.movedim(1, -1).flatten(0, 2), 1, generator=generator).reshape(1, 100, 100)
    T = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]], dtype=torch.float64)
    labels = torch.multinomial(T[truth.flatten()], 1, generator=generator).reshape(1, 100, 100)
    found = transition_from_laws(q, labels, steps=2000, tol=1e-10)
    torch.testing.assert_close(found, T, atol=0.05, rtol=0)

    def gradient(at):  # of the mean log likelihood: equal within a row where entries are positive, less where zero
        at = at.clone().requires_grad_()
        (q.movedim(1, -1).flatten(0, 2) @ at).gather(1, labels.reshape(-1, 1)).log().mean().backward()
        return at.grad

    slope = gradient(found)
    level = (slope * found).sum(1, keepdim=True)
    torch.testing.assert_close(torch.where(found > 1e-4, slope, level), level.expand(3, 3), atol=1e-5, rtol=0)
    assert bool((slope <= level + 1e-5).all())


def test_gradients_of_the_search_are_those_of_finite_differences(monkeypatch):
    given, clean, _ = study(dilated, count=2, clean_count=2)
    first = label_cleaner.FIRST

    def trial(places):
        monkeypatch.setattr(label_cleaner, "FIRST", tuple(places))
        monkeypatch.setattr(importlib.import_module("firmly.fixedpoint.bilevel"), "FIRST", 1e-11)
        return clean_labels(given, clean, max_solves=1).search.history[0]

    step = 1e-4
    gradient = trial(first).gradient  # in the logarithms
    for i, slope in enumerate(gradient):
        up, down = (
            trial([p * np.exp(sign * step) if j == i else p for j, p in enumerate(first)]).objective for sign in (1, -1)
        )
        assert float(slope) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)


def test_a_fold_learns_nothing_from_the_others():
    given, clean, _ = study(dilated)
    other = clean._replace(labels=torch.cat([clean.labels[:2], 2 - clean.labels[2:]]))
    one, two = (clean_labels(given, part, max_solves=1) for part in (clean, other))  # the same hyperparameters
    torch.testing.assert_close(one.fold_laws[0], two.fold_laws[0])
    assert not torch.allclose(one.fold_laws[1], two.fold_laws[1])
    (alone,) = clean_labels(given, clean, folds=[[0, 1]], max_solves=1).fold_laws
    torch.testing.assert_close(alone, one.fold_laws[0])


def test_void_and_classes_that_no_clean_image_shows():
    given, clean, _ = study(dilated)
    given.labels[:, :3] = 255
    given.labels[:, 3] = 2
    clean = clean._replace(labels=torch.where(clean.labels == 2, 255, clean.labels))
    laws = clean_labels(given, clean, max_solves=1).laws
    torch.testing.assert_close(laws.sum(1), torch.ones(6, 24, 24, dtype=torch.float64))
    assert bool((laws[:, 2, 3] == 1).all())  # the given label is kept
    assert bool((laws[:, :, :3].amax(1) < 1).all())  # the cleaner's own law where nothing is given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_volumes_and_two_classes(dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(4, 6, 8, 8, dtype=torch.long)
    labels[:, 2:5, 2:6, 2:6] = 1
    images = (labels[:, None] + 0.1 * torch.randn(4, 1, 6, 8, 8, generator=generator)).to(dtype)
    seen = Seen(images, scores_of(labels, 2).to(dtype), labels)
    found = clean_labels(seen, seen, rows=500, max_solves=2)
    assert found.laws.shape == (4, 2, 6, 8, 8) and bool((found.laws.argmax(1) == labels).all())


def test_features_have_signed_distances():
    images, labels = discs(1)
    features = cleaner_features(images, scores_of(labels))
    assert features.dtype == torch.float64 and features.shape[1] == 13 + 3 + 3
    distances = features[:, -3:]
    assert bool(((distances > 0).long().argmax(1) == scores_of(labels).argmax(1)).all())
    assert distances.abs().max() <= label_cleaner.REACH


def test_bad_input_is_refused():
    given, clean, _ = study(dilated)
    with pytest.raises(ShapeError):
        clean_labels(given._replace(scores=given.scores[:, :, :-1]), clean)
    with pytest.raises(ShapeError):
        cleaner_features(given.images[:-1], given.scores)
    with pytest.raises(DataError, match="two clean images"):
        clean_labels(given, Seen(*(part[:1] for part in clean)))
    with pytest.raises(DataError, match="between 0 and 2"):
        clean_labels(given, clean._replace(labels=clean.labels + 2))
    with pytest.raises(DataError, match="no pixel"):
        clean_labels(given, clean._replace(labels=torch.full_like(clean.labels, 255)))
    with pytest.raises(DataError, match="no pixel"):
        transition_from_laws(given.scores.softmax(1), torch.full_like(given.labels, 255))
    for seen in (given._replace(images=given.images * torch.nan), given._replace(scores=given.scores * torch.nan)):
        with pytest.raises(DataError, match="NaN"):
            clean_labels(seen, clean, max_solves=1)
    with pytest.raises(ShapeError, match="channels"):
        clean_labels(given._replace(images=given.images.expand(-1, 2, -1, -1)), clean)
    with pytest.raises(SettingsError, match="row"):
        clean_labels(given, clean, rows=0)
    for folds in ([[0, 1, 2, 3]], [[]], [[0, 0]], [[9]], []):
        with pytest.raises(SettingsError):
            clean_labels(given, clean, folds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    given, clean, _ = study(dilated)
    here = clean_labels(given, clean, max_solves=1).laws
    there = clean_labels(*(Seen(*(part.cuda() for part in seen)) for seen in (given, clean)), max_solves=1).laws
    torch.testing.assert_close(there.cpu(), here)


def test_laws_and_labels_that_do_not_fit_are_refused():
    q, labels, T = torch.full((2, 3, 4, 4), 1 / 3), torch.zeros(2, 4, 4, dtype=torch.long), torch.eye(3)
    nan = q.clone()
    nan[0, 0, 0, 0] = torch.nan
    for function in (transition_from_laws, lambda laws, y: label_posterior(laws, y, T)):
        with pytest.raises(ShapeError, match="do not fit"):
            function(q, labels[:, :1])  # would be broadcast
        with pytest.raises(DataError, match="softmax"):
            function(nan, labels)
    with pytest.raises(ShapeError, match="square"):
        label_posterior(q, labels, T[:, :2])
    sure = torch.nn.functional.one_hot(labels + 1, 3).movedim(-1, 1).float()
    with pytest.raises(DataError, match="impossible"):
        label_posterior(sure, labels, T)  # was a law of sum 0
