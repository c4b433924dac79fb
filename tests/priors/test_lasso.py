"""Sparse coding: every answer is proved by its duality gap, and equal to other ways to the same optimum."""

from __future__ import annotations

import itertools

import pytest
import torch

import firmly as fm
from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors import Penalty, SparseCodingStatus, duality_gap, lasso, lasso_path, weight_max

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def objective(D, y, penalty: Penalty, z):
    weight = penalty.weight.to(z)
    sizes = z.abs() if penalty.group == 1 else z.unflatten(1, (-1, penalty.group)).norm(dim=2)
    smooth = (y - z @ D.T).square().sum(1) / 2 + penalty.curvature / 2 * z.square().sum(1)
    return smooth + (weight * sizes).sum(1)


def slow(D, y, penalty: Penalty, steps: int = 10_000):
    """Plain proximal gradients, written out."""
    L = torch.linalg.matrix_norm(D, 2) ** 2 + penalty.curvature
    z = y.new_zeros(len(y), D.shape[1])
    for _ in range(steps):
        v = z - ((z @ D.T - y) @ D + penalty.curvature * z) / L
        v = v.clamp(min=0) if penalty.nonnegative else v
        sizes = v.unflatten(1, (-1, penalty.group)).norm(dim=2, keepdim=True).clamp(min=1e-300)
        shrink = (1 - penalty.weight.expand(len(y), sizes.shape[1])[..., None] / L / sizes).clamp(min=0)
        z = (v.unflatten(1, (-1, penalty.group)) * shrink).flatten(1)
    return z


