"""K-SVD and MOD: dictionaries for codes with at most a given number of nonzeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.priors.learning import Method, mini_batches, normalised
from firmly.priors.omp import OmpCode, omp


@dataclasses.dataclass(frozen=True)
class _Pursuit(Method):
    """The code step of both: min |y - D z|^2 over |z|_0 <= sparsity, greedily.

    The dictionary steps never raise the objective 1/2 |y - D z|^2. A greedy code may: codes that are kept until pursuit
    finds better ones would make the objective fall in every round, and end in worse dictionaries.
    """

    sparsity: int

    def __post_init__(self) -> None:
        if self.sparsity < 1:
            raise SettingsError(f"sparsity is at least 1, given {self.sparsity}")

    def code(self, dictionary: Tensor, data: Tensor, memory: OmpCode | None) -> OmpCode:
        return omp(dictionary, data, min(self.sparsity, *dictionary.shape))

    def objective(self, dictionary: Tensor, data: Tensor, memory: OmpCode) -> float:
        return 0.5 * float(misfit(dictionary, data, memory).double().mean())

    def unused(self, memory: OmpCode, atoms: int) -> Tensor:
        return memory.usage() == 0

    def candidates(self, dictionary: Tensor, data: Tensor, memory: OmpCode) -> Tensor:
        return data - memory.synthesise(dictionary)


@dataclasses.dataclass(frozen=True)
class KSvd(_Pursuit):
    """Atom by atom the best rank-one fit of what the others leave, on the signals that use the atom.

    With E = Y - sum_{i != j} d_i z_i over these signals, d_j and z_j are the leading singular pair of E (of the m x m
    matrix E E', by its eigenvectors). `exact=False` takes one step of the power method from the present atom in its
    place: cheaper, and still never increases the objective. With `batch_size` the first half of the passes goes through
    mini-batches, and the rest through all signals: many cheap rounds, then exact ones. Every atom should be used by
    tens of signals of a batch, batch_size >= 30 n / sparsity, say: smaller batches fit their atoms to chance.
    Sources: Aharon, Elad and Bruckstein, K-SVD, 2006; Rubinstein, Zibulevsky and Elad, 2008, for the power step.
    """

    exact: bool = True
    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise SettingsError(f"batch_size is at least 1 or None, given {self.batch_size}")

    def rounds(self, data: Tensor, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
        early = 0 if self.batch_size is None else iterations // 2
        yield from mini_batches(data, self.batch_size or len(data), early, generator)
        yield from super().rounds(data, iterations - early, generator)

    def update(self, dictionary: Tensor, data: Tensor, memory: OmpCode) -> tuple[Tensor, OmpCode]:
        atoms = dictionary.mT.contiguous().clone()
        width = memory.support.shape[1]
        values = memory.values.flatten().clone()
        owners = torch.where(values != 0, memory.support.flatten(), memory.atoms)
        slots = torch.argsort(owners, stable=True)
        ends = torch.bincount(owners, minlength=memory.atoms + 1).cumsum(0).tolist()
        left = data - memory.synthesise(dictionary)
        for j in range(memory.atoms):
            mine = slots[(ends[j - 1] if j else 0) : ends[j]]
            if len(mine) == 0:
                continue
            rows = mine // width
            missing = torch.addcmul(left[rows], values[mine, None], atoms[j])  # (users, m)
            atom = self._direction(missing, atoms[j])
            values[mine] = missing @ atom
            left[rows] = torch.addcmul(missing, values[mine, None], atom, value=-1)
            atoms[j] = atom
        return atoms.mT.contiguous(), OmpCode(memory.support, values.view_as(memory.values), memory.atoms)

    def _direction(self, missing: Tensor, atom: Tensor) -> Tensor:
        if self.exact:
            top = torch.linalg.eigh((missing.mT @ missing).double())[1][:, -1].to(missing.dtype)
            top = top if torch.dot(top, atom) >= 0 else -top
        else:
            top = missing.mT @ (missing @ atom)
        size = torch.linalg.vector_norm(top)
        return top / size if bool(size > 0) else atom


@dataclasses.dataclass(frozen=True)
class Mod(_Pursuit):
    """The method of optimal directions: D = argmin |Y - Z D'|_F^2, then atoms of unit norm and codes scaled back.

    Atoms whose codes are combinations of those of others take the least-norm solution; atoms without any code stay.
    Source: Engan, Aase and Husoy, Method of optimal directions for frame design, 1999.
    """

    def update(self, dictionary: Tensor, data: Tensor, memory: OmpCode) -> tuple[Tensor, OmpCode]:
        second = data.new_zeros(memory.atoms, memory.atoms, dtype=torch.float64)
        cross = data.new_zeros(memory.atoms, data.shape[1], dtype=torch.float64)
        for part in torch.arange(len(data), device=data.device).split(8192):
            codes = OmpCode(memory.support[part], memory.values[part], memory.atoms).dense()
            second += codes.mT @ codes
            cross += codes.mT @ data[part]
        fitted = (torch.linalg.pinv(second, rtol=1e-12, hermitian=True) @ cross).mT.to(dictionary.dtype)
        norms = torch.linalg.vector_norm(fitted, dim=0)
        fitted = torch.where(norms == 0, dictionary, fitted)
        scale = torch.cat([norms, norms.new_zeros(1)])
        return normalised(fitted), memory._replace(values=memory.values * scale[memory.support])


def misfit(dictionary: Tensor, data: Tensor, code: OmpCode) -> Tensor:
    """|y - D z|^2 of every signal: (batch,)."""
    return (data - code.synthesise(dictionary)).square().sum(1)
