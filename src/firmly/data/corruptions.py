"""What a sensor does to an image: y = A x + noise, and the masks of missing data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firmly.errors import DataError


class Measurement:
    """y = A x + sigma n with white Gaussian n of unit variance (real and imaginary parts of variance 1/2 if A x is
    complex).

    `forward` is any callable on batches, such as a linear map. With a mask, `support` (1 where something is measured)
    keeps the noise off the entries that are not measured.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], sigma: float, support: Tensor | None = None):
        if not sigma >= 0:
            raise DataError(f"the standard deviation of the noise is not negative; given {sigma}")
        self.forward = forward
        self.sigma = sigma
        self.support = support

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:  # (batch, channel, *spatial)
        """One noisy measurement of every image of the batch."""
        if not x.isfinite().all():
            raise DataError("the image has values that are not finite: nothing can be measured from it")
        clean = self.forward(x)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=generator.device).to(x.device)
        if self.support is not None:
            noise = noise * self.support.to(noise.device)
        return clean + self.sigma * noise


def pixel_mask(shape: tuple[int, ...], keep: float, generator: torch.Generator) -> Tensor:
    """A mask that keeps each pixel with probability `keep`: (1, *shape) of zeros and ones."""
    if not 0 < keep <= 1:
        raise DataError(f"the fraction of pixels kept lies in (0, 1]; given {keep}")
    return (torch.rand((1, *shape), generator=generator) < keep).float()


def column_mask(shape: tuple[int, int], keep: float, centre: float, generator: torch.Generator) -> Tensor:
    """A mask of Cartesian MRI: whole columns of the Fourier plane, zero frequency at index 0; (1, *shape).

    The `centre` fraction of lowest frequencies is fully sampled; other columns are drawn at random, as many as make
    the kept fraction `keep` in all. Source: Zbontar et al., fastMRI, 2018, section 4.9.
    """
    if not 0 < centre <= keep <= 1:
        raise DataError(f"the fractions satisfy 0 < centre <= keep <= 1; given centre = {centre}, keep = {keep}")
    width = shape[1]
    order = (torch.fft.fftfreq(width).abs()).argsort(stable=True)
    low, total = max(1, round(centre * width)), round(keep * width)
    rest = order[low:]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: max(0, total - low)]]
    mask = torch.zeros(width)
    mask[order[:low]] = 1
    mask[drawn] = 1
    return mask.expand(1, *shape).contiguous()
