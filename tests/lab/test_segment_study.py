"""The segmentation study: metrics, methods without an effect are cross-entropy, choices, resuming."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from firmly.errors import SettingsError
from firmly.lab.experiments.segment import NOISES, STUDY, SegmentSettings
from firmly.lab.experiments.segment_cells import Cell, Group, by_method, choice, groups, interval
from firmly.lab.experiments.segment_models import MODELS, hinge
from firmly.lab.experiments.segment_pictures import separation
from firmly.lab.experiments.segment_problems import cropped, mean_overlap, overlap, problem
from firmly.lab.experiments.segment_training import (
    METHODS,
    Context,
    Labelled,
    Now,
    corrected,
    drawn,
    fit,
    pencil,
    plain,
    trimmed,
)
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import run_study


def cell(method, clean, test, parameter=0.0, noise="regions", rate=0.3, seed=0):
    return Cell("U-Net", noise, rate, method, parameter, seed, clean, test, 0.1, 0.0, rate)


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


@pytest.mark.parametrize(("make", "nothing"), [(corrected, 0.0), (pencil, 1e9), (trimmed, 0.0)])
def test_methods_without_an_effect_are_cross_entropy(make, nothing):
    now = batch(0.9)
    given = Labelled(torch.zeros(2, 1, 8, 8), now.labels)
    context = Context(torch.nn.Identity(), given, given, 3)
    networks = 2 if make is trimmed else 1
    value = make(nothing, context)([now] * networks)
    expected = networks * plain(0.0, context)([now])
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    warm = batch(0.1)  # in the warm start the labels are believed, whatever the parameter
    torch.testing.assert_close(make(0.3, context)([warm] * networks), expected, atol=1e-6, rtol=0)
    assert make(0.3, context)([now] * networks) < expected


def test_every_method_trains_and_repeats_itself():
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(4, 1, 16, 16, generator=generator)
    labels = (images[:, 0] > 0.5).long()
    model = dataclasses.replace(MODELS["logistic-TV"], learning_rate=0.3)
    data = Labelled(model.seen(images), labels)
    for method in METHODS:
        one, two = (fit(model, method, method.parameters[0], data, data, 2, 6, 3) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
        assert all(p.isfinite().all() for p in one.parameters())


def test_choices_are_made_on_clean_slices():
    cells = [
        cell("cross-entropy", 70, 90),
        cell("GCE", 75, 60, 0.7),
        cell("label correction", 72, 95, 0.1),
        cell("label correction", 74, 50, 0.3),
        cell("sup-CVaR (control)", 99, 99, 0.3),
        cell("clean slices alone", 98, 98, 1.0),
        cell("GCE", 99, 99, 0.7, noise="jitter"),
    ]
    found = groups(cells, "U-Net", "regions", 0.3)
    assert choice(found).title == "GCE (0.7)"
    assert by_method(found)["label correction"].parameter == 0.3
    assert choice([g for g in found if g.method != "GCE"]).title == "label correction (0.3)"
    assert choice([g for g in found if g.method.startswith(("cross", "sup"))]).method == "cross-entropy"
    several = Group("GCE", 0.7, (cell("GCE", 70, 60), cell("GCE", 80, 70, seed=1)))
    assert (several.clean, several.test) == (75, 65)
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302652729749464 / math.sqrt(3), abs=1e-9)


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
    settings = dataclasses.replace(STUDY.presets["smoke"], steps=2)
    run = RunFolder(tmp_path)
    heard = []

    def stop(stage, event):
        heard.append(event)
        if stage == "work" and event["done"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, settings, "smoke", run, stop)
    before = run.metrics("cell")
    assert len(before) == 4
    results = run_study(STUDY, settings, "smoke", run, lambda stage, event: None)
    assert run.metrics("cell")[:4] == before
    assert results["page"]["facts"]["trainings"] == len(run.metrics("cell"))


def test_settings_are_checked():
    for wrong in ({"models": "U-Net,VGG"}, {"noises": "dust"}, {"rates": (0.9,)}, {"steps": 0}, {"couplings": ()}):
        with pytest.raises(SettingsError):
            SegmentSettings(**wrong)
