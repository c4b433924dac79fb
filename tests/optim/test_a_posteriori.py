"""The a-posteriori step of networks beside that of regression, and the Kalman filter beside least squares."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim import AdaptationGain, APosteriori, BlockKalman, ImplicitStep, RecursiveLeastSquares, presets
from firmly.optim.a_posteriori import gauss_newton_curvature
from firmly.optim.gain_profiles import Decreasing, Forgetting

generator = torch.Generator().manual_seed(0)
X = torch.randn(80, 5, generator=generator, dtype=torch.float64)
Y = X @ torch.randn(5, generator=generator, dtype=torch.float64) + torch.randn(80, generator=generator)
GAINS = [
    AdaptationGain(),
    presets.heavy_ball(0.3).gain,
    presets.nesterov(0.4).gain,
    AdaptationGain((-0.5,)),
    AdaptationGain((0.5, 0.2), (0.3, -0.25)),
]


@pytest.mark.parametrize("gain", GAINS, ids=repr)
@pytest.mark.parametrize("leakage", [0.0, 0.1])
@pytest.mark.parametrize("form", ["loss", "curvature"])
def test_is_the_implicit_step_of_a_regression(gain, leakage, form):
    p, rate = nn.Parameter(torch.zeros(5, dtype=torch.float64)), 0.7
    ours, theirs = APosteriori([p], rate, gain, leakage), ImplicitStep(torch.zeros(5).double(), gain, leakage)
    for x, y in zip(X, Y, strict=True):
        loss = (y - x @ p).square() / 2
        ours.zero_grad()
        loss.backward()
        prior = theirs.update(x, y, rate).prior
        torch.testing.assert_close((y - x @ p).detach(), prior, rtol=0, atol=1e-11)
        ours.step(loss=loss) if form == "loss" else ours.step(curvature=x @ x)


def test_stable_at_every_rate():
    for rate in (1e-3, 1.0, 1e3, 1e6):
        p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        o = APosteriori([p], rate, presets.heavy_ball(1 / 3).gain)
        for _ in range(5):
            for x, y in zip(X, X @ torch.ones(5, dtype=torch.float64), strict=True):
                o.zero_grad()
                loss = (y - x @ p).square() / 2
                loss.backward()
                o.step(loss=loss)
        assert float((p.detach() - 1).abs().max()) < (2 if rate < 1e-2 else 1e-3)


def network(batch_norm=True):
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(6)] if batch_norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def network_with_a_layer_twice():
    torch.manual_seed(1)
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("make", [network, lambda: network(False), network_with_a_layer_twice])
def test_gauss_newton_curvature_beside_the_full_jacobian(make):
    net, labels = make(), torch.arange(80) % 3
    saved = copy.deepcopy(net.state_dict())
    nn.functional.cross_entropy(net(X), labels).backward()
    after = copy.deepcopy(net.state_dict())

    def criterion(z):
        return nn.functional.cross_entropy(z, labels)

    found = gauss_newton_curvature(net, X, criterion)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), after.values(), strict=True))
    net.load_state_dict(saved)
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    z = net(X)
    J = torch.stack(
        [
            torch.cat([d.flatten() for d in torch.autograd.grad(v, list(net.parameters()), retain_graph=True)])
            for v in z.flatten()
        ]
    )
    H = torch.autograd.functional.hessian(criterion, z.detach()).reshape(240, 240)
    assert float(found) == pytest.approx(float((J @ g) @ H @ (J @ g) / (g @ g)), rel=1e-10)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("form", ["loss", "curvature"])
def test_trains_a_network_at_a_rate_that_is_far_too_large(form):
    net, target = network(), torch.sin(X[:, :3])
    o = APosteriori(net.parameters(), lr=100.0)

    def criterion(z):
        return (z - target).square().sum(1).mean() / 2

    losses = []
    for _ in range(150):
        o.zero_grad()
        loss = criterion(net(X))
        loss.backward()
        kappa = gauss_newton_curvature(net, X, criterion) if form == "curvature" else None
        o.step(loss=loss, curvature=kappa)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0] and max(losses) < 3 * losses[0]


def test_groups_closure_and_scaler():
    net = network().float()
    o = APosteriori([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[3].parameters()}], lr=0.5)
    scaler, x, y = torch.amp.GradScaler("cpu", init_scale=256.0), X.float(), X[:, :3].float()
    for _ in range(5):
        o.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(o, loss=loss.detach())
        scaler.update()

    def closure():
        o.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        return loss

    assert float(o.step(closure).detach()) < 1.5
    with pytest.raises(ConditionError, match="same lr"):
        o.step(curvature=1.0)


@pytest.mark.parametrize("make", [lambda p: APosteriori(p, 0.5, presets.heavy_ball(0.3).gain), BlockKalman])
def test_state_round_trip(make):
    nets = [network(), network()]
    first, second = make(nets[0].parameters()), make(nets[1].parameters())
    target = torch.cos(X[:, :3])

    def train(net, o, steps):
        for _ in range(steps):
            o.zero_grad()
            loss = (net(X) - target).square().mean()
            loss.backward()
            o.step(loss=loss)

    train(nets[0], first, 4)
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(nets[0], first, 3)
    train(nets[1], second, 3)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_diagonal_gain_is_not_rounded():
    found = []
    for loads in (False, True):
        p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        o = APosteriori([p], 0.1, memory=10.0)
        for step in range(6):
            if loads and step == 3:
                state = copy.deepcopy(o.state_dict())
                o = APosteriori([p], 0.1, memory=10.0)
                o.load_state_dict(state)
            p.grad = (step + 1) / 3 * torch.tensor([0.1, 1, 3], dtype=torch.bfloat16)
            o.step(loss=1.0)
        found.append(o.state[p]["squares"])
    assert found[0].dtype == torch.float32 and torch.equal(*found)


@pytest.mark.parametrize("profile", [Decreasing(), Forgetting(0.9)])
def test_kalman_is_recursive_least_squares(profile):
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    o, model = BlockKalman([p], profile=profile, start=10.0), RecursiveLeastSquares(profile, 10.0, intercept=False)
    for x, y in zip(X, Y, strict=True):
        o.zero_grad()
        loss = (y - x @ p).square() / 2
        loss.backward()
        o.step(loss=loss)
    torch.testing.assert_close(p.detach(), model.partial_fit(X, Y).coef_, rtol=0, atol=1e-9)


def test_losses_in_half_precision():
    """|g|^2 = 180,000 is beyond float16, and the step would be zero."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    p.grad = torch.full((2,), 300.0, dtype=torch.float16)
    APosteriori([p], 1.0).step(loss=torch.tensor(100.0, dtype=torch.float16))
    torch.testing.assert_close(p.detach().float(), torch.full((2,), -300 / 901), rtol=2e-3, atol=0)


