"""Wrong features and labels of linear models: a conic solver, a linear program, limits, derivatives, scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linprog
from sklearn.utils.estimator_checks import parametrize_with_checks

import firmly as fm
from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import wasserstein_logistic
from firmly.robust.linear_wasserstein import Barrier, dual_norm
from firmly.robust.wasserstein_classifier import WassersteinLogistic

f64 = torch.float64


def samples(number=60, seed=0, wrong=8):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(number, 4, generator=generator, dtype=f64)
    truth = X @ torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=f64) + 0.5
    y = torch.sign(truth + torch.randn(number, generator=generator, dtype=f64))
    y[:wrong] *= -1
    return X, y


def objective(X, y, weight, bias, price, radius, kappa):
    m = y * (X @ weight + bias)
    either = torch.nn.functional.softplus(-m)
    if kappa < math.inf:
        either = torch.maximum(either, torch.nn.functional.softplus(m) - kappa * price)
    return radius * price + either.mean()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("radius, kappa, intercept", [(0.05, math.inf, True), (0.05, 0.5, True), (0.1, 5.0, False)])
def test_equal_to_a_conic_solver(norm, radius, kappa, intercept):
    X, y = samples(40)
    found = wasserstein_logistic(X, y, radius, kappa, norm, intercept)
    value, b, price = conic(X.numpy(), y.numpy(), radius, kappa, norm, intercept)
    assert float(found.risk) == pytest.approx(value, abs=1e-7)
    np.testing.assert_allclose(found.weight.numpy(), b, atol=1e-4)
    assert float(found.price) == pytest.approx(price, abs=1e-4)
    assert float(objective(X, y, *found[:3], radius, kappa)) == pytest.approx(float(found.risk), abs=1e-12)
    assert 0 <= found.gap <= 1e-7


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("radius, kappa, intercept", [(0.05, math.inf, True), (0.05, 0.5, True), (0.1, 5.0, False)])
def test_the_lower_bound_holds_anywhere(norm, radius, kappa, intercept):
    X, y = samples()
    least = float(wasserstein_logistic(X, y, radius, kappa, norm, intercept).risk)
    columns = [y[:, None] * X, y[:, None]] if intercept else [y[:, None] * X]
    barrier = Barrier(torch.cat(columns, 1), 4, norm)
    epsilon, cost = torch.tensor([radius, kappa], dtype=f64)
    bounds = []
    for seed in range(100):
        v = torch.randn(barrier.size, generator=torch.Generator().manual_seed(seed), dtype=f64)
        v[barrier.price] = 5 * v.abs().sum()
        v[barrier.price + 1 :] = v[:4].abs() + 0.1 if norm == "linf" else 0
        bounds.append(float(barrier.lower_bound(v, 10.0 ** -(seed % 8), epsilon, cost, y if intercept else None)))
    assert max(bounds) <= least and min(bounds) >= 0


def conic(X, y, radius, kappa, norm, intercept):
    """The problem with epigraphs, log(1 + e^-m) <= s as e^-s + e^(-m - s) <= 1 in exponential cones, by Clarabel."""
    clarabel = pytest.importorskip("clarabel")
    number, d = X.shape
    cut = np.cumsum([0, d, 1, 1, number] + 4 * [number] + [d])
    size, price = cut[-1], cut[2]
    unit = np.eye(size)
    s, *parts = (unit[cut[k] : cut[k + 1]] for k in range(3, 8))
    margins = y[:, None] * (X @ unit[:d] + (unit[d : d + 1] if intercept else 0))
    equal, less, exponential = [], [], []  # rows of -A with their right sides
    if not intercept:
        equal.append((unit[d : d + 1], np.zeros(1)))
    signs = (1, -1) if kappa < math.inf else (1,)
    for k, sign in enumerate(signs):
        u, v = parts[2 * k : 2 * k + 2]
        below = s + (kappa * unit[price] if sign < 0 else 0)
        less.append((-u - v, np.ones(number)))
        for top, part in ((-below, u), (-sign * margins - below, v)):
            rows = np.stack([top, 0 * top, part], 1).reshape(-1, size)
            exponential.append((rows, np.tile([0.0, 1.0, 0.0], number)))
    bounds = unit[cut[8] : cut[9]]
    own = bounds if norm == "linf" else np.tile(unit[price], (d, 1))
    if norm == "l2":
        second = (np.concatenate([unit[price : price + 1], unit[:d]]), np.zeros(d + 1))
    else:
        second = None
        less += [(own - unit[:d], np.zeros(d)), (own + unit[:d], np.zeros(d))]
    if norm == "linf":
        less.append((unit[price : price + 1] - bounds.sum(0), np.zeros(1)))
    blocks = [*equal, *less, *([second] if second else []), *exponential]
    cones = [clarabel.ZeroConeT(1)] if equal else []
    cones.append(clarabel.NonnegativeConeT(sum(len(right) for _, right in less)))
    if second:
        cones.append(clarabel.SecondOrderConeT(d + 1))
    cones += [clarabel.ExponentialConeT()] * (2 * len(signs) * number)
    left, right = np.concatenate([rows for rows, _ in blocks]), np.concatenate([right for _, right in blocks])
    cost = radius * unit[price] + s.sum(0) / number
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    nothing = scipy.sparse.csc_matrix((size, size))
    solver = clarabel.DefaultSolver(nothing, cost, scipy.sparse.csc_matrix(-left), right, cones, settings)
    x = np.array(solver.solve().x)
    return float(cost @ x), x[:d], float(x[price])


@pytest.mark.parametrize("radius, kappa", [(0.02, math.inf), (0.05, 0.5), (0.1, 1.0)])
def test_no_direction_is_better(radius, kappa):
    X, y = samples()
    found = wasserstein_logistic(X, y, radius, kappa)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            weight = found.weight + size * torch.randn(4, generator=generator, dtype=f64)
            bias = found.bias + size * torch.randn((), generator=generator, dtype=f64)
            for price in torch.linspace(0, 2, 5, dtype=f64):
                price = dual_norm(weight, "l2") + price**4
                assert float(objective(X, y, weight, bias, price, radius, kappa)) >= float(found.risk) - 1e-9


def test_the_risk_is_that_of_transport_on_a_grid():
    """In one dimension the worst law is a linear program over a grid of places and both labels."""
    X, y = samples(12, seed=3)
    X, radius, kappa = X[:, :1].round(decimals=1), 0.3, 1.0
    found = wasserstein_logistic(X, y, radius, kappa, intercept=False, tol=1e-11)
    grid = np.arange(-40, 40.05, 0.1)
    losses, costs = [], []
    for x, label in zip(X[:, 0].tolist(), y.tolist()):
        for other in (1.0, -1.0):
            losses.append(np.logaddexp(0, -label * other * float(found.weight) * grid))
            costs.append(np.abs(grid - x) + (kappa if other < 0 else 0.0))
    count = len(y)
    rows = np.kron(np.eye(count), np.ones((1, 2 * len(grid))))
    program = linprog(-np.concatenate(losses), A_ub=np.concatenate(costs)[None], b_ub=[radius],
                      A_eq=rows, b_eq=np.full(count, 1 / count))  # fmt: skip
    assert -program.fun <= float(found.risk) + 1e-9
    assert -program.fun == pytest.approx(float(found.risk), abs=2e-3), "the supremum is at infinity"


def test_an_infinite_kappa_is_a_norm_as_penalty():
    X, y = samples(200, seed=2)
    found = wasserstein_logistic(X, y, 0.05)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = torch.nn.functional.softplus(-y * (X @ weight + bias)).mean() + 0.05 * weight.norm()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert max(float(s.abs().max()) for s in slopes) < 1e-7
    assert float(found.risk) == pytest.approx(float(loss.detach()), abs=1e-12)
    far = wasserstein_logistic(X, y, 0.05, kappa=50.0)
    torch.testing.assert_close(far.weight, found.weight, atol=1e-6, rtol=0)


def test_wrong_labels_far_away_are_taken_for_the_other_class():
    generator = torch.Generator().manual_seed(4)
    truth = torch.where(torch.rand(300, generator=generator) < 0.5, 1.0, -1.0).double()
    X = torch.stack([2.0 * truth, torch.zeros(300).double()], 1) + torch.randn(300, 2, generator=generator).double()
    given = truth.clone()
    given[torch.rand(300, generator=generator) < 0.2] *= -1
    trusting, doubting = (wasserstein_logistic(X, given, 0.02, kappa) for kappa in (math.inf, 0.2))
    assert float(doubting.weight.norm()) < float(trusting.weight.norm()), "it promises less"
    assert float(doubting.risk) > float(trusting.risk), "labels that may be wrong are worse"


def test_the_barrier_of_a_hinge():
    barrier = Barrier(torch.zeros(1, 1, dtype=f64), 1, "l2")
    h = torch.tensor([-50.0, -3.0, -1e-3, 1e-3, 2.0, 50.0], dtype=f64, requires_grad=True)
    for weight in (1.0, 1e-2, 1e-8):
        value, first, second = barrier.hinge(h, weight)
        s = value.detach() * 0 + torch.linspace(0, 60, 600_001, dtype=f64)[1:, None]
        terms = s - weight * (s.log() + (s - h.detach()).clamp(min=1e-300).log())
        best = torch.where(s > h.detach(), terms, torch.inf).amin(0)
        assert float((best - value.detach()).min()) >= -1e-9
        if weight > 1e-5:
            assert float((best - value.detach()).max()) < 1e-4
            (slope,) = torch.autograd.grad(value.sum(), h, retain_graph=True)
            (bend,) = torch.autograd.grad(first.sum(), h)
            torch.testing.assert_close(slope, first)
            torch.testing.assert_close(bend, second)
        assert float((value.detach() - h.detach().clamp(min=0)).abs().max()) < 120 * weight + 1e-12


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("radius, kappa", [(0.05, math.inf), (0.05, 0.6), (0.2, 3.0)])
def test_derivatives_in_radius_and_kappa(norm, radius, kappa):
    X, y = samples()
    direction = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=f64)

    def of(radius, kappa, tol=1e-12):
        found = wasserstein_logistic(X, y, radius, kappa, norm, tol=tol)
        return found.weight @ direction + found.bias, found.risk

    parameters = [torch.tensor(v, dtype=f64, requires_grad=math.isfinite(v)) for v in (radius, kappa)]
    known = [p for p in parameters if p.requires_grad]
    for k, value in enumerate(of(*parameters, tol=1e-9)):
        slopes = torch.autograd.grad(value, known)
        for place, slope in enumerate(slopes):
            ends = []
            for step in (-1e-5, 1e-5):
                moved = [radius, kappa]
                moved[place] += step
                ends.append(float(of(*moved)[k]))
            assert float(slope) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=2e-4, abs=1e-4 if k == 0 else 1e-5)


def test_radius_is_tuned_by_bilevel():
    X, y = samples(40, seed=1)
    V, truth = samples(400, seed=2, wrong=0)

    def inner(radius, start, tol):
        found = wasserstein_logistic(X, y, radius)
        return torch.cat([found.weight, found.bias[None]])

    def outer(v, radius):
        return torch.nn.functional.softplus(-truth * (V @ v[:-1] + v[-1])).mean()

    found = fm.bilevel(inner, outer, torch.tensor(0.05, dtype=f64), bounds=(1e-3, 0.5))
    grid = [float(outer(inner(float(r), None, 0), r)) for r in torch.logspace(-3, math.log10(0.5), 60)]
    assert found.objective <= 1.001 * min(grid)


@parametrize_with_checks([WassersteinLogistic()])
def test_scikit_learn(estimator, check):
    check(estimator)


def test_the_estimator_is_the_function():
    X, y = samples()
    found = wasserstein_logistic(X, y, 0.05, 0.5, "linf")
    names = np.where(y.numpy() > 0, "yes", "no")
    model = WassersteinLogistic(0.05, 0.5, "linf", tol=1e-9).fit(X.numpy(), names)
    np.testing.assert_allclose(model.coef_[0], found.weight.numpy())
    assert model.risk_ == pytest.approx(float(found.risk)) and model.score(X.numpy(), names) > 0.7
    assert list(model.classes_) == ["no", "yes"]


def test_bad_input_is_refused():
    X, y = samples()
    for call, error, words in (
        (lambda: wasserstein_logistic(X, y[:-1], 0.1), ShapeError, "X is"),
        (lambda: wasserstein_logistic(X, y * 2, 0.1), DataError, "-1 and 1"),
        (lambda: wasserstein_logistic(X, y, -0.1), SettingsError, "radius"),
        (lambda: wasserstein_logistic(X, y, 0.0), SettingsError, "without a penalty"),
        (lambda: wasserstein_logistic(X, y, 0.1, 0.0), SettingsError, "kappa"),
        (lambda: wasserstein_logistic(X, y, 0.1, norm="l3"), SettingsError, "norm"),
    ):
        with pytest.raises(error, match=words):
            call()
    constant = torch.ones(20, 1, dtype=f64)
    assert float(wasserstein_logistic(constant, y[:20], 0.1).weight.abs()) < 1e-6, "the bias does the same for nothing"
    with pytest.raises(DataError, match="all labels are equal"):
        wasserstein_logistic(X, torch.ones_like(y), 0.1)
    with pytest.raises(DataError, match="detach"):
        wasserstein_logistic(X.clone().requires_grad_(), y, 0.1)
    with pytest.raises(SettingsError, match="tol"):
        wasserstein_logistic(X, y, 0.1, tol=0.0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 1), (3, 40)])
def test_few_samples_and_more_features_than_samples(shape):
    number, features = shape
    X = torch.randn(number, features, generator=torch.Generator().manual_seed(5), dtype=f64)
    y = torch.tensor([1.0, -1.0, 1.0], dtype=f64)[:number]
    found = wasserstein_logistic(X, y, 0.1, 0.7, intercept=False)
    assert float(found.risk) <= math.log(2) + found.gap <= math.log(2) + 1e-7
