"""The reduced system on the active manifold: agreement with the dense Jacobian, for every prior that knows it."""

from __future__ import annotations

import pytest
import torch
from tests.fixedpoint.test_layer import TRUE, FlatDense, LassoProblem

import firmly as fm
from firmly.errors import NotConverged, SettingsError
from firmly.fixedpoint import Anderson, Implicit, implicit, manifold
from firmly.prox import (
    L1,
    L2,
    TV1D,
    Box,
    ElasticNet,
    GroupL1,
    Huber,
    MixedNorm,
    NonNegative,
    Prior,
    Simplex,
    SquaredL2,
    Zero,
)

TOL = 1e-13
SHAPE = (3, 4)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PRIORS = {
    "l1": (lambda w: L1(w), 0.3),
    "weighted": (lambda w: L1(w * torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(SHAPE)), 0.3),
    "elastic net": (lambda w: ElasticNet(w, 0.4), 0.3),
    "groups": (lambda w: GroupL1(w), 0.5),
    "mixed": (lambda w: MixedNorm(w, 2), 0.5),
    "l2": (lambda w: L2(w), 0.5),
    "nonnegative": (lambda w: NonNegative(), None),
    "box": (lambda w: Box(-0.3, 0.4), None),
    "simplex": (lambda w: Simplex(), None),
    "simplex of channels": (lambda w: Simplex(dim=1), None),
    "tv": (lambda w: TV1D(w), 0.3),
    "zero": (lambda w: Zero(), None),
    "squared": (lambda w: SquaredL2(w), 0.3),
}


@pytest.mark.parametrize("name, algorithm", [*((name, "ForwardBackward") for name in PRIORS), ("groups", "Fista")])
def test_it_agrees_with_the_dense_jacobian(name, algorithm):
    make, value = PRIORS[name]
    matrix, y, weights = numbers(40, 12) / 40**0.5, numbers(2, 40, seed=1), numbers(2, *SHAPE, seed=2)

    def gradients(adjoint):
        matrix_, y_ = matrix.clone().requires_grad_(), y.clone().requires_grad_()
        weight = torch.tensor(0.0 if value is None else value, dtype=torch.float64, requires_grad=True)
        layer = implicit(
            getattr(fm.algorithms, algorithm)(FlatDense(matrix_, SHAPE), make(weight), step_size=0.4), adjoint, tol=TOL
        )
        found = layer.solve(y_)
        loss = (found.state.x * weights).sum()
        inputs = (matrix_, y_) if value is None else (matrix_, y_, weight)
        return torch.autograd.grad(loss, inputs), found

    wanted, _ = gradients(Implicit("dense"))
    found, account = gradients(Implicit("manifold"))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert account.backward_residuals[0] < 1e-12 and not account.degenerate


def test_the_hypergradient_that_peers_get_wrong():
    found = LassoProblem().hypergradient(adjoint=Implicit("manifold"), solver=Anderson())
    assert found == pytest.approx(TRUE, abs=1e-9)


def small(weight, X, adjoint=Implicit("manifold"), prior=L1):  # noqa: B008
    return implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), prior(weight)), adjoint, tol=TOL)


def test_forward_and_reverse_mode_are_adjoint():
    X, y, dy, v = numbers(8, 5), numbers(1, 8, seed=1), numbers(1, 8, seed=2), numbers(1, 5, seed=3)
    layer = small(0.3, X)
    forward = torch.func.jvp(layer, (y,), (dy,))[1]
    backward = torch.func.vjp(layer, y)[1](v)[0]
    assert float((forward * v).sum()) == pytest.approx(float((dy * backward).sum()), rel=1e-12)


def test_heavy_ball_and_second_derivatives():
    X, y = numbers(6, 3), numbers(1, 6, seed=1).requires_grad_()
    layer = implicit(fm.algorithms.HeavyBall(fm.linear.Dense(X)), Implicit("manifold"), tol=TOL)
    found = torch.func.jacrev(layer)(y.detach())[0, :, 0]
    torch.testing.assert_close(found, torch.linalg.pinv(X), rtol=0, atol=1e-9)

    def code(weight, y):
        return small(weight, X, prior=lambda w: ElasticNet(0.05, w))(y)

    curvature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(code, (curvature, y), atol=1e-5)


def test_a_duplicated_column_gets_the_derivative_of_least_norm_and_a_flag():
    X = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    found = small(weight, X).solve(y)
    prediction = found.state.x @ X.mT
    assert not found.degenerate  # nothing was asked yet
    assert float(torch.autograd.grad(prediction[0, 0], weight)[0]) == pytest.approx(-1, abs=1e-9)
    assert found.degenerate and found.least_curvatures[0] < 1e-12
    found = small(weight, X).solve(y)
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(found.state.x[0, 0] - found.state.x[0, 1], weight)
    assert found.degenerate


