"""The bracket of attacks and certificates, and intersections over unions."""

import itertools

import pytest
import torch
from torch import nn

from firmly import certify
from firmly.errors import SettingsError, ShapeError, VerificationError
from firmly.robust import PGD, certified_iou, margin_loss, mean_iou, robustness_curves


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(4, 3, 1))


def scene(seed):
    """A small network whose classes are about as frequent, and labels that it mostly gets right, some of them void."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        model[2].bias -= model(x).mean((0, 2, 3))
    labels = model(x).argmax(1)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.1, 0, labels)
    labels[1, 2:5] = 255
    return model, x, labels


@pytest.mark.parametrize("seed", range(4))
def test_what_is_certified_is_never_above_what_an_attack_leaves(seed):
    model, x, labels = scene(seed)
    radii = [0.3, 0.0, 0.01, 0.1, 1.0]
    upper = certify(model, shape=(1, 8, 8), budget_s=1).upper
    attack = PGD(radius=1.0, norm="l2", steps=15, loss=margin_loss)
    curves = robustness_curves(model, x, labels, radii, attack, upper)
    assert curves.radii.tolist() == radii
    assert bool((curves.certified_accuracy <= curves.attacked_accuracy).all())
    assert bool((curves.certified_miou <= curves.attacked_miou + 1e-15).all())
    order = torch.tensor([1, 2, 3, 0, 4])
    assert bool((curves.certified_accuracy[order].diff() <= 0).all())
    assert bool((curves.attacked_accuracy[order].diff() <= 0).all())
    assert float(curves.certified_accuracy[2]) > 0
    assert float(curves.attacked_accuracy[4]) < float(curves.attacked_accuracy[1])
    valid, clean = labels != 255, model(x).argmax(1)
    assert float(curves.attacked_accuracy[1]) == pytest.approx(float((clean == labels)[valid].double().mean()))
    assert float(curves.certified_accuracy[1]) == float(curves.attacked_accuracy[1])
    assert float(curves.attacked_miou[1]) == pytest.approx(mean_iou(clean, labels, 3))


def test_a_false_bound_is_found_out():
    model, x, labels = scene(0)
    with pytest.raises(VerificationError, match="certified"):
        robustness_curves(model, x, labels, [0.5], PGD(radius=1.0, norm="l2", steps=15), bound=1e-6)


def test_mean_iou_counts_pixels():
    generator = torch.Generator().manual_seed(0)
    prediction, labels = (torch.randint(4, (2, 6, 6), generator=generator) for _ in range(2))
    labels = torch.where(labels == 3, 255, labels)
    pairs = [(p, q) for p, q in zip(prediction.flatten().tolist(), labels.flatten().tolist()) if q != 255]
    each = [
        sum(p == q == k for p, q in pairs) / sum(k in (p, q) for p, q in pairs)  #
        for k in range(3)
    ]
    assert mean_iou(prediction, labels, 4) == pytest.approx(sum(each) / 3, abs=1e-15)


def test_certified_iou_bounds_all_predictions_and_each_class_is_attained():
    labels = torch.tensor([[[0, 1, 2, 0, 1, 255]]])
    prediction = torch.tensor([[[0, 1, 2, 1, 0, 0]]])
    certified = torch.tensor([[[True, False, True, False, True, False]]])
    bound = certified_iou(prediction, certified, labels, 3)
    values = []
    for free in itertools.product(range(3), repeat=3):
        other = prediction.clone()
        other[~certified] = torch.tensor(free)
        values.append(mean_iou(other, labels, 3))
    assert bound <= min(values)
    assert bound == pytest.approx((1 / 4 + 0 + 1 / 3) / 3)
    assert certified_iou(prediction, torch.ones_like(certified), labels, 3) == mean_iou(prediction, labels, 3)


def test_refusals():
    model, x, labels = scene(1)
    with pytest.raises(SettingsError, match="Euclidean"):
        robustness_curves(model, x, labels, [0.1], PGD(radius=1.0))
    with pytest.raises(SettingsError, match="radii"):
        robustness_curves(model, x, labels, [-0.1])
    with pytest.raises(ShapeError, match="one shape"):
        mean_iou(labels[0], labels, 3)
    with pytest.raises(SettingsError, match="between 0 and 1"):
        mean_iou(labels, labels, 2)
    with pytest.raises(ShapeError, match="no pixel"):
        mean_iou(labels, torch.full_like(labels, 255), 3)
