"""Logistic regression on laws: its minimiser and derivatives, from any start and in any precision; on pixels."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import ConditionError, DataError, NotConverged, NotDifferentiable, ShapeError
from firmly.segment import linear_segmenter
from firmly.segment import logistic_regression as logistic
from firmly.segment.linear_segmenter import Batch, fit_logistic
from firmly.segment.logistic_regression import logistic_regression

generator = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=generator, dtype=torch.float64)
SCORES = 2 * torch.randn(40, 3, generator=generator, dtype=torch.float64)


def test_stationary():
    laws = SCORES.softmax(1)
    W = logistic_regression(X, laws, 0.01).requires_grad_()
    value = -(laws * (X @ W[:-1] + W[-1]).log_softmax(1)).sum(1).mean() + 0.005 * W[:-1].square().sum()
    (slope,) = torch.autograd.grad(value, W)
    assert float(slope.abs().max()) < 1e-10 and abs(float(W[-1].detach().sum())) < 1e-12


def test_derivatives_in_laws_and_ridge():
    scores, ridge = SCORES.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, r: logistic_regression(X, s.softmax(1), r), (scores, ridge))
    W = logistic_regression(X, scores.softmax(1), ridge)
    (slope,) = torch.autograd.grad(W.square().sum(), ridge, create_graph=True)
    with pytest.raises(NotDifferentiable):
        torch.autograd.grad(slope, ridge)


def test_any_start_gives_the_same():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = logistic_regression(X, SCORES.softmax(1), 0.1, start)
    torch.testing.assert_close(found, logistic_regression(X, SCORES.softmax(1), 0.1), rtol=0, atol=1e-8)


def test_laws_in_single_precision():
    """Their sums are one up to 1e-7 only, and no bias would be stationary to 1e-10."""
    rows = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    laws = (2 * torch.randn(300, 3, generator=generator)).softmax(1)
    found = logistic_regression(rows, laws, 1e-3)
    torch.testing.assert_close(found, logistic_regression(rows, laws.double(), 1e-3), rtol=0, atol=1e-6)


def test_refusals():
    laws = SCORES.softmax(1)
    with pytest.raises(ShapeError):
        logistic_regression(X, laws[:3], 0.1)
    with pytest.raises(ShapeError):
        logistic_regression(X, laws, 0.1, torch.zeros(4, 3))
    with pytest.raises(DataError, match="sum to one"):
        logistic_regression(X, 2 * laws, 0.1)
    with pytest.raises(ConditionError):
        logistic_regression(X, laws, 0.0)
    with pytest.raises(ConditionError, match="C is positive"):
        fit_logistic(segments(), 3, 0.0)


def segments(seed=0):
    """Two batches of different sizes, some pixels without a label."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((2, 6, 5), (1, 9, 4)):
        features = torch.randn(shape[0], 3, *shape[1:], generator=random, dtype=torch.float64)
        labels = (features[:, :2] + torch.randn(features[:, :2].shape, generator=random)).argmax(1)
        labels[torch.rand(shape, generator=random) < 0.2] = 2
        labels[torch.rand(shape, generator=random) < 0.2] = 255
        found.append(Batch(features, labels, None))
    return found


def test_hessian(monkeypatch):
    rows, laws, ridge = torch.cat([X, torch.ones(40, 1)], 1), SCORES.softmax(1), torch.tensor([0.1, 0.2, 0.3, 0.4])
    W = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(w):
        return -(laws * (rows @ w).log_softmax(1)).sum() / 40 + (ridge[:, None] * w[:-1].square()).sum() / 2

    here = logistic.objective(rows, laws, ridge.double(), W)
    torch.testing.assert_close(here.gradient, torch.func.grad(value)(W), rtol=1e-12, atol=1e-14)
    exact = torch.func.hessian(value)(W).permute(1, 0, 3, 2).clone()
    exact[:, -1, :, -1] += 1  # of equal biases, which change nothing
    for block in (logistic.BLOCK, 1):
        monkeypatch.setattr(logistic, "BLOCK", block)
        found = logistic.hessian(rows.repeat(4, 1), ridge.double(), here.p.repeat(4, 1))  # three blocks of rows
        torch.testing.assert_close(found, exact.reshape(15, 15), rtol=1e-12, atol=1e-14)


def test_newton_and_quasi_newton_fit_the_same_segmenter(monkeypatch):
    newton = fit_logistic(segments(), 3, 50.0, 0.0, tol=1e-7)
    monkeypatch.setattr(linear_segmenter, "FEW", 0)
    other = fit_logistic(segments(), 3, 50.0, 0.0, tol=1e-7, max_iter=2000)
    assert newton.converged and other.converged and newton.iterations < 10 < other.iterations
    assert newton.objective == pytest.approx(other.objective, abs=1e-10) and newton.coupling == 0
    torch.testing.assert_close(newton.weight, other.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(newton.bias, other.bias, rtol=0, atol=1e-6)
    assert abs(float(newton.bias.sum())) < 1e-12


def test_hard_fits():
    """A class without a pixel has no best bias, equal features no best weights but for the ridge, classes are apart."""
    apart = [Batch(b.features, (b.features[:, 0] > 0).long(), None) for b in segments()]
    twice = [Batch(torch.cat([b.features, b.features], 1), b.labels, None) for b in segments()]
    for batches, classes, C in ((segments(), 4, 50.0), (apart, 2, 1e9), (twice, 3, 1e6)):
        fit = fit_logistic(batches, classes, C, 0.0)
        assert fit.converged and fit.gap <= 1e-5 and bool(fit.weight.isfinite().all() and fit.bias.isfinite().all())
    short = fit_logistic(segments(), 3, 50.0, 0.0, max_iter=1)
    assert not short.converged and short.iterations == 1 and short.gap > 1e-5


def test_where_newton_finds_no_step_the_fit_goes_on(monkeypatch):
    monkeypatch.setattr(logistic, "next_point", lambda *_: None)
    fit = fit_logistic(segments(), 3, 50.0, 0.0, max_iter=1000)
    assert fit.converged and fit.iterations > 10
    with pytest.raises(NotConverged, match="after 0 steps"):
        logistic_regression(X, SCORES.softmax(1), 0.1)