def test_kalman_steps_in_any_memory_format():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).double().to(memory_format=layout)
        loss = net(X[:2, :3, None, None].expand(2, 3, 5, 4)).square().mean()
        loss.backward()
        BlockKalman(net.parameters(), block=10).step(loss=loss)
        found.append(net.weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("block", [4, 1000])
def test_kalman_trains_a_network(block):
    net, target = network(batch_norm=False), torch.sin(X[:, :3])
    o, losses = BlockKalman(net.parameters(), block=block), []
    for _ in range(150):
        o.zero_grad()
        loss = (net(X) - target).square().sum(1).mean() / 2
        loss.backward()
        o.step(loss=loss)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0]


def test_refusals():
    p = [nn.Parameter(torch.zeros(2))]
    for make in (
        lambda: APosteriori(p, 0.0),
        lambda: APosteriori(p, math.inf),
        lambda: APosteriori(p, leakage=1.0),
        lambda: APosteriori(p, floor=math.nan),
        lambda: APosteriori(p, gain=AdaptationGain((-1.0,))),
        lambda: BlockKalman(p, start=0.0),
        lambda: BlockKalman(p, block=0),
    ):
        with pytest.raises(SettingsError):
            make()
    p[0].grad = torch.ones(2).to_sparse()
    with pytest.raises(ConditionError, match="sparse"):
        APosteriori(p).step(loss=1.0)
    p[0].grad = torch.ones(2)
    for o in (APosteriori(p), BlockKalman(p)):
        with pytest.raises(ConditionError):
            o.step()
        for loss in (-1.0, math.nan, math.inf):
            with pytest.raises(DataError):
                o.step(loss=loss)
        o.step(loss=0.0)
    for curvature in (math.nan, math.inf):
        with pytest.raises(DataError):
            APosteriori(p).step(curvature=curvature)
    assert torch.equal(p[0].detach(), torch.zeros(2))
    with pytest.raises(ConditionError, match="backward"):
        gauss_newton_curvature(nn.Linear(2, 2), torch.ones(1, 2), torch.sum)


@pytest.mark.parametrize("gain", GAINS, ids=repr)
def test_a_diagonal_gain_is_an_implicit_step_with_a_matrix(gain):
    """One observation at a time: the regression with F = rate diag(1 / sqrt(mean g^2)), whatever F does meanwhile."""
    p, rate, memory = nn.Parameter(torch.zeros(5, dtype=torch.float64)), 0.7, 8.0
    ours, theirs = APosteriori([p], rate, gain, memory=memory), ImplicitStep(torch.zeros(5).double(), gain)
    gradients = []
    for x, y in zip(X, Y, strict=True):
        loss = (y - x @ p).square() / 2
        ours.zero_grad()
        loss.backward()
        gradients.append(p.grad.clone())
        weights = [(1 - 1 / memory) ** k for k in reversed(range(len(gradients)))]
        mean = sum(w * g.square() for w, g in zip(weights, gradients, strict=True)) / sum(weights)
        prior = theirs.update(x, y, torch.diag(rate / mean.sqrt())).prior
        torch.testing.assert_close((y - x @ p).detach(), prior, rtol=0, atol=1e-6)
        ours.step(loss=loss)


def test_a_diagonal_gain_is_kept_saved_and_refused():
    def start(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        return net, APosteriori(net.parameters(), 0.1, presets.nesterov(0.5).gain, memory=20.0)

    def learn(net, o, x, y):
        loss = (net(x.float()).squeeze(-1) - y.float()).square().mean()
        o.zero_grad()
        loss.backward()
        o.step(loss=loss)
        return float(loss.detach())

    (net, o), (other, resumed) = start(0), start(1)
    losses = [learn(net, o, X, Y) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(o.state_dict()))
    for _ in range(3):
        assert learn(net, o, X, Y) == learn(other, resumed, X, Y)
    with pytest.raises(ConditionError, match="along the gradient"):
        o.step(curvature=1.0)
    for bad in (0.5, math.inf, math.nan):
        with pytest.raises(SettingsError, match="memory"):
            APosteriori(net.parameters(), memory=bad)
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ConditionError, match="real"):
        APosteriori([z], memory=10.0).step(loss=1.0)


def test_gradients_that_are_not_finite_are_refused():
    for memory in (None, 10.0):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.tensor([1.0, math.inf])
        with pytest.raises(DataError, match="gradient"):
            APosteriori([p], memory=memory).step(loss=1.0)
        assert torch.equal(p.detach(), torch.ones(2))
