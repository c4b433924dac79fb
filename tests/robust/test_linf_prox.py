"""The maximum norm's proximal map in a box: the two exact versions, optimality, a conic solver."""

import pytest
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import linf_prox


def problem(count, size, seed, active=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand(count, size, generator=generator, dtype=torch.float64)

    delta = 2 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    low, high = (-draw(0, 1.5), draw(0, 1.5)) if active else (-draw(9, 10), draw(9, 10))
    lam = 3 * size * torch.rand(count, generator=generator, dtype=torch.float64) ** 3
    return delta, draw(0.1, 2), lam, low, high


def objective(p, delta, weight, lam):
    return lam * p.abs().amax(1) + (weight * (p - delta) ** 2).sum(1) / 2


@pytest.mark.parametrize("size", [1, 2, 7, 60])
@pytest.mark.parametrize("active", [True, False])
def test_both_versions_agree_to_1e_12_on_a_thousand_cases(size, active):
    delta, weight, lam, low, high = problem(1000, size, size, active)
    bracketed = linf_prox(delta, weight, lam, low, high, sort=False)
    assert torch.allclose(bracketed, linf_prox(delta, weight, lam, low, high, sort=True), rtol=0, atol=1e-12)
    inside = delta.clamp(low, high)
    assert bool(((bracketed >= low) & (bracketed <= high)).all())
    if active and size > 1:
        assert float((inside != delta).double().mean()) > 0.3
        assert bool((bracketed.abs().amax(1) < inside.abs().amax(1)).any())


@pytest.mark.parametrize("kind", ["plain", "ties", "heavy", "no pull", "large lam", "zeros"])
def test_guesses_of_any_quality_do_not_matter(kind):
    delta, weight, lam, low, high = problem(6, 7000, 8)
    if kind == "ties":
        delta, low, high = (g.mul(8).round() / 8 for g in (delta, low, high))
    elif kind == "heavy":
        weight = torch.where(torch.arange(7000) % 997 == 3, 1e4 * weight, 1e-3 * weight)
    elif kind == "no pull":
        weight[:, ::2], lam = 0, 0.5 * lam
    elif kind == "large lam":
        lam = lam * torch.logspace(-3, 3, 6, dtype=torch.float64)
    elif kind == "zeros":
        delta[:3], low[3:], high[3:] = 0, 0, 0
    few, all_of_them = (linf_prox(delta, weight, lam, low, high, sort=sort) for sort in (False, True))
    assert torch.allclose(few, all_of_them, rtol=0, atol=1e-12)


def test_the_threshold_is_that_of_a_search_over_all_break_points():
    delta, weight, lam, low, high = problem(200, 9, 3)
    p = linf_prox(delta, weight, lam, low, high, sort=False)
    boxed = delta.clamp(low, high)
    best = torch.full((200,), torch.inf, dtype=torch.float64)
    for t in torch.linspace(0, 1.5, 3001, dtype=torch.float64):
        best = torch.minimum(best, objective(boxed.clamp(-t, t), delta, weight, lam))
    value = objective(p, delta, weight, lam)
    assert bool((value <= best + 1e-12).all())
    assert bool((value >= best - 0.01).all())


@pytest.mark.parametrize("sort", [False, True])
def test_where_newton_alone_passes_over_the_solution(sort):
    delta = torch.tensor([[1.0, 0.6]], dtype=torch.float64)
    high = torch.tensor([[0.3, 1.0]], dtype=torch.float64)
    p = linf_prox(delta, torch.ones_like(delta), 0.5, -high, high, sort)
    assert p.tolist() == [[0.3, 0.3]]


@pytest.mark.parametrize("sort", [False, True])
def test_edges_of_the_problem(sort):
    delta = torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.float64)
    one = torch.ones_like(delta)
    assert torch.equal(linf_prox(delta, one, 0.0, sort=sort), delta)
    assert torch.equal(linf_prox(delta, one, 5.5, sort=sort), 0 * delta)
    assert torch.allclose(linf_prox(delta, one, 1.0, sort=sort), torch.tensor([[2, -2, 0.5]]).double())
    assert torch.allclose(linf_prox(delta, one, 2.0, sort=sort), torch.tensor([[1.5, -1.5, 0.5]]).double())
    assert torch.equal(linf_prox(delta, 0 * one, 1.0, sort=sort), 0 * delta)
    assert torch.equal(linf_prox(0 * delta, one, 1.0, sort=sort), 0 * delta)
    tied = torch.tensor([[1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(linf_prox(tied, torch.ones_like(tied), 2.0, sort=sort), 0.5 * tied)


def test_samples_of_one_batch_do_not_mix():
    delta, weight, lam, low, high = (g[:20] for g in problem(20, 400, 5))
    lam[3], lam[7] = 0, 1e6
    alone = [linf_prox(*(g[i : i + 1] for g in (delta, weight, lam, low, high)), sort=False) for i in range(20)]
    together = linf_prox(delta, weight, lam, low, high, sort=False)
    assert torch.allclose(torch.cat(alone), together, rtol=0, atol=1e-13)
    shaped = linf_prox(*(g.reshape(20, 4, 10, 10) for g in (delta, weight)), lam,
                       *(g.reshape(20, 4, 10, 10) for g in (low, high)))  # fmt: skip
    assert torch.equal(shaped.flatten(1), linf_prox(delta, weight, lam, low, high, sort=True)), "few are sorted"


def test_single_precision_sums_in_double():
    delta, weight, lam, low, high = problem(3, 20_000, 6)
    exact = linf_prox(delta, weight, lam, low, high, sort=False)
    narrow = linf_prox(*(g.float() for g in (delta, weight, lam, low, high)))
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sort", [False, True])
def test_equal_to_a_conic_solver(sort):
    clarabel = pytest.importorskip("clarabel")
    sparse = pytest.importorskip("scipy.sparse")
    for delta, weight, lam, low, high in zip(*problem(25, 8, 11), strict=True):
        n = len(delta)
        eye, ones, none = sparse.eye(n), sparse.csc_matrix([[1.0]] * n), sparse.csc_matrix((n, 1))
        blocks = [[eye, -ones], [-eye, -ones], [eye, none], [-eye, none]]  # |p| <= t, low <= p <= high
        bounds = torch.cat([torch.zeros(2 * n), high, -low]).double().numpy()
        linear = torch.cat([-weight * delta, lam[None]]).numpy()
        quadratic = sparse.diags(torch.cat([weight, torch.zeros(1)]).numpy()).tocsc()
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-13
        solver = clarabel.DefaultSolver(
            quadratic, linear, sparse.bmat(blocks).tocsc(), bounds, [clarabel.NonnegativeConeT(4 * n)], settings
        )
        expected = torch.tensor(solver.solve().x[:n], dtype=torch.float64)
        p = linf_prox(*(g[None] for g in (delta, weight)), lam[None], low[None], high[None], sort)[0]
        assert torch.allclose(p, expected, rtol=0, atol=1e-9)


def test_refusals():
    delta = torch.ones(2, 3)
    with pytest.raises(ShapeError, match="batch"):
        linf_prox(delta, torch.ones(2, 1), 1.0)
    with pytest.raises(ShapeError, match="one for each of 2"):
        linf_prox(delta, delta, torch.ones(3))
    with pytest.raises(SettingsError, match="not negative"):
        linf_prox(delta, delta, -1.0)
    with pytest.raises(DataError, match="holds 0"):
        linf_prox(delta, delta, 1.0, low=0.5 * delta)
    with pytest.raises(DataError, match="finite"):
        linf_prox(delta * torch.nan, delta, 1.0)
    with pytest.raises(DataError, match="negative"):
        linf_prox(delta, -delta, 1.0)
