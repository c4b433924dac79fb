"""PyTorch's inventory, parameters and groups: how they are given, rates, schedules, options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, ReduceLROnPlateau

from firmly.errors import FirmlyError, SettingsError
from firmly.optim import APosteriori

from .optimisers import FILTER, every, network, same, those, walk, weights


@those("params")
def test_parameters_as_pytorch_takes_them(case):
    kind, nets = type(case.make(network())), [network() for _ in range(4)]
    made = [
        kind(list(nets[0].parameters())),
        kind(nets[1].named_parameters()),
        kind([{"params": nets[2].parameters()}]),
        kind([{"params": [p]} for p in nets[3].parameters()]),
    ]
    for net, optimizer in zip(nets, made, strict=True):
        walk(net, optimizer, 3)
        torch.testing.assert_close(weights(net), weights(nets[0]), rtol=1e-12, atol=1e-12)
    assert made[1].param_groups[0]["param_names"][0] == "0.weight"
    bad: list[tuple[Any, type[Exception]]] = [
        ([], ValueError), (torch.ones(3), TypeError), ([torch.ones(3, requires_grad=True) * 1], ValueError),
        ([{"params": [p]} for p in [nn.Parameter(torch.ones(1))] * 2], ValueError),
    ]  # fmt: skip
    for params, error in bad:
        with pytest.raises(error):
            kind(params)


@those("group rates")
def test_groups_have_their_own_rates(case):
    net, still = network(), network()
    optimizer = case.make(net)
    kind = type(optimizer)
    settings = {"gain": FILTER} if kind is APosteriori else {}
    halves = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 1e-9}]
    walk(net, kind(halves, lr=0.1, **settings), 3)
    first, last = (
        max(float((a - b).abs().max()) for a, b in zip(weights(net[k]), weights(still[k]), strict=True)) for k in (0, 2)
    )
    assert first > 1e-3 and 0 < last < 1e-6


@those("group rates")
def test_groups_may_be_added(case):
    net, other = network(), network()
    kind = type(case.make(net))
    optimizer = kind(net[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    walk(net, optimizer, 3)
    walk(other, kind([{"params": other[0].parameters()}, {"params": other[2].parameters()}], lr=0.1), 3)
    same(net, other)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [net[0].weight]})


@every
@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_out_of_range(case, rate):
    with pytest.raises(SettingsError):
        case.make(network(), lr=rate)


@those("tensor rate")
def test_a_rate_in_a_tensor(case):
    nets = network(), network()
    walk(nets[0], case.make(nets[0]), 4)
    walk(nets[1], case.make(nets[1], lr=torch.tensor(0.05, dtype=torch.float64)), 4)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-12)


@those("tensor rate", without=True)
def test_a_rate_in_a_tensor_is_a_number(case):
    """The others read it as a number, or refuse it: it never is left out."""
    nets = network(), network()
    optimizer = case.make(nets[0], lr=0.25)
    walk(nets[0], optimizer, 3)
    try:
        other = case.make(nets[1], lr=torch.tensor(0.25, dtype=torch.float64))
    except (FirmlyError, TypeError):
        return
    walk(nets[1], other, 3)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-12)


@those("reached by schedules")
@pytest.mark.parametrize(
    "schedule",
    [lambda o: ExponentialLR(o, 0.5), lambda o: LinearLR(o, 0.4, total_iters=4), lambda o: CosineAnnealingLR(o, 10),
     lambda o: ReduceLROnPlateau(o, patience=0, threshold=10.0)],
)  # fmt: skip
def test_schedules_set_the_rate_of_the_next_step(case, schedule):
    """A step at the rate that the schedule has set is the step of an optimiser that is given this rate."""
    net = network()
    optimizer = case.make(net)
    scheduler = schedule(optimizer)
    walk(net, optimizer, 2)
    for _ in range(3):
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    rate = optimizer.param_groups[0]["lr"]
    assert rate != pytest.approx(case.make(network()).param_groups[0]["lr"])
    twin, other = copy.deepcopy((net, optimizer))
    other.param_groups[0]["lr"] = float(rate)
    walk(net, optimizer, 1)
    walk(twin, other, 1)
    same(net, twin)
    still, stopped = network(), None
    stopped = case.make(still)
    stopped.param_groups[0]["lr"] = 1e-12
    before = weights(still)
    walk(still, stopped, 1)
    torch.testing.assert_close(weights(still), before, rtol=1e-9, atol=1e-9)


@those("reached by schedules", without=True)
def test_the_others_set_their_rate_themselves(case):
    """What a schedule writes is the rate of the step before, which the search goes on from; the group has the rate."""
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 1)
    found = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 1e-9
    before = weights(net)
    walk(net, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] < 2e-9 < found
    torch.testing.assert_close(weights(net), before, rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("option", ["maximize", "foreach", "fused", "capturable", "differentiable"])
def test_options_that_are_not_offered_are_refused(case, option):
    if option in case.takes:
        case.make(network(), maximize=True)
    else:
        with pytest.raises(TypeError, match=option):
            case.make(network(), **{option: True})
