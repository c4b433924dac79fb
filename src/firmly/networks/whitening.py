"""The whitening of a dictionary, and the dictionary in its coordinates: what analytic weights are made of."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import Adjoint, LinearMap

Dictionary = TypeVar("Dictionary", Tensor, LinearMap)


@torch.no_grad()
def analytic_whitening(D: Dictionary, regularisation: float = 0.0, symmetric: bool = False) -> Dictionary:
    """C with C* C = (D D* + regularisation Id)^-1 on the range of D: the whitening of the analytic weights.

    For a matrix D (m, n) of rank r it is (r, m), and a `Dense` map for a `Dense` map. For a circular convolution, or
    the adjoint of one, it is a circular convolution of data to data, with a kernel as large as the grid. With
    `symmetric`, for matrices, it is the minimiser of |D* C* C D|_F^2 with a diagonal of ones instead, so that p = 1:

        C* C = M diag(mu) M*,   M = (D D* + regularisation Id)^-1 D,   sum_j (D* M)_ij^2 mu_j = 1.

    Raises `DataError` for atoms that are zero or not finite and for dictionaries without a symmetric minimiser of this
    form, `SettingsError` for other maps.
    Source: Chen, Liu, Wang and Yin, Hyperparameter tuning is all you need for LISTA, 2021, iterate the symmetric one;
    the closed forms are derived in docs/lista.
    """
    if not 0 <= regularisation < float("inf"):
        raise SettingsError(f"the regularisation is a finite number of at least 0, given {regularisation}")
    if isinstance(D, Tensor):
        return symmetric_whitening(D, regularisation) if symmetric else dense_whitening(D, regularisation)
    if isinstance(D, Dense):
        return Dense(analytic_whitening(D.weight, regularisation, symmetric))  # type: ignore[return-value]
    if symmetric:
        raise SettingsError("a symmetric whitening is known in closed form for matrices only: give a tensor (m, n)")
    return circular_whitening(D, regularisation)  # type: ignore[return-value]


def dense_whitening(D: Tensor, regularisation: float) -> Tensor:
    U, s, _ = range_of(D)
    return ((s**2 + regularisation).rsqrt()[:, None] * U.T).to(D)


def symmetric_whitening(D: Tensor, regularisation: float) -> Tensor:
    U, s, V = range_of(D)
    scale = (s**2 + regularisation).rsqrt()
    core = (s * scale)[:, None] * V.T
    squares = (core.T @ core) ** 2
    mu = torch.linalg.lstsq(squares, squares.new_ones(len(squares), 1), driver="gelsd").solution[:, 0]
    values, vectors = torch.linalg.eigh((core * mu) @ core.T)
    if not bool(values.min() > 0) or not torch.allclose(squares @ mu, mu.new_ones(()), atol=1e-8):
        raise DataError(
            "this dictionary has no symmetric analytic weights in closed form (the multipliers leave the cone); "
            "use symmetric=False, or a larger regularisation"
        )
    return (values.sqrt()[:, None] * vectors.T @ (scale[:, None] * U.T)).to(D)


def range_of(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors (m, r), values (r,) and vectors (n, r) of the range of D, in double precision on the CPU."""
    if D.dim() != 2 or D.is_complex() or not D.is_floating_point():
        raise ShapeError(f"analytic weights take a real matrix (m, n), given {tuple(D.shape)} of {D.dtype}")
    refuse_zero_atoms(D.T)
    U, s, Vh = torch.linalg.svd(D.detach().cpu().double(), full_matrices=False)
    rank = int((s > max(D.shape) * torch.finfo(D.dtype).eps * s[0]).sum())
    return U[:, :rank], s[:rank], Vh[:rank].T


