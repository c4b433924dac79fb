"""Risks: closed forms, a conic solver, derivatives, masks and groups, and what is refused."""

from __future__ import annotations

import math
import warnings

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch.autograd import grad, gradcheck, gradgradcheck

import firmly as fm
from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import KL, Chi2, CVaR, KLPenalty, TotalVariation, risk, worst_case

f64 = torch.float64
LOSSES = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=f64)
SETS = {"kl": KL, "chi2": Chi2, "cvar": CVaR, "tv": TotalVariation, "kl-penalty": KLPenalty}
BALLS = {"kl": KL, "chi2": Chi2, "cvar": CVaR, "tv": TotalVariation}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


CLOSED = [
    ("kl", 0.1, 2.4250348668, 1.1177835084),
    ("kl", 0.4, 3.0938487626, 0.5759884226),
    ("chi2", 0.1, 2.4114378278, 1.0885621722),
    ("chi2", 0.4, 3.0711981207, 0.5169541085),
    ("cvar", 0.5, 3.0, 0.5),
    ("cvar", 0.3, 11 / 3, 1 / 6),
    ("tv", 0.2, 2.55, 0.95),
    ("tv", 0.4, 3.2, 0.45),
    ("kl-penalty", 1.0, math.log((1 + math.e + math.e**2 + math.e**4) / 4), 0.9665777148),
    ("chi2", 1.5, 4.0, 0.0),
    ("chi2", 7.0, 4.0, 0.0),
    ("kl", math.log(4), 4.0, 0.0),
    ("kl", 9.0, 4.0, 0.0),
    ("tv", 1.0, 4.0, 0.0),
    ("cvar", 1.0, 1.75, 1.75),
    ("kl", 0.0, 1.75, 1.75),
    ("chi2", 0.0, 1.75, 1.75),
    ("tv", 0.0, 1.75, 1.75),
]


@pytest.mark.parametrize("divergence, radius, sup, inf", CLOSED)
def test_values_of_the_notes(divergence, radius, sup, inf):
    assert float(fm.robust.risk(LOSSES, divergence=divergence, radius=radius)) == pytest.approx(sup, abs=2e-10)
    assert float(risk(LOSSES, divergence=divergence, radius=radius, sense="inf")) == pytest.approx(inf, abs=2e-10)


def oracle(name: str, radius: float, losses: np.ndarray, p: np.ndarray) -> float:
    """max over q in the set of <q, l>, by clarabel."""
    n = len(losses)
    one, eye, zero = np.ones((1, n)), np.eye(n), np.zeros((n, n))
    if name == "cvar":
        return -solved(-losses, [one, -eye, eye], [[1.0], np.zeros(n), p / radius], [1, 2 * n])
    if name == "tv":  # variables q, s with |q - p| <= s
        rows = [np.hstack([one, 0 * one]), np.hstack([-eye, zero]), np.hstack([eye, -eye]), np.hstack([-eye, -eye]),
                np.hstack([0 * one, one])]  # fmt: skip
        right = [[1.0], np.zeros(n), p, -p, [2 * radius]]
        return -solved(np.concatenate([-losses, np.zeros(n)]), rows, right, [1, 3 * n + 1])
    if name == "chi2":
        cone = np.vstack([np.zeros((1, n)), -np.diag(1 / np.sqrt(p))])
        right = [[1.0], np.zeros(n), np.concatenate([[math.sqrt(2 * radius)], -np.sqrt(p)])]
        return -solved(-losses, [one, -eye, cone], right, [1, n], soc=n + 1)
    # KL: variables q, s; (-s_i, q_i, p_i) in the exponential cone says q_i log(q_i / p_i) <= s_i; sum s <= radius
    cone, right = np.zeros((3 * n, 2 * n)), np.zeros(3 * n)
    for i in range(n):
        cone[3 * i, n + i], cone[3 * i + 1, i], right[3 * i + 2] = 1.0, -1.0, p[i]
    rows = [np.hstack([one, 0 * one]), np.hstack([0 * one, one]), cone]
    return -solved(np.concatenate([-losses, np.zeros(n)]), rows, [[1.0], [radius], right], [1, 1], exponential=n)


