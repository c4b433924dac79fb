"""How close an image is to the truth: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def psnr(image: Tensor, truth: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(peak^2 / mean |image - truth|^2) in dB, one number per image: (batch,)."""
    return 10 * torch.log10(peak**2 / (image - truth).abs().square().flatten(1).mean(1))


def ssim(image: Tensor, truth: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity, one number in [-1, 1] per image (batch, channel, height, width): (batch,).

    The mean over the image of (2 m1 m2 + c1)(2 s12 + c2) / ((m1^2 + m2^2 + c1)(s1^2 + s2^2 + c2)) with local means m
    and (co)variances s under a Gaussian window of width 1.5 cut at 11 x 11, c1 = (0.01 peak)^2, c2 = (0.03 peak)^2;
    only windows inside the image count.
    Source: Wang, Bovik, Sheikh and Simoncelli, Image quality assessment, 2004, section III.
    """
    channels = image.shape[1]
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=image.dtype, device=image.device) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        x = conv2d(x, window.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return conv2d(x, window.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    m1, m2 = local_mean(image), local_mean(truth)
    v1 = local_mean(image * image) - m1**2
    v2 = local_mean(truth * truth) - m2**2
    v12 = local_mean(image * truth) - m1 * m2
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * m1 * m2 + c1) * (2 * v12 + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    return similarity.flatten(1).mean(1)
