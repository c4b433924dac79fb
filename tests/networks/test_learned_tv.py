"""Learned total variation: what the networks are before training, what training reaches, what is certified."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.algorithms.algorithm import check
from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.networks.descent import descend
from firmly.networks.learned_tv import JumpL1, largest_tv_weight, learned_tv, tv_objective
from firmly.prox import TV1D

WEIGHT = 0.1


def operator(n: int = 8, m: int = 5, seed: int = 0) -> fm.linear.Dense:
    """m x n with columns of unit norm; with NumPy's legacy generator, as in the setting of the paper."""
    import numpy as np

    rows = torch.from_numpy(np.random.RandomState(seed).randn(n, m))
    return fm.linear.Dense((rows / rows.norm(dim=1, keepdim=True)).mT.contiguous())


def data(A: fm.linear.LinearMap, count: int, seed: int = 0) -> Tensor:
    """One random jump per signal, noise of the same power, scaled so that weight 1 makes the solution constant."""
    generator = torch.Generator().manual_seed(seed)
    n = A.domain[0]
    z = torch.zeros(count, n, dtype=torch.float64)
    where = torch.randint(n, (count,), generator=generator)
    z[torch.arange(count), where] = torch.randn(count, dtype=torch.float64, generator=generator)
    y = A(z.cumsum(-1))
    noise = torch.randn(*y.shape, dtype=torch.float64, generator=generator)
    y = y + noise * y.norm() / noise.norm()
    return y / largest_tv_weight(A, y)[:, None]


def from_least_squares(A: fm.linear.LinearMap, y: Tensor) -> Tensor:
    return y @ torch.linalg.pinv(A.matrix()).mT


def iterated(algorithm, y: Tensor, start: Tensor, count: int) -> Tensor:
    state = algorithm.start(y, start)
    for k in range(count):
        state = algorithm.step(state, y, k)
    return algorithm.read(state)


def test_jump_variables_are_badly_conditioned():
    A = operator()
    ratio = (A @ fm.linear.Cumulative(8)).norm().upper ** 2 / A.norm().lower ** 2
    assert abs(ratio - 17.9) < 0.1


def test_untrained_taut_is_proximal_gradient_descent():
    A = operator()
    y = data(A, 50)
    start = from_least_squares(A, y)
    descent = fm.algorithms.ForwardBackward(A, TV1D(WEIGHT))
    for depth in (1, 7):
        ours = learned_tv(A, depth, "taut", WEIGHT)(y)
        torch.testing.assert_close(ours, iterated(descent, y, start, depth), rtol=0, atol=1e-12)
        contracted = learned_tv(A, depth, "taut", WEIGHT, nonexpansive=True)(y)
        torch.testing.assert_close(contracted, ours, rtol=0, atol=1e-10)


def test_untrained_synthesis_is_ista_in_the_jumps():
    A = operator()
    y = data(A, 50)
    start = from_least_squares(A, y)
    L = fm.linear.Cumulative(8)
    ista = fm.algorithms.ForwardBackward(A @ L, JumpL1(WEIGHT))
    jumps = torch.cat([start[:, :1], start.diff(dim=-1)], -1)
    expected = L(iterated(ista, y, jumps, 6))
    torch.testing.assert_close(learned_tv(A, 6, "synthesis", WEIGHT)(y), expected, rtol=0, atol=1e-10)


