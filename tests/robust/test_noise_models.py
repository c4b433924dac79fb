"""Noise models: what they change, and that void, seeds and rates are respected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from firmly.errors import DataError, SettingsError
from firmly.robust import (
    Annotators,
    BoundaryJitter,
    BoundaryShift,
    ClassConfusion,
    InTurn,
    MergedObjects,
    MissingObjects,
    RegionFlips,
    annotated,
    at_rate,
    biased_annotators,
)
from firmly.robust.noise_models import LabelNoise

ALL = (
    BoundaryShift(1.5),
    BoundaryShift(-1.0, (1, 3)),
    BoundaryJitter(1.5),
    MissingObjects(0.4),
    MergedObjects(0.4),
    ClassConfusion(0.3),
    RegionFlips(0.3),
    InTurn(1.0, (MissingObjects(0.2), BoundaryJitter(1.0))),
    Annotators(1.0, (BoundaryShift(2.0), BoundaryJitter(1.0))),
)


def maps(images=3, size=32):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(images, 4, size // 4, size // 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").argmax(1)


def square(size=40, low=12, high=28):
    image = torch.zeros(1, size, size, dtype=torch.long)
    image[:, low:high, low:high] = 1
    return image


@pytest.mark.parametrize("noise", ALL, ids=lambda n: f"{type(n).__name__}{n.amount}")
def test_every_model_reports_what_it_changed(noise):
    labels = maps()
    labels[:, :3] = 255
    before = labels.clone()
    found = noise(labels, 4, seed=3)
    assert torch.equal(labels, before)
    assert torch.equal(found.labels[:, :3], labels[:, :3]) and not found.changed[:, :3].any()
    assert torch.equal(found.changed, found.labels != labels) and found.changed.any()
    valid = labels != 255
    assert found.rate == float(found.changed.sum()) / int(valid.sum())
    assert set(found.labels[valid].tolist()) <= set(range(4))
    for j in range(4):
        for k in range(4):
            here = valid & (labels == j)
            expected = float((found.labels[here] == k).float().mean())
            assert abs(float(found.transition[j, k]) - expected) < 1e-6
    assert torch.equal(noise(labels, 4, seed=3).labels, found.labels)
    assert torch.equal(replace(noise, amount=0.0)(labels, 4, seed=3).labels, labels)
    one = noise(labels[:2], 4, seed=3)  # the errors of an image do not depend on the others
    assert torch.equal(one.labels, found.labels[:2])
    assert found.labels.dtype == noise(labels.to(torch.uint8), 4, seed=3).labels.to(torch.long).dtype


@pytest.mark.parametrize("noise", [n for n in ALL if not isinstance(n, (BoundaryShift, InTurn))], ids=repr)
def test_seeds_differ(noise):
    assert not torch.equal(noise(maps(), 4, seed=1).labels, noise(maps(), 4, seed=2).labels)


def test_a_square_grows_by_the_amount_and_shrinks():
    labels = square()
    grown = BoundaryShift(3.0, (1,))(labels, 2).labels
    rows = grown[0, 20].nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (12 - 3, 27 + 3)
    shrunk = BoundaryShift(-3.0)(labels, 2).labels
    rows = shrunk[0, 20].nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (12 + 3, 27 - 3)


def test_only_contours_of_grown_classes_move():
    labels = torch.zeros(1, 30, 30, dtype=torch.long)
    labels[:, 10:20], labels[:, 20:] = 1, 2
    found = BoundaryShift(2.0, (2,))(labels, 3).labels
    assert torch.equal(found[0, :, 0], torch.tensor([0] * 10 + [1] * 8 + [2] * 12))


def test_jitter_moves_only_contours_and_by_little():
    labels = square()
    found = BoundaryJitter(1.0, smoothness=3.0)(labels, 2)
    assert found.changed.any() and not found.changed[0, 18:22, 18:22].any() and not found.changed[0, :4].any()


def test_missing_objects_are_whole_objects():
    labels = torch.zeros(1, 20, 20, dtype=torch.long)
    labels[0, 2:6, 2:6], labels[0, 10:18, 10:18], labels[0, 2:6, 12:16] = 1, 1, 2
    all_gone = MissingObjects(1.0)(labels, 3).labels
    assert (all_gone == 0).all()
    small_gone = MissingObjects(1.0, largest=16)(labels, 3).labels
    assert torch.equal(small_gone[0, 10:18, 10:18], labels[0, 10:18, 10:18]) and (small_gone[0, :8] == 0).all()
    for seed in range(6):
        found = MissingObjects(0.5)(labels, 3, seed).labels
        for k in (1, 2):
            lost = (labels == k) & (found != k)
            assert int(lost.sum()) in (0, 16, 64, 80)


def test_merged_objects_take_the_class_of_their_neighbour():
    labels = torch.zeros(1, 20, 20, dtype=torch.long)
    labels[0, 4:16, 4:16], labels[0, 8:12, 8:12] = 2, 1
    found = MergedObjects(1.0)(labels, 3).labels
    assert (found[0, 8:12, 8:12] == 2).all()  # enclosed by class 2
    alone = square()
    assert (MergedObjects(1.0)(alone, 2).labels == 0).all()  # nothing but background beside it


def test_confusion_has_the_fraction_asked_for():
    labels = maps(images=4)
    found = ClassConfusion(0.25, pairs=((1, 2), (3, 0)))(labels, 4)
    assert float(found.transition[1, 2]) == pytest.approx(0.25, abs=0.01)
    assert float(found.transition[3, 0]) == pytest.approx(0.25, abs=0.01)
    assert float(found.transition[0, 0]) == float(found.transition[2, 2]) == 1.0


def test_regions_flip_whole_blocks():
    labels = square(32, 0, 32)
    found = RegionFlips(0.5, block=8)(labels, 4).labels.reshape(4, 8, 4, 8)
    assert (found.amax((1, 3)) == found.amin((1, 3))).all() and int((found[:, 0, :, 0] != 1).sum()) > 3


@pytest.mark.parametrize("noise", ALL, ids=lambda n: f"{type(n).__name__}{n.amount}")
def test_errors_grow_to_the_rate(noise):
    labels = maps(images=6)
    model, found = at_rate(noise, labels, 4, 0.2, seed=1)
    again = model(labels, 4, seed=1)
    assert torch.equal(again.labels, found.labels) and model.amount * noise.amount >= 0
    assert abs(found.foreground_rate - 0.2) < 0.06  # objects come whole
    assert at_rate(noise, labels, 4, 0.0)[1].rate == 0


def test_volumes():
    labels = torch.zeros(1, 8, 10, 12, dtype=torch.long)
    labels[:, 2:6, 3:7, 4:9] = 1
    for noise in ALL:
        found = noise(labels, 4)
        assert found.labels.shape == labels.shape


def test_people_differ_and_share():
    labels = maps(images=8)
    people = biased_annotators(3, seed=4)
    several, errors = annotated(people, labels, 4)
    assert several.shape == (8, 3, 32, 32) and len(errors) == 3
    assert not torch.equal(several[:, 0], several[:, 1])
    assert torch.equal(several[:, 1], errors[1].labels)
    assert biased_annotators(3, seed=4) == people != biased_annotators(3, seed=5)
    alone = Annotators(1.0, (BoundaryShift(2.0),))(labels, 4).labels
    assert torch.equal(alone, BoundaryShift(2.0)(labels, 4).labels)


def test_refusals():
    labels = maps()
    with pytest.raises(DataError, match="integers"):
        RegionFlips(0.1)(labels.float(), 4)
    with pytest.raises(DataError, match="between 0 and 2"):
        RegionFlips(0.1)(labels, 3)
    for noise in (MissingObjects(1.5), MergedObjects(-0.1), ClassConfusion(2.0), RegionFlips(1.1)):
        with pytest.raises(SettingsError, match="probability"):
            noise(labels, 4)
    with pytest.raises(SettingsError, match="grown"):
        BoundaryShift(1.0, (4,))(labels, 4)
    with pytest.raises(SettingsError, match="confused"):
        ClassConfusion(0.1, ((0, 9),))(labels, 4)
    with pytest.raises(SettingsError, match="give pairs"):
        ClassConfusion(0.1)(labels.clamp(max=1), 2)
    with pytest.raises(SettingsError, match="at most"):
        at_rate(ClassConfusion(0.1, ((1, 2),)), labels, 4, 0.9)
    with pytest.raises(SettingsError, match="rate"):
        at_rate(RegionFlips(0.1), labels, 4, 1.0)
    with pytest.raises(SettingsError, match="nobody"):
        annotated((), labels, 4)
    with pytest.raises(TypeError, match="use one of the models"):
        LabelNoise(1.0)(labels, 4)
