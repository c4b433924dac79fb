"""Sparse codes with derivatives: closed forms, finite differences, and what the test of inactive atoms leaves."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError
from firmly.linear import Dense
from firmly.priors import duality_gap, hypergradient, implicit_lasso, lasso, weight_max
from firmly.priors.hypergradient import undecided
from firmly.priors.penalty import Penalty
from firmly.priors.problem import Problem


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(m=30, n=60, batch=1, seed=0):
    D = numbers(m, n, seed=seed) / m**0.5
    codes = numbers(batch, n, seed=seed + 1) * (numbers(batch, n, seed=seed + 2) > 1.5)
    return D, codes @ D.mT + 0.05 * numbers(batch, m, seed=seed + 3)


def test_the_hypergradient_that_peers_get_wrong():
    torch.manual_seed(0)
    X = torch.randn(100, 200, dtype=torch.float64)
    w = torch.zeros(200, dtype=torch.float64)
    w[:10] = 1
    y = X @ w + 0.3 * torch.randn(100, dtype=torch.float64)
    V = torch.randn(50, 200, dtype=torch.float64)
    weight = (0.1 * (X.mT @ y).abs().max() / 100).requires_grad_()
    b = implicit_lasso(X / 10, y[None] / 10, weight)[0]
    (V @ (b - w)).square().mean().backward()
    assert int((b != 0).sum()) == 11
    assert float(weight.grad) == pytest.approx(3.798876230622671, abs=1e-9)


@pytest.mark.parametrize("curvature", [0.0, 0.3])
def test_closed_forms_in_all_four_arguments(curvature):
    D, y = problem()
    v = numbers(60, seed=9)
    weight = (0.1 * weight_max(D, y)[0]).requires_grad_()
    ridge = torch.tensor(curvature, dtype=torch.float64, requires_grad=True)
    D.requires_grad_()
    y.requires_grad_()
    z = implicit_lasso(D, y, weight, ridge)
    found = torch.autograd.grad(z[0] @ v, (weight, ridge, y, D))
    with torch.no_grad():
        S = z[0].nonzero()[:, 0]
        A, u = D[:, S], z[0, S]
        w = torch.linalg.solve(A.mT @ A + curvature * torch.eye(len(S), dtype=torch.float64), v[S])
        r = y[0] - A @ u
        in_D = torch.zeros_like(D)
        in_D[:, S] = r[:, None] * w - (A @ w)[:, None] * u
        wanted = (-(u.sign() @ w), -(u @ w), (A @ w)[None], in_D)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("group", [1, 3])
def test_finite_differences_of_a_batch_with_weights_of_its_own(group):
    D, y = problem(15, 24, batch=2, seed=4)
    penalty = Penalty(1.0, group=group)
    weight = (0.2 * weight_max(D, y, penalty)[:, None]).requires_grad_()  # (batch, 1)
    assert torch.autograd.gradcheck(
        lambda w, y: implicit_lasso(D, y, w, group=group), (weight, y.requires_grad_()), eps=1e-7, atol=1e-6
    )


def test_weights_of_atoms_and_groups():
    D, y = problem(seed=7)
    weight = (0.1 * weight_max(D, y)[0] * (1 + torch.rand(60, dtype=torch.float64))).requires_grad_()
    z = implicit_lasso(D, y, weight)
    gradient = torch.autograd.grad(z.sum(), weight)[0]
    S = z[0].nonzero()[:, 0]
    A = D[:, S]
    wanted = torch.zeros(60, dtype=torch.float64)
    wanted[S] = -torch.linalg.solve(A.mT @ A, torch.ones(len(S), dtype=torch.float64)) * z[0, S].detach().sign()
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)
    each = torch.linspace(0.2, 0.4, 20, dtype=torch.float64).requires_grad_()
    z, change = implicit_lasso(D, y, each, group=3), numbers(20, seed=8)
    above, below = (implicit_lasso(D, y, each.detach() + e * change, group=3).sum() for e in (1e-6, -1e-6))
    slope = torch.autograd.grad(z.sum(), each)[0] @ change
    assert float(slope) == pytest.approx(float(above - below) / 2e-6, rel=1e-6)


def test_it_is_the_code_of_lasso_and_every_row_stands_alone():
    D, y = problem(batch=4)
    weight = 0.1 * weight_max(D, y)[:, None]
    z = implicit_lasso(D, y, weight)
    assert float((duality_gap(D, y, weight, z).gap / y.square().sum(1)).max()) < 1e-13
    alone = torch.cat([implicit_lasso(D, y[k : k + 1], weight[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(z, alone, rtol=0, atol=1e-12)


def test_second_derivatives_and_forward_mode():
    D, y = problem(12, 20)
    weight, ridge = torch.tensor(0.2).double().requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w, c: implicit_lasso(D, y, w, c), (weight, ridge), atol=1e-5)
    wanted = torch.autograd.functional.jacobian(lambda w: implicit_lasso(D, y, w, 0.5), weight)
    for mode in (torch.func.jacfwd, torch.func.jacrev):
        found = mode(lambda w: implicit_lasso(D, y, w, 0.5))(weight.detach())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_nothing_active_has_a_gradient_of_exactly_zero():
    D, y = problem()
    weight = (1.1 * weight_max(D, y)[0]).requires_grad_()
    z = implicit_lasso(D, y, weight)
    assert not bool(z.any())
    assert float(torch.autograd.grad(z.sum(), weight)[0]) == 0


def test_rough_codes_leave_every_atom_that_is_active_undecided():
    for seed in range(5):
        D, y = problem(batch=2, seed=seed)
        for penalty in (Penalty(0.1), Penalty(0.1, curvature=0.2), Penalty(0.2, group=4)):
            active = lasso(D, y, penalty, 1e-14).code.unflatten(1, (-1, penalty.group)).any(2).any(0).nonzero()[:, 0]
            exact = Problem(Dense(D), y, penalty.on(y, 60))
            counts = []
            for tol in (1e-1, 1e-3, 1e-6, 1e-12):
                kept = undecided(exact, lasso(D, y, penalty, tol).code)
                assert set(active.tolist()) <= set(kept.tolist())
                counts.append(len(kept))
            assert counts[-1] <= counts[0] and counts[-1] == len(active)


def test_active_columns_that_depend_on_each_other():
    D = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    z = implicit_lasso(D, y, weight)
    assert float(torch.autograd.grad((z @ D.mT)[0, 0], weight)[0]) == pytest.approx(-1, abs=1e-9)
    z = implicit_lasso(D, y, weight)
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(z[0, 0] - z[0, 1], weight)


def test_single_precision():
    D, y = problem()
    weight = 0.1 * weight_max(D, y)[0]

    def gradient(dtype):
        w = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(implicit_lasso(D.to(dtype), y.to(dtype), w).sum(), w)[0].double()

    torch.testing.assert_close(gradient(torch.float32), gradient(torch.float64), rtol=1e-3, atol=1e-3)


def test_it_says_what_is_wrong():
    D, y = problem()
    with pytest.raises(ShapeError):
        implicit_lasso(D, y[0], 0.1)
    with pytest.raises(SettingsError, match="a matrix, given Dense"):
        implicit_lasso(Dense(D), y, 0.1)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="positive"):
        implicit_lasso(D, y, -0.1)
    with pytest.raises(SettingsError, match="one number"):
        implicit_lasso(D, y, 0.1, torch.ones(60))
    with pytest.raises(SettingsError, match="group"):
        implicit_lasso(D, y, 0.1, 0.1, group=3)
    with pytest.raises(ShapeError, match="groups of 7"):
        implicit_lasso(D, y, 0.1, group=7)
    with pytest.raises(DataError, match="NaN"):
        implicit_lasso(D * torch.nan, y, 0.1)


def test_a_poor_code_costs_iterations_and_not_accuracy(monkeypatch):
    D, y = problem()
    weight = (0.1 * weight_max(D, y)[0]).requires_grad_()
    wanted = torch.autograd.grad(implicit_lasso(D, y, weight).sum(), weight)[0]
    nothing = lasso(D, y, 1e3 * weight.detach())
    monkeypatch.setattr(hypergradient, "lasso", lambda *arguments: nothing)
    found = torch.autograd.grad(implicit_lasso(D, y, weight).sum(), weight)[0]
    assert float(found) == pytest.approx(float(wanted), abs=1e-9)
    monkeypatch.setattr(hypergradient, "POLISH", 3)
    with pytest.raises(NotConverged, match="not reached"):
        implicit_lasso(D, y, weight)
