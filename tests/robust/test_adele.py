"""ADELE: onsets of known curves, what is corrected, scales, and a small problem with errors near the contours."""

from __future__ import annotations

import math

import pytest
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import Adele, class_overlaps, memorisation_onset, multiscale_consistency, multiscale_laws


@pytest.mark.parametrize("a, b, c", [(0.8, 0.3, 1.0), (0.6, 0.9, 0.8), (0.9, 0.1, 0.95)])
def test_onset_of_known_curves(a, b, c):
    curve = [a * (1 - math.exp(-b * t**c)) for t in range(1, 31)]
    slope = [a * b * c * t ** (c - 1) * math.exp(-b * t**c) for t in range(1, 31)]
    expected = next(t for t in range(1, 31) if (slope[0] - slope[t - 1]) / slope[0] > 0.9)
    found = memorisation_onset(curve)
    assert found is not None and abs(found - expected) <= 1
    noisy = [y + 0.01 * (-1) ** t for t, y in enumerate(curve)]
    again = memorisation_onset(noisy)
    assert again is not None and abs(again - expected) <= 3
    assert memorisation_onset(curve[: expected // 2]) is None


def test_the_fit_is_that_of_scipy():
    from scipy.optimize import curve_fit

    from firmly.robust.adele import fitted

    t = torch.arange(1, 16, dtype=torch.float64)
    noise = 0.02 * torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (0.7 * (1 - torch.exp(-0.4 * t**0.8)) + noise).clamp(0, 1)

    def f(t, a, b, c):
        return a * (1 - math.e ** (-b * t**c))

    sigma = torch.logspace(0, -1, 15, dtype=torch.float64).numpy()
    (_, b, c), _ = curve_fit(f, t.numpy(), y.numpy(), p0=(1, 1, 1), sigma=sigma, bounds=([0, 0, 0], [1, 50, 1]))
    found = fitted(t, y)
    assert found == pytest.approx((b, c), abs=1e-3)


def test_classes_start_one_by_one_and_only_they_are_corrected():
    adele = Adele(3, background=None)
    for t in range(1, 13):
        fast, slow = 0.9 * (1 - math.exp(-0.6 * t)), 0.9 * (1 - math.exp(-0.02 * t))
        adele.observe(torch.tensor([fast, slow, fast]))
    assert adele.started == [True, False, True]
    labels = torch.tensor([[[0, 0, 2, 1, 255, 0]]])
    sure = torch.full((1, 3, 1, 6), 0.05)
    for place, k in enumerate((2, 1, 0, 0, 0, 0)):
        sure[0, k, 0, place] = 0.9
    assert adele.corrected(sure, labels).tolist() == [[[2, 0, 0, 1, 255, 0]]]
    assert adele.corrected(sure.clamp(max=0.7), labels).tolist() == labels.tolist()
    assert Adele(3).corrected(sure, labels).tolist() == labels.tolist(), "before anything was seen"
    assert Adele(3, background=1, started=[True, False, True]).corrected(sure, labels)[0, 0].tolist()[:4] == [
        2,
        1,
        0,
        0,
    ]
    nan = Adele(2)
    nan.observe(torch.tensor([0.5, torch.nan]))
    assert nan.started == [False, False]


def test_overlaps():
    labels = torch.tensor([[[0, 0, 1, 1, 255]]])
    assert class_overlaps(torch.tensor([[[0, 1, 1, 1, 0]]]), labels, 3)[:2].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert class_overlaps(labels.clamp(max=1), labels, 3)[2].isnan()


@pytest.mark.parametrize("shape", [(2, 1, 10, 13), (1, 1, 6, 8, 7)])
def test_scales(shape):
    convolution = (torch.nn.Conv2d, torch.nn.Conv3d)[len(shape) - 4]
    network = convolution(1, 3, 3, padding=1).double()
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    laws = multiscale_laws(network, images)
    assert laws.shape == (3, shape[0], 3, *shape[2:])
    torch.testing.assert_close(laws[1], network(images).softmax(1))
    torch.testing.assert_close(laws.sum(2), torch.ones_like(laws[:, :, 0]))
    q = laws.mean(0)
    entropy = -(q * q.log()).sum(1) + (laws * laws.log()).sum(2).mean(0)  # that of the mean less the mean of those
    torch.testing.assert_close(multiscale_consistency(laws), entropy)
    assert float(multiscale_consistency(laws[1:2].repeat(2, *[1] * len(shape))).detach().abs().max()) < 1e-15
    even = multiscale_laws(torch.nn.Sequential(torch.nn.Identity()), images, multiple=2)
    assert even.shape[2:] == images.shape[1:]


def test_wrong_labels_are_corrected_on_a_small_problem():
    generator = torch.Generator().manual_seed(1)
    truth = torch.zeros(6, 24, 24, dtype=torch.long)
    truth[:, 6:18, 6:18] = 1
    images = truth[:, None] + 0.2 * torch.randn(6, 1, 24, 24, generator=generator)
    given = truth.clone()
    given[:3, 6:12, 6:12] = 0  # a quarter of half the objects is missing
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    adele, labels = Adele(2), given
    for _ in range(40):
        optimiser.zero_grad()
        laws = multiscale_laws(network, images)
        loss = torch.nn.functional.nll_loss(laws[1].log(), labels) + multiscale_consistency(laws).mean()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            q = multiscale_laws(network, images).mean(0)
        adele.observe(class_overlaps(q.argmax(1), given, 2))
        labels = adele.corrected(q, given)
    assert adele.started[1]
    assert (labels != truth).double().mean() < 0.3 * (given != truth).double().mean()


def test_bad_input_is_refused():
    with pytest.raises(SettingsError, match="threshold"):
        memorisation_onset([0.1, 0.2, 0.3], 1.0)
    with pytest.raises(DataError, match="overlaps lie"):
        memorisation_onset([0.1, 1.2, 0.3])
    with pytest.raises(SettingsError, match="background"):
        Adele(2, background=2)
    with pytest.raises(SettingsError, match="two classes"):
        Adele(1)
    with pytest.raises(ShapeError, match="overlaps are"):
        Adele(2).observe(torch.zeros(3))
    with pytest.raises(ShapeError, match="do not fit"):
        Adele(2).corrected(torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match="do not fit"):
        class_overlaps(torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.long), 2)
    with pytest.raises(SettingsError, match="scales"):
        multiscale_laws(torch.nn.Identity(), torch.ones(1, 2, 4, 4), ())


def test_what_is_refused_leaves_no_trace():
    adele = Adele(2)
    with pytest.raises(DataError, match="overlaps"):
        adele.observe(torch.tensor([0.5, 50.0]))
    assert adele.overlaps == []
    with pytest.raises(DataError, match="between 0 and 1"):
        class_overlaps(torch.full((1, 2, 2), 2), torch.zeros(1, 2, 2, dtype=torch.long), 2)
