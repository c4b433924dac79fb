"""The sinogram and the signal that ship with the package."""

from __future__ import annotations

import math

import pytest
import torch

from firmly.data import Sinogram, centre_of_rotation, ecg, rebinned, tooth
from firmly.errors import DataError
from firmly.linear import Radon


def test_tooth():
    sinogram = tooth()
    assert sinogram.values.shape == (2, 181, 400) and sinogram.values.dtype == torch.float32
    assert sinogram.angles[0] == 0 and 3.12 < sinogram.angles[-1] < math.pi
    assert abs(sinogram.centre - (296.26 - 96)) < 0.6  # of an independent fit on the whole detector
    total = sinogram.values.sum(-1)
    assert float((total / total.mean(1, keepdim=True) - 1).abs().max()) < 0.02  # every view sees all of it


def test_the_two_ends_of_half_a_turn_are_mirror_images():
    """The first and the last view are nearly opposite: the mirrored last one fits best with the axis that was found."""
    sinogram = tooth()
    bins = rebinned(sinogram, 128, 3.0)
    same = (bins[:, 0] - bins[:, -1].flip(-1)).norm()
    for shift in (-2, 2):
        assert same < (bins[:, 0] - bins[:, -1].flip(-1).roll(shift, -1)).norm()


def test_centre_of_rotation_of_a_simulated_object():
    angles = torch.arange(0, 180, 5, dtype=torch.float64).deg2rad()
    image = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    image[..., 8:20, 15:31] = 1.0
    values = Radon((1, 40, 40), angles, 61)(image)[:, 0]
    assert abs(centre_of_rotation(values, angles) - 30) < 1e-2
    assert abs(centre_of_rotation(values[..., 3:], angles) - 27) < 1e-2
    with pytest.raises(DataError, match="whole object"):
        centre_of_rotation(values[..., 28:], angles)


def test_rebinning_keeps_the_mass_and_the_axis():
    values = torch.rand(2, 7, 50, generator=torch.Generator().manual_seed(0))
    angles = torch.zeros(7, dtype=torch.float64)
    coarse = rebinned(Sinogram(values, angles, 24.5), 10, 5.0)
    torch.testing.assert_close(coarse, values.unflatten(-1, (10, 5)).mean(-1))
    shifted = rebinned(Sinogram(values, angles, 20.25), 40, 2.0)  # reaches past both ends
    torch.testing.assert_close(2 * shifted.sum(-1), values.sum(-1))
    assert bool((shifted[..., :9] == 0).all()) and bool((shifted[..., -4:] == 0).all())


def test_ecg():
    signal = ecg()
    assert signal.shape == (72000,) and signal.dtype == torch.float32
    assert 0.3 < float(signal.std()) < 1 and float(signal.abs().max()) < 5
