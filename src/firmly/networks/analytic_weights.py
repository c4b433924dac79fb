"""The weights of ALISTA in closed form: the least coherent partner of a dictionary, dense and convolutional."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import Adjoint, LinearMap

Dictionary = TypeVar("Dictionary", Tensor, LinearMap)


def analytic_weights(D: Dictionary, regularisation: float = 0.0, symmetric: bool = False) -> Dictionary:
    """The minimiser W of the energy |W* D|_F^2 under <w_i, d_i> = 1 for every atom, given as D is given.

    Dense, D a matrix (m, n) or a `Dense` map: with C the whitening of `analytic_whitening`, of any rank and scale,

        W = C* C D diag(1 / p),   p = diag(D* C* C D),      w_i = (D D*)^-1 d_i / (d_i* (D D*)^-1 d_i) by default.

    Convolutional, D a `Convolution` or the adjoint of one, with atoms of size s: the kernels w_i = Q^-1 d_i / (d_i Q^-1
    d_i) minimise the energy of all cross-correlations, where Q[a, b] = sum_j sum_t d_j[a + t] d_j[b + t] on the support
    of an atom (all channels of it); `regularisation` is added to the diagonal of Q, and `symmetric` is for matrices.

    Source: Liu, Chen, Wang and Yin, ALISTA: analytic weights are as good as learned weights, 2019, section 3, where the
    minimiser is iterated; the closed forms are derived in docs/lista.
    """
    if isinstance(D, Tensor):
        return dense_weights(D, analytic_whitening(D, regularisation, symmetric))
    if isinstance(D, Dense):
        return Dense(dense_weights(D.weight, analytic_whitening(D.weight, regularisation, symmetric)))  # type: ignore[return-value]
    if symmetric:
        raise SettingsError("symmetric weights are known in closed form for matrices only: give a tensor (m, n)")
    kernel = kernel_of(D)
    return like(D, from_atoms(D, convolutional_weights(to_atoms(D, kernel), regularisation).to(kernel)))


@torch.no_grad()
def analytic_whitening(D: Tensor, regularisation: float = 0.0, symmetric: bool = False) -> Tensor:
    """C (r, m) with C* C = (D D* + regularisation Id)^-1 on the range of D, of dimension r.

    With `symmetric`, the minimiser of |D* C* C D|_F^2 with a diagonal of ones instead, so that W = C* C D has p = 1:

        C* C = M diag(mu) M*,   M = (D D* + regularisation Id)^-1 D,   sum_j (D* M)_ij^2 mu_j = 1.

    Raises `DataError` for atoms that are zero and for dictionaries without a symmetric minimiser of this form.
    Source: Chen, Liu, Wang and Yin, Hyperparameter tuning is all you need for LISTA, 2021, iterate the symmetric one.
    """
    U, s, V = range_of(D)
    if not (regularisation >= 0 and regularisation < float("inf")):
        raise SettingsError(f"the regularisation is a finite number of at least 0, given {regularisation}")
    scale = (s**2 + regularisation).rsqrt()
    if not symmetric:
        return (scale[:, None] * U.T).to(D)
    gram = V @ ((s * scale) ** 2)[:, None].mul(V.T)
    mu = torch.linalg.lstsq(gram**2, gram.new_ones(len(gram), 1)).solution[:, 0]
    core = (s * scale)[:, None] * V.T
    values, vectors = torch.linalg.eigh((core * mu) @ core.T)
    if not bool(values.min() > 0) or not torch.allclose(gram**2 @ mu, mu.new_ones(()), atol=1e-8):
        raise DataError(
            "this dictionary has no symmetric analytic weights in closed form (the multipliers leave the cone); "
            "use symmetric=False, or a larger regularisation"
        )
    return (values.sqrt()[:, None] * vectors.T @ (scale[:, None] * U.T)).to(D)


def range_of(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors (m, r), values (r,) and vectors (n, r) of the range of D, in double precision."""
    if D.dim() != 2 or D.is_complex() or not D.is_floating_point():
        raise ShapeError(f"analytic weights take a real matrix (m, n), given {tuple(D.shape)} of {D.dtype}")
    if not bool(D.isfinite().all()) or bool((D == 0).all(0).any()):
        raise DataError("analytic weights need finite atoms that are not zero: look at the columns of D")
    U, s, Vh = torch.linalg.svd(D.detach().double(), full_matrices=False)
    rank = int((s > max(D.shape) * torch.finfo(D.dtype).eps * s[0]).sum())
    return U[:, :rank], s[:rank], Vh[:rank].T


