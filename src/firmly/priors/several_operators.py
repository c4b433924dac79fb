"""Data that were seen through several operators, and what can be learned from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError
from firmly.linear import LinearMap

LARGEST = 4096  # unknowns up to which the joint null space is computed


class Identifiability(NamedTuple):
    """What the operators see together: the eigenvalues of G = sum_i A_i'A_i / (number of signals).

    `blind` is the dimension of the common null space, `null_space` (dimension, blind) an orthonormal basis of it, and
    `smallest` and `largest` are the eigenvalues of G at the ends. What the atoms have there is in no datum, so no
    method can learn it. A small ratio smallest / largest means that some directions are learned from few data. To see
    everything is necessary, not sufficient.
    Source: Malezieux, Michel, Moreau and Kowalski, Where prior learning can and can't work in unsupervised inverse
    problems, 2023.
    """

    dimension: int
    blind: int
    smallest: float
    largest: float
    null_space: Tensor

    def __str__(self) -> str:
        if self.blind:
            return f"{self.blind} of {self.dimension} dimensions are seen by none of the operators"
        return f"all {self.dimension} dimensions are seen; the weakest has {self.smallest / self.largest:.2g} of the "\
               "weight of the strongest"  # fmt: skip


class Observation(ABC):
    """y_i = A_{o(i)} x_i for every signal of a batch, in which signal i has its own operator."""

    count: int  # of signals
    signal_shape: tuple[int, ...]
    data_shape: tuple[int, ...]

    @abstractmethod
    def apply(self, signal: Tensor) -> Tensor:
        """(count, *signal_shape) -> (count, *data_shape)."""

    @abstractmethod
    def adjoint(self, data: Tensor) -> Tensor:
        """(count, *data_shape) -> (count, *signal_shape)."""

    @abstractmethod
    def squared_norm(self) -> float:
        """An upper bound of all |A_i|^2."""

    @abstractmethod
    def gram(self) -> Tensor:
        """sum_i A_i'A_i over the signals, divided by their number: (d, d) in float64."""

    @torch.no_grad()
    def identifiability(self) -> Identifiability:
        """What the operators see together; `DataError` beyond 4096 unknowns, where no basis fits."""
        dimension = torch.Size(self.signal_shape).numel()
        if dimension > LARGEST:
            raise DataError(f"signals of {dimension} unknowns are too large for this check (at most {LARGEST})")
        values, vectors = torch.linalg.eigh(self.gram())
        unseen = values <= float(values[-1]) * dimension * 4 * torch.finfo(torch.float64).eps
        smallest = 0.0 if bool(unseen.any()) else float(values[0])
        return Identifiability(dimension, int(unseen.sum()), smallest, float(values[-1]), vectors[:, unseen])


class Operators(Observation):
    """A list of linear maps with equal domains and codomains, and `which` (batch,), the map of every signal."""

    def __init__(self, maps: Sequence[LinearMap], which: Tensor):
        if not maps or any((A.domain, A.codomain) != (maps[0].domain, maps[0].codomain) for A in maps):
            raise ShapeError("the operators share one domain and one codomain, and there is at least one; "
                             f"given {[(A.domain, A.codomain) for A in maps]}")  # fmt: skip
        if which.dim() != 1 or which.is_floating_point() or not bool(((which >= 0) & (which < len(maps))).all()):
            raise DataError(f"`which` has the index of an operator, 0 to {len(maps) - 1}, for every signal")
        if any(A.is_complex for A in maps):
            raise DataError("dictionaries are learned from real data: the operators are real")
        self.maps = list(maps)
        self.rows = [(which == i).nonzero()[:, 0] for i in range(len(maps))]
        self.order = torch.argsort(torch.cat(self.rows))
        self.count = len(which)
        self.signal_shape, self.data_shape = maps[0].domain, maps[0].codomain

    def apply(self, signal: Tensor) -> Tensor:
        return self._each(self.maps, signal)

    def adjoint(self, data: Tensor) -> Tensor:
        return self._each([A.T for A in self.maps], data)

    def _each(self, maps: Sequence[LinearMap], given: Tensor) -> Tensor:
        results = [A(given[rows]) for A, rows in zip(maps, self.rows) if len(rows)]
        return torch.cat(results)[self.order]

    def squared_norm(self) -> float:
        return max(A.norm().upper for A, rows in zip(self.maps, self.rows) if len(rows)) ** 2

    def gram(self) -> Tensor:
        parts = [len(rows) * A.matrix().mT @ A.matrix() for A, rows in zip(self.maps, self.rows) if len(rows)]
        return torch.stack(parts).sum(0) / self.count


class Masks(Observation):
    """Entries that were seen: a mask of zeros and ones for every signal, (batch, m); y = mask * x."""

    def __init__(self, mask: Tensor):
        if mask.dim() < 2 or not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError(f"masks have entries 0 and 1 and shape (batch, *signal), given {tuple(mask.shape)}")
        self.mask = mask
        self.count = len(mask)
        self.signal_shape = self.data_shape = tuple(mask.shape[1:])

    def apply(self, signal: Tensor) -> Tensor:
        return self.mask.to(signal.dtype) * signal

    def adjoint(self, data: Tensor) -> Tensor:
        return self.apply(data)

    def squared_norm(self) -> float:
        return 1.0

    def gram(self) -> Tensor:
        return torch.diag(self.mask.double().mean(0).flatten())
