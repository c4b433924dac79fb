"""Quadratic programs: solutions against clarabel, six gradients against the closed form, the SVM dual, refusals."""

from __future__ import annotations

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse

from firmly.errors import ConditionError, DataError, NotConverged, ShapeError
from firmly.fixedpoint import quadratic_program


def program(seed=0, batch=3, n=6, m=8, p=2, rank=None):
    """A feasible program with an interior: Q, q, G, h, A, b."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factor = normal(batch, n, rank or n)
    Q = factor @ factor.mT / n
    q = 3 * (Q @ normal(batch, n, 1))[:, :, 0]  # bounded from below
    inside, G, A = normal(batch, n, 1), normal(batch, m, n), normal(batch, p, n)
    slack = 0.3 * torch.rand(batch, m, generator=generator, dtype=torch.float64)
    return Q, q, G, (G @ inside)[:, :, 0] + slack, A, (A @ inside)[:, :, 0]


def by_clarabel(Q, q, G, h, A, b):
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    rows = sparse.csc_matrix(np.concatenate([A.numpy(), G.numpy()]))
    cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(Q.numpy())), q.numpy(), rows, np.concatenate([b.numpy(), h.numpy()]), cones, settings
    )
    return torch.tensor(solver.solve().x, dtype=torch.float64)


@pytest.mark.parametrize("rank", [None, 3])
def test_solutions_agree_with_clarabel(rank):
    data = program(rank=rank, batch=5)
    found = quadratic_program(*data)
    assert float(found.residual.max()) < 1e-12
    Q, q, G, h = data[:4]
    assert float(((G @ found.x[:, :, None])[:, :, 0] - h).max()) < 1e-12 and float(found.inequality.min()) > -1e-12
    for k in range(5):
        peer = by_clarabel(*(t[k] for t in data))
        value = lambda x, k=k: float(x @ Q[k] @ x / 2 + q[k] @ x)  # noqa: E731
        assert value(found.x[k]) == pytest.approx(value(peer), abs=1e-8)
        if rank is None:
            torch.testing.assert_close(found.x[k], peer, rtol=0, atol=1e-6)


def test_six_gradients_equal_the_closed_form():
    """Amos and Kolter 2017: the transposed KKT system, and products of its solution with the primal-dual point."""
    given = [t[0].requires_grad_() for t in program(batch=1)]
    Q, _, G, h, A, _ = (t.detach() for t in given)
    found = quadratic_program(*given)
    v = torch.linspace(-1, 1, 6, dtype=torch.float64)
    gradients = torch.autograd.grad(found.x @ v, given)
    assert found.backward_residuals[0] < 1e-12 and not bool(found.degenerate.any())
    x, dual, nu = found.x.detach(), found.inequality.detach(), found.equality.detach()
    assert 1 <= int((dual > 1e-9).sum()) <= 4  # constraints are active, and leave freedom
    system = torch.zeros(16, 16, dtype=torch.float64)
    system[:6] = torch.cat([Q, G.mT * dual, A.mT], 1)
    system[6:14] = torch.cat([G, torch.diag(G @ x - h), torch.zeros(8, 2, dtype=torch.float64)], 1)
    system[14:, :6] = A
    dx, dl, dnu = torch.linalg.solve(system, -torch.cat([v, v.new_zeros(10)])).split([6, 8, 2])
    wanted = (
        (torch.outer(dx, x) + torch.outer(x, dx)) / 2, dx,
        torch.outer(dual * dl, x) + torch.outer(dual, dx), -dual * dl,
        torch.outer(dnu, x) + torch.outer(nu, dx), -dnu,
    )  # fmt: skip
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_gradients_of_solution_and_multipliers_against_differences():
    given = [t.requires_grad_() for t in program(seed=1, batch=2, n=3, m=3, p=1)]
    assert torch.autograd.gradcheck(lambda *data: quadratic_program(*data).x, given, atol=1e-7)
    assert torch.autograd.gradcheck(lambda *data: quadratic_program(*data).inequality, given[:4], atol=1e-7)


def test_second_derivatives():
    Q, q, G, h, A, b = program(seed=2, batch=1, n=3, m=3, p=1)
    solve = lambda Q, h: quadratic_program(Q, q, G, h, A, b).x  # noqa: E731
    assert torch.autograd.gradgradcheck(solve, (Q.requires_grad_(), h.requires_grad_()), atol=1e-6)


def test_a_batch_is_its_elements_and_shared_data_broadcast():
    Q, q, G, h, A, b = program(batch=4)
    together = quadratic_program(Q[0], q, G[0], h[0], A[0], b[0])
    for k in range(4):
        alone = quadratic_program(Q[0], q[k], G[0], h[0], A[0], b[0])
        assert alone.x.shape == (6,)
        torch.testing.assert_close(together.x[k], alone.x, rtol=0, atol=1e-12)


def test_equalities_alone_inequalities_alone_and_nothing():
    Q, q, G, h, A, b = (t[0] for t in program(batch=1))
    KKT = torch.cat([torch.cat([Q, A.mT], 1), torch.cat([A, torch.zeros(2, 2, dtype=torch.float64)], 1)])
    torch.testing.assert_close(quadratic_program(Q, q, A=A, b=b).x, torch.linalg.solve(KKT, torch.cat([-q, b]))[:6])
    torch.testing.assert_close(quadratic_program(Q, q).x, -torch.linalg.solve(Q, q))
    assert bool((G @ quadratic_program(Q, q, G, h).x <= h + 1e-12).all())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale):
    Q, q, G, h, A, b = program()
    plain = quadratic_program(Q, q, G, h, A, b)
    other = quadratic_program(scale * Q, scale * q, 3 * G, 3 * h, A / scale, b / scale)
    torch.testing.assert_close(other.x, plain.x, rtol=0, atol=1e-11)
    torch.testing.assert_close(other.inequality, scale * plain.inequality / 3, rtol=1e-9, atol=1e-11 * scale)


class Svm:
    """The dual: min 1/2 a'Ka - sum a, 0 <= a <= C, y'a = 0, of 30 samples with 4 features, so that K is singular."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        noise = torch.randn(30, generator=generator, dtype=torch.float64)
        self.y = (self.X[:, 0] - 0.5 * self.X[:, 1] + 0.8 * noise).sign()
        self.signed = self.y[:, None] * self.X

    def solve(self, C):
        eye = torch.eye(30, dtype=torch.float64)
        bounds = torch.cat([torch.zeros(30, dtype=torch.float64), C.expand(30)])
        return quadratic_program(
            self.signed @ self.signed.mT, -torch.ones(30, dtype=torch.float64), torch.cat([-eye, eye]), bounds,
            self.y[None], torch.zeros(1, dtype=torch.float64),
        )  # fmt: skip

    def weights(self, C):
        return self.signed.mT @ self.solve(C).x


