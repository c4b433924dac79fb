"""The rate at which parameters and their average predict alike: the law by hand, and the theorem behind it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim import Balance


def balance(rate=0.1, lowest=1e-3, highest=1.0, **settings):
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return Balance(torch.optim.SGD([p], rate), lowest, highest, **settings)


def test_the_law_by_hand():
    b = balance(0.01, step=0.05, share=0.25)
    assert b.update(1.0, 1.0) == 0.01 and b.climbs  # no difference says nothing
    assert b.update(1.0, 2.0) == pytest.approx(0.01 * math.sqrt(2))  # the average lags: climb
    assert b.update(1.0, 2.0) == pytest.approx(0.02)
    rate = b.update(3.0, 2.0)
    assert not b.climbs and rate == pytest.approx(0.02 * math.exp(-2 * 0.05 * 0.25))
    assert b.update(1.0, 2.0) == pytest.approx(rate * math.exp(2 * 0.05 * 0.75))
    assert b.optimizer.param_groups[0]["lr"] == b.rate
    b.restart()
    before = b.rate
    assert b.climbs and b.update(1.0, 2.0) == pytest.approx(before * math.sqrt(2))


def test_comparisons_are_due_at_every_batch_of_a_climb_then_now_and_then():
    law, due = balance(every=3), []
    for _ in range(9):
        due.append(law.due())
        if due[-1]:
            law.update(2.0 if len(due) == 4 else 1.0, 1.5)
        law.follow()
    assert due == [True] * 4 + [False, False, True, False, False]
    law.restart()
    assert law.due()


def test_at_rest_where_the_parameters_win_their_share():
    """A loop whose chance to win falls with the rate settles where the chance is `share`."""
    chance = torch.Generator().manual_seed(0)
    b, seen = balance(0.5, step=0.03, share=0.4), []
    for t in range(6000):
        wins = float(torch.rand((), generator=chance)) < 1 / (1 + b.rate / 0.02)
        b.update(1.0 + (not wins), 1.5)
        seen += [math.log(b.rate)] if t > 1000 else []
    assert sum(seen) / len(seen) == pytest.approx(math.log(0.02 * 0.6 / 0.4), abs=0.1)


def test_the_rate_stays_in_its_range_and_groups_keep_their_ratios():
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1e-6}, {"params": [b], "lr": 3e-6}])
    law = Balance(optimizer, 0.01, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.03])
    for _ in range(20):
        law.update(1.0, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])
    for _ in range(200):
        law.update(math.nan, 2.0)  # parameters that have diverged are the worse ones
    assert law.rate == 0.01 and not law.leads
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ConditionError, match="group"):
        law.update(1.0, 2.0)


def test_the_average_of_few_steps_is_plain_and_then_forgets():
    law = balance(memory=3.0)
    (p,) = law.optimizer.param_groups[0]["params"]
    path = [torch.tensor([t + 1.0, 0.5 * t], dtype=torch.float64) for t in range(6)]
    expected = torch.zeros(2, dtype=torch.float64)
    for t, value in enumerate(path):
        with torch.no_grad():
            p.copy_(value)
        law.follow()
        expected += (value - expected) / min(t + 1, 3)
        with law.averaged():
            assert torch.allclose(p, expected, rtol=1e-14)
        assert torch.equal(p.detach(), value)
    with pytest.raises(RuntimeError), law.averaged():
        raise RuntimeError
    assert torch.equal(p.detach(), path[-1])  # also after an error


def gains(rate, memory, noise, drift):
    """E x^2, E y^2 for x = theta - target and y = average - target, by solving the Lyapunov equation of the loop."""
    a, b = rate, 1 / memory
    step = torch.tensor([[1 - a, 0.0], [b * (1 - a), 1 - b]], dtype=torch.float64)
    into = torch.tensor([[a, -1.0], [b * a, -1.0]], dtype=torch.float64)
    input = into @ torch.diag(torch.tensor([noise, drift], dtype=torch.float64)) @ into.T
    covariance = torch.linalg.solve(
        torch.eye(4, dtype=torch.float64) - torch.kron(step, step), input.reshape(4)
    ).reshape(2, 2)
    return float(covariance[0, 0]), float(covariance[1, 1])


def balanced(ratio, memory):
    """The positive root of the quadratic in the docs, for ratio = drift / noise."""
    b = 1 / memory
    square = 1 / ratio + (1 - b) ** 2 / (2 * b)
    linear = (2 * (1 - b) ** 2 - 3 * b + b * b) / (2 * b)
    return (linear + math.sqrt(linear * linear + 4 * square * (2 - b))) / (2 * square)


@pytest.mark.parametrize("memory", [1.5, 5.0, 40.0])
@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 0.1, 1.0, 100.0])
def test_one_rate_balances_both_errors(memory, ratio):
    """Above it the average has the smaller error, below it the larger one: the sign says where to go, from anywhere."""
    root = balanced(ratio, memory)
    assert 0 < root < 2
    mine, averaged = gains(root, memory, 1.0, ratio)
    assert averaged == pytest.approx(mine, rel=1e-8)
    for factor in (1e-3, 0.1, 0.5, 0.99, 1.01, 1.5, 4.0):
        if factor * root < 2:
            mine, averaged = gains(factor * root, memory, 1.0, ratio)
            assert (averaged < mine) == (factor > 1)


def test_the_balanced_rate_is_nearly_the_best():
    for ratio, most in ((1e-6, 1.05), (1e-4, 1.05), (1e-2, 1.09), (0.04, 1.15)):
        best = min(gains(0.001 * k, 5.0, 1.0, ratio)[0] for k in range(1, 1500))
        assert 1 <= gains(balanced(ratio, 5.0), 5.0, 1.0, ratio)[0] / best < most


def test_state_round_trip():
    first = balance(0.02)
    for losses in ((1.0, 2.0), (3.0, 2.0), (1.0, 2.0)):
        first.update(*losses)
        with torch.no_grad():
            first.optimizer.param_groups[0]["params"][0].mul_(0.9)
        first.follow()
    second = balance(0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        second.optimizer.param_groups[0]["params"][0].copy_(first.optimizer.param_groups[0]["params"][0])
    for law in (first, second):
        law.update(2.0, 1.0)
        law.follow()
    ours, theirs = first.state_dict(), second.state_dict()
    averages = [state.pop("average") for state in (ours, theirs)]
    assert ours == theirs and torch.equal(*[a[0] for a in averages])


def test_refusals():
    for bad in (
        {"lowest": 0.0}, {"lowest": 2.0}, {"highest": math.inf}, {"memory": 0.5}, {"step": -1.0}, {"share": 1.0},
        {"every": 0},
    ):  # fmt: skip
        with pytest.raises(SettingsError):
            balance(**bad)
    with pytest.raises(DataError):
        balance().update(1.0, math.nan)


def test_a_rate_in_a_tensor_stays_one():
    p, rate = nn.Parameter(torch.ones(2)), torch.tensor(0.1)
    law = Balance(torch.optim.SGD([p], rate), 0.01, 1.0)
    law.update(1.0, 2.0)
    assert law.optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1 * math.sqrt(2))
