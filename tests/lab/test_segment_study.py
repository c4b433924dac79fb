"""The segmentation study: metrics, methods without an effect are cross-entropy, choices, resuming."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from firmly.errors import SettingsError
from firmly.lab.experiments.segment import NOISES, STUDY, SegmentSettings
from firmly.lab.experiments.segment_cells import Cell, Group, by_method, choice, groups, interval, measured, ratio
from firmly.lab.experiments.segment_energy import Energy
from firmly.lab.experiments.segment_models import MODELS, Labelled, hinge
from firmly.lab.experiments.segment_page import advice, names
from firmly.lab.experiments.segment_pictures import separation
from firmly.lab.experiments.segment_problems import cropped, mean_overlap, overlap, problem
from firmly.lab.experiments.segment_training import (
    METHODS,
    Now,
    Task,
    corrected,
    drawn,
    early,
    fit,
    pencil,
    plain,
    trained,
    trimmed,
)
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import run_study


def cell(method, clean, test, parameter=0.0, noise="regions", rate=0.3, seed=0):
    """`clean` for each of two slices, or one number for both."""
    clean = clean if isinstance(clean, tuple) else (clean, clean)
    return Cell("U-Net", noise, rate, method, parameter, seed, clean, test, 0.1, rate)


def small_task(steps=6, seed=3):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(8, 1, 16, 16, generator=generator)
    labels = (images[:, 0] > 0.5).long()
    model = dataclasses.replace(MODELS["logistic-TV"], learning_rate=0.3, coupled=False)
    seen = Labelled(images, model.seen(images), labels)
    given, clean = (Labelled(*(t[part] for t in seen)) for part in (slice(0, 4), slice(4, 8)))
    return Task(model, given, clean, 2, steps, seed)


def test_overlap_by_hand():
    truth = torch.tensor([[[0, 0, 1], [1, 1, 2]]])
    found = torch.tensor([[[0, 1, 1], [1, 1, 1]]])
    values = overlap(found, truth, 4)
    assert values[:3] == [1 / 2, 3 / 5, 0.0] and math.isnan(values[3])
    assert mean_overlap(found, truth, 4) == pytest.approx((0.5 + 0.6) / 3)
    assert cropped(torch.zeros(2, 1, 101, 122)).shape == (2, 1, 100, 120)


def test_the_hinge_is_that_of_crammer_and_singer():
    scores = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(4):
        margins = torch.stack([1 + scores[:, j] - scores[:, k] for j in range(4) if j != k])
        torch.testing.assert_close(hinge(scores)[:, k], margins.amax(0).clamp(min=0))


def batch(progress):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    labels[:, 0] = 255
    _, views = drawn(torch.Size((2, 8, 8)), False, generator)
    return Now(scores, -scores.log_softmax(1), labels, [0, 1], views[:2], progress)


@pytest.mark.parametrize(
    ("make", "nothing", "something"),
    [(corrected, 0.0, 0.3), (pencil, 1e9, 0.3), (trimmed, 0.0, 0.3), (early, 0.0, 3.0)],
)
def test_methods_without_an_effect_are_cross_entropy(make, nothing, something):
    now = batch(0.9)
    given = Labelled(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), now.labels)
    task = Task(MODELS["U-Net"], given, given, 3, 10, 0)
    networks = 2 if make is trimmed else 1
    value = make(nothing, task, 0)([now] * networks)
    expected = networks * plain(0.0, task, 0)([now])
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    assert make(something, task, 0)([now] * networks) < expected
    warm = batch(0.1)  # in the warm start the labels are believed, whatever the parameter
    torch.testing.assert_close(make(something, task, 0)([warm] * networks), expected, atol=1e-6, rtol=0)


def test_every_method_trains_and_repeats_itself():
    for method in METHODS.values():
        one, two = (trained(small_task(), method, method.parameters[0]) for _ in range(2))
        assert len(one) == len(two) == len(method.folds)
        for a, b in zip(one, two):
            assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(a.parameters(), b.parameters()))


def test_methods_that_learn_from_clean_slices_see_one_half_of_them():
    for name in ("forward correction", "then clean slices", "cleaned labels", "clean slices alone"):
        method, task, other = METHODS[name], small_task(), small_task()
        assert method.learns and task.halves == [[0, 1], [2, 3]]
        other.clean.labels[2:] = 1 - other.clean.labels[2:]
        if name == "cleaned labels":  # its two hyperparameters are those of both halves
            continue
        first, second = ([fit(t, method, method.parameters[0], fold) for t in (task, other)] for fold in (0, 1))
        assert all(torch.equal(p, q) for p, q in zip(first[0].parameters(), first[1].parameters()))
        assert not all(torch.equal(p, q) for p, q in zip(second[0].parameters(), second[1].parameters()))


def test_clean_slices_are_judged_by_the_network_that_has_not_seen_them():
    class Constant(torch.nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full(x[:, 0].shape, self.k), 2).movedim(-1, 1).float()

    task = small_task()
    task.clean.labels[:2], task.clean.labels[2:] = 1, 0
    test = Labelled(*(part[:1] for part in task.clean))  # of class 1 only
    assert task.energies == [Energy(0.0, 1.0)] * 2
    clean, value, laws = measured(task, test, [Constant(0), Constant(1)])  # of the first half and of the second
    assert clean == [100.0, 100.0, 100.0, 100.0]
    assert value == pytest.approx((0 + 100) / 2) and laws.shape == (1, 2, 16, 16)
    torch.testing.assert_close(laws, torch.full_like(laws, 0.5))
    assert measured(task, test, [Constant(1)])[0] == [100.0, 100.0, 0.0, 0.0]


def test_choices_are_made_on_clean_slices():
    cells = [
        cell("cross-entropy", (70, 71), 90),
        cell("GCE", (75, 76), 60, 0.7),
        cell("SCE", (60, 96), 60, 0.1),  # better in the mean, and not beyond chance
        cell("label correction", (72, 73), 95, 0.1),
        cell("label correction", (74, 75), 50, 0.3),
        cell("sup-CVaR (control)", 99, 99, 0.3),
    ]
    assert choice(cells).title == "GCE (0.7)"
    found = groups([*cells, cell("GCE", 99, 99, 0.7, noise="jitter")], "U-Net", "regions", 0.3)
    assert by_method(found)["label correction"].parameter == 0.3
    assert choice([c for c in cells if c.method != "GCE"]).title == "label correction (0.3)"
    assert choice([c for c in cells if c.method[:3] in ("cro", "sup", "SCE")]).method == "cross-entropy"
    several = Group("GCE", 0.7, (cell("GCE", 70, 60), cell("GCE", 80, 70, seed=1)))
    assert (several.clean, several.test) == (75, 65)


def test_what_is_recovered_is_paired_by_seeds():
    cells = [cell("clean slices alone", 10, 10, 1.0, noise="none", rate=0.0, seed=s) for s in (0, 1)]
    for seed, (plain_test, best_test, clean_test) in enumerate(((60, 75, 80), (62, 79, 82))):
        cells += [
            cell("cross-entropy", (50, 51), plain_test, seed=seed),
            cell("GCE", (60, 61), best_test, 0.7, seed=seed),
            cell("cross-entropy", (80, 81), clean_test, noise="none", rate=0.0, seed=seed),
            cell("GCE", (70, 71), clean_test - 3, 0.7, noise="none", rate=0.0, seed=seed),
        ]
    found = advice(cells, "U-Net", "regions", 0.3)
    assert names(found.best) == "GCE (0.7)" and found.lost == [20, 20]
    share, half = found.recovered(found.best)
    assert share == pytest.approx(80) and found.met
    assert half == pytest.approx(100 * interval([15 / 20, 17 / 20]))
    assert [c.test for c in found.clean_best] == [77, 79]
    clean = advice(cells, "U-Net", "none", 0.0)
    assert names(clean.best) == "cross-entropy" and clean.recovered(clean.best) is None


def test_intervals():
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302652729749464 / math.sqrt(3), abs=1e-9)
    assert ratio([2.0], [4.0]) == (0.5, None)
    quotient, half = ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert quotient == pytest.approx(0.5) and half == pytest.approx(0.0, abs=1e-12)


def test_separation_counts_pairs():
    quality = torch.tensor([0.1, 0.4, 0.35, 0.8])
    wrong = torch.tensor([True, True, False, False])
    assert separation(quality, wrong) == pytest.approx(3 / 4)
    assert math.isnan(separation(quality, torch.zeros(4, dtype=torch.bool)))


def test_every_noise_fits_every_stack():
    for name in ("template", "mr"):
        data = problem(name)
        assert set(data.noises) == set(NOISES)
        found = data.corrupted("regions", 0.3, seed=0)
        assert found.labels.shape == data.train.labels.shape and found.foreground_rate == pytest.approx(0.3, abs=0.02)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    settings = dataclasses.replace(STUDY.presets["smoke"], models="U-Net", steps=2, methods="GCE")
    run = RunFolder(tmp_path)
    heard = []

    def stop(stage, event):
        heard.append(event)
        if stage == "work" and event["done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, settings, "smoke", run, stop)
    before = run.metrics("cell")
    assert len(before) == 2
    results = run_study(STUDY, settings, "smoke", run, lambda stage, event: None)
    assert run.metrics("cell")[:2] == before
    assert results["page"]["facts"]["trainings"] == len(run.metrics("cell"))


def test_settings_are_checked():
    for wrong in ({"models": "U-Net,VGG"}, {"noises": "dust"}, {"rates": (0.9,)}, {"steps": 0}, {"methods": "magic"}):
        with pytest.raises(SettingsError):
            SegmentSettings(**wrong)
