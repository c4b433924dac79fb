"""How far an estimate is from the dipoles that were there."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError


def peaks(strength: Tensor, positions: Tensor, count: int = 2, apart: float = 0.03) -> Tensor:
    """The indices of the `count` strongest sources that lie at least `apart` metres from each other; fewer if there
    are no more with a positive strength.

    `strength` is (sources,), `positions` (sources, 3).
    """
    left = strength.clone()
    found: list[int] = []
    while len(found) < count and float(left.max()) > 0:
        found.append(int(left.argmax()))
        left[torch.linalg.vector_norm(positions - positions[found[-1]], dim=1) < apart] = 0
    return torch.tensor(found, dtype=torch.long)


def localisation_error(strength: Tensor, positions: Tensor, truth: Tensor, apart: float = 0.03) -> Tensor:
    """The distance of every true source to the nearest peak, metres: (len(truth),). As many peaks as true sources.

    `truth` holds indices of sources. An estimate of nothing raises `DataError`.
    """
    found = peaks(strength, positions, len(truth), apart)
    if len(found) == 0:
        raise DataError("an estimate without any active source has no peaks: lower its regularisation")
    return torch.cdist(positions[truth], positions[found]).amin(1)


def spatial_dispersion(strength: Tensor, positions: Tensor, truth: Tensor) -> float:
    """sqrt(sum_i p_i d_i^2 / sum_i p_i), metres: p_i = strength_i^2, d_i the distance to the nearest true source.

    Source: Molins et al., Quantification of the benefit from integrating MEG and EEG data, 2008.
    """
    power = strength.square()
    if not float(power.sum()) > 0:
        raise DataError("an estimate without any active source has no dispersion")
    nearest = torch.cdist(positions, positions[truth]).amin(1)
    return float(((power * nearest.square()).sum() / power.sum()).sqrt())
