"""The study of optimisers: its scores by hand, fair choices, the goal, and runs that go on where they stopped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from firmly.errors import SettingsError
from firmly.lab.experiments import optim_linear
from firmly.lab.experiments import optim_page as page
from firmly.lab.experiments.bregman_data import Samples, Split
from firmly.lab.experiments.optim import OptimSettings, grid, read
from firmly.lab.experiments.optim_data import Stream, chunked, electricity, incremental
from firmly.lab.experiments.optim_goal import beside, verdict
from firmly.lab.experiments.optim_linear import a_posteriori, linear_section, logistic, regressors
from firmly.lab.experiments.optim_methods import (
    Method,
    methods,
)
from firmly.lab.experiments.optim_runs import THOROUGH, Clock, Compared, Kept, Record, Size, choice, compare
from firmly.lab.experiments.optim_scores import area, kappa_temporal, reached, recovery, width, windowed
from firmly.lab.page import Table
from firmly.lab.run_folder import RunFolder
from firmly.optim import AdaptationGain, ImplicitStep

SIZE = Size(hidden=4, batch=10, epochs=2, first=0.3, window=2, ahead=2)
SGD = Method("SGD", torch.optim.SGD)


def record(rate: float, chosen_by: float, score: float, loss: float = 1.0) -> Record:
    return Record(rate, (chosen_by, loss), score, [(1.0, score)], 0.0, 1, 1, False)


# -- scores --------------------------------------------------------------------------------------------------------


def test_area_and_width():
    assert area([0.01, 0.1, 1.0], [0.5, 1.0, 0.5]) == pytest.approx(0.75)
    assert area([0.1, 1.0, 100.0], [1.0, 1.0, 0.0]) == pytest.approx((1 + 2 * 0.5) / 3)
    assert area([0.1], [0.3]) == 0.3
    # 0.90 at 0.1, falling by 0.02 in a decade on both sides: within 0.01 for half a decade each
    assert width([0.01, 0.1, 1.0], [0.88, 0.90, 0.88]) == pytest.approx(1.0)
    assert width([0.01, 0.1, 1.0], [0.90, 0.90, 0.90]) == pytest.approx(2.0)
    assert width([0.1], [0.9]) == 0.0


def test_kappa_temporal():
    assert kappa_temporal(0.85, 0.85) == 0.0 and kappa_temporal(1.0, 0.85) == 1.0
    assert kappa_temporal(0.7, 0.85) == pytest.approx(-1.0)
    assert kappa_temporal(0.9, 1.0) == -math.inf


def test_recovery():
    right, wrong = torch.ones(20), torch.zeros(7)
    correct = torch.cat([right, wrong, torch.ones(13), wrong, torch.zeros(3)]).bool()
    # all of 4 are right again when 11 samples of the second part have passed; never after the third begins
    assert recovery(correct, [20, 40], 4) == [11, 10]
    assert recovery(torch.ones(10).bool(), [5], 3) == [3]
    assert recovery(torch.tensor([1, 1, 0, 0]).bool(), [2], 4) == [2]  # no window fits
    curve = windowed(correct, 5)
    assert curve[3] == (20.0, 1.0) and curve[4] == (25.0, 0.0) and len(curve) == 10
    assert reached(curve, [20, 40], [1.0, 1.0], 50) == [15.0, 10.0]
    assert reached(curve, [20], [0.6], 50) == [10.0]


def test_what_is_scored_in_chunks(tmp_path):
    kept = Kept(RunFolder(tmp_path), "x", lambda: None)
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0.5).long() + 2 * (x[:, 1] > 0.5).long()
    split = Split("x", *[Samples(x, labels)] * 3, 4, None)
    for data, score in ((chunked(split, 2), "final"), (incremental(split), "mean")):
        found = kept.run(data, SGD, 0.1 if score == "final" else 0.2, 0, SIZE)
        assert len(found.curve) == 4 and found.backward == found.forward
        assert found.final == found.curve[-1][1] and found.mean == pytest.approx(sum(v for _, v in found.curve) / 4)
        assert found.score == getattr(found, score) and 0 < found.chosen_by[0] <= 1


# -- slow steps ------------------------------------------------------------------------------------------------------


class Slow:
    """Every step costs as many passes as it is told."""

    def __init__(self, forward: int, backward: int):
        self.each, self.forward, self.backward = (forward, backward), 0, 0

    def learn(self):
        self.forward, self.backward = self.forward + self.each[0], self.backward + self.each[1]


@pytest.mark.parametrize(
    ("each", "delay", "learnt"),
    [((1, 1), "passes", 12), ((2, 2), "passes", 6), ((2, 1), "passes", 9), ((1, 0), "passes", 12), ((4, 1), "none", 12),
     ((4, 4), "passes", 3)],
)  # fmt: skip
def test_slow_steps_miss_batches(each, delay, learnt):
    clock, learner, seen = Clock(delay, nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1).long()), Slow(*each), 0
    for _ in range(12):
        if not clock.late():
            with clock.running(learner):  # type: ignore[arg-type]
                learner.learn()
            seen += 1
    assert seen == learnt and clock.missed == 12 - learnt


def test_steps_may_be_timed(tmp_path):
    twice = Method("twice", lambda p, lr: Twice(p, lr))
    stream = electricity(400, 0.3)
    counted, timed, free = (
        Kept(RunFolder(tmp_path / delay), "x", lambda: None).run(stream, twice, 0.1, 0, SIZE._replace(delay=delay))
        for delay in ("passes", "seconds", "none")
    )
    assert (counted.missed, counted.backward, counted.forward) == (0.5, 40, 40)
    assert 0 <= timed.missed < 1 and (free.missed, free.backward) == (0, 80)
    assert len(counted.curve) == len(free.curve)


class Twice(torch.optim.SGD):
    """Two gradients for every step."""

    def step(self, closure=None):
        assert closure is not None
        closure()
        return super().step(closure)


# -- the protocol ---------------------------------------------------------------------------------------------------


def test_choices_never_look_at_the_score():
    grid_ = [record(0.1, 0.8, 0.1), record(1.0, 0.7, 0.9), record(10.0, 0.8, 0.5, loss=0.5)]
    assert choice(grid_).rate == 10.0
    assert Compared(SGD, grid_, []).chosen.score == 0.5


def test_the_goal_takes_all_seeds_of_every_rate():
    def runs(name: str, role: str, *scores: tuple[float, float]) -> Compared:
        every = [[record(10.0**k, a, a), record(10.0**k, b, b)] for k, (a, b) in zip(range(-3, 3), scores)]
        return Compared(Method(name, role=role), [r[0] for r in every], every[2], every)  # type: ignore[arg-type]

    adam = runs("Adam", "other", (0.5, 0.5), (0.8, 0.9), (0.7, 0.7), (0.7, 0.7), (0.7, 0.7), (0.7, 0.7))
    ours = runs("hybrid", "ours", (0.1, 0.1), (0.8, 0.8), (0.9, 0.7), (0.71, 0.69), (0.8, 0.8), (0.0, 0.0))
    at = beside([adam, ours], 1e-2, 10.0)
    assert at.ours[0].rate == 1.0 and at.to_adam.mean == pytest.approx(0.0)
    assert at.hindsight[0].rate == 1e-2 and at.to_hindsight.mean == pytest.approx(-15.0)
    assert "It is met. " in verdict({"x": at}) and "it is missed on x" in verdict({"x": at})
    low = beside([adam, ours], 1e-3, 10.0)
    assert low.to_adam.mean == pytest.approx(-60.0) and "missed on x, by 60.0" in verdict({"x": low})


def test_thorough_methods_run_everywhere(tmp_path):
    data = read("spirals", OptimSettings(train=40, test=20))
    assert set(THOROUGH) <= {m.name for m in methods()}
    named = [Method("Adam", torch.optim.Adam), SGD]
    adam, sgd = compare(data, named, [0.1, 1.0], [0, 1, 2], SIZE, Kept(RunFolder(tmp_path), "x", lambda: None))
    assert sgd.everywhere is None and adam.everywhere is not None
    assert [[r.rate for r in runs] for runs in adam.everywhere] == [[0.1, 0.1], [1.0, 1.0]]
    assert adam.runs in adam.everywhere and adam.runs[0].rate == adam.chosen.rate


def test_one_configuration():
    adam = Method("Adam", torch.optim.Adam)
    ours = Method("ours", torch.optim.SGD, role="ours")

    def runs(method: Method, *scores: float) -> Compared:
        return Compared(method, [record(10.0**k, s, s) for k, s in zip(range(-2, 3), scores)], [])

    found = {
        "a": [runs(adam, 0.5, 0.9, 0.9, 0.9, 0.5), runs(ours, 0.80, 0.89, 0.895, 0.90, 0.88)],
        "b": [runs(adam, 0.5, 0.5, 0.8, 0.5, 0.5), runs(ours, 0.10, 0.79, 0.81, 0.80, 0.70)],
    }
    shared = {s.method: s for s in page.shared_configurations(found)}
    assert shared["ours"].rate == 10.0 and min(shared["ours"].gaps.values()) == pytest.approx(0.0)
    assert (shared["ours"].low, shared["ours"].high) == (0.1, 100.0)
    assert shared["ours"].worst == pytest.approx(-0.1)
    assert shared["Adam"].worst == pytest.approx(-0.4)
    assert "not met" in page.goal(list(shared.values()))


def test_ours_is_chosen_blind_and_the_peer_in_hindsight():
    def runs(role: str, chosen_by: float, *scores: float) -> Compared:
        method = Method(f"{role} {chosen_by}", role=role)  # type: ignore[arg-type]
        return Compared(method, [record(0.1, chosen_by, 0.0)], [record(0.1, chosen_by, s) for s in scores])

    found = [runs("ours", 0.9, 0.5, 0.52), runs("ours", 0.8, 0.9, 0.9), runs("other", 0.9, 0.1, 0.1),
             runs("other", 0.2, 0.7, 0.72)]  # fmt: skip
    assert page.preferred(found) == found[0] and page.strongest(found) == found[3]
    assert "worse" in page.verdict(found) and "-20.00 ± 0.00" in page.verdict(found)
    assert "worse on x" in page.headline({"x": found})
    assert "not told apart" in page.verdict([runs("ours", 0.9, 0.5), runs("other", 0.2, 0.7)])


def test_runs_go_on_where_they_stopped(tmp_path):
    split = read("spirals", OptimSettings(train=40, test=20))
    calls = []
    counted = Method("counted", lambda p, lr: calls.append(lr) or torch.optim.SGD(p, lr))
    first = compare(split, [counted], [0.1, 1.0], [0, 1], SIZE, Kept(RunFolder(tmp_path), "spirals", lambda: None))
    assert len(calls) == 3
    again = compare(split, [counted], [0.1, 1.0], [0, 1], SIZE, Kept(RunFolder(tmp_path), "spirals", lambda: None))
    assert len(calls) == 3 and again == first
    other = Kept(RunFolder(tmp_path), "other", lambda: None).run(split, counted, 0.1, 0, SIZE)
    assert len(calls) == 4 and other.score == first[0].grid[0].score
    assert first[0].runs[0].backward == 2 * 4 and len(first[0].runs[0].curve) == 2


def test_a_network_that_diverges_is_counted(tmp_path):
    kept = Kept(RunFolder(tmp_path), "x", lambda: None)
    lost = kept.run(read("spirals", OptimSettings(train=40, test=20)), SGD, 1e30, 1, SIZE)
    assert lost.diverged and lost.chosen_by[1] > 1e6 and len(lost.curve) == 2
    stream = electricity(400, 0.3)
    bad = kept.run(stream, SGD, 1e30, 0, SIZE)
    good = kept.run(stream, SGD, 0.1, 0, SIZE)
    assert bad.diverged and not good.diverged and bad.chosen_by[1] > 1e6
    assert bad.score < 0.8 and choice([bad, good]) == good
    assert good.forward == good.backward == 40 and bad.backward < 40
    assert len(good.curve) == len(bad.curve) == 20
    later = torch.cat([stream.labels[10 * (t + 2) : 10 * (t + 3)] for t in range(12, 38, 2)])
    assert bad.near_future == pytest.approx(float((later == 0).double().mean()))


# -- the linear model -------------------------------------------------------------------------------------------------


def test_all_rates_at_once_are_single_runs():
    stream = electricity(300, 0.1)
    phi, signs = regressors(stream.x), 2 * stream.labels - 1
    seen = stream.x[:51].double()
    expected = (seen[50] - seen.mean(0)) / seen.std(0, correction=0).clamp(min=1e-6)
    torch.testing.assert_close(phi[50, :6], expected, rtol=1e-8, atol=1e-8)
    gain = AdaptationGain((0.9,))
    swept = a_posteriori(phi, signs, gain, [0.01, 1.0])
    single = ImplicitStep(phi.new_zeros(7), gain)
    right = 0
    for row, sign in zip(phi, signs):
        right += bool(single.predict(row) * sign > 0)
        single.update(row, sign.double(), 1.0)
    assert swept.accuracies[1] == pytest.approx(right / 300)

    theta, right = torch.nn.Parameter(phi.new_zeros(7)), 0
    optimizer = torch.optim.SGD([theta], 0.1)
    for row, sign in zip(phi, signs):
        margin = sign * (row @ theta)
        right += bool(margin > 0)
        optimizer.zero_grad()
        nn.functional.softplus(-margin).backward()
        optimizer.step()
    assert logistic(phi, signs, [0.1]).accuracies[0] == pytest.approx(right / 300)


def test_rates_that_diverge_are_errors_and_leave_the_others_alone(monkeypatch):
    monkeypatch.setattr(optim_linear, "DIVERGED", 1e6)
    stream = electricity(3000, 0.1)
    phi, signs = regressors(stream.x), 2 * stream.labels - 1
    gain = AdaptationGain((), (0.99,))
    both, alone = a_posteriori(phi, signs, gain, [1e-4, 10.0]), a_posteriori(phi, signs, gain, [1e-4])
    assert both.accuracies[0] == alone.accuracies[0] > 0.6 and both.accuracies[1] < 0.3


def test_what_is_proved_stable():
    section = linear_section(electricity(200, 0.1), lambda stage, event: None)
    table = section.blocks[1]
    assert isinstance(table, Table)
    said = {row[0]: row[6] for row in table.rows}
    assert said["a posteriori"] == said["a posteriori, heavy ball 1/3"] == "every rate"
    assert said["a posteriori, heavy ball 0.9"].startswith("rate < ")
    with pytest.raises(SettingsError, match="two classes"):
        linear_section(Stream("", torch.zeros(3, 1), torch.zeros(3).long(), 3), lambda stage, event: None)


# -- settings -------------------------------------------------------------------------------------------------------


def test_the_grid():
    assert grid(OptimSettings(rates=3, lowest=0.01, highest=1.0)) == pytest.approx([0.01, 0.1, 1.0])
    assert grid(OptimSettings(rates=1)) == pytest.approx([1e-4])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"task": ()}, "at least one of"), ({"rates": 0}, "given 0"), ({"lowest": 1.0, "highest": 0.5}, "given 1.0"),
        ({"seeds": 0}, "given 0"), ({"batch": 0}, "at least 1"), ({"train": 3}, "at least 20"),
        ({"parts": 1}, "given 1"), ({"first": 0.9}, "given 0.9"), ({"length": 100}, "at least one window"),
        ({"published": 0.0}, "positive"),
    ],
)  # fmt: skip
def test_bad_settings(bad, said):
    with pytest.raises(SettingsError, match=said):
        OptimSettings(**bad)
