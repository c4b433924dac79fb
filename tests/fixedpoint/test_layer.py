"""Implicit layers: hypergradients against closed forms and the values that peers get wrong."""

from __future__ import annotations

import pytest
import torch

import firmly as fm
from firmly.errors import ConditionError, NotConverged, SettingsError
from firmly.fixedpoint import (
    AdjointWarning,
    Anderson,
    Broyden,
    Checkpointed,
    Implicit,
    Neumann,
    Unrolled,
    fixed_point,
    implicit,
)
from firmly.prox import L1, ElasticNet, GroupL1

TOL = 1e-13


class LassoProblem:
    """The hypergradient problem of the notes: 100 samples, 200 features, ten of them active."""

    def __init__(self):
        torch.manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        self.X = normal(100, 200)
        truth = torch.zeros(200, dtype=torch.float64)
        truth[:10] = 1
        self.y = self.X @ truth + 0.3 * normal(100)
        self.validation = normal(50, 200)
        self.target = self.validation @ truth
        self.weight = 0.1 * (self.X.mT @ self.y).abs().max() / 100

    def coefficients(self, weight, **options):
        A = fm.linear.Dense(self.X / 10)  # |y - X b|^2 / (2 n) with n = 100
        layer = implicit(fm.algorithms.ForwardBackward(A, L1(weight)), tol=TOL, max_iterations=100_000, **options)
        return layer(self.y[None] / 10)[0]

    def hypergradient(self, **options):
        weight = self.weight.clone().requires_grad_()
        loss = (self.validation @ self.coefficients(weight, **options) - self.target).square().mean()
        return float(torch.autograd.grad(loss, weight)[0])


@pytest.fixture(scope="module")
def lasso():
    return LassoProblem()


TRUE = 3.798876230622671  # reproduced by the closed form below


def test_the_closed_form_is_the_reference(lasso):
    with torch.no_grad():
        b = lasso.coefficients(lasso.weight)
    active = b != 0
    XS = lasso.X[:, active]
    change = -100 * torch.linalg.solve(XS.mT @ XS, b[active].sign())
    outer = 2 * lasso.validation.mT @ (lasso.validation @ b - lasso.target) / 50
    assert int(active.sum()) == 11
    assert float(lasso.weight) == pytest.approx(0.139227473167047, abs=1e-14)
    assert float(outer[active] @ change) == pytest.approx(TRUE, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"adjoint": Implicit("dense")}, {"adjoint": Implicit("normal-cg")}, {"adjoint": Unrolled()},
     {"adjoint": Checkpointed(100)}, {"solver": Anderson()}, {"solver": Broyden()}],
    ids=str,
)  # fmt: skip
def test_every_way_gives_the_hypergradient(lasso, options):
    assert lasso.hypergradient(**options) == pytest.approx(TRUE, abs=1e-8)


def test_the_truncated_series_that_peers_return_in_silence_warns(lasso):
    with pytest.warns(AdjointWarning, match="relative residual"):
        assert lasso.hypergradient(adjoint=Neumann(10)) == pytest.approx(3.044376, abs=1e-6)


def test_every_weight_of_a_weighted_lasso(lasso):
    weights = lasso.weight * torch.linspace(0.8, 1.2, 200, dtype=torch.float64)
    weights.requires_grad_()
    b = lasso.coefficients(weights, adjoint=Implicit("dense"))
    found = torch.autograd.grad(b.sum(), weights)[0]
    active = b.detach() != 0
    XS = lasso.X[:, active]
    inverse = torch.linalg.inv(XS.mT @ XS)
    wanted = torch.zeros(200, dtype=torch.float64)
    wanted[active] = -100 * inverse.sum(0) * b.detach()[active].sign()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_elastic_net_and_its_two_weights():
    torch.manual_seed(0)
    X = torch.randn(100, 50, dtype=torch.float64)
    y = X[:, :5].sum(1) + 0.3 * torch.randn(100, dtype=torch.float64)
    l1 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    l2 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    layer = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X / 10), ElasticNet(l1, l2)), tol=TOL)
    b = layer(y[None] / 10)[0]
    active = b.detach() != 0
    XS, bS = X[:, active], b.detach()[active]
    H = XS.mT @ XS / 100 + 0.5 * torch.eye(len(bS), dtype=torch.float64)
    wanted = -torch.linalg.solve(H, torch.stack([bS.sign(), bS], 1)).sum(0)
    found = torch.autograd.grad(b.sum(), (l1, l2))
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-8, atol=1e-10)