def solved(cost, rows, right, sizes, soc: int = 0, exponential: int = 0) -> float:
    cones = [clarabel.ZeroConeT(sizes[0]), clarabel.NonnegativeConeT(sizes[1])]
    cones += [clarabel.SecondOrderConeT(soc)] if soc else []
    cones += [clarabel.ExponentialConeT()] * exponential
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    size = len(cost)
    A, b = sparse.csc_matrix(np.vstack(rows)), np.concatenate([np.asarray(r, dtype=float) for r in right])
    solution = clarabel.DefaultSolver(sparse.csc_matrix((size, size)), np.asarray(cost), A, b, cones, settings).solve()
    assert str(solution.status) in ("Solved", "AlmostSolved")
    return float(solution.obj_val)


@pytest.mark.parametrize("sense", ["sup", "inf"])
@pytest.mark.parametrize("name", BALLS)
def test_duals_equal_a_conic_solver(name, sense):
    for seed, radius in enumerate((0.02, 0.1, 0.4, 0.9)):
        losses = randn(60, seed=seed).exp()
        p = randn(60, seed=seed + 100).exp()
        p = p / p.sum()
        sign = 1 if sense == "sup" else -1
        expected = sign * oracle(name, radius, sign * losses.numpy(), p.numpy())
        found = worst_case(losses, p, divergence=name, radius=radius, sense=sense)
        assert float(found.risk) == pytest.approx(expected, abs=1e-6)
        in_ball(name, radius, found.weights, p)


def in_ball(name: str, radius: float, q: torch.Tensor, p: torch.Tensor) -> None:
    assert float(q.sum()) == pytest.approx(1, abs=1e-12) and bool((q >= 0).all())
    if name == "kl":
        assert float(torch.special.xlogy(q, q / p).sum()) <= radius * (1 + 1e-10) + 1e-13
    elif name == "chi2":
        assert float((p * (q / p - 1) ** 2).sum() / 2) <= radius * (1 + 1e-10) + 1e-13
    elif name == "cvar":
        assert bool((q <= p / radius * (1 + 1e-12)).all())
    else:
        assert float((q - p).abs().sum() / 2) <= radius * (1 + 1e-12)


@pytest.mark.parametrize("radius", [1e-12, 1e-6, 1e-3, 0.1, 1.0, 3.0, 5.0, 20.0])
@pytest.mark.parametrize("name", ["kl", "chi2"])
def test_every_radius_stays_in_the_ball_and_attains_its_dual(name, radius):
    for seed, losses in enumerate((randn(200).exp() ** 3, randn(200), (randn(200) > 1).double(), 1e9 + randn(200))):
        found = worst_case(losses, divergence=name, radius=radius)
        in_ball(name, radius, found.weights, torch.full((200,), 1 / 200, dtype=f64))
        bound = dual(name, radius, losses)
        assert float(found.risk) <= bound + 1e-9 * float(losses.abs().max())
        assert float(found.risk) >= bound - 1e-7 * float(losses.max() - losses.min()), (seed, bound)


