"""The E/PD law on the published trace, its stability flag beside simulation, and its life beside an optimiser."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim import Dag, EventPasses, Feedback, LossEvent
from firmly.optim.events import slope
from firmly.optim.feedback import stable_delayed, stable_immediate


def make(lr=0.01, **options):
    return Feedback(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr), **options)


def test_the_published_trace():
    feedback = make()
    rates = [feedback.rate] + [feedback.update(loss) for loss in (1, 0.8, 0.7, 0.75)]
    assert rates == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.04], abs=1e-15)
    assert feedback.proportional == pytest.approx(0.04)
    assert feedback.update(0.6) == pytest.approx(0.0315, abs=1e-15)
    assert feedback.optimizer.param_groups[0]["lr"] == pytest.approx(0.0315, abs=1e-15)


def test_ceiling_and_negative_rates():
    feedback = make(ceiling=0.05)
    rates = [feedback.rate] + [feedback.update(loss) for loss in (1, 0.9, 0.8)]
    assert rates == pytest.approx([0.01, 0.02, 0.04, 0.02])  # 0.08 is above the ceiling: K_P = 0.01 2^1
    # the derivative term alone would be -0.05 * 1.2: only the proportional one is taken
    assert feedback.update(2.0) == pytest.approx(0.02 * 2.0)


def test_a_chunk_starts_over_and_keeps_the_first_loss():
    feedback = make()
    for loss in (2, 1.8, 1.9):
        feedback.update(loss)
    assert feedback.proportional is not None
    assert feedback.restart() == 0.01 and feedback.proportional is None and feedback.first_loss == 2
    assert [feedback.update(loss) for loss in (1.0, 0.5, 0.6)] == pytest.approx([0.02, 0.04, 0.02])
    assert feedback.update(0.4) == pytest.approx(0.02 * 0.4 / 2 + 0.05 * 0.2 / 2)


def test_a_chunk_may_start_at_another_rate():
    feedback = make()
    feedback.update(1.0)
    assert feedback.restart(0.05) == 0.05
    assert [feedback.update(loss) for loss in (0.9, 0.8, 0.85)] == pytest.approx([0.1, 0.2, 0.1])
    assert feedback.update(0.7) == pytest.approx(0.1 * 0.7 + 0.05 * 0.15)
    assert feedback.base_rates == [0.01]
    for bad in (0.0, math.nan):
        with pytest.raises(SettingsError):
            feedback.restart(bad)


def test_hold_keeps_the_rate_while_the_loss_falls():
    feedback = make(hold=True)
    rates = [feedback.update(loss) for loss in (1, 0.8, 0.9, 0.7, 0.6, 0.65)]
    assert rates[2:5] == [rates[2]] * 3 and rates[2] == pytest.approx(0.02)
    assert rates[5] == pytest.approx(0.02 * 0.65 - 0.05 * 0.05)


def simulated(p, q, delayed, steps=4000):
    """Does the loss of the linear model go to zero, from a start in all modes?"""
    z = torch.stack([torch.ones_like(p), 0.3 * torch.ones_like(p), -0.7 * torch.ones_like(p)])
    for _ in range(steps):
        # L_k = L_{k-1} - p L_{k-1} + q (L_{k-1} - L_{k-2}), the bracket one step older where it is delayed
        a, b = (z[1], z[2]) if delayed else (z[0], z[1])
        z = torch.stack([z[0] - p * a + q * (a - b), z[0], z[1]]).clamp(-1e30, 1e30)
    return z.abs().amax(0) < 1e-3


@pytest.mark.parametrize("delayed", [False, True])
def test_the_flag_is_that_of_the_simulated_loop(delayed):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3_000, generator=generator, dtype=torch.float64) * 5 - 0.5
    q = torch.rand(3_000, generator=generator, dtype=torch.float64) * 3 - 1.5
    if delayed:
        p = p / 2
        radius = roots(torch.stack([q, p - q, -torch.ones_like(p)]))
    else:
        radius = roots(torch.stack([q, -(1 - p + q)]))
    rule = stable_delayed if delayed else stable_immediate
    flag = torch.tensor([rule(a, b) for a, b in zip(p.tolist(), q.tolist())])
    clear = (radius - 1).abs() > 5e-3
    assert clear.double().mean() > 0.9 and 0.05 < flag.double().mean() < 0.95
    assert bool((flag == simulated(p, q, delayed))[clear].all())
    assert bool((flag == (radius < 1))[(radius - 1).abs() > 1e-9].all())


def roots(coefficients):
    """Spectral radii of companion matrices; coefficients (degree, count) from the constant upwards."""
    degree, count = coefficients.shape
    companion = torch.zeros(count, degree, degree, dtype=coefficients.dtype)
    companion[:, 1:, :-1] = torch.eye(degree - 1)
    companion[:, :, -1] = -coefficients.T
    return torch.linalg.eigvals(companion).abs().amax(1)


@pytest.mark.parametrize(("b", "stable"), [(2.0, True), (9.0, True), (21.0, False)])
@pytest.mark.parametrize("late", [False, True])
def test_b_is_estimated_exactly_where_the_model_is_true(b, stable, late):
    feedback, loss, rates = make(ceiling=0.03, forgetting=1.0), 1.0, [0.01]
    assert feedback.stability() is None
    for _ in range(2 if b > 20 else 5):
        rates.append(feedback.update(loss))
        loss -= b * rates[-2 if late else -1]
    feedback.update(loss)
    state = feedback.stability()
    assert state is not None
    found = state.delayed if late else state.immediate
    assert found[:3] == pytest.approx((b, b * feedback.proportional, b * 0.05))
    assert found.stable == stable


def test_a_loss_that_rises_with_the_rate_is_unstable():
    feedback = make()
    for loss in (1.0, 0.99, 1.3):
        feedback.update(loss)
    state = feedback.stability()
    assert state is not None and state.immediate.b < 0 and not state.stable


def test_state_round_trip():
    feedback = make(hold=True)
    losses = (1, 0.8, 0.9, 0.7, 0.75, 0.6, 0.62)
    for loss in losses[:4]:
        feedback.update(loss)
    other = make(lr=0.5, hold=True)
    other.load_state_dict(copy.deepcopy(feedback.state_dict()))
    assert other.optimizer.param_groups[0]["lr"] == feedback.rate
    saved = feedback.state_dict()
    for loss in losses[4:]:
        assert feedback.update(loss) == other.update(loss)
    assert feedback.stability() == other.stability()
    assert saved["losses"] == [0.9, 0.7]  # not a view of the live state


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Dag])
def test_any_optimiser_and_groups_keep_their_ratio(optimizer):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    o = optimizer([{"params": [a], "lr": 0.01}, {"params": [b], "lr": 0.001}], lr=0.1)
    feedback = Feedback(o)
    feedback.update(1.0)
    assert [g["lr"] for g in o.param_groups] == pytest.approx([0.02, 0.002])
    (a.sum() + b.sum()).backward()
    o.step()
    assert float(1 - a.detach()[0]) == pytest.approx(10 * float(1 - b.detach()[0]), rel=1e-4)


def test_a_rate_in_a_tensor_is_changed_in_place():
    rate = torch.tensor(0.01)
    o = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=rate)
    Feedback(o).update(torch.tensor(1.0))
    assert o.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.02)


def test_with_a_gradient_scaler():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    o = Dag(net.parameters(), lr=0.01)
    feedback, scaler = Feedback(o, ceiling=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    losses = []
    for _ in range(12):
        o.zero_grad()
        loss = (net(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(o)
        scaler.update()
        losses.append(float(loss.detach()))
        feedback.update(loss)
    assert losses[-1] < losses[0] and feedback.passes == 12


def test_refusals():
    for bad in ({"lr": 0.0}, {"lr": 5.0}, {"derivative": -1.0}, {"forgetting": 0.0}, {"derivative": math.inf}):
        with pytest.raises(SettingsError):
            make(**bad)
    feedback = make()
    for loss in (math.nan, math.inf, -1.0, 0.0):
        with pytest.raises(DataError):
            feedback.update(loss)
    feedback.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConditionError, match="groups"):
        feedback.update(1.0)


def test_event_passes():
    events = EventPasses(limit=100)
    assert not any(events.done(loss) for loss in (2, 1.5, 1.2, 1.0))  # no five values yet
    assert not events.done(0.9)
    assert [events.done(0.9) for _ in range(5)] == [False, False, False, True, True]
    events.restart()
    assert not any(events.done(0.9) for _ in range(4)) and events.done(0.9)
    late = EventPasses(limit=15)
    assert [late.done(1.0) for _ in range(8)] == [False] * 8  # passes 5 and later: not more than 10 are left
    again = EventPasses(limit=100)
    again.load_state_dict(events.state_dict())
    assert again.done(0.9) and again.passes == events.passes + 1
    for bad in ({"limit": 0}, {"limit": 5, "window": 1}, {"limit": 5, "reserve": -1}):
        with pytest.raises(SettingsError):
            EventPasses(**bad)
    for loss in (0.0, math.nan):
        with pytest.raises(DataError):
            EventPasses(10).done(loss)
    assert slope([1, 3, 5, 7, 9]) == pytest.approx(2) and slope([0, 1]) == pytest.approx(1)


def test_loss_event():
    event = LossEvent(threshold=0.5, memory=10)
    assert [event.happens(loss) for loss in (1, 1, 0.4, 0.4, 2.0)] == [True, True, False, True, True]
    other = LossEvent(0.5, 10)
    other.load_state_dict(event.state_dict())
    assert other.mean == event.mean == pytest.approx((1 + 1 + 0.4 + 0.4 + 2) / 5)
    event.restart()
    assert event.happens(1e-9)
    assert all(LossEvent(0.0).happens(loss) for loss in (1, 0, 0.5))
    with pytest.raises(DataError, match="is not negative"):
        LossEvent(0.0).happens(-1.0)
    for bad in ({"threshold": 1.5}, {"memory": 0}):
        with pytest.raises(SettingsError):
            LossEvent(**bad)
    with pytest.raises(DataError):
        event.happens(math.nan)
