"""The forward model of source localisation: a whitened gain, its orientations and its depth weights."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError


class SourceModel:
    """y = G x + noise of unit variance, with G = gain (sensors, sources, orientations).

    Deep sources have weak fields: `scale`, one number per source, is the prior standard deviation of its current,
    |g_i|^-depth (Frobenius norm of the gain of source i) up to a common factor, and at most `limit` times the smallest.
    The factor makes trace(G R G^T) = sensors for R = diag(scale^2), so that a regularisation of 1 / SNR^2 means the
    same for every gain. `matrix` is G with all columns in one axis, (sensors, sources * orientations), and
    `weighted` is G R^(1/2).
    Source: Lin et al., Assessing and improving the spatial accuracy in MEG source localization by depth-weighted
    minimum-norm estimates, 2006. Raises `ShapeError` or `DataError` for a gain that is no such tensor.
    """

    def __init__(self, gain: Tensor, depth: float = 0.8, limit: float = 10.0):
        if gain.dim() == 2:
            gain = gain[:, :, None]
        if gain.dim() != 3 or not gain.is_floating_point():
            raise ShapeError(f"a gain is (sensors, sources, orientations), given {tuple(gain.shape)} of {gain.dtype}")
        if not bool(torch.isfinite(gain).all()):
            raise DataError("the gain has entries that are not finite numbers")
        if not 0 <= depth <= 1 or not limit >= 1:
            raise DataError(f"depth lies in [0, 1] and limit is at least 1; given {depth} and {limit}")
        self.gain = gain.double()
        self.sensors, self.sources, self.orientations = gain.shape
        size = torch.linalg.vector_norm(self.gain, dim=(0, 2))
        if not bool((size > 0).all()):
            raise DataError(f"source {int(size.argmin())} has no field at any sensor: leave it out of the gain")
        scale = size**-depth
        scale = scale.clamp(max=limit * float(scale.min()))
        power = (self.gain * scale[:, None]).square().sum()
        self.scale = scale * (self.sensors / power).sqrt()
        self.matrix = self.gain.flatten(1)
        self.weighted = (self.gain * self.scale[:, None]).flatten(1)

    def checked(self, data: Tensor) -> Tensor:
        """The data in float64, once their shape (batch, time, sensors) and values are known to be right."""
        if data.dim() != 3 or data.shape[2] != self.sensors:
            raise ShapeError(f"data are (batch, time, {self.sensors} sensors), given {tuple(data.shape)}")
        if not bool(torch.isfinite(data).all()):
            raise DataError("the data have entries that are not finite numbers")
        return data.double()

    def courses(self, flat: Tensor) -> Tensor:
        """(batch, time, sources * orientations) with the orientations in an axis of their own."""
        return flat.unflatten(-1, (self.sources, self.orientations))

    def strength(self, flat: Tensor) -> Tensor:
        """The Frobenius norm of the course of every source: (batch, sources)."""
        return torch.linalg.vector_norm(self.courses(flat), dim=(1, 3))


def whitener(covariance: Tensor, rank_tolerance: float = 1e-6) -> Tensor:
    """W (rank, sensors) with W C W^T = I: whitens sensors whose noise covariance is C and drops what C does not know.

    Directions whose variance is below `rank_tolerance` times the largest, after every sensor is scaled to unit
    variance, carry no noise estimate (projections remove them): they are left out. Raises `DataError` if C is not a
    covariance.
    """
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ShapeError(f"a covariance is a square matrix, given {tuple(covariance.shape)}")
    covariance = covariance.double()
    spread = covariance.diagonal().clamp(min=0).sqrt()
    if not bool((spread > 0).all()) or not bool(torch.isfinite(covariance).all()):
        raise DataError("a covariance has finite entries and a positive diagonal")
    values, vectors = torch.linalg.eigh(covariance / spread[:, None] / spread[None, :])
    kept = values > rank_tolerance * values[-1]
    if bool((values < -rank_tolerance * values[-1]).any()):
        raise DataError(
            f"the covariance is not positive semidefinite: its correlations have eigenvalue {values[0]:.3g}"
        )
    return (vectors[:, kept] / values[kept].sqrt()).mT / spread
