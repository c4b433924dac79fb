"""Stochastic bilevel problems: beside the deterministic solution, the gradient it claims, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from firmly.errors import ConditionError, NotConverged, SettingsError, ShapeError
from firmly.fixedpoint import bilevel, stochastic_bilevel

f64 = torch.float64


class Ridge:
    """Logistic regression of 300 samples with a ridge for every group of features, 150 samples to validate it."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=f64)  # noqa: E731
        truth = torch.cat([2 * normal(2), 0.3 * normal(2), torch.zeros(2, dtype=f64)])
        self.X, self.V = normal(300, 6), normal(150, 6)
        self.y, self.t = ((Z @ truth + 2 * normal(len(Z)) > 0).double() for Z in (self.X, self.V))
        self.groups = torch.tensor([0, 0, 1, 1, 2, 2])
        self.samples = torch.arange(300), torch.arange(150)

    def inner(self, x, weight, rows):
        scores = self.X[rows] @ x
        return (softplus(scores) - self.y[rows] * scores).mean() + 0.5 * (weight[self.groups] * x.square()).sum()

    def outer(self, x, weight, rows):  # with a preference, so that no weight goes to zero or infinity
        scores = self.V[rows] @ x
        return (softplus(scores) - self.t[rows] * scores).mean() + 0.002 * (weight / 0.1).log().square().sum()

    def solve(self, weight, start, tol):
        """By Newton's method; differentiable by one more step."""
        x = torch.zeros(6, dtype=f64) if start is None else start
        for _ in range(30):
            value = torch.func.grad(self.inner)
            H = torch.func.jacrev(value)(x, weight.detach(), self.samples[0])
            x = x - torch.linalg.solve(H, value(x, weight.detach(), self.samples[0]))
        return x - torch.linalg.solve(H, value(x, weight, self.samples[0]))

    def exact(self):
        return bilevel(self.solve, lambda x, w: self.outer(x, w, self.samples[1]), torch.full((3,), 0.1, dtype=f64))

    def stochastic(self, **options):
        options = {"batch": 32, "epochs": 150, "generator": torch.Generator().manual_seed(1), **options}
        return stochastic_bilevel(
            self.inner, self.outer, torch.full((3,), 0.1, dtype=f64), torch.zeros(6, dtype=f64), (300, 150), **options
        )


@pytest.mark.parametrize("batch", [16, 32])
def test_it_converges_to_the_deterministic_solution(batch):
    problem = Ridge()
    exact, found = problem.exact(), problem.stochastic(batch=batch)
    assert exact.converged and found.converged and len(found.history) < 150
    torch.testing.assert_close(found.parameters.log(), exact.parameters.log(), rtol=0, atol=0.1)
    assert found.objective <= 1.001 * exact.objective
    x = problem.solve(found.parameters, None, 0)
    torch.testing.assert_close(found.solution, x, rtol=0, atol=0.01)


def test_the_gradient_it_claims_is_that_of_the_solution():
    problem = Ridge()
    found = problem.stochastic(epochs=40)
    weight = found.parameters.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.outer(problem.solve(weight, None, 0), weight, problem.samples[1]), weight)
    size = max(float(trial.gradient.abs().max()) for trial in found.history)
    torch.testing.assert_close(found.gradient, gradient * weight.detach(), rtol=0, atol=0.02 * size)


def test_blocks_of_different_sizes_are_weighted_by_them():
    """One block or many: objective and residuals of all samples are the same numbers."""
    problem = Ridge()
    whole, parts = (problem.stochastic(batch=batch, epochs=1) for batch in (300, 77))
    rows = problem.samples
    for found in (whole, parts):
        assert found.objective == pytest.approx(
            float(problem.outer(found.solution, found.parameters, rows[1])), rel=1e-12
        )
        slope = torch.func.grad(problem.inner)(found.solution, found.parameters, rows[0])
        start = torch.func.grad(problem.inner)(torch.zeros(6, dtype=f64), found.parameters, rows[0])
        assert found.inner_residual == pytest.approx(float(slope.norm() / start.norm()), rel=0.3)


def test_weights_of_classes_of_samples():
    """Samples whose labels are drawn at random lose their weight."""
    generator = torch.Generator().manual_seed(0)
    X, V = (torch.randn(n, 4, generator=generator, dtype=f64) for n in (400, 200))
    truth = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=f64)
    y, t = ((Z @ truth > 0).double() for Z in (X, V))
    kind = torch.arange(400) % 2
    y = torch.where(kind == 1, 1 - y, y)  # half of the labels are wrong

    def inner(x, weights, rows):
        scores = X[rows] @ x
        return (weights["kind"][kind[rows]] * (softplus(scores) - y[rows] * scores)).mean() + 0.01 * x.square().sum()

    def outer(x, weights, rows):
        scores = V[rows] @ x
        return (softplus(scores) - t[rows] * scores).mean()

    first = {"kind": torch.ones(2, dtype=f64)}
    found = stochastic_bilevel(
        inner, outer, first, torch.zeros(4, dtype=f64), (400, 200), 40, 40, torch.Generator().manual_seed(0)
    )
    good, wrong = found.parameters["kind"].tolist()
    assert good > 10 * wrong and found.objective < 0.5 * found.history[0].objective


def test_a_seed_gives_the_same_run_and_a_callback_hears_every_epoch():
    problem, heard = Ridge(), []
    one, two = problem.stochastic(epochs=6, callback=heard.append), problem.stochastic(epochs=6)
    torch.testing.assert_close(one.parameters, two.parameters, rtol=0, atol=0)
    assert len(heard) == 6 and heard == one.history


def test_what_is_refused():
    problem = Ridge()
    p, x = torch.ones(3, dtype=f64), torch.zeros(6, dtype=f64)
    with pytest.raises(SettingsError, match="at least 1"):
        problem.stochastic(epochs=0)
    with pytest.raises(ShapeError, match="start"):
        stochastic_bilevel(problem.inner, problem.outer, p, torch.zeros(6, dtype=torch.long), (300, 150))
    with pytest.raises(ConditionError, match="positive"):
        stochastic_bilevel(problem.inner, problem.outer, -p, x, (300, 150))
    with pytest.raises(SettingsError, match="`inner` returns one number"):
        stochastic_bilevel(lambda x, p, rows: p, problem.outer, p, x, (300, 150))
    with pytest.raises(SettingsError, match="`outer` returns one number"):
        stochastic_bilevel(problem.inner, lambda x, p, rows: x.detach().sum(), p, x, (300, 150))
    with pytest.raises(NotConverged, match="curvature"):
        stochastic_bilevel(lambda x, p, rows: (x * p.sum()).sum(), lambda x, p, rows: x.sum(), p, x, (300, 150))
    with pytest.raises(NotConverged, match="curvature of the inner problem is -"):
        stochastic_bilevel(lambda x, p, rows: -(p * x[:3]).square().sum(), problem.outer, p, x, (300, 150))
    with pytest.raises(NotConverged, match="finite"):
        stochastic_bilevel(problem.inner, lambda x, p, rows: x.sum() / 0, p, x, (300, 150))
