"""Online dictionary learning: mini-batches, and statistics whose size does not depend on the number of signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.priors.learning import Method
from firmly.priors.sparse_model import SparseModel


class Statistics(NamedTuple):
    """What is known of all batches: A = sum z z', (n, n), and B = sum y z', (m, n), with old batches forgotten."""

    second: Tensor
    cross: Tensor
    batches: int
    codes: Tensor  # of the last batch


@dataclasses.dataclass(frozen=True)
class Online(Method):
    """Codes of a mini-batch, A and B with weights (1 - 1/t)^forgetting on the past, then every atom in turn:

        d_j <- u / |u|,     u = d_j + (B_j - D A_j) / A_jj,     the minimiser of 1/2 tr(D'D A) - tr(D'B) over |d_j| = 1.

    Memory is that of a batch and of A and B, whatever the number of signals: `iterations` counts passes over a tensor,
    and `learn_from_stream` takes batches that are read once. Codes are `steps` iterations of FISTA: while D still
    moves, exact ones are wasted. An atom that no code has used so far is replaced.
    Source: Mairal, Bach, Ponce and Sapiro, Online learning for matrix factorization and sparse coding, 2010.
    """

    streams = True
    weight: float
    batch_size: int = 512
    steps: int = 30
    forgetting: float = 2.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps < 1 or self.forgetting < 0:
            raise SettingsError(
                "batch_size and steps are at least 1 and forgetting at least 0, given "
                f"{self.batch_size}, {self.steps} and {self.forgetting}"
            )
        SparseModel(self.weight)

    def rounds(self, data: Tensor, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(iterations):
            for rows in torch.randperm(len(data), generator=generator).split(self.batch_size):
                yield data[rows.to(data.device)]

    @torch.no_grad()
    def code(self, dictionary: Tensor, data: Tensor, memory: Statistics | None) -> Statistics:
        z = SparseModel(self.weight).codes(dictionary, data, self.steps)
        second, cross = z.mT @ z, data.mT @ z
        t = 1
        if memory is not None:
            t = memory.batches + 1
            past = (1 - 1 / t) ** self.forgetting
            second, cross = second + past * memory.second, cross + past * memory.cross
        return Statistics(second, cross, t, z)

    @torch.no_grad()
    def update(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> tuple[Tensor, Statistics]:
        atoms = dictionary.mT.contiguous().clone()
        cross = memory.cross.mT.contiguous()
        for j in (~self.unused(memory, len(atoms))).nonzero()[:, 0].tolist():
            atom = torch.addmv(cross[j], atoms.mT, memory.second[j], alpha=-1)
            atom = atoms[j] + atom / memory.second[j, j]
            atoms[j] = atom / torch.linalg.vector_norm(atom)
        return atoms.mT.contiguous(), memory

    @torch.no_grad()
    def objective(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> float:
        return float(SparseModel(self.weight).value(dictionary, data, memory.codes))

    def unused(self, memory: Statistics, atoms: int) -> Tensor:
        return memory.second.diagonal() <= 1e-12 * memory.second.diagonal().max()

    def candidates(self, dictionary: Tensor, data: Tensor, memory: Statistics) -> Tensor:
        return data - memory.codes @ dictionary.mT
