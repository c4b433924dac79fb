"""PyTorch's inventory, kinds of gradients: complex, sparse, scaled, clipped, compiled, on two devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from firmly.errors import ConditionError
from firmly.optim import APosteriori, LayerRls

from .optimisers import X, Y, network, those, walk, weights


def complex_step(case, z: nn.Parameter, optimizer: Optimizer, target: torch.Tensor) -> float:
    def closure():
        optimizer.zero_grad()
        loss = torch.view_as_real(z - target).square().sum() if z.is_complex() else (z - target).square().sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    return float(optimizer.step(closure).detach())  # type: ignore[union-attr]


@those("params")
def test_complex_parameters_are_two_real_ones_or_refused(case):
    kind = type(case.make(network()))
    real = nn.Parameter(torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=torch.float64))
    z = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    target = torch.zeros_like(real)
    ours, theirs = kind([z], lr=0.1), kind([real], lr=0.1)
    try:
        for _ in range(5):
            complex_step(case, z, ours, torch.view_as_complex(target))
            complex_step(case, real, theirs, target)
    except ConditionError:
        assert case.name == "BlockKalman"
        return
    torch.testing.assert_close(torch.view_as_real(z.detach()), real.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_layers_are_refused():
    with pytest.raises(ConditionError, match="complex"):
        LayerRls(nn.Linear(3, 2).to(torch.complex128))


def test_a_diagonal_gain_is_real():
    z = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    z.grad = torch.ones_like(z)
    with pytest.raises(ConditionError, match="real"):
        APosteriori([z], memory=10.0).step(loss=1.0)


def test_sparse_gradients_beside_layers_are_plain_steps():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)).double()
        optimizer = LayerRls(net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.tensor([1, 3, 1])).square().mean().backward()
            optimizer.step()
        ends.append(weights(net))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@those("params")
def test_sparse_gradients_are_refused(case):
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.tensor([1, 3])).square().sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    with pytest.raises(ConditionError, match=r"sparse|dense"):
        optimizer.step(closure)


@those("own gradients", without=True)
def test_a_scaler_skips_gradients_that_overflow(case):
    net = network(torch.float32)
    optimizer, scaler = case.make(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        before = weights(net)
        optimizer.zero_grad()
        loss = (net(X.float()) - Y.float()).square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer, **({"loss": loss.detach()} if "loss" in case.takes else {}))
        scaler.update()
        assert all(torch.equal(a, b) != moves for a, b in zip(before, weights(net), strict=True))
        assert all(bool(p.isfinite().all()) for p in net.parameters())


@those("own gradients")
def test_a_search_refuses_a_scaler(case):
    """Scaled gradients are not those that it takes."""
    net = network(torch.float32)
    optimizer, scaler = case.make(net), torch.amp.GradScaler("cpu")
    scaler.scale((net(X.float()) - Y.float()).square().mean()).backward()
    with pytest.raises(ConditionError, match="closure"):
        scaler.step(optimizer)


@those("own gradients", without=True)
def test_clipped_gradients(case):
    net = network()
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]  # type: ignore[union-attr]
    assert losses[-1] < losses[0]


@those("own gradients", without=True)
def test_compiled_steps_are_the_same(case):
    """Where a step reads numbers out of tensors, the graph breaks there; where not, it is one graph."""
    torch._dynamo.reset()
    nets = network(), network()
    optimizer = case.make(nets[1])
    step = torch.compile(optimizer.step, backend="eager", fullgraph="fullgraph" in case.takes)
    walk(nets[0], case.make(nets[0]), 2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (nets[1](X) - Y).square().mean()
        loss.backward()
        step(**({"loss": loss.detach()} if "loss" in case.takes else {}))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-10, atol=1e-10)


@those("params")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_parameters_on_two_devices(case):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 2).double().cuda()

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).cuda()).cpu()

    net = Split()
    losses = walk(net, case.make(net), 20)
    assert losses[-1] < losses[0]