def test_svm_weights_against_scikit_learn_differences_and_the_closed_form():
    from sklearn.svm import SVC

    problem, C = Svm(), torch.tensor(0.7, dtype=torch.float64)
    w = problem.weights(C)
    peer = SVC(C=0.7, kernel="linear", tol=1e-12).fit(problem.X.numpy(), problem.y.numpy())
    torch.testing.assert_close(w, torch.tensor(peer.coef_[0]), rtol=0, atol=1e-6)
    found = torch.func.jacrev(problem.weights)(C)
    step = 1e-6
    differences = (problem.weights(C + step) - problem.weights(C - step)) / (2 * step)
    torch.testing.assert_close(found, differences, rtol=0, atol=1e-6)
    a, K = problem.solve(C).x, problem.signed @ problem.signed.mT
    bound, free = a > 0.7 - 1e-9, (a > 1e-9) & (a < 0.7 - 1e-9)
    y = problem.y
    system = torch.cat(
        [torch.cat([K[free][:, free], y[free, None]], 1), torch.cat([y[None, free], y.new_zeros(1, 1)], 1)]
    )
    right = -torch.cat([K[free][:, bound].sum(1), y[bound].sum()[None]])
    da = bound.to(torch.float64)
    da[free] = (torch.linalg.pinv(system) @ right)[:-1]
    torch.testing.assert_close(found, problem.signed.mT @ da, rtol=0, atol=1e-8)


def test_what_is_not_unique_is_refused_and_what_is_goes_through():
    Q = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    total = torch.autograd.grad(quadratic_program(Q, q).x.sum(), q)[0]  # x1 + x2 = -(q1 + q2) / 2
    torch.testing.assert_close(total, torch.full((2,), -0.5, dtype=torch.float64))
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(quadratic_program(Q, q).x @ torch.tensor([1.0, -1.0], dtype=torch.float64), q)


def test_a_constraint_with_a_multiplier_of_zero_is_reported():
    one = torch.ones(1, dtype=torch.float64)
    touching = quadratic_program(one[None], 0 * one, one[None], 0 * one)  # min x^2 / 2, x <= 0
    assert bool(touching.degenerate) and float(touching.complementarity) < 1e-12
    assert not bool(quadratic_program(one[None], -one, one[None], 0 * one).degenerate)


def test_single_precision():
    Q, q, G, h, A, b = (t.float() for t in program())
    h.requires_grad_()
    found = quadratic_program(Q, q, G, h, A, b)
    assert found.x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), quadratic_program(*program()).x, rtol=0, atol=1e-5)
    assert torch.autograd.grad(found.x.sum(), h)[0].dtype == torch.float32


def test_what_is_refused():
    Q, q, G, h, *_ = (t[0] for t in program(batch=1))
    with pytest.raises(NotConverged, match="feasible"):
        quadratic_program(Q, q, torch.stack([G[0], -G[0]]), torch.tensor([-1.0, -1.0], dtype=torch.float64))
    with pytest.raises(NotConverged, match="bounded"):
        quadratic_program(torch.zeros_like(Q), q, G[:1], h[:1])
    with pytest.raises(ConditionError, match="positive semidefinite"):
        quadratic_program(-Q, q)
    with pytest.raises(ShapeError, match="given together"):
        quadratic_program(Q, q, G)
    with pytest.raises(ShapeError, match="G \\(m, n\\)"):
        quadratic_program(Q, q, G[:, :3], h)
    with pytest.raises(ShapeError, match="batch"):
        quadratic_program(Q.expand(2, 6, 6), q.expand(3, 6))
    with pytest.raises(DataError, match="h has to have"):
        quadratic_program(Q, q, G, torch.full_like(h, torch.inf))
