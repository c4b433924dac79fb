"""The classical methods a learned one has to beat, each with its one parameter tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms import Admm
from firmly.fixedpoint import solve
from firmly.lab.metrics import psnr
from firmly.linear import LinearMap, Resolvent, Scale, Stack
from firmly.linear.fourier_sampling import FourierSampling
from firmly.linear.gradient import Gradient
from firmly.prox import GroupL1


class Tuned(NamedTuple):
    """The images of the best weight, (batch, *image_shape), that weight, and the mean PSNR of every weight tried."""

    images: Tensor
    weight: float
    scores: dict[float, float]


def wiener_filter(A: LinearMap, weight: float) -> LinearMap:
    """The map y -> (A*A + weight D*D + 1e-8 I)^-1 A* y with D the circular gradient.

    This is the Wiener filter for images with power spectrum 1 / |f|^2 (Field, Relations between the statistics of
    natural images and the response properties of cortical cells, 1987). `NotDiagonal` if A is not diagonal in Fourier.
    """
    gradient = Gradient(A.domain, padding="circular")
    same_gram = A
    if isinstance(A, FourierSampling):  # what it gives are frequencies; taken back to pixels they stack with a gradient
        same_gram = FourierSampling(torch.ones(A.domain[1:], dtype=A.mask.dtype, device=A.mask.device)).T @ A
    return Resolvent(Stack([same_gram, Scale(weight**0.5, gradient)]), 1e-8) @ A.T


def tv(A: LinearMap, y: Tensor, weight: float, tol: float = 1e-4, max_iterations: int = 150) -> Tensor:
    """argmin_x 1/2 |A x - y|^2 + weight TV(x), isotropic, by ADMM, for the whole batch at once: (batch, *image_shape).

    Source: Rudin, Osher and Fatemi, Nonlinear total variation based noise removal algorithms, 1992.
    """
    gradient = Gradient(A.domain, padding="neumann")
    algorithm = Admm(A, GroupL1(weight), penalty=10 * weight, K=gradient)
    return solve(algorithm, y, tol=tol, max_iterations=max_iterations).x


@torch.no_grad()
def tune_wiener(A: LinearMap, y: Tensor, truth: Tensor, weights: Sequence[float]) -> Tuned:
    """The Wiener filter whose weight has the best mean PSNR on these very images (which favours the baseline)."""
    return _best({w: _real(wiener_filter(A, w)(y), truth) for w in weights}, truth)


@torch.no_grad()
def tune_tv(A: LinearMap, y: Tensor, truth: Tensor, weights: Sequence[float]) -> Tuned:
    """TV reconstruction whose weight has the best mean PSNR on these very images (which favours the baseline)."""
    return _best({w: _real(tv(A, y, w), truth) for w in weights}, truth)


def _best(images: dict[float, Tensor], truth: Tensor) -> Tuned:
    scores = {w: float(psnr(x, truth).mean()) for w, x in images.items()}
    best = max(scores, key=scores.__getitem__)
    return Tuned(images[best], best, scores)


def _real(image: Tensor, truth: Tensor) -> Tensor:
    return image.real.to(truth.dtype)
