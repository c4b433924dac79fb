"""The weighted Radon transform: its adjoint is filtered back projection, and its norm is proved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from firmly.errors import NotCertifiable
from firmly.linear import Dense, FilteredRadon, Radon
from firmly.linear.filtered_radon import ramp


def half_turn(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64) * math.pi / count


def test_ramp_is_positive_definite_and_has_the_known_values():
    filter_ = ramp(33)
    assert bool((torch.linalg.eigvalsh(filter_) > 0).all())
    expected = torch.tensor([1 / 4, -1 / math.pi**2, 0.0, -1 / (3 * math.pi) ** 2], dtype=torch.float64)
    torch.testing.assert_close(filter_[0, :4], expected)


def test_adjoint_is_filtered_back_projection():
    B, R = FilteredRadon((1, 20, 20), half_turn(30), 31), Radon((1, 20, 20), half_turn(30), 31)
    y = torch.randn(2, 1, 30, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = R.T(y @ ramp(31)) * math.pi / 30
    torch.testing.assert_close(B.T(B.weighted(y)), expected, rtol=0, atol=1e-12)


def test_a_disc_is_reconstructed_from_its_exact_projections():
    """Projections 2 sqrt(r^2 - s^2) of a disc of value 1, from many angles: within a few percent inside."""
    size, radius = 64, 20.0
    B = FilteredRadon((1, size, size), half_turn(120), size)
    s = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y = 2 * (radius**2 - s**2).clamp(min=0).sqrt().expand(1, 1, 120, size)
    image = B.T(B.weighted(y))[0, 0]
    distance = (s[:, None] ** 2 + s**2).sqrt()
    assert float((image[distance < radius - 3] - 1).abs().max()) < 0.05
    ring = (distance > radius + 3) & (distance < size / 2 - 1)  # corners lie outside of the field of view
    assert float(image[ring].abs().max()) < 0.03


def test_norm_is_proved_and_tight():
    B = FilteredRadon((1, 24, 24), half_turn(14), 25)
    true = float(torch.linalg.matrix_norm(B.matrix(), 2))
    for upper in (B.norm().upper, B._upper()):  # by the matrix, and as for sizes beyond it
        assert true <= upper <= 1.001 * true
    gram, error = B._gram_of_rays()
    exact = B.matrix() @ B.matrix().mT
    assert float(torch.linalg.matrix_norm(gram - exact, 2)) < error < 1e-9


def test_tensors_that_are_not_finite_have_no_norm():
    B = FilteredRadon((1, 8, 8), half_turn(4), 9)
    B.root[0, 0] = math.nan
    with pytest.raises(NotCertifiable, match="not finite"):
        B._upper()


def test_loose_but_sound_beyond_the_largest_factorisation(monkeypatch):
    monkeypatch.setattr("firmly.linear.filtered_radon.LARGEST_GRAM", 10)
    B = FilteredRadon((1, 12, 12), half_turn(7), 13)
    true = float(torch.linalg.matrix_norm(B.matrix(), 2))
    assert true <= B._upper() <= Dense(B.root).norm().upper * Radon((1, 12, 12), half_turn(7), 13).norm().upper * 1.01
