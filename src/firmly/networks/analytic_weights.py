"""The weights of ALISTA in closed form: the least coherent partner of a dictionary, dense and convolutional."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import Adjoint, LinearMap
from firmly.networks.whitening import Dictionary, analytic_whitening, convolution_of, refuse_zero_atoms, weights_of


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
        return analytic_weights(Dense(D), regularisation, symmetric).weight  # type: ignore[return-value]
    if isinstance(D, Dense):
        return weights_of(D, analytic_whitening(D, regularisation, symmetric))  # type: ignore[return-value]
    if symmetric:
        raise SettingsError("symmetric weights are known in closed form for matrices only: give a tensor (m, n)")
    kernel = convolution_of(D).kernel
    return like(D, from_kernels(D, convolutional_weights(to_kernels(D, kernel), regularisation).to(kernel)))  # type: ignore[return-value]


@torch.no_grad()
def convolutional_weights(kernels: Tensor, regularisation: float = 0.0) -> Tensor:
    """The kernels w_i (J, channel, *size) for the atoms d_i (J, channel, *size); see `analytic_weights`."""
    refuse_zero_atoms(kernels)
    d = kernels.detach().double()
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


def to_kernels(D: LinearMap, kernel: Tensor) -> Tensor:
    """The kernel as (J, channel, *size): one part for every channel of the code."""
    if convolution_of(D).per_channel:
        return kernel[None, None]
    return kernel if isinstance(D, Adjoint) else kernel.transpose(0, 1)


def from_kernels(D: LinearMap, kernels: Tensor) -> Tensor:
    if convolution_of(D).per_channel:
        return kernels[0, 0]
    return kernels if isinstance(D, Adjoint) else kernels.transpose(0, 1)


def like(D: LinearMap, weight: Tensor) -> LinearMap:
    """A map of the kind of D with other weights: the matrix of a `Dense`, the kernel of a `Convolution`."""
    if isinstance(D, Adjoint):
        return like(D.of, weight).T
    if isinstance(D, Dense):
        return Dense(weight)
    plain = convolution_of(D)
    return Convolution(weight, plain.domain, plain.padding)
