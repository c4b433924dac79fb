"""Sparse generalised linear models: optimality, closed-form and finite-difference derivatives, and what is refused."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import ConditionError, DataError, NotConverged, SettingsError, ShapeError
from firmly.priors.losses import Logistic, Softmax, Squared
from firmly.priors.sparse_linear import SparseLinear


def problem(loss, n=60, p=12, seed=0, intercept=True):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, p, generator=generator, dtype=torch.float64)
    scores = X[:, :3] @ torch.ones(3, 3, dtype=torch.float64).tril() + 0.5
    if isinstance(loss, Softmax):
        target = torch.nn.functional.one_hot((scores + torch.randn(n, 3, generator=generator)).argmax(1), 3).double()
    else:
        target = scores[:, :1] + torch.randn(n, 1, generator=generator, dtype=torch.float64)
        target = (target > 0).double() if isinstance(loss, Logistic) else target
    return SparseLinear(X, target, loss, intercept)


LOSSES = [Squared(), Logistic(), Softmax()]
CASES = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


@CASES
def test_a_loss_agrees_with_its_derivatives(loss):
    scores = torch.randn(5, 3 if loss.shifted else 1, dtype=torch.float64)
    target = torch.softmax(torch.randn_like(scores), 1) if loss.shifted else torch.rand_like(scores)
    slope = torch.func.vmap(torch.func.grad(lambda s, t: loss.value(s[None], t[None])[0]))(scores, target)
    torch.testing.assert_close(loss.slope(scores, target), slope)
    bend = torch.func.vmap(torch.func.jacrev(lambda s, t: loss.slope(s[None], t[None])[0]))(scores, target)
    torch.testing.assert_close(loss.curvature(scores), bend)
    assert torch.linalg.eigvalsh(loss.curvature(scores)).max() <= loss.bend + 1e-12


@CASES
@pytest.mark.parametrize("p", [12, 200])
@pytest.mark.parametrize("fraction", [0.99, 0.3, 0.03, 0.003])
def test_optimality_conditions(loss, p, fraction):
    model = problem(loss, p=p)
    weight = fraction * model.largest * torch.linspace(0.5, 1.5, p, dtype=torch.float64)
    B = model.solve(weight, tol=1e-11)
    slope = model.A.mT @ model.loss.slope(model.A @ B, model.target) / 60
    assert slope[-1].abs().max() < 1e-10
    slope, b, weight = slope[:-1], B[:-1], weight[:, None].expand(B[:-1].shape)
    torch.testing.assert_close(slope[b != 0], -(weight * b.sign())[b != 0], rtol=0, atol=1e-10)
    assert bool((slope.abs() <= weight + 1e-10).all()) and bool((b != 0).any())


@CASES
def test_nothing_is_active_above_the_pull(loss):
    model = problem(loss)
    assert not bool(model.solve(torch.tensor(1.0001 * model.largest, dtype=torch.float64))[:-1].any())
    assert int((model.solve(torch.tensor(0.9999 * model.largest, dtype=torch.float64))[:-1] != 0).sum()) >= 1


@CASES
@pytest.mark.parametrize("shape", ["number", "feature", "coefficient"])
@pytest.mark.parametrize("intercept", [True, False])
def test_derivatives_in_the_weights_against_central_differences(loss, shape, intercept):
    model = problem(loss, intercept=intercept)
    K = model.target.shape[1]
    sizes = {"number": (), "feature": (12,), "coefficient": (12, K)}
    generator = torch.Generator().manual_seed(1)
    weight = 0.1 * model.largest * (1 + torch.rand(sizes[shape], generator=generator, dtype=torch.float64))
    away = torch.randn(13, K, generator=generator, dtype=torch.float64)
    if loss.shifted:  # what the model is for depends on differences of scores only
        away = away - away.mean(1, keepdim=True)

    def outer(weight):
        return (model.solve(weight, tol=1e-13) * away).sum()

    (found,) = torch.autograd.grad(outer(weight.requires_grad_()), weight)
    direction = weight.detach() * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        expected = (outer(weight + h * direction) - outer(weight - h * direction)) / (2 * h)
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-6, atol=1e-9)
    assert 0 <= model.residuals[-1] < 1e-12


def test_the_closed_form_of_the_lasso():
    """db_S = -n (X_S' X_S)^-1 sgn(b_S) dweight, theory of implicit differentiation."""
    model = problem(Squared(), intercept=False)
    weight = torch.tensor(0.1 * model.largest, dtype=torch.float64, requires_grad=True)
    B = model.solve(weight, tol=1e-13)
    S, away = B[:-1, 0] != 0, torch.randn(13, dtype=torch.float64)
    (found,) = torch.autograd.grad(B[:, 0] @ away, weight)
    X = model.A[:, :-1][:, S]
    expected = -60 * away[:-1][S] @ torch.linalg.solve(X.mT @ X, B[:-1, 0][S].sign())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_the_benchmark_of_the_notes():
    """A Lasso whose hypergradient is 3.798876230622671, on which other libraries return the wrong sign."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    X, w = draw(100, 200), torch.zeros(200, dtype=torch.float64)
    w[:10] = 1
    y = X @ w + 0.3 * draw(100)
    V = draw(50, 200)
    torch.set_rng_state(state)
    model = SparseLinear(X, y[:, None], Squared(), intercept=False)
    weight = torch.tensor(0.139227473167047, dtype=torch.float64, requires_grad=True)
    assert model.largest == pytest.approx(1.39227473167047, rel=1e-12)
    B = model.solve(weight, tol=1e-13)
    (found,) = torch.autograd.grad((V @ B[:-1, 0] - V @ w).square().mean(), weight)
    assert int((B != 0).sum()) == 11 and float(found) == pytest.approx(3.798876230622671, rel=1e-9)


@CASES
def test_a_start_saves_work_and_changes_nothing(loss):
    model = problem(loss)
    weight = torch.tensor(0.05 * model.largest, dtype=torch.float64)
    cold = model.solve(weight)
    torch.testing.assert_close(model.solve(weight, model.solve(1.3 * weight)), cold, rtol=0, atol=1e-8)
    assert model.minimise(model.padded(weight.expand(12, cold.shape[1])), cold, 1e-9) is cold


def test_a_column_twice():
    """Only the sum of their coefficients is unique: one of them is kept, and the derivative is that of one column."""
    model = problem(Squared(), p=4)
    X = torch.cat([model.A[:, :4], model.A[:, :1]], 1)
    double = SparseLinear(X, model.target, Squared())
    start = torch.zeros(6, 1, dtype=torch.float64)
    start[[0, 4]] = 0.2
    weight = torch.tensor(0.1 * double.largest, dtype=torch.float64, requires_grad=True)
    B = double.solve(weight, start, tol=1e-13)
    assert int((B[[0, 4]] != 0).sum()) == 1
    (one,) = torch.autograd.grad((double.A @ B).square().sum(), weight)
    C = model.solve(weight, tol=1e-13)
    torch.testing.assert_close(double.A @ B, model.A @ C, rtol=0, atol=1e-10)
    (other,) = torch.autograd.grad((model.A @ C).square().sum(), weight)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=0)
    double.independent = lambda B: B  # both, and an objective that depends on which
    B = double.solve(weight, start)
    assert bool((B[[0, 4]] != 0).all())
    with pytest.raises(NotConverged, match="linearly dependent"):
        torch.autograd.grad(B[0, 0], weight)


def test_single_precision():
    exact = problem(Logistic())
    model = SparseLinear(exact.A[:, :-1].float(), exact.target.float(), Logistic())
    weight = torch.tensor(0.1 * exact.largest)
    B = model.solve(weight, tol=1e-5)
    assert B.dtype == torch.float32
    torch.testing.assert_close(B.double(), exact.solve(weight.double()), rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    exact = problem(Softmax())
    model = SparseLinear(exact.A[:, :-1].cuda(), exact.target.cuda(), Softmax())
    weight = torch.tensor(0.1 * exact.largest, dtype=torch.float64)
    torch.testing.assert_close(model.solve(weight.cuda()).cpu(), exact.solve(weight), rtol=0, atol=1e-8)


def test_what_is_refused():
    X, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    for data, target in ((X, y[:5]), (X, y[:, 0]), (X[:0], y[:0]), (X[:, :0], y)):
        with pytest.raises(ShapeError, match="given"):
            SparseLinear(data, target, Squared())
    with pytest.raises(DataError, match="finite"):
        SparseLinear(X / 0, y, Squared())
    for target in (y.sign(), torch.ones(10, 2, dtype=torch.float64)):
        with pytest.raises(DataError, match="not -1 and 1"):
            SparseLinear(X, target, Logistic())
    for target in (y.abs(), torch.ones(10, 2, dtype=torch.float64)):
        with pytest.raises(DataError, match="sum 1"):
            SparseLinear(X, target, Softmax())
    with pytest.raises(SettingsError, match="detach"):
        SparseLinear(X.clone().requires_grad_(), y, Squared())
    model = SparseLinear(X, y, Squared())
    with pytest.raises(ShapeError, match="weight"):
        model.solve(torch.ones(4, dtype=torch.float64))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConditionError, match="positive"):
            model.solve(torch.tensor(bad, dtype=torch.float64))
