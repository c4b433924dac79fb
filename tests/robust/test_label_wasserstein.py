"""Label Wasserstein risks: the linear program, closed forms of the 0/1 cost, masks, soft labels, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.autograd import grad, gradcheck

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import (
    TotalVariation,
    Wasserstein,
    boundary_distance,
    label_risk,
    ordinal_cost,
    risk,
    tree_cost,
    worst_case,
)

f64 = torch.float64
LOSSES = torch.tensor([[0.1, 2, 0.5], [1, 0.2, 3], [0.3, 0.4, 0.9]], dtype=f64).T.unsqueeze(0)  # (1, class, 3)
LABELS = torch.tensor([[0, 1, 2]])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "budget, zero_one, ordinal", [(1 / 3, (4 / 3, 0.2), (4 / 3, 0.7 / 3)), (0.5, (1.65, 0.2), (1.65, 0.65 / 3))]
)
def test_values_of_the_notes(budget, zero_one, ordinal):
    for cost, expected in ((None, zero_one), (2 * ordinal_cost(3), ordinal)):
        for sense, value in zip(("sup", "inf"), expected):
            found = float(label_risk(LOSSES, LABELS, budget, cost, sense=sense).risk)
            assert found == pytest.approx(value, abs=1e-12)


def program(losses: np.ndarray, laws: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """max over transports t_ijk of sum t l_ik / n: losses and laws (n, K), cost (n, K, K)."""
    n, K = losses.shape
    gain = np.broadcast_to(losses[:, None, :], (n, K, K)).ravel() / n
    finite = np.isfinite(cost).ravel()
    marginal = np.zeros((n * K, n * K * K))
    for row in range(n * K):
        marginal[row, row * K : (row + 1) * K] = 1
    spent = (np.where(np.isfinite(cost), cost, 0).ravel() / n)[None]
    bounds = [(0, None if free else 0) for free in finite]
    found = linprog(-gain, spent, [budget], marginal, laws.ravel(), bounds, method="highs")
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("over", ["image", "pixel", "batch"])
def test_equal_to_the_linear_program(over, soft):
    B, K, n = 3, 4, 8
    for seed, budget in enumerate((0.0, 0.02, 0.1, 0.3, 5.0)):
        losses = -rand(B, K, 2, 4, seed=seed).log()
        cost = rand(K, K, seed=seed + 10) * (1 - torch.eye(K, dtype=f64))
        cost[0, 3] = math.inf
        distance = rand(B, 2, 4, seed=seed + 20)
        laws = rand(B, K, 2, 4, seed=seed + 30).round(decimals=1) + 1e-3
        laws = laws / laws.sum(1, keepdim=True)
        labels = laws if soft else laws.argmax(1)
        P = laws if soft else torch.nn.functional.one_hot(labels, K).movedim(-1, 1).double()
        rows = [t.movedim(1, -1).reshape(B * n, K).numpy() for t in (losses, P)]
        costs = (cost[None] * distance.flatten()[:, None, None]).numpy()
        parts = {"image": np.arange(B * n).reshape(B, n), "batch": np.arange(B * n)[None]}
        pieces = parts.get(over, np.arange(B * n)[:, None])
        for sense, sign in (("sup", 1), ("inf", -1)):
            expected = [sign * program(sign * rows[0][i], rows[1][i], costs[i], budget) for i in pieces]
            found = label_risk(losses, labels, budget, cost, distance, over=over, sense=sense)
            assert np.abs(found.risk.numpy().ravel() - expected).max() < 1e-9
            assert float((found.labels.sum(1) - 1).abs().max()) < 1e-12


def test_the_0_1_cost_changes_the_labels_with_the_largest_regrets():
    losses, labels = -rand(1, 5, 10, 10).log(), (rand(1, 10, 10, seed=1) * 5).long()
    given = losses.gather(1, labels.unsqueeze(1)).squeeze(1)
    for sense, sign, best in (("inf", -1, losses.amin(1)), ("sup", 1, losses.amax(1))):
        regret = (sign * (best - given)).flatten().sort(descending=True).values
        for changed in (0, 7, 23):
            found = label_risk(losses, labels, (changed + 0.25) / 100, sense=sense)
            moved = regret[:changed].sum() + 0.25 * regret[changed]
            assert float(found.risk) == pytest.approx(float(given.mean() + sign * moved / 100), abs=1e-12)
            assert float(found.price) == pytest.approx(float(regret[changed]), abs=1e-12)
            believed = found.labels.argmax(1)
            assert int((believed != labels).sum()) == changed


def test_void_pixels_do_not_count_and_have_no_gradient():
    losses, labels = rand(2, 3, 4, 4), (rand(2, 4, 4, seed=1) * 3).long()
    mask = rand(2, 4, 4, seed=2) > 0.4
    poisoned = torch.where(mask.unsqueeze(1), losses, math.nan).requires_grad_()
    void = torch.where(mask, labels, 255)
    found = label_risk(poisoned, void, 0.1, mask=mask)
    for i in range(2):
        alone = label_risk(losses[i][:, mask[i]].unsqueeze(0), labels[i][mask[i]].unsqueeze(0), 0.1)
        assert found.risk[i].item() == pytest.approx(alone.risk.item(), abs=1e-12)
    (slope,) = grad(found.risk.sum(), poisoned)
    assert bool((slope[~mask.unsqueeze(1).expand_as(slope)] == 0).all())
    assert torch.allclose(slope, found.labels / mask.sum((1, 2)).reshape(2, 1, 1, 1))


@pytest.mark.parametrize("sense", ["sup", "inf"])
def test_an_infinite_distance_keeps_a_label(sense):
    losses = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, distance = torch.tensor([[0, 1, 2, 0]]), torch.ones(1, 4, dtype=torch.float64)
    distance[0, 0] = math.inf
    found = label_risk(losses, labels, 0.3, distance=distance, sense=sense)
    distance[0, 0] = 1e13
    far = label_risk(losses, labels, 0.3, distance=distance, sense=sense)
    torch.testing.assert_close(found.risk, far.risk, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.labels, far.labels, rtol=1e-9, atol=1e-9)


def test_derivatives():
    losses, labels = rand(2, 3, 5).requires_grad_(), (rand(2, 5, seed=1) * 3).long()
    budget = torch.tensor(0.13, dtype=f64, requires_grad=True)
    cost = ordinal_cost(3)
    assert gradcheck(lambda l, b: label_risk(l, labels, b, cost, sense="sup").risk, (losses, budget))
    assert gradcheck(lambda l, b: label_risk(l, labels, b, cost, sense="inf").risk, (losses, budget))
    found = label_risk(losses, labels, budget, cost)
    slope = grad(found.risk.sum(), budget)[0]
    assert slope.item() == pytest.approx(-found.price.sum().item())


def test_a_wasserstein_ball_over_few_atoms():
    losses, p = rand(9).exp(), rand(9, seed=2)
    for radius in (0.0, 0.1, 0.4, 1.0):
        same = risk(losses, p, divergence="wasserstein", radius=radius)
        assert float(same) == pytest.approx(float(risk(losses, p, divergence=TotalVariation(radius))), abs=1e-12)
    cost = ordinal_cost(9)
    law = (p / p.sum()).numpy()
    for radius in (0.03, 0.2):
        for sense, sign in (("sup", 1), ("inf", -1)):
            found = worst_case(losses, p, divergence=Wasserstein(radius, cost), sense=sense)
            expected = sign * program(sign * losses[None].numpy(), law[None], cost[None].numpy(), radius)
            assert float(found.risk) == pytest.approx(expected, abs=1e-9)
    masked = worst_case(losses, torch.arange(9) != int(losses.argmax()), divergence="wasserstein", radius=0.3)
    assert float(masked.weights[losses.argmax()]) == 0 and float(masked.weights.sum()) == pytest.approx(1)
    radius = torch.tensor(0.13, dtype=f64, requires_grad=True)
    assert gradcheck(lambda l, r: risk(l, divergence=Wasserstein(r, cost)), (losses.requires_grad_(), radius))


def test_costs():
    assert ordinal_cost(3).tolist() == [[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]]
    # classes 0, 1 are siblings below node 3; class 2 hangs on the root 4
    cost = tree_cost([3, 3, 4, 4, -1], 3)
    assert torch.allclose(cost, torch.tensor([[0, 2, 3], [2, 0, 3], [3, 3, 0]], dtype=f64) / 3)
    labels = torch.zeros(2, 5, 5, dtype=torch.long)
    labels[0, :, 3:] = 1
    distance = boundary_distance(labels, unit=2.0)
    assert distance[0, 0].tolist() == [1.5, 1.0, 0.5, 0.5, 1.0]
    assert float(distance[1].min()) > 3


@pytest.mark.parametrize(
    "change, error",
    [
        ({"budget": -1.0}, SettingsError),
        ({"budget": math.nan}, SettingsError),
        ({"over": "class"}, SettingsError),
        ({"sense": "max"}, SettingsError),
        ({"labels": torch.tensor([[0, 1, 255]])}, DataError),
        ({"labels": torch.tensor([[0.0, 1, 2]])}, DataError),
        ({"labels": torch.zeros(1, 4, dtype=torch.long)}, ShapeError),
        ({"labels": torch.full((1, 3, 3), 0.5)}, DataError),
        ({"labels": torch.full((1, 3, 3), 1 / 3, requires_grad=True)}, DataError),
        ({"cost": torch.ones(3, 3)}, DataError),
        ({"cost": -ordinal_cost(3)}, DataError),
        ({"cost": ordinal_cost(4)}, ShapeError),
        ({"distance": torch.ones(3)}, ShapeError),
        ({"mask": torch.ones(1, 3)}, ShapeError),
        ({"mask": torch.zeros(1, 3, dtype=torch.bool)}, DataError),
        ({"losses": LOSSES + math.inf}, DataError),
        ({"losses": LOSSES[0, 0]}, ShapeError),
    ],
)
def test_bad_input_is_refused(change, error):
    with pytest.raises(error):
        label_risk(**({"losses": LOSSES, "labels": LABELS, "budget": 0.1} | change))


@pytest.mark.parametrize(
    "make", [lambda: ordinal_cost(1), lambda: tree_cost([1, 0], 2), lambda: tree_cost([-1, -1], 2)]
)
def test_bad_costs_are_refused(make):
    with pytest.raises(SettingsError):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    losses, labels = rand(2, 3, 5, 5), (rand(2, 5, 5, seed=1) * 3).long()
    found = label_risk(losses.cuda(), labels.cuda(), 0.1, ordinal_cost(3))
    assert torch.allclose(found.risk.cpu(), label_risk(losses, labels, 0.1, ordinal_cost(3)).risk)
