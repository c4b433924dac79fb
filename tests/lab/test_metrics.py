"""PSNR and SSIM against direct loops and scikit-image."""

import numpy as np
import pytest
import torch

from firmly.lab.metrics import psnr, ssim


def pair():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 1, 24, 30, generator=generator, dtype=torch.float64)
    return (truth + 0.1 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)), truth


def test_psnr_of_a_constant_error():
    truth = torch.zeros(2, 1, 4, 4)
    image = truth + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert torch.allclose(psnr(image, truth), torch.tensor([20.0, 40.0]))


def test_ssim_against_a_direct_loop():
    image, truth = pair()
    axis = np.arange(-5, 6)
    window = np.exp(-(axis**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    for n in range(2):
        a, b = image[n, 0].numpy(), truth[n, 0].numpy()
        values = []
        for i in range(24 - 10):
            for j in range(30 - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert abs(float(ssim(image, truth)[n]) - np.mean(values)) < 1e-12


def test_ssim_and_psnr_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    image, truth = pair()
    for n in range(2):
        a, b = image[n, 0].numpy(), truth[n, 0].numpy()
        reference = metrics.structural_similarity(
            a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert abs(float(ssim(image, truth)[n]) - reference) < 1e-12
        assert abs(float(psnr(image, truth)[n]) - metrics.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-10


def test_ssim_of_equal_images_is_one():
    _, truth = pair()
    assert torch.allclose(ssim(truth, truth), torch.ones(2, dtype=torch.float64))
