"""PyTorch's inventory, states: round trips, copies, hooks, devices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from .optimisers import every, network, same, walk


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every
@pytest.mark.parametrize("through", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), through_file])
def test_states_go_on_after_a_round_trip(case, through):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 3)
    state, other = through(optimizer.state_dict()), network()
    other.load_state_dict(net.state_dict())
    again = case.make(other)
    again.load_state_dict(state)
    assert walk(net, optimizer, 3) == walk(other, again, 3)
    same(net, other)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every
@pytest.mark.parametrize("through", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_network_and_optimiser_go_on_alike(case, through):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 3)
    other, again = through((net, optimizer))
    assert walk(net, optimizer, 3) == walk(other, again, 3)
    same(net, other)


@every
def test_states_of_another_number_of_parameters_are_refused(case):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 1)
    larger = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    with pytest.raises(ValueError):
        case.make(larger).load_state_dict(optimizer.state_dict())


@every
def test_hooks_and_print(case):
    net = network()
    optimizer, seen = case.make(net), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    walk(net, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]
    assert type(optimizer).__name__ in repr(optimizer) and "lr" in repr(optimizer)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_states_follow_the_parameters_to_another_device(case):
    net, moved = network(), network(device="cuda")
    optimizer, other = case.make(net), case.make(moved)
    walk(net, optimizer, 3)
    moved.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert walk(net, optimizer, 3) == pytest.approx(walk(moved, other, 3), rel=1e-6)