def dual(name: str, radius: float, losses: torch.Tensor) -> float:
    """The dual function, minimised on a grid and then between the neighbours of the best point: an upper bound."""
    centred = (losses - losses.max()).numpy()
    width = -centred.min()

    def function(x: float) -> float:
        if name == "kl":
            return x * radius + x * (logsumexp(centred / x) - math.log(len(centred)))
        return x + math.sqrt(1 + 2 * radius) * math.sqrt((np.maximum(centred - x, 0) ** 2).mean())

    grid = width * np.logspace(-4, 7, 500)
    if name == "chi2":
        grid = np.sort(np.concatenate([-grid, width * np.linspace(-1, 0, 200)]))
    best = int(np.argmin([function(x) for x in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(function, bounds=ends, method="bounded", options={"xatol": 1e-11 * abs(grid[best])})
    return float(losses.max()) + min(0.0, found.fun)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("sense", ["sup", "inf"])
def test_batches_equal_loops_and_orders_do_not_matter(name, sense):
    losses, mask = randn(7, 3, 5, seed=3), randn(7, 3, 5, seed=4) > -0.5
    ambiguity = SETS[name](0.3)
    together = ambiguity.worst_case(losses, mask, sense)
    for i in range(7):
        alone = worst_case(losses[i][mask[i]], divergence=name, radius=0.3, sense=sense)
        assert float((together.weights[i][mask[i]] - alone.weights).abs().max()) < 1e-12
        assert float(together.risk[i] - alone.risk) == pytest.approx(0, abs=1e-12)
    assert bool((together.weights[~mask] == 0).all())


@pytest.mark.parametrize("name", SETS)
def test_ties_share_their_weight(name):
    losses = torch.tensor([0.0, 1.0, 1.0, 1.0, 3.0, 3.0], dtype=f64)
    for radius in (0.05, 0.2, 0.45, 0.8):
        weights = worst_case(losses, divergence=name, radius=radius).weights
        assert float(weights[1:4].max() - weights[1:4].min()) < 1e-15
        assert float(weights[4] - weights[5]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("sense", ["sup", "inf"])
@pytest.mark.parametrize("name", SETS)
def test_first_and_second_derivatives(name, sense):
    x, radius = randn(2, 7, seed=5).requires_grad_(), torch.tensor(0.33, dtype=f64, requires_grad=True)

    def value(x, radius):
        return SETS[name](radius).risks(x, sense=sense)

    def gradient(x, radius):
        return grad(value(x, radius).sum(), x, create_graph=True)[0]

    assert gradcheck(value, (x, radius))
    assert gradgradcheck(lambda x: value(x, radius.detach()), (x,))
    assert gradcheck(gradient, (x, radius)), "what a hypergradient in the radius needs"


@pytest.mark.parametrize("name", SETS)
def test_the_gradient_is_the_weights_and_exactly_zero_on_void(name):
    losses = randn(2, 3, 4, 5).requires_grad_()  # (batch, class, height, width)
    mask = randn(2, 1, 4, 5, seed=1) > 0
    with torch.no_grad():
        poisoned = torch.where(mask, losses, torch.tensor(math.nan, dtype=f64)).requires_grad_()
    for over in ("pixel", "image", "class"):
        found = worst_case(poisoned, mask, over=over, divergence=name, radius=0.2)
        (slope,) = grad(found.risk, poisoned)
        assert torch.allclose(slope, found.weights, atol=1e-14)
        assert bool((slope[~mask.expand_as(slope)] == 0).all())
        assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)


def test_groups():
    losses, labels = randn(2, 4, 4).exp(), torch.arange(32).reshape(2, 4, 4) % 3
    means = torch.stack([losses[labels == k].mean() for k in range(3)])
    assert float(risk(losses, over=labels, divergence="cvar", radius=1 / 3)) == pytest.approx(float(means.max()))
    assert float(risk(losses, over=7 * labels - 9, divergence="kl", radius=0.2)) == pytest.approx(
        float(risk(means, divergence="kl", radius=0.2))
    )
    maps = randn(2, 3, 4, 4)  # three annotators
    by_annotator = maps.mean((0, 2, 3))
    found = risk(maps, over="annotator", divergence="tv", radius=0.1)
    assert float(found) == pytest.approx(float(risk(by_annotator, divergence="tv", radius=0.1)))
    volumes = randn(3, 2, 4, 5, 6)
    images = volumes.flatten(1).mean(1)
    assert float(risk(volumes, over="image", radius=0.3)) == pytest.approx(float(risk(images, radius=0.3)))


def test_a_mask_is_never_taken_for_that_of_another_dimension():
    losses, mask = randn(2, 3, 4, 5), randn(2, 4, 5, seed=1) > 0
    assert torch.equal(risk(losses, mask), risk(losses, mask.unsqueeze(1)))
    assert torch.equal(risk(losses, over=mask.long()), risk(losses, over=mask.long().unsqueeze(1)))
    with pytest.raises(ShapeError):
        risk(randn(3, 3, 4, 5), randn(3, 4, 5) > 0)  # images or classes?
    with pytest.raises(ShapeError):
        risk(randn(4, 4, 4), randn(4, 4) > 0)


def test_groups_without_a_valid_entry_do_not_exist():
    losses, mask = randn(3, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool)
    mask[1] = False
    kept = losses[[0, 2]].mean((1, 2))
    assert float(risk(losses, mask, over="image", radius=0.1)) == pytest.approx(float(risk(kept, radius=0.1)))


def test_pessimistic_over_images_of_optimistic_over_pixels():
    losses = randn(4, 6, 6).exp().requires_grad_()
    mask = randn(4, 6, 6, seed=9) > -1
    inner = CVaR(0.8).worst_case(losses, mask, sense="inf")
    outer = worst_case(inner.risk, over="image", divergence="cvar", radius=0.25)
    assert outer.risk.item() == pytest.approx(inner.risk.max().item())
    (slope,) = grad(outer.risk, losses)
    assert torch.allclose(slope, outer.weights[:, None, None] * inner.weights)


def test_trim_leaves_out_the_largest_losses():
    losses = randn(100).exp()
    ordered = losses.sort().values
    assert float(risk(losses, divergence="kl", radius=0.0, trim=0.1)) == pytest.approx(float(ordered[:90].mean()))
    # ranks eps B to (eps + a (1 - eps)) B of DORO
    doro = ordered.flip(0)[10:55].mean()
    assert float(risk(losses, divergence="cvar", radius=0.5, trim=0.1)) == pytest.approx(float(doro))


def test_single_precision_of_ten_thousand_batches_and_half():
    losses = randn(10_000, 50).float().exp()
    single, double = KL(0.2).risks(losses), KL(0.2).risks(losses.double())
    assert single.dtype == torch.float32
    assert float((single - double).abs().max()) < 1e-5
    assert risk(losses.bfloat16(), divergence="chi2", radius=0.1).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SETS)
def test_single_precision_far_from_zero_is_exact_on_its_numbers(name):
    # many atoms in pieces, with a spacing of 1/16 between them, beside the same numbers in double precision
    losses = (1e6 + 3 * randn(300_000)).float()
    weights = (randn(300_000, seed=1) > 0.2).float() * 0.5
    for mask in (None, weights > 0, weights + weights.roll(1)):
        for radius in (0.05, 0.9):
            found = worst_case(losses.double(), mask, divergence=name, radius=radius)
            one = SETS[name](radius).worst_case(losses.unsqueeze(0), None if mask is None else mask.unsqueeze(0))
            assert float(one.weights.double().sum()) == pytest.approx(1, abs=1e-5)
            assert torch.allclose(one.weights[0].double(), found.weights, rtol=1e-5, atol=1e-12)
            assert float(one.risk) == pytest.approx(float(found.risk), abs=0.07)


def test_a_mass_of_outliers_far_below_rounding():
    losses, masses = torch.zeros(1000, dtype=f64), torch.ones(1000, dtype=f64)
    losses[0], masses[0] = 1.0, 1e-18
    for name in SETS:
        found = worst_case(losses, masses, divergence=name, radius=0.5)
        assert bool(found.weights.isfinite().all()) and float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
        in_ball(name, 0.5, found.weights, masses / masses.sum()) if name in BALLS else None


def test_pessimism_about_noisy_labels_warns():
    with pytest.warns(UserWarning, match="wrong"):
        risk(LOSSES, labels="noisy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        risk(LOSSES, labels="noisy", sense="inf")
        risk(LOSSES)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"divergence": "renyi"}, SettingsError),
        ({"divergence": KL(0.1), "radius": 0.2}, SettingsError),
        ({"radius": -0.1}, SettingsError),
        ({"radius": math.nan}, SettingsError),
        ({"radius": torch.zeros(2)}, SettingsError),
        ({"divergence": "cvar", "radius": 0.0}, SettingsError),
        ({"divergence": "cvar", "radius": 1.1}, SettingsError),
        ({"divergence": "tv", "radius": 1.1}, SettingsError),
        ({"divergence": "kl-penalty", "radius": 0.0}, SettingsError),
        ({"sense": "max"}, SettingsError),
        ({"trim": 1.0}, SettingsError),
        ({"trim": -0.1}, SettingsError),
        ({"over": "voxel"}, SettingsError),
        ({"losses": torch.rand(5000), "divergence": "wasserstein"}, SettingsError),
        ({"over": torch.zeros(4)}, SettingsError),
        ({"over": torch.zeros(3, dtype=torch.long)}, ShapeError),
        ({"over": "class"}, ShapeError),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, DataError),
        ({"mask": torch.tensor([1.0, 1.0, -1.0, 1.0])}, DataError),
        ({"mask": torch.ones(3)}, ShapeError),
        ({"mask": torch.ones(4, requires_grad=True)}, DataError),
        ({"losses": torch.tensor([1.0, math.inf])}, DataError),
        ({"losses": torch.tensor([1.0, math.nan])}, DataError),
        ({"losses": torch.tensor([1, 2])}, DataError),
        ({"losses": torch.tensor([])}, DataError),
        ({"radius": torch.tensor(0.0, requires_grad=True)}, SettingsError),
    ],
)
def test_bad_input_is_refused(arguments, error):
    with pytest.raises(error):
        risk(**({"losses": LOSSES} | arguments))


