"""Recursive least squares per layer beside the normal equations; Polyak's step and Armijo's search by their rules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim import ArmijoSearch, LayerRls, PolyakStep
from firmly.optim.gain_profiles import ConstantTrace, Decreasing, Forgetting

generator = torch.Generator().manual_seed(0)
X = torch.randn(96, 3, 6, 5, generator=generator, dtype=torch.float64)
Y = torch.randn(96, 4, 3, 3, generator=generator, dtype=torch.float64)


def batches(o, net, x, y, size=16):
    for rows in torch.arange(len(x)).split(size):
        o.zero_grad()
        loss = (net(x[rows]) - y[rows]).square().sum() / (2 * len(rows))
        loss.backward()
        o.step()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_layer_is_recursive_least_squares(kind, bias):
    torch.manual_seed(0)
    if kind == "linear":
        net, x, y = nn.Linear(30, 4, bias=bias).double(), X[:, 0].flatten(1), Y[:, :, 0, 0]
        rows, target = x, y
    else:
        net, x, y = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=bias).double(), X, None
        y = torch.randn(net(X).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows = nn.functional.unfold(X, (3, 2), (1, 2), 1, 2).mT.flatten(0, 1)
        target = y.flatten(2).mT.flatten(0, 1)
    start = torch.cat([p.detach().reshape(4, -1) for p in net.parameters()], 1).mT
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    batches(LayerRls(net, profile=Decreasing(), damping=0.1), net, x, y)
    information = rows.mT @ rows / 16 + 0.1 * torch.eye(rows.shape[1])
    expected = torch.linalg.solve(information, rows.mT @ target / 16 + 0.1 * start)
    found = torch.cat([p.detach().reshape(4, -1) for p in net.parameters()], 1).mT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2)
    ).double()


def test_trains_a_network_and_state_continues():
    x, y = X, torch.stack([X[:, 0].mean((1, 2)), X[:, 1].mean((1, 2)).abs()], 1)
    first = network()
    o_first = LayerRls(first, lr=0.5, damping=0.1, every=2)
    for _ in range(5):
        batches(o_first, first, x, y)
    second = network()
    o_second = LayerRls(second, lr=0.5, damping=0.1, every=2)
    second.load_state_dict(first.state_dict())
    o_second.load_state_dict(copy.deepcopy(o_first.state_dict()))
    for o, net in ((o_first, first), (o_second, second)):
        for _ in range(5):
            batches(o, net, x, y)
    with torch.no_grad():
        after, before = ((net.eval()(x) - y).square().sum() for net in (first, network()))
    assert after < 0.5 * before
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_gain_stays_bounded_without_excitation():
    net = nn.Linear(3, 2)
    o = LayerRls(net, profile=Forgetting(0.9), damping=0.5)
    for _ in range(3000):
        o.zero_grad()
        (net(torch.zeros(4, 3)) * torch.tensor([1.0, -1])).sum().backward()
        o.step()
    factor = o.state_dict()["layers"][0][1]
    assert float(torch.linalg.eigvalsh(torch.cholesky_inverse(factor))[-1]) <= 2 * (1 + 1e-5)


def test_rows_of_evaluation_are_not_seen():
    net = network()
    o = LayerRls(net)
    net.eval()(X)
    with torch.no_grad():
        net.train()(X)
    assert not o._seen
    net(X)
    assert len(o._seen) == 3
    o.remove()
    o._seen.clear()
    net(X)
    assert not o._seen


def test_polyak():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    o = PolyakStep([p], lr=10.0, batches=4)
    loss = p.square().sum() / 2
    loss.backward()
    o.step(loss=loss)  # 12.5 / (0.5 * 25) = 1
    assert torch.allclose(p.detach(), torch.zeros(2)) and o.param_groups[0]["lr"] == pytest.approx(1.0)
    p.grad = torch.full((2,), 1e-6)
    o.step(loss=1.0)
    assert o.param_groups[0]["lr"] == pytest.approx(2**0.25)
    again = PolyakStep([p])
    again.load_state_dict(o.state_dict())
    assert again.param_groups[0]["lr"] == o.param_groups[0]["lr"]
    with pytest.raises(ConditionError):
        o.step()
    with pytest.raises(DataError, match="floor"):
        o.step(loss=-1.0)
    with pytest.raises(DataError):
        o.step(loss=math.nan)
    with pytest.raises(SettingsError):
        PolyakStep([p], c=0.0)


def test_armijo():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    o = ArmijoSearch([p], lr=8.0, growth=1.0, shrink=0.5)
    loss = o.step(lambda: p.square().sum() / 2)
    # l(p - eta g) = 12.5 (1 - eta)^2 <= 12.5 - 2.5 eta from eta = 1.8 downwards: 8, 4, 2 fail and 1 holds
    assert float(loss) == 12.5 and torch.allclose(p.detach(), torch.zeros(2))
    assert o.param_groups[0]["lr"] == 1.0 and o.forwards == 5
    p.data.fill_(1.0)
    o = ArmijoSearch([p], trials=3)
    o.step(lambda: p.sum() * 0 + torch.where(p == 1, 0.0 * p, math.nan).sum() + (p - p.detach()).sum())
    assert torch.equal(p.detach(), torch.ones(2)) and o.forwards == 4  # no rate was good enough
    with pytest.raises(ConditionError, match="closure"):
        o.step()
    for bad in ({"c": 1.0}, {"shrink": 1.0}, {"growth": 0.5}, {"trials": 0}, {"lr": 0.0}):
        with pytest.raises(SettingsError):
            ArmijoSearch([p], **bad)


def test_refusals():
    shared = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = shared.weight
    tied = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7))
    tied[1].weight = tied[0].weight
    for model in (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Sequential(shared, other),
        tied,
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ):
        with pytest.raises(ConditionError):
            LayerRls(model)
    net = nn.Linear(3, 2)
    for bad in (
        {"lr": 0.0},
        {"damping": 0.0},
        {"every": 0},
        {"profile": ConstantTrace(decreasing=5)},
        {"other_lr": -1.0},
    ):
        with pytest.raises(SettingsError):
            LayerRls(net, **bad)
    o = LayerRls(net)
    net(torch.full((2, 3), math.inf)).sum().backward()
    with pytest.raises(DataError):
        o.step()
    with pytest.raises(ValueError, match="size of optimizer's group"):  # torch's own check
        LayerRls(nn.Sequential(net, nn.Linear(2, 2))).load_state_dict(LayerRls(nn.Linear(3, 2)).state_dict())


def test_gradients_without_rows_are_refused():
    """In eval mode nothing is seen, and nn.MultiheadAttention never calls its projection: no step is made up there."""
    net = nn.Linear(3, 2).eval()
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    for model, inputs in ((net, (X[0, 0, 0, :3],)), (attention, (X[:2, 0, :, :4].float(),) * 3)):
        model = model.to(inputs[0].dtype)
        optimizer, start = LayerRls(model), [p.detach().clone() for p in model.parameters()]
        out = model(*inputs)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        with pytest.raises(ConditionError, match="none of its rows were seen"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(start, model.parameters(), strict=True))