def test_inner_layers_approach_the_exact_prox():
    A = operator()
    y = data(A, 20)
    exact = learned_tv(A, 1, "taut", WEIGHT)(y)
    with torch.no_grad():
        errors = [(learned_tv(A, 1, "lista", WEIGHT, inner_depth=d)(y) - exact).abs().max() for d in (1, 150, 1500)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_untrained_condat_vu_reaches_the_minimum():
    """It penalises all differences: its limit is the minimiser, which a network that leaves one out never reaches."""
    A = operator()
    y = data(A, 20)
    best = iterated(fm.algorithms.Fista(A, TV1D(WEIGHT), restart=100), y, from_least_squares(A, y), 300)
    with torch.no_grad():
        found = learned_tv(A, 800, "condat-vu", WEIGHT)(y)
    gap = tv_objective(A, WEIGHT, found, y) - tv_objective(A, WEIGHT, best, y)
    assert gap.abs().max() < 1e-9


def test_training_without_truth_beats_fista():
    """The target is a factor of ten at depth 5; firmly run tv measures the whole ladder."""
    A = operator()
    y, held_out = data(A, 60), data(A, 60, seed=1)
    net = learned_tv(A, 5, "taut", WEIGHT)
    values = descend(net.parameters(), lambda: tv_objective(A, WEIGHT, net(y), y).mean(), 45)
    assert all(later < earlier for earlier, later in pairwise(values))
    fista = fm.algorithms.Fista(A, TV1D(WEIGHT), restart=100)
    start = from_least_squares(A, held_out)
    with torch.no_grad():
        best, five = (tv_objective(A, WEIGHT, iterated(fista, held_out, start, k), held_out) for k in (300, 5))
        ours = tv_objective(A, WEIGHT, net(held_out), held_out)
    assert (ours - best).mean() < 0.1 * (five - best).mean()


@pytest.mark.parametrize("variant", ["taut", "lista", "synthesis"])
def test_trained_networks_are_certified(variant):
    A = operator(6, 4)
    y = data(A, 40)
    net = learned_tv(A, 2, variant, WEIGHT, inner_depth=2)
    descend(net.parameters(), lambda: tv_objective(A, WEIGHT, net(y), y).mean(), 5)
    certificate = fm.certify(net, budget_s=5)
    pairs = torch.randn(2, 300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moved = (net(pairs[0]) - net(pairs[1])).norm(dim=1) / (pairs[0] - pairs[1]).norm(dim=1)
    assert moved.max() <= certificate.upper
    if variant == "taut":  # one multiplier per signal and layer, almost no gap
        assert certificate.upper < 1.1 * certificate.lower


def test_nonexpansive_layers():
    A = operator()
    y = data(A, 60)
    free = learned_tv(A, 3, "taut", WEIGHT)
    held = learned_tv(A, 3, "taut", WEIGHT, nonexpansive=True)
    for net in (free, held):
        descend(net.parameters(), lambda net=net: tv_objective(A, WEIGHT, net(y), y).mean(), 15)
    assert all(norm <= 1 + 1e-12 for norm in (layer.code.norm().upper for layer in held.layers))
    for layer in held.layers:
        check(layer.conditions())
    with torch.no_grad():
        free.layers[0].code.weight.mul_(1.5)
    with pytest.raises(ConditionError, match="nonexpansive"):
        check(free.layers[0].conditions())
    x = torch.randn(2, 200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        after = [held.layers[1](held.layers[1].start(y[:1], part), y[:1].expand(200, -1), 1).x for part in x]
    assert bool(((after[0] - after[1]).norm(dim=1) <= (x[0] - x[1]).norm(dim=1) * (1 + 1e-12)).all())


def test_largest_weight():
    A = operator()
    y = data(A, 10, seed=4)
    torch.testing.assert_close(largest_tv_weight(A, y), torch.ones(10, dtype=torch.float64))
    for weight, constant in ((1.001, True), (0.9, False)):
        u = iterated(fm.algorithms.Fista(A, TV1D(weight), restart=100), y, from_least_squares(A, y), 400)
        assert bool((u.diff(dim=-1).abs().amax(-1) < 1e-7).all()) is constant


def test_single_precision_and_state():
    A = operator()
    y = data(A, 5)
    for variant in ("taut", "lista", "synthesis", "condat-vu"):
        net = learned_tv(A, 2, variant, WEIGHT, inner_depth=2)
        again = learned_tv(A, 2, variant, 0.3, inner_depth=2)
        again.load_state_dict(net.state_dict())
        if variant != "condat-vu":  # whose weight is not learned
            torch.testing.assert_close(again(y), net(y))
        single = net.float()(y.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(
            single.double(), learned_tv(A, 2, variant, WEIGHT, inner_depth=2)(y), rtol=0, atol=1e-4
        )


def test_descent_stops_at_a_minimum():
    x = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    values = descend([x], lambda: (x**2).sum(), 1000)
    assert len(values) < 1000 and values[-1] < 1e-20
    still = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert descend([still], lambda: still.abs().sum(), 10) == [0.0]
    with pytest.raises(DataError, match="before the first step"):
        descend([x], lambda: x.sum() * math.nan, 3)


def test_bad_input():
    A = operator()
    with pytest.raises(SettingsError, match="unknown variant"):
        learned_tv(A, 2, "tautest")
    with pytest.raises(SettingsError, match="depth"):
        learned_tv(A, 0)
    with pytest.raises(SettingsError, match="not nonexpansive"):
        learned_tv(A, 2, "condat-vu", nonexpansive=True)
    with pytest.raises(ConditionError, match="positive"):
        learned_tv(A, 2, weight=0.0)
    with pytest.raises(ShapeError, match="flat signals"):
        learned_tv(fm.linear.Identity((1, 8)), 2)
    with pytest.raises(ShapeError, match="data"):
        learned_tv(A, 2)(torch.zeros(3, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    A, y = operator(), data(operator(), 10)
    on_gpu = fm.linear.Dense(A.weight.cuda())
    for variant in ("taut", "lista", "synthesis", "condat-vu"):
        ours = learned_tv(A, 3, variant, WEIGHT, inner_depth=2)(y)
        theirs = learned_tv(on_gpu, 3, variant, WEIGHT, inner_depth=2).cuda()(y.cuda())
        torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-10)
