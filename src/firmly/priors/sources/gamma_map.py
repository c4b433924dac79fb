"""Sparse Bayesian learning: the variance of every source by maximising the evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError
from firmly.priors.sources.mixed_norm import Estimate
from firmly.priors.sources.source_model import SourceModel


def gamma_map(
    model: SourceModel, data: Tensor, noise: float = 1.0, tol: float = 1e-6, max_iterations: int = 1000
) -> list[Estimate]:
    """Courses with prior variances gamma_i that maximise the evidence of every window.

    With C = noise I + sum_i gamma_i G_i G_i^T the updates are gamma_i <- gamma_i sqrt(|G_i^T C^-1 Y|_F^2 / (T
    tr(G_i^T C^-1 G_i))), T the number of times, which never raise -2 log p(Y) / T = log det C + tr(Y^T C^-1 Y) / T;
    sources whose variance falls below 1e-6 of the largest are pruned. `gap` is the relative change of the last update.
    Source: Wipf and Nagarajan, A unified Bayesian framework for MEG/EEG source imaging, 2009, section III-A, the
    convexity-based updates.
    """
    if not noise > 0:
        raise DataError(f"the variance of the noise is positive, given {noise}")
    gain = model.weighted.unflatten(1, (model.sources, model.orientations))
    return [_one(model, gain, window.mT, noise, tol, max_iterations) for window in model.checked(data)]


def _one(model: SourceModel, gain: Tensor, data: Tensor, noise: float, tol: float, max_iterations: int) -> Estimate:
    times = data.shape[1]
    kept = torch.arange(model.sources)
    start = data.square().sum() / times / gain.square().sum()
    gamma = torch.full((model.sources,), float(start), dtype=torch.float64)
    change = 0.0
    for _ in range(max_iterations):
        if not len(kept) or not float(gamma.max()) > 0:
            break
        part, variance = gain[:, kept], gamma[kept]
        factor = torch.linalg.cholesky(_covariance(part, variance, noise))
        white_data = torch.linalg.solve_triangular(factor, data, upper=False)
        white_gain = torch.linalg.solve_triangular(factor, part.flatten(1), upper=False)
        seen = (white_gain.mT @ white_data).unflatten(0, part.shape[1:]).square().sum((1, 2)) / times
        expected = white_gain.square().sum(0).unflatten(0, part.shape[1:]).sum(1)
        new = variance * (seen / expected).sqrt()
        change = float((new - variance).abs().max() / new.max().clamp(min=1e-300))
        gamma[kept] = torch.where(new > 1e-6 * new.max(), new, 0)
        kept = torch.nonzero(gamma).flatten()
        if change <= tol:
            break
    covariance = _covariance(gain, gamma, noise)
    courses = gamma[:, None, None] * torch.einsum("mno,mt->not", gain, torch.linalg.solve(covariance, data))
    currents = (courses * model.scale[:, None, None]).permute(2, 0, 1)
    reached = f"the variances change by {change:.1e}, {'within' if change <= tol else 'above'} the tolerance {tol:.1e}"
    return Estimate(currents, kept, change, f"{len(kept)} active sources; {reached}")


def _covariance(gain: Tensor, gamma: Tensor, noise: float) -> Tensor:
    matrix = (gain * gamma[:, None]).flatten(1) @ gain.flatten(1).mT
    matrix.diagonal().add_(noise)
    return matrix
