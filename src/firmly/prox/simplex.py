"""Projections by sorting: the probability simplex, and the threshold that the l1 ball shares with it."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.prox.manifold import Manifold
from firmly.prox.prior import Prior, indicator, positive


class Simplex(Prior):
    """g(x) = 0 if x >= 0 and sum x = total, else infinity; prox = max(z - theta, 0) with theta exact by sorting.

    `dim=None` takes all entries of a sample together; `dim=1` the channels of every pixel (class probabilities).
    Source: Held, Wolfe and Crowder, Validation of subgradient optimization, 1974; Duchi et al., Efficient projections
    onto the l1-ball, 2008, figure 1.
    """

    real_only = True

    def __init__(self, total: float = 1.0, dim: int | None = None):
        super().__init__()
        self.total = positive("the total of a simplex", total)
        self.dim = dim
        self.structure = "group" if dim == 1 else "whole"

    def value(self, x: Tensor) -> Tensor:
        entries = x.flatten(1) if self.dim is None else x
        dim = 1 if self.dim is None else self.dim
        sums = (entries.sum(dim) / self.total - 1).abs().reshape(len(x), -1).amax(1)
        return indicator((-x).flatten(1).amax(1) / self.total) + indicator(sums / entries.shape[dim])

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        if self.dim is None:
            return onto_simplex(z.flatten(1), self.total, 1).reshape(z.shape)
        return onto_simplex(z, self.total, self.dim)

    def manifold(self, x: Tensor) -> Manifold:
        active, dims = x > 0, tuple(range(1, x.dim())) if self.dim is None else self.dim
        count = active.sum(dims, keepdim=True)

        def project(v: Tensor) -> Tensor:
            inside = v * active
            return (inside - inside.sum(dims, keepdim=True) / count) * active

        return Manifold(project, torch.zeros_like)

    def extra_repr(self) -> str:
        return f"total={self.total}, dim={self.dim}"


def onto_simplex(z: Tensor, total: float | Tensor, dim: int) -> Tensor:
    """The nearest point to real z with entries >= 0 that sum to `total` along `dim`."""
    values, _ = z.sort(dim=dim, descending=True)
    counts = torch.arange(1, z.shape[dim] + 1, dtype=z.dtype, device=z.device)
    counts = counts.reshape(-1, *[1] * (z.dim() - 1 - dim % z.dim()))
    candidates = (values.cumsum(dim) - total) / counts
    support = (values > candidates).sum(dim, keepdim=True) - 1  # the support is a run of the largest entries
    return (z - candidates.gather(dim, support)).clamp(min=0)
