"""Linear inverses: minimum norm, dSPM, sLORETA."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from firmly.errors import DataError
from firmly.linear.dense import Dense
from firmly.linear.map import Bracket
from firmly.priors.sources.source_model import SourceModel

Normalisation = Literal["none", "dspm", "sloreta"]


class MinimumNorm:
    """x = N K y with K = R G^T (G R G^T + lambda2 I)^-1, the depth-weighted minimum-norm inverse.

    `normalisation` is N, one number for every source: "none" gives currents (MNE); "dspm" divides by the standard
    deviation that noise alone would have there, sqrt(tr_i(K K^T)); "sloreta" by that of noise and signal together,
    sqrt(tr_i(K (G R G^T + lambda2 I) K^T)), which localises a single source without error where there is no noise.
    `regularisation` is lambda2 = 1 / SNR^2. `matrix` is N K, (sources * orientations, sensors), and `norm()` its
    certified norm: the exact worst-case amplification of an error in the data.
    Sources: Hamalainen and Ilmoniemi 1994; Dale et al. 2000; Pascual-Marqui 2002.
    """

    def __init__(self, model: SourceModel, normalisation: Normalisation = "none", regularisation: float = 1 / 9):
        if normalisation not in ("none", "dspm", "sloreta"):
            raise DataError(f"the normalisation is none, dspm or sloreta; given {normalisation!r}")
        if not regularisation > 0:
            raise DataError(f"the regularisation is positive, given {regularisation}")
        self.model = model
        covariance = model.weighted @ model.weighted.mT
        covariance.diagonal().add_(regularisation)
        inverse = torch.linalg.solve(covariance, model.weighted).mT
        kernel = model.scale.repeat_interleave(model.orientations)[:, None] * inverse
        if normalisation != "none":
            seen = kernel if normalisation == "dspm" else kernel @ torch.linalg.cholesky(covariance)
            size = torch.linalg.vector_norm(seen.unflatten(0, (model.sources, model.orientations)), dim=(1, 2))
            kernel = kernel / size.repeat_interleave(model.orientations)[:, None]
        self.matrix = kernel

    def __call__(self, data: Tensor) -> Tensor:
        """The courses (batch, time, sources * orientations) for whitened data (batch, time, sensors)."""
        return self.model.checked(data) @ self.matrix.mT

    def norm(self) -> Bracket:
        return Dense(self.matrix).norm()
