"""Criteria for hyperparameters: unbiasedness by simulation, gradients by differences, and what they choose."""

from __future__ import annotations

import pytest
import torch

import firmly as fm
from firmly.errors import DataError, SettingsError
from firmly.fixedpoint import (
    Anderson,
    Criterion,
    Implicit,
    bilevel,
    cross_validation,
    divergence,
    hold_out,
    implicit,
    k_folds,
    sure,
)
from firmly.prox import L1, ElasticNet, GroupL1

SIGMA = 0.5


def number(value, grad=False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


class Signal:
    """A code of 12 features, four of them active, seen through 30 measurements."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.X = self.normal(30, 12) / 30**0.5
        code = torch.zeros(12, dtype=torch.float64)
        code[:4] = torch.tensor([3.0, -2.0, 1.5, 1.0], dtype=torch.float64)
        self.mean = self.X @ code
        self.A = fm.linear.Dense(self.X)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def data(self, count):
        return self.mean + SIGMA * self.normal(count, 30)

    def lasso(self, data, weight, start, tol):
        return self.solve(L1(weight), data, start, tol)

    def elastic(self, data, weights, start, tol):
        return self.solve(ElasticNet(weights[0], weights[1]), data, start, tol)

    def solve(self, prior, data, start, tol):
        algorithm = fm.algorithms.ForwardBackward(self.A, prior)
        return implicit(algorithm, Implicit("manifold"), Anderson(), tol=tol)(data, start)


def value(criterion, parameters, tol=1e-13):
    return criterion.outer(criterion.inner(parameters, None, tol), parameters)


def differences(criterion, parameters, step=1e-6):
    found = torch.zeros_like(parameters)
    with torch.no_grad():
        for k in range(parameters.numel()):
            moved = []
            for sign in (1, -1):
                changed = parameters.detach().clone()
                changed.view(-1)[k] += sign * step
                moved.append(value(criterion, changed))
            found.view(-1)[k] = (moved[0] - moved[1]) / (2 * step)
    return found


def test_the_divergence_of_a_lasso_is_its_number_of_active_entries():
    problem = Signal()
    y = problem.data(5).requires_grad_()
    b = problem.lasso(y, 0.3, None, 1e-13)
    exact = divergence(problem.A(b), y)
    torch.testing.assert_close(exact, (b != 0).sum(1).to(torch.float64), rtol=0, atol=1e-9)
    probes = torch.randint(0, 2, (3, 5, 30), generator=problem.generator).to(torch.float64) * 2 - 1
    sampled = divergence(problem.A(b), y, probes)
    S = [(b[k] != 0).nonzero()[:, 0] for k in range(5)]
    hats = [problem.X[:, s] @ torch.linalg.pinv(problem.X[:, s]) for s in S]
    wanted = torch.stack([torch.stack([p[k] @ hats[k] @ p[k] for p in probes]).mean() for k in range(5)])
    torch.testing.assert_close(sampled, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [{"step": 0, "probes": None}, {"step": 0}, {}], ids=str)
def test_the_risk_estimate_is_unbiased(options):
    problem, weight = Signal(seed=1), number(0.3)
    excess = []
    for _ in range(12):
        y = problem.data(20)
        criterion = sure(problem.lasso, y, SIGMA, problem.A, generator=problem.generator, **options)
        with torch.no_grad():
            estimate = criterion.inner(weight, None, 1e-9)
            risk = (problem.A(estimate.x[:20]) - problem.mean).square().mean()
            excess.append(criterion.outer(estimate, weight) - risk)
    excess = torch.stack(excess)
    assert abs(float(excess.mean())) < 3.5 * float(excess.std()) / len(excess) ** 0.5
    assert float(excess.std()) < 0.1


def test_gradients_of_risk_estimates():
    problem = Signal(seed=2)
    y = problem.data(3)
    for probes in (1, None):
        criterion = sure(problem.lasso, y, SIGMA, problem.A, probes=probes, generator=problem.generator)
        weight = number(0.3, True)
        found = torch.autograd.grad(value(criterion, weight), weight)[0]
        torch.testing.assert_close(found, differences(criterion, weight), rtol=1e-6, atol=1e-8)
        criterion = sure(problem.elastic, y, SIGMA, problem.A, 0, probes, problem.generator)
        weights = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(value(criterion, weights), weights)[0]
        torch.testing.assert_close(found, differences(criterion, weights), rtol=1e-6, atol=1e-8)


def test_the_derivative_of_a_group_lasso_has_a_gradient_of_its_own():
    problem = Signal(seed=3)
    y = 1.5 * problem.normal(2, 3, 4)  # denoising of four groups of three
    identity = fm.linear.Identity((3, 4))

    def solve(data, weight, start, tol):
        return implicit(fm.algorithms.ForwardBackward(identity, GroupL1(weight), step_size=0.7), tol=tol)(data, start)

    criterion = sure(solve, y, SIGMA, step=0, probes=None)
    weight = number(0.6, True)
    found = torch.autograd.grad(value(criterion, weight), weight)[0]
    torch.testing.assert_close(found, differences(criterion, weight), rtol=1e-6, atol=1e-8)
    size = torch.linalg.vector_norm(y, dim=1)  # block soft thresholding: div = sum over active groups 3 - 2 w / |y_g|
    active = size > 0.6
    misfit = torch.where(active, 0.6, size).square().sum(1) / 12
    spread = torch.where(active, 3 - 2 * 0.6 / size, 0).sum(1)
    closed = (misfit - SIGMA**2 + 2 * SIGMA**2 * spread / 12).mean()
    torch.testing.assert_close(value(criterion, weight).detach(), closed, rtol=0, atol=1e-10)


def test_a_weight_chosen_by_the_risk_estimate_is_near_the_best():
    problem = Signal(seed=4)
    y = problem.data(60)
    top = float((y @ problem.X).abs().max())
    criterion = sure(problem.lasso, y, SIGMA, problem.A, generator=problem.generator)
    found = bilevel(*criterion, number(0.1 * top), bounds=(top / 100, 0.999 * top))

    def risk(weight):
        return float((problem.A(problem.lasso(y, weight, None, 1e-8)) - problem.mean).square().mean())

    with torch.no_grad():
        best = min(risk(w) for w in top * torch.logspace(-1.5, 0, 12, dtype=torch.float64))
        assert risk(found.parameters) < 1.1 * best


def test_cross_validation_is_the_mean_of_its_hold_outs():
    problem = Signal(seed=5)
    X, y = problem.normal(40, 12), problem.normal(40)
    y = y + X[:, :3].sum(1)

    def fold(train, test):
        A = fm.linear.Dense(X[train] / len(train) ** 0.5)

        def inner(weight, start, tol):
            algorithm = fm.algorithms.ForwardBackward(A, L1(weight))
            return implicit(algorithm, Implicit("manifold"), Anderson(), tol=tol)(
                y[train][None] / len(train) ** 0.5, start
            )

        return Criterion(inner, hold_out(lambda b: b[0] @ X[test].mT, y[test]))

    folds = [fold(*split) for split in k_folds(40, 3, problem.generator)]
    criterion, weight = cross_validation(folds), number(0.2, True)
    mean = sum(value(f, weight) for f in folds) / 3
    torch.testing.assert_close(value(criterion, weight), mean)
    found = torch.autograd.grad(value(criterion, weight), weight)[0]
    torch.testing.assert_close(found, differences(criterion, weight), rtol=1e-6, atol=1e-8)
    chosen = bilevel(*criterion, number(0.2), bounds=(0.01, 1.0))
    with torch.no_grad():
        grid = min(float(value(criterion, number(w), 1e-8)) for w in torch.logspace(-2, 0, 15).tolist())
    assert chosen.objective <= 1.001 * grid


def test_folds_are_a_partition():
    splits = k_folds(11, 3, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([test for _, test in splits]).tolist()) == list(range(11))
    for train, test in splits:
        assert sorted(torch.cat([train, test]).tolist()) == list(range(11)) and len(test) in (3, 4)


def test_what_is_refused():
    y = torch.zeros(1, 4, dtype=torch.float64)
    with pytest.raises(SettingsError, match="folds"):
        k_folds(4, 5)
    with pytest.raises(SettingsError, match="at least one fold"):
        cross_validation([])
    for sigma in (0.0, float("nan")):
        with pytest.raises(SettingsError, match="sigma"):
            sure(lambda *a: y, y, sigma)
    with pytest.raises(SettingsError, match="probes"):
        sure(lambda *a: y, y, 1.0, probes=0)
    with pytest.raises(SettingsError, match="step"):
        sure(lambda *a: y, y, 1.0, step=-1.0)
    with pytest.raises(DataError, match="real"):
        sure(lambda *a: y, y.long(), 1.0)
    with pytest.raises(DataError, match="same space"):
        divergence(y[:, :2], y)
    criterion = sure(lambda data, p, start, tol: data[:, :2], y, 1.0)
    with pytest.raises(DataError, match="same space"):
        criterion.outer(criterion.inner(None, None, 0.1), None)