def circular_whitening(D: LinearMap, regularisation: float) -> Convolution:
    """(D D* + regularisation Id)^(-1/2), one Hermitian matrix (channel, channel) for every frequency."""
    columns = atoms(D).double()
    axes = tuple(range(2, columns.dim()))
    spectrum = torch.fft.fftn(columns, dim=axes).flatten(2)
    values, vectors = torch.linalg.eigh(torch.einsum("jcf,jef->fce", spectrum, spectrum.conj()))
    kept = values > len(columns) * torch.finfo(atoms(D).dtype).eps * values.max()
    roots = torch.where(kept, (values + regularisation).clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    inverse = torch.einsum("fce,fe,fde->cdf", vectors, roots.to(vectors), vectors.conj())
    shape = D.codomain
    response = torch.fft.ifftn(inverse.reshape(shape[0], *shape), dim=axes).real  # to an impulse at the origin
    # Convolution correlates: the kernel is the reversed response, with its centre at size // 2 and not at the origin
    kernel = response.flip(axes).roll([n // 2 + 1 for n in shape[1:]], axes)
    return Convolution(kernel.to(atoms(D)), shape)


# -- a dictionary as a set of atoms --------------------------------------------------------------------------------


@torch.no_grad()
def atoms(D: LinearMap) -> Tensor:
    """The atoms (J, *data): the columns of a matrix, or what an impulse in the middle of every channel of a circular
    convolutional code becomes."""
    if isinstance(D, Dense):
        columns = D.weight.detach().T
    else:
        plain = convolution_of(D)
        if plain.padding != "circular":
            raise SettingsError(
                f"a convolution with {plain.padding} padding has no circular whitening: use circular ones"
            )
        columns = torch.cat([D(impulse(D, j, plain.kernel)) for j in range(D.domain[0])])
    refuse_zero_atoms(columns)
    return columns


def impulse(D: LinearMap, j: int, like: Tensor) -> Tensor:
    code = torch.zeros(1, *D.domain, dtype=like.dtype, device=like.device)
    code[(0, j, *(n // 2 for n in D.domain[1:]))] = 1
    return code


def synthesis(D: LinearMap, columns: Tensor) -> LinearMap:
    """The dictionary with these atoms, on the codes of D."""
    if isinstance(D, Dense):
        return Dense(columns.T.contiguous())
    return Convolution(columns, columns.shape[1:]).T


def refuse_zero_atoms(columns: Tensor) -> None:
    if not bool(columns.isfinite().all()) or bool((columns.flatten(1) == 0).all(1).any()):
        raise DataError("analytic weights need finite atoms that are not zero: look at the columns or kernels of D")


@torch.no_grad()
def energies(D: LinearMap, whitening: LinearMap) -> Tensor:
    """p = diag(D* C* C D), the squared norms of the whitened atoms, in a shape that broadcasts against a code."""
    p = whitening(atoms(D).double()).flatten(1).square().sum(1)
    return p.reshape(-1, *[1] * (len(D.domain) - 1)).to(atoms(D))


@torch.no_grad()
def whitened(D: LinearMap, whitening: LinearMap) -> LinearMap:
    """F = C D diag(p)^(-1/2), in the precision of D: the whitened atoms with unit norm."""
    columns = whitening(atoms(D).double())
    return synthesis(D, (columns / over_atoms(columns).sqrt()).to(atoms(D)))


@torch.no_grad()
def weights_of(D: LinearMap, whitening: LinearMap) -> LinearMap:
    """W = C* C D diag(1 / p), in the precision of D."""
    columns = whitening(atoms(D).double())
    return synthesis(D, (whitening.T(columns) / over_atoms(columns)).to(atoms(D)))


def over_atoms(columns: Tensor) -> Tensor:
    """The squared norms of atoms (J, *data), shaped to divide them."""
    return columns.flatten(1).square().sum(1).reshape(-1, *[1] * (columns.dim() - 1))


def convolution_of(D: LinearMap) -> Convolution:
    plain = D.of if isinstance(D, Adjoint) else D
    if not isinstance(plain, Convolution):
        raise SettingsError(
            f"a dictionary is a matrix (m, n), a Dense map, a Convolution or the adjoint of one, given {D._get_name()}"
        )
    return plain
