"""Orthogonal matching pursuit for batches of signals, with a Cholesky factor that grows with the support."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from firmly.errors import DataError, SettingsError, ShapeError

CHUNK_BYTES = 2**22  # of the largest temporary: larger ones leave the cache


class OmpCode(NamedTuple):
    """Codes of at most k nonzeros: values (batch, k) of the atoms in support (batch, k).

    Unused places of the support hold n, one past the last atom, with the value 0.
    """

    support: Tensor
    values: Tensor
    atoms: int

    def dense(self) -> Tensor:
        """The codes as a matrix (batch, n)."""
        full = self.values.new_zeros(len(self.values), self.atoms + 1)
        return full.scatter_(1, self.support, self.values)[:, :-1]

    def synthesise(self, dictionary: Tensor) -> Tensor:
        """sum_i z_i d_i for a dictionary (m, n): (batch, m)."""
        rows = torch.cat([dictionary.mT, dictionary.new_zeros(1, len(dictionary))])
        return embedding_bag(self.support, rows, per_sample_weights=self.values, mode="sum")

    def usage(self) -> Tensor:
        """How many signals use each atom: (n,)."""
        return torch.bincount(self.support[self.values != 0], minlength=self.atoms)


@torch.no_grad()
def omp(dictionary: Tensor, data: Tensor, sparsity: int | None = None, tolerance: float | None = None) -> OmpCode:
    """Greedy codes: in every step the atom with the largest |<d_i, residual>| joins, and all coefficients are refitted.

    dictionary: (m, n), columns of unit norm; data: (batch, m). A signal stops at `sparsity` atoms (default m), when
    |residual| <= tolerance, or when no atom independent of its support correlates with the residual. With the
    orthonormal basis q_1, ..., q_j of the support (its Cholesky factor, one row for each step) the correlations follow
    alpha <- alpha - <q_j, y> D'q_j, so that residuals are never formed. In float32 correlations below about 1e-5 |y|
    are rounding.

    Raises `ShapeError`, `DataError` and `SettingsError` for input that does not fit.
    Sources: Pati, Rezaiifar and Krishnaprasad, 1993; Rubinstein, Zibulevsky and Elad, Efficient implementation of the
    K-SVD algorithm using batch OMP, 2008.
    """
    refuse_dictionary(dictionary)
    refuse_signals(data, dictionary.shape[:1])
    m, n = dictionary.shape
    if sparsity is None and tolerance is None:
        raise SettingsError("omp stops at a number of atoms or at a residual: give sparsity, tolerance or both")
    if sparsity is not None and not 1 <= sparsity <= min(m, n):
        raise SettingsError(f"sparsity is from 1 to min(m, n) = {min(m, n)}, given {sparsity}")
    if tolerance is not None and not (tolerance >= 0 and math.isfinite(tolerance)):
        raise SettingsError(f"tolerance is a finite number of at least 0, given {tolerance}")
    steps = min(m, n) if sparsity is None else sparsity
    gram = dictionary.mT @ dictionary
    chunk = max(1, CHUNK_BYTES // (data.element_size() * n * min(steps, 8)))
    parts = [_pursue(gram, part @ dictionary, part, steps, tolerance or 0.0) for part in data.split(chunk)]
    width = max(1, *(support.shape[1] for support, _ in parts))
    missing = [width - support.shape[1] for support, _ in parts]
    support = torch.cat([torch.nn.functional.pad(s, (0, k), value=n) for (s, _), k in zip(parts, missing)])
    values = torch.cat([torch.nn.functional.pad(v, (0, k)) for (_, v), k in zip(parts, missing)])
    return OmpCode(support, values, n)


def _pursue(gram: Tensor, alpha: Tensor, data: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Support (batch, k) and values (batch, k) from correlations alpha (batch, n), which are overwritten."""
    batch, n = alpha.shape
    eps = torch.finfo(data.dtype).eps
    left = data.square().sum(1)
    noise = 64 * eps * left.sqrt()
    floor = (8 * eps * left).clamp(min=tolerance**2)  # below 8 eps the energy left is rounding of its recursion
    support = torch.full((batch, steps), n, device=data.device)
    factor = torch.eye(steps, dtype=data.dtype, device=data.device).repeat(batch, 1, 1)
    along = data.new_zeros(batch, steps)  # <q_j, y>
    directions = data.new_empty(batch, steps, n)  # D'q_j
    rows = torch.arange(batch, device=data.device)  # the signals that are still worked on
    going = left > floor
    for j in range(steps):
        if 2 * int(going.sum()) < len(rows):  # the others leave
            kept = going.nonzero()[:, 0]
            rows, alpha, left, noise, floor = rows[kept], alpha[kept], left[kept], noise[kept], floor[kept]
            later, directions = directions, data.new_empty(len(kept), steps, n)
            directions[:, :j] = later[kept, :j]
            going = going[kept]
        if len(rows) == 0:
            return support[:, :j], _solve(factor[:, :j, :j], along[:, :j])
        everyone = torch.arange(len(rows), device=data.device)
        strength, chosen = alpha.abs().max(1)
        row = directions[everyone, :j, chosen]  # <q_l, d_chosen>
        pivot = (gram[chosen, chosen] - row.square().sum(1)).clamp(min=0)
        going = going & (strength > noise) & (pivot > 1e4 * eps)
        pivot = torch.where(going, pivot.sqrt(), 1.0)
        direction = gram[chosen]
        if j:
            direction = torch.baddbmm(direction[:, None], row[:, None], directions[:, :j], alpha=-1)[:, 0]
        direction = direction / pivot[:, None]
        size = torch.where(going, alpha[everyone, chosen] / pivot, 0.0)
        alpha.addcmul_(size[:, None], direction, value=-1)
        alpha[everyone[going], chosen[going]] = 0
        directions[:, j] = direction
        support[rows, j] = torch.where(going, chosen, n)
        factor[rows, j, :j] = torch.where(going[:, None], row, 0.0)
        factor[rows, j, j] = pivot
        along[rows, j] = size
        left = left - size.square()
        going = going & (left > floor)
    return support, _solve(factor, along)


