"""Bilevel problems: closed forms, a grid, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import firmly as fm
from firmly.errors import ConditionError, DataError, NotConverged, SettingsError
from firmly.fixedpoint import Anderson, Ending, Implicit, bilevel, implicit
from firmly.fixedpoint.descent import least_combination
from firmly.prox import L1


def number(value):
    return torch.tensor(value, dtype=torch.float64)


class Selection:
    """A Lasso of 80 samples and 120 features, and 80 samples to validate it."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        truth = torch.zeros(120, dtype=torch.float64)
        truth[:10] = normal(10)
        self.X, self.validation = normal(80, 120) / 80**0.5, normal(80, 120)
        self.y = (80**0.5 * self.X @ truth + 0.5 * normal(80)) / 80**0.5
        self.target = self.validation @ truth + 0.5 * normal(80)
        self.largest = float((self.X.mT @ self.y).abs().max())
        self.A = fm.linear.Dense(self.X)

    def inner(self, weight, start, tol):
        algorithm = fm.algorithms.ForwardBackward(self.A, L1(weight))
        layer = implicit(algorithm, Implicit("manifold"), Anderson(10), tol=tol, max_iterations=100_000)
        return layer(self.y[None], start)

    def outer(self, b, weight):
        return (self.validation @ b[0] - self.target).square().mean()


@pytest.mark.parametrize("seed", [3, 4])
def test_a_bisection_of_twelve_solves_is_as_good_as_a_grid_of_a_hundred(seed):
    problem = Selection(seed)
    top = problem.largest
    found = bilevel(problem.inner, problem.outer, number(top / 10), bounds=(top / 100, 0.999 * top))
    best, start = math.inf, None
    with torch.no_grad():
        for weight in top * torch.logspace(0, -2, 100, dtype=torch.float64):
            start = problem.inner(weight, start, 1e-6)
            best = min(best, float(problem.outer(start, weight)))
    assert found.objective <= 1.001 * best
    assert len(found.history) == 12 and found.status is Ending.BRACKETED and found.converged
    assert found.objective == min(trial.objective for trial in found.history)
    tolerances = [trial.tol for trial in found.history]
    assert tolerances == sorted(tolerances, reverse=True) and tolerances[-1] < 1e-11


def test_a_weight_for_every_feature_beats_one_for_all():
    problem = Selection(4)
    weights = torch.full((120,), problem.largest / 10, dtype=torch.float64)
    found = bilevel(problem.inner, problem.outer, weights, max_solves=15)
    first = found.history[0].objective
    assert found.objective < 0.8 * first
    torch.testing.assert_close(problem.outer(found.solution, None), number(found.objective), rtol=1e-12, atol=0)


def ridge(parameters, start, tol):
    """argmin (x - 3)^2 / 2 + p x^2 / 2 + q (x - 1)^2 / 2."""
    p, q = parameters
    return ((3 + q) / (1 + p + q)).reshape(1, 1)


def test_several_parameters_against_the_closed_form():
    def outer(x, parameters):  # least at p = 1 and q = 2, where x = 5 / 4
        p, q = parameters
        return 1 + (x[0, 0] - 1.25) ** 2 + 0.1 * p.log() ** 2 + 0.1 * (q / 2).log() ** 2

    found = bilevel(ridge, outer, (number(3.0), number(0.5)))
    assert found.status is Ending.STATIONARY
    torch.testing.assert_close(found.parameters, (number(1.0), number(2.0)), rtol=2e-3, atol=0)


def test_a_quadratic_in_the_logarithm_and_bounds():
    outer = lambda x, p: (p.log() - 1).cosh().sum() + 3 + 0 * x.sum()  # noqa: E731
    inner = lambda p, start, tol: p[None]  # noqa: E731
    found = bilevel(inner, outer, torch.tensor([0.1, 20.0], dtype=torch.float64))
    assert found.status is Ending.STATIONARY and len(found.history) < 10
    torch.testing.assert_close(found.parameters, torch.full((2,), math.e, dtype=torch.float64), rtol=1e-3, atol=0)
    found = bilevel(inner, outer, torch.tensor([0.1, 1.5], dtype=torch.float64), bounds=(0.01, 2.0))
    assert found.status is Ending.STATIONARY
    torch.testing.assert_close(found.parameters, torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_kink_is_where_a_search_may_end():
    """The minimum of max(u, -3 u, ...) in logarithms, where no gradient is small."""

    def outer(x, p):
        u = p.log() - 0.3
        return 1 + torch.maximum(u.sum(), -3 * u.sum()) + (u[0] - u[1]).abs() + 0 * x.sum()

    found = bilevel(lambda p, start, tol: p[None], outer, torch.tensor([3.0, 0.2], dtype=torch.float64))
    assert found.status is Ending.KINK and found.converged
    assert found.objective == pytest.approx(1, abs=1e-3)
    assert min(t.gradient.abs().max() for t in found.history) > 0.5


def test_a_nonsmooth_valley():
    """|x2 - x1^2| + (1 - x1)^2 / 4 bends, and gradients along its valley say nothing: kinks do not stop the search."""
    outer = lambda x, p: 1 + (x[1] - x[0] ** 2).abs() + 0.25 * (1 - x[0]) ** 2  # noqa: E731
    start = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    found = bilevel(lambda p, start, tol: p, outer, start, max_solves=150, mapped=lambda p: 1.0 * p)
    assert found.objective < 1.001
    torch.testing.assert_close(found.parameters, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_the_least_convex_combination_of_gradients():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 3), (2, 5), (5, 3), (12, 6)):
        vectors = torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.7
        least = least_combination(vectors)
        # <v, least> >= |least|^2 for all v characterises it
        assert float((vectors @ least).min()) >= float(least @ least) - 1e-6


