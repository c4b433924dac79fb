"""Alarms of the Page-Hinkley test, and the loop that learns from a stream."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from firmly.errors import DataError, SettingsError
from firmly.optim import (
    APosteriori,
    Balance,
    BlockKalman,
    Feedback,
    LayerRls,
    PageHinkley,
    PolyakStep,
    RecursiveLeastSquares,
    StreamLearner,
    presets,
)
from firmly.optim.streaming import HIGHEST, LOWEST, weight_size

generator = torch.Generator().manual_seed(0)


def alarms(losses, **settings):
    test = PageHinkley(**settings)
    return [t for t, loss in enumerate(losses) if test.happens(loss)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_alarms_after_a_rise_and_not_before(scale):
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1)).tolist()
    losses = [scale * (5 + n + (2 if t >= 2000 else 0)) for t, n in enumerate(noise)]
    found = alarms(losses)
    assert len(found) == 1 and 2000 <= found[0] < 2040


def test_falling_and_constant_losses_never_alarm():
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    falling = (3 * torch.exp(-torch.arange(3000) / 300) + 1 + 0.1 * noise).tolist()
    assert alarms(falling) == [] and alarms([0.5] * 500) == []
    assert alarms([0.5] * 100 + [0.6]) == [100]  # the first difference at all
    assert alarms([0.5] * 10 + [9.0] * 10) == []  # warm-up


def test_the_moments_are_those_of_the_values():
    values = torch.rand(500, generator=generator, dtype=torch.float64)
    test = PageHinkley(threshold=1e6)
    for value in values:
        test.happens(value)
    assert test.mean == pytest.approx(float(values.mean()))
    assert test.variance == pytest.approx(float(values.var(correction=0)))


def rotating(count, turn_at=None):
    """Two classes along a direction that jumps once."""
    x = torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(3))
    directions = torch.tensor([[1.0, 1, 0, 0], [-1, -0.5, 1, 0]])
    for t in range(count):
        direction = directions[0 if turn_at is None or t < turn_at else 1]
        yield x[t], (x[t] @ direction > 0).long()


def learner(scale=1.0, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.mul_(scale)
    return StreamLearner.hybrid(model, nn.functional.cross_entropy, **options)


def by_feedback(window=25):
    """The parts that climb per window: `Feedback` on a-posteriori steps, with alarms."""
    torch.manual_seed(0)
    model, gain = nn.Linear(4, 2), presets.nesterov(0.5).gain
    optimizer = APosteriori(model.parameters(), 0.01 / gain.dc_gain(), gain)
    controller = Feedback(optimizer, ceiling=1 / gain.dc_gain())
    return StreamLearner(model, nn.functional.cross_entropy, optimizer, controller, change=PageHinkley(), window=window)


@pytest.mark.parametrize("make", [learner, by_feedback])
def test_recovers_from_a_change_and_counts(make):
    stream = make()
    right, rates, changed = [], [], []
    for x, y in rotating(1600, turn_at=800):
        found = stream.learn(x, y)
        right.append(float((found.outputs.argmax(1) == y).double().mean()))
        rates.append(stream.optimizer.param_groups[0]["lr"])
        changed.append(found.changed)
    assert stream.changes == [t for t, c in enumerate(changed) if c]
    assert len(stream.changes) >= 1 and 800 <= stream.changes[0] < 850
    assert sum(right[700:800]) / 100 > 0.93 and sum(right[1500:]) / 100 > 0.93
    assert sum(right[800:830]) / 30 < 0.8
    assert stream.backwards == stream.batches == 1600 and stream.skipped == 0
    if make is by_feedback:
        assert max(rates) > 8 * rates[0] and min(rates[stream.changes[0] :]) > 2 * rates[0]
        assert stream.forwards == 1600
    else:
        assert max(rates) / min(rates) <= HIGHEST / LOWEST * (1 + 1e-9) and 1600 * 1.25 <= stream.forwards < 1600 * 1.4


def test_skips_what_is_fitted():
    stream, full = learner(threshold=0.7), learner()
    for x, y in rotating(800):
        before = [p.detach().clone() for p in stream.model.parameters()]
        found = stream.learn(x, y)
        full.learn(x, y)
        same = all(torch.equal(a, b) for a, b in zip(before, stream.model.parameters(), strict=True))
        assert same != found.learned
    assert 0.1 * stream.batches < stream.skipped < 0.9 * stream.batches
    assert stream.skipped + stream.backwards == 800


def test_the_hybrid_starts_at_the_rate_that_was_asked_for():
    stream = learner(lr=0.03)
    optimizer = stream.optimizer
    assert isinstance(optimizer, APosteriori) and optimizer.gain.pr()
    assert optimizer.gain.dc_gain() * optimizer.param_groups[0]["lr"] == pytest.approx(0.03)


@pytest.mark.parametrize("lr", [1e-6, 1.0, 1e3])
def test_the_hybrid_forgets_the_rate_that_it_was_given(lr):
    stream, lost = learner(lr=lr), 0.0
    for t, (x, y) in enumerate(rotating(400)):
        lost += stream.learn(x, y).loss if t >= 300 else 0.0
    assert lost / 100 < 0.4  # a coin's is 0.69


def test_predictions_are_made_before_the_labels_are_seen():
    """Neither the choice between parameters and average nor the average itself knows the batch that is scored."""
    streams = learner(), learner()
    for t, (x, y) in enumerate(rotating(40)):
        shown = [stream.learn(x, labels).outputs for stream, labels in zip(streams, (y, 1 - y), strict=True)]
        if t == 39:
            assert torch.equal(*shown)
        else:
            streams[1].load_state_dict(streams[0].state_dict())
            streams[1].model.load_state_dict(streams[0].model.state_dict())
            streams[1].optimizer.load_state_dict(copy.deepcopy(streams[0].optimizer.state_dict()))


def test_the_weights_that_predict_are_those_of_the_outputs():
    stream, batches = learner(), list(rotating(200))
    chosen = set()
    for x, y in batches:
        learned = [p.detach().clone() for p in stream.model.parameters()]
        compared = stream.feedback.due()
        with stream.predicting() if compared else nullcontext(), torch.no_grad():
            expected = stream.model(x)
        assert all(torch.equal(p, q) for p, q in zip(learned, stream.model.parameters(), strict=True))
        chosen.add((compared, stream.feedback.leads))
        assert torch.equal(stream.learn(x, y).outputs, expected)
    assert len(chosen) == 4


def test_batch_statistics_count_every_batch_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 2)).double()
    learner, means = StreamLearner.hybrid(net, nn.functional.cross_entropy), []
    net[0].register_forward_hook(lambda layer, inputs, outputs: means.append(outputs.detach().mean(0)))
    learned = []
    for x in torch.randn(6, 8, 3, dtype=torch.float64):
        learner.learn(x, (x[:, 0] > 0).long())
        learned.append(means[-1])  # of the pass that is learned from, the last one of its batch
    assert learner.forwards > learner.batches == int(net[1].num_batches_tracked)
    torch.testing.assert_close(net[1].running_mean, torch.stack(learned).mean(0), rtol=1e-12, atol=1e-12)


def test_batches_that_are_skipped_are_not_compared_again():
    torch.manual_seed(0)
    x = torch.randn(200, 8, 3, dtype=torch.float64)
    learner = StreamLearner.hybrid(nn.Linear(3, 2).double(), nn.functional.cross_entropy, threshold=0.9)
    for batch in x:
        learner.learn(batch, (batch[:, 0] > 0).long())
    assert learner.skipped > 20
    assert learner.forwards - learner.batches <= learner.backwards + 1


def test_the_size_of_weights():
    two, one = torch.full((2, 3), 0.5), torch.full((4,), 7.0)
    assert weight_size([two, one]) == pytest.approx(0.5) and weight_size([one]) == pytest.approx(7.0)
    assert weight_size([torch.zeros(2, 3), one]) == pytest.approx(1 / 3)  # 1 / sqrt(3 fan_in)
    assert weight_size([two, torch.full((1, 2), -2.0)]) == pytest.approx(math.sqrt((6 * 0.25 + 2 * 4) / 8))
    with pytest.raises(SettingsError, match="no parameters"):
        weight_size([torch.zeros(0, 3)])


def test_state_round_trip():
    first, second = learner(threshold=0.3), learner(threshold=0.3)
    data = list(rotating(300, turn_at=150))
    for x, y in data[:173]:
        first.learn(x, y)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))  # else they share buffers
    second.load_state_dict(first.state_dict())
    for x, y in data[173:]:
        a, b = first.learn(x, y), second.learn(x, y)
        assert torch.equal(a.outputs, b.outputs) and a[1:] == b[1:]
    ours, theirs = first.state_dict(), second.state_dict()
    averages = [state["feedback"].pop("average") for state in (ours, theirs)]
    assert ours == theirs and all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_a_state_brings_the_range_of_rates_that_the_first_weights_set():
    first, larger = learner(), learner(scale=3.0)
    data = list(rotating(60, turn_at=30))
    for x, y in data[:30]:
        first.learn(x, y)
    larger.model.load_state_dict(first.model.state_dict())
    larger.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    larger.load_state_dict(first.state_dict())
    for x, y in data[30:]:
        assert torch.equal(first.learn(x, y).outputs, larger.learn(x, y).outputs)


def test_nothing_is_learned_from_a_loss_that_is_not_finite_while_the_average_predicts():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    balance = Balance(optimizer, 0.01, 1.0)
    stream = StreamLearner(model, nn.functional.mse_loss, optimizer, balance)
    with torch.no_grad():
        model.weight.fill_(math.inf)
    with pytest.raises(DataError):
        stream.learn(torch.ones(3, 2), torch.zeros(3, 1))
    assert not balance.leads and stream.backwards == 0 and not bool(model.weight.isnan().any())


def test_optimisers_that_take_the_loss_get_it():
    model = nn.Linear(4, 2)
    stream = StreamLearner(model, nn.functional.cross_entropy, APosteriori(model.parameters(), 1.0))
    losses = [stream.learn(x, y).loss for x, y in rotating(300)]
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_refusals():
    model = nn.Linear(4, 2)
    a, b = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SettingsError, match="another optimiser"):
        StreamLearner(model, nn.functional.cross_entropy, a, Feedback(b))
    with pytest.raises(SettingsError):
        StreamLearner(model, nn.functional.cross_entropy, a, window=0)
    for bad in ({"threshold": 0.0}, {"slack": -1.0}, {"warm_up": 1}, {"memory": 5.0}):
        with pytest.raises(SettingsError):
            PageHinkley(**bad)
    with pytest.raises(DataError):
        PageHinkley().happens(math.nan)
    stream = StreamLearner(model, nn.functional.cross_entropy, a)
    with pytest.raises(DataError):
        stream.learn(torch.full((2, 4), math.nan), torch.tensor([0, 1]))
    assert stream.batches == 0 and all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    stream = StreamLearner.hybrid(net, nn.functional.cross_entropy, threshold=0.2)
    for x, y in rotating(200):
        stream.learn(x.cuda(), y.cuda())
    x, y = next(rotating(1))
    for o in (LayerRls(net), BlockKalman(net.parameters(), block=8), PolyakStep(net.parameters())):
        loss = nn.functional.cross_entropy(net(x.cuda()), y.cuda())
        o.zero_grad()
        loss.backward()
        o.step() if isinstance(o, LayerRls) else o.step(loss=loss)
    model = RecursiveLeastSquares().partial_fit(x.cuda(), y.cuda())
    assert model.coef_.is_cuda and all(bool(p.isfinite().all()) for p in net.parameters())