def test_group_lasso():
    torch.manual_seed(1)
    # GroupL1 has its groups along the channels: codes (3 channels, 4 pixels) are four groups of three
    X = torch.randn(30, 12, dtype=torch.float64)
    y = X[:, ::4].sum(1) + 0.1 * torch.randn(30, dtype=torch.float64)
    A = FlatDense(X / 30**0.5, (3, 4))
    weight = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    layer = implicit(fm.algorithms.ForwardBackward(A, GroupL1(weight)), tol=TOL)
    x = layer(y[None] / 30**0.5)
    found = torch.autograd.grad(x.sum(), weight)[0]
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            implicit(fm.algorithms.ForwardBackward(A, GroupL1(weight.detach() + s)), tol=TOL)(y[None] / 30**0.5).sum()
            for s in (step, -step)
        )
    assert float(found) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)


class FlatDense(fm.linear.LinearMap):
    """A matrix on codes of any shape."""

    def __init__(self, weight, shape):
        super().__init__(shape, weight.shape[:1])
        self.hold("weight", weight)

    def _apply_map(self, x):
        return x.flatten(1) @ self.weight.mT

    def _apply_adjoint(self, y):
        return (y @ self.weight).reshape(-1, *self.domain)


def test_gradients_reach_data_and_parameters():
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    algorithm = fm.algorithms.ForwardBackward(fm.linear.Dense(weight), L1(0.1), step_size=0.2)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def code(y, weight):
        fresh = fm.algorithms.ForwardBackward(fm.linear.Dense(weight), L1(0.1), step_size=0.2)
        return implicit(fresh, Implicit("dense"), tol=1e-13)(y)

    assert torch.autograd.gradcheck(code, (y, weight.detach().clone().requires_grad_()), atol=1e-6)
    implicit(algorithm)(y).sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


@pytest.mark.parametrize("make", ["DouglasRachford", "Admm"])
def test_other_algorithms_agree_with_forward_backward(make):
    torch.manual_seed(3)
    X, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    A = fm.linear.Dense(X)

    def gradient(algorithm):
        data = y.clone().requires_grad_()
        image = implicit(algorithm, tol=1e-13, max_iterations=100_000)(data)
        return image.detach(), torch.autograd.grad(image.sum(), data)[0]

    plain = gradient(fm.algorithms.ForwardBackward(A, L1(0.3)))
    other = gradient(getattr(fm.algorithms, make)(A, prior=L1(0.3)))
    torch.testing.assert_close(other[0], plain[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(other[1], plain[1], rtol=0, atol=1e-7)


def test_momentum_is_not_unrolled_but_differentiated_at_the_solution():
    torch.manual_seed(4)
    X, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    fista = fm.algorithms.Fista(fm.linear.Dense(X), L1(0.3))
    with pytest.raises(SettingsError, match="momentum"):
        implicit(fista, Unrolled())
    image = implicit(fista, tol=1e-12)(y)
    plain = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(0.3)), tol=1e-12)(y)
    torch.testing.assert_close(image, plain, rtol=0, atol=1e-9)


def test_a_singular_active_set_is_refused_unless_it_does_not_matter():
    X = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # a duplicated column
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    algorithm = fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(weight))
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    prediction = implicit(algorithm)(y) @ X.mT
    found = torch.autograd.grad(prediction[0, 0], weight)[0]  # unique: X b = y - weight
    assert float(found) == pytest.approx(-1.0, abs=1e-9)
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(implicit(algorithm)(y)[0, 0] - implicit(algorithm)(y)[0, 1], weight)


def test_conditions_are_asked_for():
    X = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ConditionError, match="step_size"):
        implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(0.1), step_size=3.0))


def test_tangents_of_tensors_inside_the_algorithm_reach_the_solution():
    """Forward mode, where nothing requires a gradient."""
    generator = torch.Generator().manual_seed(3)
    X, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 20), (1, 30)))
    weight = torch.tensor(2.0, dtype=torch.float64)

    def code(weight):
        return implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(weight)), tol=1e-13)(y)

    forwards = torch.func.jvp(code, (weight,), (torch.ones_like(weight),))[1]
    assert float(forwards.abs().max()) > 1e-3
    torch.testing.assert_close(forwards, torch.func.jacrev(code)(weight), rtol=1e-8, atol=1e-12)


def test_tangents_that_a_map_holds_on_to_are_refused():
    def solution(w):
        return fixed_point(lambda x: torch.tanh(0.3 * w * x + 1), torch.zeros(1, 3, dtype=torch.float64)).state

    with pytest.raises(SettingsError, match="holds on to tensors"):
        torch.func.jvp(solution, (torch.ones((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
