"""What PyTorch's test_optim.py asks of its own optimisers, asked of every optimiser of `firmly.optim`: steps.

Beside it `test_inventory_*.py` ask of groups, states and gradients, and `test_dag_in_torch.py` asks more of `Dag`, in
every order. The table in docs/optimisers.md says what each one takes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import firmly.optim
from firmly.errors import ConditionError

from .optimisers import CASES, X, Y, every, network, same, those, walk, weights


def test_every_optimiser_is_here():
    found = {v for v in vars(firmly.optim).values() if isinstance(v, type) and issubclass(v, Optimizer)}
    assert found == {type(c.make(network())) for c in CASES}


@every
def test_goes_down(case):
    net = network()
    losses = walk(net, case.make(net), 30)
    assert losses[-1] < 0.5 * losses[0]


@every
def test_goes_down_with_weights_that_are_not_contiguous(case):
    net = network()
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
        assert not layer.weight.is_contiguous()
    other = network()
    first, second = walk(net, case.make(net), 5), walk(other, case.make(other), 5)
    assert first == pytest.approx(second, rel=1e-10)


@every
def test_is_the_same_every_time(case):
    nets = network(), network()
    for net in nets:
        walk(net, case.make(net), 5)
    same(*nets)


@every
def test_single_precision(case):
    net = network(torch.float32)
    losses = walk(net, case.make(net), 20)
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in net.parameters())


@every
def test_half_precision_or_refused(case):
    """Where there is a factorisation, PyTorch has none of bfloat16, and says so."""
    net = network(torch.bfloat16)
    if case.name in ("LayerRls", "BlockKalman"):
        with pytest.raises(RuntimeError, match="BFloat16"):
            walk(net, case.make(net), 1)
    else:
        losses = walk(net, case.make(net), 20)
        assert losses[-1] < losses[0] and all(p.dtype == torch.bfloat16 for p in net.parameters())


@every
def test_without_gradients_nothing_moves(case):
    net = network()
    optimizer, before = case.make(net), weights(net)
    for p in net.parameters():
        p.requires_grad_("own gradients" in case.takes)
    if "own gradients" in case.takes:
        constant = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer.step(lambda: constant * 1.0)  # type: ignore[arg-type]
    else:
        optimizer.step(*([lambda: torch.tensor(1.0)] if "loss" in case.takes else []))  # type: ignore[arg-type]
    torch.testing.assert_close(weights(net), before, rtol=0, atol=0)


@every
def test_parameters_without_a_gradient_stay_while_others_move(case):
    net = network()
    net[0].bias.requires_grad_(False)
    before = weights(net)
    walk(net, case.make(net), 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True)]
    assert moved == [True, False, True, True]


@those("params")
def test_parameters_of_size_zero(case):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.full, self.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 3))

    net = Two()
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = net.full.square().sum() + net.empty.sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())  # type: ignore[union-attr]
    assert float(optimizer.step(closure).detach()) < first  # type: ignore[union-attr]


@those("plain step", without=True)
def test_a_step_that_needs_the_loss_says_so(case):
    net = network()
    optimizer = case.make(net)
    (net(X) - Y).square().mean().backward()
    with pytest.raises(ConditionError, match="closure"):
        optimizer.step()


@those("loss")
def test_the_loss_may_be_given(case):
    nets = network(), network()
    walk(nets[0], case.make(nets[0]), 3)
    optimizer = case.make(nets[1])
    for _ in range(3):
        optimizer.zero_grad()
        loss = (nets[1](X) - Y).square().mean()
        loss.backward()
        assert optimizer.step(loss=loss.detach()) is not None  # type: ignore[call-arg]
    same(*nets)
