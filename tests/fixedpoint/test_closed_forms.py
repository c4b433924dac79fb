"""Derivatives of solutions: closed form = implicit = unrolled = central differences, problem by problem.

Every case is a map from parameters to a solution, with the closed form of its Jacobian at the solution.
"""

from __future__ import annotations

import pytest
import torch
from tests.fixedpoint.test_layer import FlatDense, LassoProblem

import firmly as fm
from firmly.fixedpoint import AdjointWarning, Anderson, Implicit, Neumann, Picard, ProximalGradient, Unrolled, implicit
from firmly.prox import L1, L2, TV, TV1D, ElasticNet, GroupL1, Nuclear, Simplex

TOL = 1e-14


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def solved(A, prior, y, **options):
    options.setdefault("solver", Picard() if isinstance(options.get("adjoint"), Unrolled) else Anderson())
    layer = implicit(fm.algorithms.ForwardBackward(A, prior), tol=TOL, max_iterations=100_000, **options)
    return layer(y[None])[0].flatten()


class Regression:
    """|y - X b|^2 / (2 n): X and y are given with 1 / sqrt(n) inside."""

    rows, columns = 60, 12

    def __init__(self):
        n = self.rows
        self.X = numbers(n, self.columns) / n**0.5
        truth = torch.tensor([1.0, 0, 0, -1, 0, 0, 2, 0, 0, -0.5, 0, 0], dtype=torch.float64).repeat(self.columns // 12)
        self.y = self.X @ truth + 0.3 * numbers(n, seed=1) / n**0.5

    def gram(self, active):
        return self.X[:, active].mT @ self.X[:, active]


class Lasso(Regression):
    parameters = (number(0.12),)

    def solve(self, weight, **options):
        return solved(fm.linear.Dense(self.X), L1(weight), self.y, **options)

    def jacobian(self, b, weight):
        J, S = torch.zeros(len(b), 1, dtype=torch.float64), b != 0
        J[S, 0] = -torch.linalg.solve(self.gram(S), b[S].sign())
        return J


class WeightedLasso(Lasso):
    parameters = (0.12 * torch.linspace(0.5, 1.5, 12, dtype=torch.float64),)

    def jacobian(self, b, weight):
        J, S = torch.zeros(len(b), len(b), dtype=torch.float64), b != 0
        J[S.outer(S)] = (-torch.linalg.inv(self.gram(S)) * b[S].sign()).flatten()
        return J


class Elastic(Regression):
    parameters = (number(0.1), number(0.5))

    def solve(self, l1, l2, **options):
        return solved(fm.linear.Dense(self.X), ElasticNet(l1, l2), self.y, **options)

    def jacobian(self, b, l1, l2):
        J, S = torch.zeros(len(b), 2, dtype=torch.float64), b != 0
        H = self.gram(S) + l2 * torch.eye(int(S.sum()), dtype=torch.float64)
        J[S] = -torch.linalg.solve(H, torch.stack([b[S].sign(), b[S]], 1))
        return J


class Groups(Regression):
    """Eight groups of three, weighted; GroupL1 has them along the channels."""

    columns = 24
    shares = torch.linspace(0.7, 1.6, 8, dtype=torch.float64)
    parameters = (number(0.3),)

    def solve(self, weight, **options):
        return solved(FlatDense(self.X, (3, 8)), GroupL1(weight * self.shares), self.y, **options)

    def jacobian(self, b, weight):
        groups = [torch.arange(g, 24, 8) for g in range(8)]  # entry (channel, group) is channel 8 + group
        S, H, right = b != 0, self.gram(torch.ones_like(b, dtype=torch.bool)), torch.zeros_like(b)
        for w, G in zip(self.shares, groups):
            size = torch.linalg.vector_norm(b[G])
            if size > 0:
                unit = b[G] / size
                H[G[:, None], G] += weight * w / size * (torch.eye(3, dtype=torch.float64) - unit.outer(unit))
                right[G] = w * unit
        J = torch.zeros(24, 1, dtype=torch.float64)
        J[S, 0] = -torch.linalg.solve(H[S][:, S], right[S])
        assert 0 < int(S.sum()) < 24
        return J


class Logistic(Regression):
    """mean log(1 + exp(-y X b)) + weight |b|_1, with a proximal gradient step of our own."""

    parameters = (number(0.05),)

    def __init__(self):
        self.X = numbers(60, 12)
        self.y = (self.X[:, 0] - self.X[:, 3] + 0.5 * numbers(60, seed=1)).sign()

    def gradient(self, b, weight):
        return -((self.y * torch.sigmoid(-self.y * (b @ self.X.mT))) @ self.X) / 60

    def solve(self, weight, adjoint=Implicit(), solver=Anderson()):  # noqa: B008
        step = 4 * 60 / float(torch.linalg.matrix_norm(self.X, 2)) ** 2
        if isinstance(adjoint, Unrolled):
            solver = Picard()
        T = ProximalGradient(self.gradient, L1, step)
        start = torch.zeros(1, 12, dtype=torch.float64)
        return fm.fixed_point(T, start, weight, adjoint=adjoint, solver=solver, tol=TOL, max_iterations=100_000).state[
            0
        ]

    def jacobian(self, b, weight):
        S, p = b != 0, torch.sigmoid(self.X @ b)
        XS = self.X[:, S]
        J = torch.zeros(12, 1, dtype=torch.float64)
        J[S, 0] = -torch.linalg.solve(XS.mT @ ((p * (1 - p))[:, None] * XS) / 60, b[S].sign())
        return J


class TotalVariation:
    """|A x - y|^2 / 2 + weight |D x|_1 with 40 entries, in the weight and in the data."""

    parameters = (number(0.3), None)

    def __init__(self):
        self.A = numbers(60, 40) / 60**0.5
        steps = torch.tensor([0.0, 2.0, -1.0, 1.0], dtype=torch.float64).repeat_interleave(10)
        self.parameters = (number(0.3), self.A @ steps + 0.1 * numbers(60, seed=1))

    def solve(self, weight, y, **options):
        return solved(fm.linear.Dense(self.A), TV1D(weight), y, **options)

    def jacobian(self, x, weight, y):
        jumps = x.diff()
        assert 0 < int((jumps != 0).sum()) < 30
        block = torch.nn.functional.pad((jumps != 0).long(), (1, 0)).cumsum(0)
        Z = torch.nn.functional.one_hot(block).to(torch.float64)  # indicators of the segments
        AZ = self.A @ Z
        D = torch.diff(torch.eye(40, dtype=torch.float64), dim=0)
        inverse = torch.linalg.inv(AZ.mT @ AZ)
        return torch.cat([(-Z @ inverse @ Z.mT @ D.mT @ jumps.sign())[:, None], Z @ inverse @ AZ.mT], 1)


class OnSimplex:
    """The least squares solution on the probability simplex, in the data."""

    def __init__(self):
        self.X = numbers(20, 6) / 20**0.5
        self.parameters = (self.X @ torch.tensor([0.6, 0.4, 0, 0, 0, -0.3], dtype=torch.float64),)

    def solve(self, y, **options):
        return solved(fm.linear.Dense(self.X), Simplex(), y, **options)

    def jacobian(self, x, y):
        S = x > 0
        assert 1 < int(S.sum()) < 6
        basis = torch.linalg.svd(torch.ones(1, int(S.sum()), dtype=torch.float64))[2][1:].mT  # sums of zero
        XZ = self.X[:, S] @ basis
        J = torch.zeros(6, 20, dtype=torch.float64)
        J[S] = basis @ torch.linalg.solve(XZ.mT @ XZ, XZ.mT)
        return J


CASES = [Lasso, WeightedLasso, Elastic, Groups, Logistic, TotalVariation, OnSimplex]
ADJOINTS = [Implicit(), Implicit("manifold"), Implicit("dense"), Unrolled()]


@pytest.mark.parametrize("case", CASES)
def test_closed_form_implicit_and_unrolled_agree(case):
    problem = case()
    v = numbers(len(problem.solve(*problem.parameters)), seed=5)
    wanted = None
    for adjoint in ADJOINTS:
        parameters = [p.clone().requires_grad_() for p in problem.parameters]
        x = problem.solve(*parameters, adjoint=adjoint)
        if wanted is None:
            wanted = v @ problem.jacobian(x.detach(), *problem.parameters)
        found = torch.cat([g.flatten() for g in torch.autograd.grad(x @ v, parameters)])
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, a=adjoint: f"{a}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_closed_forms_equal_central_differences(case):
    problem = case()
    with torch.no_grad():
        J = problem.jacobian(problem.solve(*problem.parameters), *problem.parameters)
        column = 0
        for i, parameter in enumerate(problem.parameters):
            for k in range(min(parameter.numel(), 4)):
                moved = []
                for step in (1e-6, -1e-6):
                    changed = parameter.clone()
                    changed.view(-1)[k] += step
                    moved.append(problem.solve(*problem.parameters[:i], changed, *problem.parameters[i + 1 :]))
                torch.testing.assert_close((moved[0] - moved[1]) / 2e-6, J[:, column + k], rtol=0, atol=1e-6)
            column += parameter.numel()


def test_hypergradients_at_five_weights():
    lasso = LassoProblem()

    def loss(weight):
        b = lasso.coefficients(weight, adjoint=Implicit("manifold"), solver=Anderson(10))
        return (lasso.validation @ b - lasso.target).square().mean()

    top = float((lasso.X.mT @ lasso.y).abs().max()) / 100
    for share in 0.05 + 0.4 * torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        weight = (share * top).requires_grad_()
        found = float(torch.autograd.grad(loss(weight), weight)[0])
        with torch.no_grad():
            differences = float(loss(weight + 1e-6) - loss(weight - 1e-6)) / 2e-6
        assert found == pytest.approx(differences, rel=1e-6)


@pytest.mark.parametrize("adjoint", [Implicit("manifold"), Implicit("dense")], ids=str)
def test_gradients_of_a_batch_are_those_of_its_elements(adjoint):
    X, Y = numbers(20, 8) / 20**0.5, numbers(4, 20, seed=1)
    layer = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(0.2)), adjoint, Anderson(), tol=TOL)

    def gradient(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(layer(y).square().sum(), y)[0]

    alone = torch.cat([gradient(y[None]) for y in Y])
    torch.testing.assert_close(gradient(Y), alone, rtol=0, atol=1e-12)


def test_derivatives_of_proximal_maps():
    z, weight = numbers(6, seed=3), 0.4
    size = torch.linalg.vector_norm(z)

    def jacobian(prior):
        return torch.func.jacrev(lambda z: prior.prox(z[None])[0])(z)

    eye, S = torch.eye(6, dtype=torch.float64), (Simplex().prox(z[None])[0] > 0).double()
    x = TV1D(weight).prox(z[None])[0]
    Z = (x[:, None] == x).double()
    for prior, wanted in (
        (L1(weight), torch.diag((z.abs() > weight).double())),
        (L2(weight), eye - weight / size * (eye - z.outer(z) / size**2)),
        (Simplex(), torch.diag(S) - S.outer(S) / S.sum()),
        (TV1D(weight), Z / Z.sum(1, keepdim=True)),
    ):
        torch.testing.assert_close(jacobian(prior), wanted, rtol=0, atol=1e-12)


def test_derivative_of_a_spectral_map():
    """Daleckii and Krein: U (F o U'EU) U' with divided differences F, for symmetric matrices."""
    base, E = numbers(4, 4, seed=1), numbers(4, 4, seed=2)
    Y, E = (base + base.mT) / 2, (E + E.mT) / 2
    weight = 0.5
    Y.requires_grad_()  # a symmetric map has a symmetric derivative
    found = torch.autograd.grad(Nuclear(weight).prox(Y[None, None]), Y, E[None, None])[0]
    Y = Y.detach()
    values, U = torch.linalg.eigh(Y)
    f = values.sign() * (values.abs() - weight).clamp(min=0)
    gaps = values[:, None] - values
    same = torch.eye(4, dtype=torch.bool)
    F = torch.where(same, torch.diag((values.abs() > weight).double()), (f[:, None] - f) / torch.where(same, 1, gaps))
    torch.testing.assert_close(found, U @ (F * (U.mT @ E @ U)) @ U.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prior", [Nuclear(0.3), TV(0.3, accuracy=1e-6)], ids=["nuclear", "tv"])
def test_priors_whose_derivative_only_plain_autograd_knows(prior):
    A, y, v = FlatDense(numbers(15, 12, seed=4) / 4, (1, 4, 3)), numbers(1, 15, seed=6), numbers(1, 1, 4, 3, seed=7)
    layer = implicit(fm.algorithms.ForwardBackward(A, prior), solver=Anderson(), tol=1e-12)
    y.requires_grad_()
    found = torch.autograd.grad((layer(y) * v).sum(), y)[0]
    with torch.no_grad():
        for k in (0, 7):
            e = torch.zeros_like(y)
            e[0, k] = 1e-4
            assert float(((layer(y + e) - layer(y - e)) * v).sum()) / 2e-4 == pytest.approx(
                float(found[0, k]), abs=1e-6
            )


def test_a_truncated_series_errs_as_predicted():
    torch.manual_seed(0)
    X = torch.randn(100, 50, dtype=torch.float64)
    y = X[:, :5].sum(1) + 0.3 * torch.randn(100, dtype=torch.float64)
    t = float(1 / (torch.linalg.matrix_norm(X, 2) ** 2 / 100 + 0.5))
    weight, start = number(0.1), torch.zeros(1, 50, dtype=torch.float64)
    T = ProximalGradient(lambda b, weight: (b @ X.mT - y) @ X / 100 + 0.5 * b, L1, t)

    def derivative(adjoint):
        solve = lambda w: fm.fixed_point(T, start, w, tol=TOL, adjoint=adjoint).state[0]  # noqa: E731
        return torch.func.jvp(solve, (weight,), (torch.ones_like(weight),))

    b, exact = derivative(Implicit("manifold"))
    r = float(torch.linalg.matrix_norm(torch.func.jacrev(lambda b: T(b[None], weight)[0])(b), 2))
    assert int((b != 0).sum()) == 16 and r == pytest.approx(0.712821, abs=1e-6)
    for terms, error in {0: 0.378, 1: 0.186, 5: 0.0306, 10: 4.5e-3, 20: 1.2e-4, 40: 9.4e-8}.items():
        with pytest.warns(AdjointWarning):
            found = derivative(Neumann(terms, tol=1e-14))[1]
        relative = float((found - exact).norm() / exact.norm())
        assert relative <= r ** (terms + 1)
        assert relative == pytest.approx(error, rel=0.02)
