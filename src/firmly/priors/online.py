"""Online dictionary learning: mini-batches, and statistics whose size does not depend on the number of signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.priors.learning import Method, mini_batches, normalised
from firmly.priors.omp import omp
from firmly.priors.sparse_model import SparseModel


class Statistics(NamedTuple):
    """What is known of all batches: A = sum z z', (n, n), and B = sum y z', (m, n), with old batches forgotten."""

    second: Tensor
    cross: Tensor
    batches: int
    codes: Tensor  # of the last batch


@dataclasses.dataclass(frozen=True)
class Online(Method):
    """Codes of a mini-batch; A and B with weights (1 - 1/t)^forgetting on the past; then for the atoms, all at once,

        D <- normalise(D + (B - D A) diag(r)^-1),     r_j = sum_i |A_ij|,

    ten times. diag(r) - A is diagonally dominant, so that every such step minimises an upper bound of the objective
    1/2 tr(D'D A) - tr(D'B) over atoms of unit norm, exact at D: it never rises. (Mairal et al. go atom by atom.)

    With `weight` the codes solve the Lasso, up to `steps` iterations of FISTA: while D moves, exact ones are wasted.
    With `sparsity` they are those of orthogonal matching pursuit. Memory is that of a batch and of A and B, whatever
    the number of signals: `iterations` counts passes over a tensor, and `learn_from_stream` takes batches that are read
    once. An atom that no code has used so far is replaced.
    Source: Mairal, Bach, Ponce and Sapiro, Online learning for matrix factorization and sparse coding, 2010.
    """

    streams = True
    weight: float | None = None
    sparsity: int | None = None
    batch_size: int = 256
    steps: int = 40
    forgetting: float = 2.0

    def __post_init__(self) -> None:
        if (self.weight is None) == (self.sparsity is None):
            raise SettingsError("give either the weight of the l1 norm or the sparsity of pursuit")
        if self.weight is not None:
            SparseModel(self.weight)
        if min(self.batch_size, self.steps, self.sparsity or 1) < 1 or self.sparsity == 0 or self.forgetting < 0:
            raise SettingsError(
                "batch_size, steps and sparsity are at least 1 and forgetting at least 0, given "
                f"{self.batch_size}, {self.steps}, {self.sparsity} and {self.forgetting}"
            )

    def rounds(self, data: Tensor, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
        return mini_batches(data, self.batch_size, iterations, generator)

    @torch.no_grad()
    def code(self, dictionary: Tensor, data: Tensor, memory: Statistics | None) -> Statistics:
        if self.weight is not None:
            z = SparseModel(self.weight).codes(dictionary, data, self.steps)
        else:
            z = omp(dictionary, data, min(self.sparsity or 1, *dictionary.shape)).dense()
        second, cross = z.mT @ z, data.mT @ z
        t = 1
        if memory is not None:
            t = memory.batches + 1
            past = (1 - 1 / t) ** self.forgetting
            second, cross = second + past * memory.second, cross + past * memory.cross
        return Statistics(second, cross, t, z)

    @torch.no_grad()
    def update(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> tuple[Tensor, Statistics]:
        rows = memory.second.abs().sum(0)
        used = ~self.unused(memory, len(rows))
        for _ in range(10):
            moved = dictionary + (memory.cross - dictionary @ memory.second) / torch.where(used, rows, 1.0)
            dictionary = normalised(torch.where(used, moved, dictionary))
        return dictionary, memory

    @torch.no_grad()
    def objective(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> float:
        rest = (data - memory.codes @ dictionary.mT).square().sum() / 2
        return float(rest + (self.weight or 0.0) * memory.codes.abs().sum()) / len(data)

    def unused(self, memory: Statistics, atoms: int) -> Tensor:
        return memory.second.diagonal() <= 1e-12 * memory.second.diagonal().max()

    def candidates(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> Tensor:
        return data - memory.codes @ dictionary.mT