D, Y = normal(12, 20), normal(6, 12, seed=1)
WEIGHTS = 0.2 + normal(20, seed=2).abs()
PENALTIES = {
    "l1": Penalty(0.7),
    "one weight for each problem": Penalty(torch.linspace(0.3, 3, 6, dtype=F64)[:, None]),
    "one weight for each atom": Penalty(WEIGHTS),
    "elastic net": Penalty(0.7, curvature=0.3),
    "non-negative": Penalty(0.4, nonnegative=True),
    "non-negative elastic net": Penalty(WEIGHTS, curvature=0.1, nonnegative=True),
    "groups": Penalty(0.7, group=4),
    "non-negative groups": Penalty(torch.linspace(0.3, 2, 5, dtype=F64), group=4, nonnegative=True),
    "elastic groups": Penalty(0.7, curvature=0.2, group=2),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_the_optimum_is_that_of_plain_proximal_gradients(name):
    penalty = PENALTIES[name]
    found = lasso(D, Y, penalty, tol=1e-13)
    assert found.status is SparseCodingStatus.CONVERGED and bool(found.converged.all())
    torch.testing.assert_close(found.objective, objective(D, Y, penalty, slow(D, Y, penalty)), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.objective, objective(D, Y, penalty, found.code), rtol=1e-13, atol=0)
    assert (found.gap <= 1e-13 * Y.square().sum(1) / 2).all()
    assert not penalty.nonnegative or (found.code >= 0).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_the_gap_bounds_the_suboptimality_of_any_code(name):
    penalty = PENALTIES[name]
    least = lasso(D, Y, penalty, tol=1e-13).objective
    for seed, scale in itertools.product(range(5), (1e-3, 0.1, 1.0)):
        z = lasso(D, Y, penalty, tol=1e-13).code + scale * normal(6, 20, seed=seed + 3)
        z = z.clamp(min=0) if penalty.nonnegative else z
        found = duality_gap(D, Y, penalty, z)
        torch.testing.assert_close(found.objective, objective(D, Y, penalty, z), rtol=1e-12, atol=0)
        assert (found.gap >= found.objective - least - 1e-12).all()


def test_a_square_identity_is_the_soft_threshold():
    found = lasso(torch.eye(12, dtype=F64), Y, 0.5, tol=1e-14)
    torch.testing.assert_close(found.code, fm.prox.L1(0.5).prox(Y), rtol=0, atol=1e-12)


def test_the_best_of_all_supports_and_signs():
    D, y, w = normal(3, 4, seed=5), normal(1, 3, seed=6), 0.3
    best = float("inf")
    for signs in itertools.product((-1, 0, 1), repeat=4):
        s = torch.tensor(signs, dtype=F64)
        A = [i for i in range(4) if signs[i]]
        if len(A) > 3:
            continue
        z = torch.zeros(4, dtype=F64)
        if A:
            z[A] = torch.linalg.solve(D[:, A].T @ D[:, A], D[:, A].T @ y[0] - w * s[A])
        best = min(best, float(objective(D, y, Penalty(w), z[None])))
    assert abs(float(lasso(D, y, w, tol=1e-14).objective) - best) < 1e-12


HARD = {
    "tall": normal(60, 12),
    "repeated atoms": torch.cat([D, -D[:, :5]], 1),
    "atoms of zeros": torch.cat([D, torch.zeros(12, 3, dtype=F64)], 1),
    "correlated": normal(12, 2) @ normal(2, 30, seed=1) + 0.05 * normal(12, 30, seed=2),
    "of all sizes": D * torch.logspace(-3, 3, 20, dtype=F64),
    "one atom": D[:, :1],
    "zeros": 0 * D,
    "huge": 1e12 * D,
}


@pytest.mark.parametrize("factor", [0.5, 0.05, 0.003])
@pytest.mark.parametrize("name", HARD)
def test_hard_dictionaries(name, factor):
    D = HARD[name]
    y = normal(7, D.shape[0], seed=3)
    y[2] = 0
    w = factor * weight_max(D, y)[:, None].clamp(min=1e-9)
    found = lasso(D, y, w, tol=1e-8)
    assert found.status is SparseCodingStatus.CONVERGED
    torch.testing.assert_close(duality_gap(D, y, w, found.code).gap, found.gap, rtol=1e-6, atol=1e-11)
    assert (found.code[2] == 0).all() and found.gap[2] == 0


def test_a_batch_is_its_problems():
    D, y = normal(30, 70), normal(9, 30, seed=1)
    together = lasso(D, y, 2.0, tol=1e-12)
    for i in range(9):
        alone = lasso(D, y[i : i + 1], 2.0, tol=1e-12)
        torch.testing.assert_close(alone.code[0], together.code[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.objective[0], together.objective[i], rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["l1", "one weight for each atom", "elastic net", "non-negative"])
def test_many_atoms_go_through_working_sets(name):
    D, y = normal(40, 1500), normal(2, 40, seed=1)
    weights = 6 + normal(1500, seed=2).abs()
    penalty = {
        "l1": Penalty(torch.tensor([[6.0], [2.0]], dtype=F64)),
        "one weight for each atom": Penalty(weights),
        "elastic net": Penalty(6.0, curvature=0.5),
        "non-negative": Penalty(2.0, nonnegative=True),
    }[name]
    found = lasso(D, y, penalty, tol=1e-12)
    assert found.status is SparseCodingStatus.CONVERGED and ((found.code != 0).sum(1) > 5).all()
    gap = duality_gap(D, y, penalty, found.code)
    assert (gap.gap <= 2e-12 * y.square().sum(1) / 2).all()
    torch.testing.assert_close(gap.objective, found.objective, rtol=1e-12, atol=0)
    # the same problems among so many others that the Gram matrix of all atoms pays
    weights = penalty.on(y, 1500).weight.expand(2, -1).repeat(20, 1)
    many = lasso(D, y.repeat(20, 1), penalty.weighing(weights), tol=1e-12)
    torch.testing.assert_close(many.objective[:2], found.objective, rtol=1e-10, atol=0)
    warm = lasso(D, y, penalty, tol=1e-11, start=found.code)
    assert (warm.iterations == 0).all()


def test_working_sets_in_single_precision():
    D, y = normal(40, 1500).float(), normal(1, 40, seed=1).float()
    assert lasso(D, y, 4.0).status is SparseCodingStatus.CONVERGED
    assert lasso(D, y, 4.0, tol=1e-14).status is SparseCodingStatus.PRECISION
    assert lasso(D, y, 0.5, tol=1e-12, max_iterations=3).status is SparseCodingStatus.LIMIT


@pytest.mark.parametrize("atoms", [60, 3000])
def test_the_objective_is_that_of_scikit_learn(atoms):
    linear_model = pytest.importorskip("sklearn.linear_model")
    D, y = normal(50, atoms), normal(1, 50, seed=1)
    w = float(0.1 * weight_max(D, y))
    found = lasso(D, y, w, tol=1e-12)
    peer = linear_model.Lasso(alpha=w / 50, fit_intercept=False, tol=1e-12, max_iter=10**6).fit(D.numpy(), y[0].numpy())
    theirs = duality_gap(D, y, w, torch.from_numpy(peer.coef_)[None]).objective
    torch.testing.assert_close(found.objective, theirs, rtol=1e-8, atol=0)


def test_a_batch_of_more_than_a_chunk_with_a_start():
    D, y = normal(8, 12), normal(1100, 8, seed=1)
    cold = lasso(D, y, 1.0, tol=1e-12)
    warm = lasso(D, y, 1.0, tol=1e-12, start=cold.code)
    assert cold.code.shape == (1100, 12) and (warm.iterations == 0).all()
    torch.testing.assert_close(warm.code, cold.code, rtol=0, atol=0)


def test_float32_reaches_what_it_can_and_says_when_it_cannot():
    found = lasso(D.float(), Y.float(), 0.7, tol=1e-6)
    assert found.code.dtype == torch.float32 and found.gap.dtype == F64
    assert found.status is SparseCodingStatus.CONVERGED
    exact = lasso(D, Y, 0.7, tol=1e-13).objective
    torch.testing.assert_close(found.objective, exact, rtol=1e-5, atol=0)
    refused = lasso(D.float(), Y.float(), 0.7, tol=1e-14)
    assert refused.status is SparseCodingStatus.PRECISION and "float64" in str(refused.status)
    assert (refused.gap < 1e-5).all()


def test_a_limit_is_reported():
    found = lasso(normal(30, 60), normal(4, 30), Penalty(0.01, group=3), max_iterations=10)
    assert found.status is SparseCodingStatus.LIMIT and not bool(found.converged.all())
    assert (found.iterations == 10).all() and "max_iterations" in str(found.status)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_data_that_single_precision_does_not_hold(scale):
    found = lasso(D, scale * Y, scale * 0.7, tol=1e-12)
    assert found.status is SparseCodingStatus.CONVERGED
    torch.testing.assert_close(found.code / scale, lasso(D, Y, 0.7, tol=1e-12).code, rtol=1e-5, atol=1e-6)


def test_an_absolute_tolerance_is_enough():
    assert lasso(D, Y, 0.7, tol=0, absolute_tol=1e-3).status is SparseCodingStatus.CONVERGED


def test_convolutional_dictionaries():
    A = fm.linear.Convolution(normal(1, 3, 5, 5), shape=(3, 9, 9), padding="circular")
    y = normal(2, 1, 9, 9, seed=1)
    found = lasso(A, y, 2.0, tol=1e-9)
    assert found.status is SparseCodingStatus.CONVERGED and found.code.shape == (2, 3, 9, 9)
    dense = lasso(A.matrix(), y.flatten(1), 2.0, tol=1e-12)
    torch.testing.assert_close(found.objective, dense.objective, rtol=1e-8, atol=0)


def test_weight_max_is_where_codes_begin():
    for penalty in (Penalty(1.0), Penalty(WEIGHTS), Penalty(1.0, nonnegative=True), Penalty(1.0, group=4)):
        top = weight_max(D, Y, penalty)[:, None]
        above = lasso(D, Y, penalty.weighing(penalty.weight * top * 1.0001), tol=1e-13)
        below = lasso(D, Y, penalty.weighing(penalty.weight * top * 0.99), tol=1e-13)
        assert (above.code == 0).all() and (below.code != 0).any(1).all()


def test_a_path_is_made_of_solutions():
    path = lasso_path(D, Y, factors=torch.tensor([1.0, 0.5, 0.1, 0.01]), tol=1e-10)
    assert len(path.codes) == 4 and (path.codes[0].code.abs() < 1e-9).all()
    for factor, step in zip(path.factors, path.codes):
        assert step.status is SparseCodingStatus.CONVERGED
        direct = lasso(D, Y, factor * weight_max(D, Y)[:, None], tol=1e-12)
        torch.testing.assert_close(step.objective, direct.objective, rtol=1e-8, atol=0)
    errors = torch.stack([(Y - step.code @ D.T).norm(dim=1) for step in path.codes])
    assert (errors.diff(dim=0) <= 0).all()


@pytest.mark.parametrize(
    "error, arguments",
    [
        (ShapeError, (D, Y[0], 1.0)),
        (ShapeError, (D, normal(3, 11), 1.0)),
        (ShapeError, (D, Y[:0], 1.0)),
        (ShapeError, (D, Y, torch.ones(7))),
        (ShapeError, (D, Y, Penalty(1.0, group=3))),
        (ShapeError, (D[0], Y, 1.0)),
        (DataError, (D, torch.where(Y > 1, torch.nan, Y), 1.0)),
        (DataError, (torch.where(D > 1, torch.inf, D), Y, 1.0)),
        (DataError, (D, Y.to(torch.complex128), 1.0)),
        (DataError, (D, Y.long(), 1.0)),
        (DataError, (D, Y.half(), 1.0)),
        (DataError, (D, 1e160 * Y, 1.0)),
        (SettingsError, (D, Y.float(), 1e-60)),
        (SettingsError, (D, Y, 0.0)),
        (SettingsError, (D, Y, -1.0)),
        (SettingsError, (D, Y, torch.tensor([1.0, torch.nan]))),
        (SettingsError, (D, Y, 1.0, -1e-6)),
        (SettingsError, (D, Y, 1.0, 1e-6, 0.0, 0)),
        (ShapeError, (D, Y, 1.0, 1e-6, 0.0, 10, normal(6, 19))),
    ],
)
def test_bad_input_is_refused(error, arguments):
    with pytest.raises(error):
        lasso(*arguments)


def test_bad_penalties_and_paths_are_refused():
    for settings in ({"curvature": -1.0}, {"group": 0}, {"group": True}):
        with pytest.raises(SettingsError):
            Penalty(1.0, **settings)
    for factors in ([0.5, 0.9], [], [2.0, 1.0], [0.5, 0.0]):
        with pytest.raises(SettingsError):
            lasso_path(D, Y, factors=torch.tensor(factors))


def test_a_negative_code_under_the_constraint_has_no_gap():
    assert duality_gap(D, Y, Penalty(1.0, nonnegative=True), -torch.ones(6, 20, dtype=F64)).gap.isinf().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", PENALTIES)
def test_on_cuda(name):
    penalty = PENALTIES[name]
    found = lasso(D.cuda(), Y.cuda(), penalty, tol=1e-12)
    assert found.code.is_cuda and found.status is SparseCodingStatus.CONVERGED
    torch.testing.assert_close(found.objective.cpu(), lasso(D, Y, penalty, tol=1e-12).objective, rtol=1e-10, atol=0)