def test_second_derivatives_in_the_radius_are_refused_not_wrong():
    radius = torch.tensor(0.3, dtype=f64, requires_grad=True)
    (slope,) = grad(risk(LOSSES, radius=radius), radius, create_graph=True)
    with pytest.raises(SettingsError):
        grad(slope, radius)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", SETS)
def test_cuda(name):
    losses = randn(3, 50)
    apart = SETS[name](0.2).risks(losses.cuda()).cpu() - SETS[name](0.2).risks(losses)
    assert float(apart.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["log-normal", "uniform", "tied", "rare", "masses"])
@pytest.mark.parametrize("radius", [0.01, 1.0, 20.0])
def test_the_guess_of_many_atoms_does_not_matter(kind, radius, monkeypatch):
    from firmly.robust import divergences

    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(20_000, generator=generator, dtype=torch.float64).exp()
    masses = torch.rand(20_000, generator=generator) if kind == "masses" else None
    if kind == "uniform":
        losses = torch.rand(20_000, generator=generator, dtype=torch.float64)
    elif kind == "tied":
        losses = losses.clamp(max=4).floor()
    elif kind == "rare":
        losses[:-3] = 0
    plain = worst_case(losses, masses, divergence="chi2", radius=radius)
    for sample in (50, 1000):  # guesses of all qualities
        monkeypatch.setattr(divergences, "MANY", 1000)
        monkeypatch.setattr(divergences, "SAMPLE", sample)
        found = worst_case(losses, masses, divergence="chi2", radius=radius)
        assert float(found.risk) == pytest.approx(float(plain.risk), rel=1e-12)
        torch.testing.assert_close(found.weights, plain.weights, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("guess", [-0.999, -0.5, -0.1, -1e-6])
def test_any_guess_gives_the_same_law(guess, monkeypatch):
    from firmly.robust.divergences import Chi2

    generator = torch.Generator().manual_seed(0)
    losses, masses = torch.randn(100, generator=generator, dtype=torch.float64), torch.rand(100, generator=generator)
    plain = worst_case(losses, masses, divergence="chi2", radius=0.5)
    monkeypatch.setattr(Chi2, "guess", lambda self, rows: torch.full_like(rows.total, guess))
    found = worst_case(losses, masses, divergence="chi2", radius=0.5)
    torch.testing.assert_close(found.weights, plain.weights, rtol=1e-12, atol=0)