@torch.no_grad()
def dense_weights(D: Tensor, whitening: Tensor) -> Tensor:
    """W = C* C D diag(1 / p) (m, n) with p = `energies(D, C)`."""
    C, D64 = whitening.double(), D.double()
    return (C.T @ (C @ D64) / energies(D64, C)).to(D)


def energies(D: Tensor, whitening: Tensor) -> Tensor:
    """p = diag(D* C* C D) (n,): the squared norms of the whitened atoms."""
    return (whitening @ D).square().sum(0)


@torch.no_grad()
def convolutional_weights(atoms: Tensor, regularisation: float = 0.0) -> Tensor:
    """The kernels w_i (J, channel, *size) for the atoms d_i (J, channel, *size); see `analytic_weights`."""
    if not bool(atoms.isfinite().all()) or bool((atoms.flatten(1) == 0).all(1).any()):
        raise DataError("analytic weights need finite atoms that are not zero: look at the kernels of D")
    d = atoms.detach().double()
    J, channels, size = d.shape[0], d.shape[1], d.shape[2:]
    axes, grid = tuple(range(2, d.dim())), [2 * s - 1 for s in size]
    spectrum = torch.fft.fftn(d, s=grid, dim=axes)
    power = torch.einsum("jc...,je...->ce...", spectrum, spectrum.conj())
    correlation = torch.fft.ifftn(power, dim=axes).real  # (channel, channel, *lag)
    places = torch.cartesian_prod(*(torch.arange(s, device=d.device) for s in size)).reshape(-1, len(size))
    lags = (places[:, None] - places[None]) % torch.tensor(grid, device=d.device)
    Q = correlation[(slice(None), slice(None), *lags.unbind(-1))]  # (channel, channel, place, place)
    Q = Q.permute(0, 2, 1, 3).reshape(channels * len(places), -1)
    Q = Q + regularisation * torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    columns = d.reshape(J, -1).T
    solved = torch.linalg.lstsq(Q.cpu(), columns.cpu(), driver="gelsd").solution.to(Q)  # Q may be singular
    return (solved / (columns * solved).sum(0)).T.reshape(d.shape)


# -- dictionaries that are convolutions ----------------------------------------------------------------------------


def convolution_of(D: LinearMap) -> Convolution:
    plain = D.of if isinstance(D, Adjoint) else D
    if not isinstance(plain, Convolution):
        raise SettingsError(
            f"a dictionary is a matrix (m, n), a Dense map, a Convolution or the adjoint of one, given {D._get_name()}"
        )
    return plain


def kernel_of(D: LinearMap) -> Tensor:
    return convolution_of(D).kernel


def to_atoms(D: LinearMap, kernel: Tensor) -> Tensor:
    """The kernel as atoms (J, channel, *size): one for every channel of the code."""
    if convolution_of(D).per_channel:
        return kernel[None, None]
    return kernel if isinstance(D, Adjoint) else kernel.transpose(0, 1)


def from_atoms(D: LinearMap, atoms: Tensor) -> Tensor:
    if convolution_of(D).per_channel:
        return atoms[0, 0]
    return atoms if isinstance(D, Adjoint) else atoms.transpose(0, 1)


def like(D: LinearMap, weight: Tensor) -> LinearMap:
    """A map of the kind of D with other weights: the matrix of a `Dense`, the kernel of a `Convolution`."""
    if isinstance(D, Adjoint):
        return like(D.of, weight).T
    if isinstance(D, Dense):
        return Dense(weight)
    plain = convolution_of(D)
    return Convolution(weight, plain.domain, plain.padding)
