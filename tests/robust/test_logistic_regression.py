"""Logistic regression on laws: stationary, differentiable in laws and ridge, alike from any start and any precision."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import ConditionError, DataError, NotDifferentiable, ShapeError
from firmly.robust.logistic_regression import logistic_regression

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
