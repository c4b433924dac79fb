"""Wiener filter and TV against independent computations."""

import pytest
import torch

from firmly.data import Measurement
from firmly.errors import NotDiagonal
from firmly.lab.baselines import tune_tv, tune_wiener, tv, wiener_filter
from firmly.linear import Identity
from firmly.linear.blur import Blur
from firmly.linear.fourier_sampling import FourierSampling
from firmly.linear.gradient import Gradient
from firmly.linear.mask import Mask


def blurred(size=16):
    A = Blur.gaussian(1.0, (1, size, size))
    x = torch.zeros(2, 1, size, size, dtype=torch.float64)
    x[0, :, 4:9, 5:11] = 1
    x[1, :, 2:14, 7:9] = 0.5
    return A, x, Measurement(A, 0.02)(x, torch.Generator().manual_seed(0))


def test_wiener_filter_solves_its_normal_equations():
    A, _, y = blurred()
    x = wiener_filter(A, 0.05)(y)
    D = Gradient(A.domain, padding="circular")
    residual = A.T(A(x)) + 0.05 * D.T(D(x)) + 1e-8 * x - A.T(y)
    assert residual.abs().max() < 1e-10


def test_wiener_filter_has_a_certified_norm_and_needs_a_common_basis():
    A, _, y = blurred()
    bracket = wiener_filter(A, 0.05).norm()
    gain = wiener_filter(A, 0.05)(y).norm() / y.norm()
    assert gain <= bracket.upper <= bracket.lower * (1 + 1e-6)
    sampling = FourierSampling((torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.5).double())
    x = wiener_filter(sampling, 0.1)(torch.ones(1, 1, 64, 64, dtype=torch.complex128))
    D = Gradient(sampling.domain, padding="circular")
    residual = sampling.T(sampling(x)) + 0.1 * D.T(D(x)) + 1e-8 * x - sampling.T(torch.ones_like(x))
    assert residual.abs().max() < 1e-10
    with pytest.raises(NotDiagonal):
        wiener_filter(Mask((torch.rand(1, 64, 64) < 0.5).double()), 0.1)(torch.zeros(1, 1, 64, 64).double())


def test_tv_denoising_of_a_step_in_closed_form():
    # one step of height 1 between constant halves of n rows: each half moves by weight / n towards the other
    x = torch.zeros(1, 1, 20, 6, dtype=torch.float64)
    x[:, :, 10:] = 1
    result = tv(Identity((1, 20, 6)), x, 0.5, tol=1e-10, max_iterations=5000)
    expected = torch.where(x > 0.5, 1 - 0.05, 0.05).to(x.dtype)
    assert (result - expected).abs().max() < 1e-6


def test_tv_does_not_depend_on_the_batch():
    A, _, y = blurred()
    both = tv(A, y, 0.01, tol=0.0, max_iterations=30)
    assert torch.allclose(both[1:], tv(A, y[1:], 0.01, tol=0.0, max_iterations=30), atol=1e-12)


def test_tuning_returns_the_best_of_the_grid():
    A, x, y = blurred()
    for tune in (tune_wiener, tune_tv):
        tuned = tune(A, y, x, (1e-5, 0.003, 10.0))
        assert tuned.weight == max(tuned.scores, key=tuned.scores.get) == 0.003
