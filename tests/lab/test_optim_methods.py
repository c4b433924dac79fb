"""Methods of the study of optimisers: every one learns; their schedules, feedback and gains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from firmly.lab.experiments.optim_gains import FILTERS, dc_gain
from firmly.lab.experiments.optim_methods import (
    Horizon,
    Method,
    Stepping,
    cosine,
    each_chunk,
    feedback,
    methods,
    missing,
)


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_method_learns(method):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x, labels = torch.randn(32, 3), torch.arange(32) % 2
    x[:, 0] += 4 * labels
    learner = method.start(net, 0.05, Horizon(60, 10, 30))
    losses = []
    for step in range(60):
        with learner.predicting():
            before = net(x)
        outputs, loss = learner.learn(x, labels)
        torch.testing.assert_close(outputs, before, rtol=1e-5, atol=1e-6)
        assert not outputs.requires_grad
        losses.append(loss)
        if step % 10 == 9:
            learner.end_window(sum(losses[-10:]) / 10)
    assert losses[-1] < losses[0] and learner.backward <= 60 <= learner.forward
    assert learner.backward == 60 or "skipping" in method.name
    with learner.predicting():
        assert not net(x).requires_grad


def test_cosine_ends_at_zero_and_feedback_doubles():
    net, x, labels = nn.Linear(1, 2), torch.ones(4, 1), torch.zeros(4).long()
    for schedule, end in ((cosine, 0.0), (feedback, 0.4)):
        learner = Method("", torch.optim.SGD, schedule).start(net, 0.1, Horizon(4, 2))
        assert isinstance(learner, Stepping)
        for step in range(4):
            learner.learn(x, labels)
            if step % 2:
                learner.end_window(1.0 / (step + 1))
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(end, abs=1e-12)


def test_feedback_that_is_told_of_drifts_begins_again():
    net, x, labels = nn.Linear(1, 2), torch.ones(4, 1), torch.zeros(4).long()
    learner = Method("", torch.optim.SGD, each_chunk).start(net, 0.1, Horizon(12, 2, 6))
    assert isinstance(learner, Stepping)
    rates = []
    for step in range(8):
        learner.learn(x, labels)
        if step % 2:
            learner.end_window(1.0 / (step + 1))
            rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.4, 0.1, 0.2])


def test_peers_of_packages_are_named_when_absent():
    names = [m.name for m in methods()]
    assert len(set(names)) == len(names)
    assert ("Prodigy" in names) == ("prodigyopt" not in missing())


def test_dc_gains():
    assert dc_gain(FILTERS["PID (3, 100, 0.9)"]) == pytest.approx(31)
    assert dc_gain(FILTERS["momentum 0.9"]) == pytest.approx(dc_gain(FILTERS["Nesterov 0.9"])) == pytest.approx(10)
    assert dc_gain(FILTERS["Dag, heavy ball 1/3"]) == pytest.approx(1.5)