@pytest.mark.parametrize("name", ["l1", "mixed", "simplex", "tv"])
def test_systems_written_out_and_by_products_agree(name, monkeypatch):
    make, value = PRIORS[name]
    matrix, y = numbers(40, 12) / 40**0.5, numbers(3, 40, seed=1).requires_grad_()

    def solved():
        weight = None if value is None else torch.tensor(value, dtype=torch.float64)
        algorithm = fm.algorithms.ForwardBackward(FlatDense(matrix, SHAPE), make(weight), step_size=0.4)
        found = implicit(algorithm, Implicit("manifold"), tol=TOL).solve(y)
        return torch.autograd.grad((found.state.x * numbers(3, *SHAPE, seed=2)).sum(), y)[0], found.least_curvatures[0]

    dense, least = solved()
    monkeypatch.setattr(manifold, "DENSE", 0)
    products, ritz = solved()
    torch.testing.assert_close(dense, products, rtol=0, atol=1e-11)
    assert ritz == pytest.approx(least, rel=1e-8)  # twelve entries: Lanczos ends with all eigenvalues


class WrongManifold(L1):
    """It forgets an active entry."""

    def manifold(self, x):
        right = super().manifold(x)
        first = torch.zeros_like(x)
        first[:, x[0].abs().argmax()] = 1
        return right._replace(project=lambda v: right.project(v) * (1 - first))


def test_a_wrong_manifold_is_caught_by_the_residual():
    X, y = numbers(8, 5), numbers(1, 8, seed=1).requires_grad_()
    image = small(0.1, X, prior=WrongManifold)(y)
    with pytest.raises(NotConverged, match="relative residual"):
        torch.autograd.grad(image.sum(), y)


def test_a_solution_at_a_kink_is_refused_where_autograd_takes_the_other_side():
    y = torch.tensor([[0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.0, -1.5]], dtype=torch.float64)  # |y| is the weight
    algorithm = fm.algorithms.ForwardBackward(fm.linear.Identity((2,)), L1(0.5), step_size=0.7)
    with pytest.raises(NotConverged, match="kink"):
        torch.autograd.grad(implicit(algorithm, Implicit("manifold"))(y, start).sum(), y)
    gradient = torch.autograd.grad(implicit(algorithm)(y, start).sum(), y)[0]
    assert 0 <= float(gradient[0, 0]) <= 1


def test_it_says_for_what_it_is_not():
    A = fm.linear.Dense(numbers(4, 3))
    with pytest.raises(SettingsError, match="Admm"):
        implicit(fm.algorithms.Admm(A, prior=L1(0.1)), Implicit("manifold"))
    with pytest.raises(SettingsError, match="Huber does not know"):
        implicit(fm.algorithms.ForwardBackward(A, Huber(0.1)), Implicit("manifold"))
    assert Prior().manifold(torch.zeros(1, 3)) is None
    p = torch.tensor([0.5], requires_grad=True)
    with pytest.raises(SettingsError, match="implicit"):
        fm.fixed_point(lambda x, p: x / 2 + p, torch.zeros(1), p, adjoint=Implicit("manifold")).state.sum().backward()
    with pytest.raises(SettingsError, match="manifold"):
        Implicit("cg")  # type: ignore[arg-type]


def test_a_linear_solver_of_your_own_is_judged_as_any():
    p = numbers(1, 3).requires_grad_()

    def half(right):
        def solver(transposed, x, v, parameters, tol):
            return v / (1 - 0.5 * right)

        return Implicit(solver)

    def gradient(adjoint):
        found = fm.fixed_point(lambda x, p: x / 2 + p, torch.zeros_like(p), p, adjoint=adjoint)
        return torch.autograd.grad(found.state.sum(), p)[0]

    torch.testing.assert_close(gradient(half(1.0)), torch.full_like(p, 2.0))
    with pytest.raises(NotConverged):
        gradient(half(0.9))


def test_no_curvature_at_all_and_nothing_active():
    X, y = torch.zeros(2, 2), torch.zeros(1, 2).requires_grad_()
    X[0, 0] = 1
    image = small(0.1, X, prior=lambda w: Zero())
    found = implicit(image.algorithm, Implicit("manifold")).solve(y)
    assert float(torch.autograd.grad(found.state.x[0, 0], y)[0][0, 0]) == pytest.approx(1)
    assert found.degenerate  # the second entry is free
    found = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(0.1)), Implicit("manifold")).solve(y)
    assert not bool(torch.autograd.grad(found.state.x.sum(), y)[0].any())
    assert not found.degenerate


def test_single_precision():
    X, y = numbers(8, 5).float(), numbers(2, 8, seed=1).float().requires_grad_()
    layer = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(0.3)), Implicit("manifold"))
    exact = small(0.3, X.double())(y.double())
    torch.testing.assert_close(
        torch.autograd.grad(layer(y).sum(), y)[0], torch.autograd.grad(exact.sum(), y)[0], rtol=1e-3, atol=1e-4
    )