def test_weights_as_a_function_of_features():
    """weight_j = exp(a + b' z_j): parameters of any sign, in a dictionary."""
    problem = Selection(4)
    informed = torch.zeros(120, 1, dtype=torch.float64)
    informed[10:] = 1  # the first ten are said to be different, not how
    first = {"level": number(math.log(problem.largest / 10)), "slopes": [number([0.0])]}
    found = bilevel(
        problem.inner,
        problem.outer,
        first,
        max_solves=20,
        mapped=lambda q: (q["level"] + informed @ q["slopes"][0]).exp(),
    )
    assert found.parameters.keys() == first.keys() and float(found.parameters["slopes"][0]) > 0.3
    assert found.objective < 0.9 * found.history[0].objective
    trial = found.history[3]  # the chain rule, against central differences
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight = (trial.parameters["level"] + informed @ (trial.parameters["slopes"][0] + sign * 1e-5)).exp()
            values.append(float(problem.outer(problem.inner(weight, None, 1e-12), None)))
    assert float(trial.gradient["slopes"][0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_bounds_of_mapped_parameters():
    found = bilevel(
        lambda p, start, tol: p, lambda x, p: (x + 3).square(), number(0.0), (-1.0, 2.0), mapped=lambda q: 1.0 * q
    )
    assert found.status is Ending.BRACKETED and float(found.parameters) == pytest.approx(-1, abs=0.05)


def test_inner_tolerances_are_summable_and_gradients_become_as_accurate():
    """The error of a gradient falls with its inner tolerance: the tolerances bound all errors together."""
    problem = Selection(3)
    weight = torch.full((120,), problem.largest / 10, dtype=torch.float64)
    found = bilevel(problem.inner, problem.outer, weight, max_solves=10)
    tolerances = [trial.tol for trial in found.history]
    assert sum(tolerances) < 1.34 * tolerances[0] and tolerances[0] == 1e-5
    errors = []
    for trial in found.history:
        p = trial.parameters.clone().requires_grad_()
        (g,) = torch.autograd.grad(problem.outer(problem.inner(p, None, 1e-13), p), p)
        errors.append(float((trial.gradient - g * p.detach()).norm() / (g * p.detach()).norm()))
    assert all(error <= 1e4 * tol for error, tol in zip(errors, tolerances)), list(zip(errors, tolerances))
    assert errors[-1] < 1e-6


def test_a_weight_above_the_largest_useful_one_is_said_to_be_flat():
    problem = Selection(0)
    found = bilevel(problem.inner, problem.outer, number(1.1 * problem.largest))
    assert found.status is Ending.FLAT and not found.converged and "smaller" in str(found.status)


def test_a_step_where_the_inner_problem_fails_is_made_shorter():
    def inner(p, start, tol):
        if float(p.detach()) > 1.5:
            raise NotConverged("too large")
        return p.reshape(1, 1)

    found = bilevel(inner, lambda x, p: (x - 1.4).square().sum(), number(0.5))
    assert any(math.isnan(trial.objective) for trial in found.history)
    assert float(found.parameters) == pytest.approx(1.4, abs=1e-2)
    with pytest.raises(NotConverged, match="too large"):
        bilevel(inner, lambda x, p: x.sum(), number(2.0))


def test_an_interruption_keeps_the_best():
    def stop(trial):
        if trial.objective < 6:
            raise KeyboardInterrupt

    found = bilevel(lambda p, start, tol: p[None], lambda x, p: x.square().sum(), number([5.0]), callback=stop)
    assert found.status is Ending.INTERRUPTED and found.objective < 6


def test_what_is_refused():
    inner, outer, p = (lambda p, start, tol: p[None]), (lambda x, p: x.sum()), number([1.0, 2.0])
    with pytest.raises(ConditionError, match="positive"):
        bilevel(inner, outer, number([1.0, 0.0]))
    with pytest.raises(ConditionError, match="bounds"):
        bilevel(inner, outer, p, bounds=(2.0, 1.0))
    with pytest.raises(ConditionError, match="within the bounds"):
        bilevel(inner, outer, p, bounds=(1.5, 3.0))
    with pytest.raises(ConditionError, match="0 < low"):
        bilevel(inner, outer, p, bounds=(-1.0, 3.0))
    with pytest.raises(ConditionError, match="finite"):
        bilevel(inner, outer, p / 0, mapped=lambda q: q.exp())
    with pytest.raises(SettingsError, match="floating-point"):
        bilevel(inner, outer, {"a": p, "b": 1.0})
    with pytest.raises(SettingsError, match="differentiable"):
        bilevel(lambda p, start, tol: p.detach(), outer, p)
    with pytest.raises(SettingsError, match="returns tensors"):
        bilevel(lambda p, start, tol: "p", lambda x, p: p.sum(), p)
    with pytest.raises(SettingsError, match=r"number \[1\]"):
        bilevel(lambda p, start, tol: p[0][None], lambda x, p: x.sum(), (p, p))
    with pytest.raises(SettingsError, match="one number"):
        bilevel(inner, lambda x, p: x, p)
    with pytest.raises(SettingsError, match="max_solves"):
        bilevel(inner, outer, p, max_solves=0)
    with pytest.raises(SettingsError, match="tol"):
        bilevel(inner, outer, p, tol=0.0)
    with pytest.raises(SettingsError, match="floating-point"):
        bilevel(inner, outer, torch.tensor([1, 2]))
    with pytest.raises(DataError, match="dtype"):
        bilevel(inner, outer, (p, p.float()))
    with pytest.raises(NotConverged, match="not finite"):
        bilevel(inner, lambda x, p: x.sum() / 0, p)