def _solve(factor: Tensor, along: Tensor) -> Tensor:
    """The coefficients c of L'c = <q, y>."""
    return torch.linalg.solve_triangular(factor.mT, along[..., None], upper=True)[..., 0]


def refuse_dictionary(dictionary: Tensor) -> None:
    """Raise unless this is a finite real matrix with columns of unit norm."""
    if dictionary.dim() != 2 or 0 in dictionary.shape:
        raise ShapeError(f"a dictionary is a matrix (m, n) with its atoms as columns, given {tuple(dictionary.shape)}")
    if not dictionary.is_floating_point() or not bool(dictionary.isfinite().all()):
        raise DataError("a dictionary has finite real floating-point entries")
    norms = torch.linalg.vector_norm(dictionary, dim=0)
    if bool(((norms - 1).abs() > 1e-3).any()):
        raise DataError(f"the atoms (columns) have unit norm, given norms from {float(norms.min()):.4g} to "
                        f"{float(norms.max()):.4g}; divide by them")  # fmt: skip


def refuse_signals(data: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless this is a batch of at least one signal of the shape, real, floating-point and finite."""
    if tuple(data.shape[1:]) != tuple(shape) or data.dim() != max(len(shape), 1) + 1 or len(data) == 0:
        expected = ", ".join(map(str, ("batch", *shape)))
        raise ShapeError(f"signals have shape ({expected}) with a batch of at least one, given {tuple(data.shape)}")
    if data.dtype not in (torch.float32, torch.float64):
        raise DataError(f"signals are real numbers in float32 or float64, given {data.dtype}; use .float()")
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise DataError(f"{bad} of {data.numel()} entries of the signals are NaN or infinite; clean them first")
