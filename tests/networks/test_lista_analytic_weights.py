"""Analytic weights: the closed forms against projected gradient, brute force and the identities of the theory."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.linear import Convolution, Dense, Gradient
from firmly.networks import analytic_weights, analytic_whitening
from firmly.networks.analytic_weights import convolutional_weights
from firmly.networks.whitening import atoms, energies, weights_of, whitened


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    D = torch.tensor(np.random.default_rng(seed).standard_normal((m, n)))
    return D / D.norm(dim=0)


def off_diagonal_energy(W, D):
    coherence = W.T @ D
    return float((coherence - torch.diag(coherence.diag())).square().sum())


def projected_gradient(D, steps=1000, step=0.1):
    """min |W'D|_F^2 under diag(W'D) = 1, as the authors of ALISTA solve it; the atoms have unit norm."""
    W, gram = D.clone(), D @ D.T
    for _ in range(steps):
        W = W - step * gram @ W
        W = W + D * (1 - (W * D).sum(0))
    return W


@pytest.fixture(scope="module")
def wide():
    return gaussian(250, 500)


def test_target_of_the_dense_closed_form(wide):
    started = time.perf_counter()
    W = analytic_weights(wide)
    assert time.perf_counter() - started < 1
    coherence = W.T @ wide
    assert (coherence.diag() - 1).abs().max() < 1e-10
    assert 500 <= off_diagonal_energy(W, wide) <= 505
    assert (coherence - torch.eye(500)).abs().max() <= 0.25
    projector = torch.linalg.pinv(wide) @ wide
    torch.testing.assert_close(coherence, projector / projector.diag()[:, None], atol=1e-12, rtol=0)


def test_it_is_the_limit_of_projected_gradient():
    D = gaussian(60, 120, seed=1)
    closed, iterated = analytic_weights(D), projected_gradient(D)
    energy = off_diagonal_energy(closed, D)
    assert energy <= off_diagonal_energy(iterated, D) * (1 + 1e-12)
    assert off_diagonal_energy(iterated, D) == pytest.approx(energy, rel=1e-6)
    assert energy >= 120 * 60 / 60  # n (n - m) / m


def test_the_layer_is_nonexpansive_up_to_the_limit_and_not_beyond(wide):
    C = analytic_whitening(wide)
    scale = energies(Dense(wide), Dense(C)).sqrt()
    linear = analytic_weights(wide).T @ wide
    whitened = C @ wide / scale
    limit = 2 / float(torch.linalg.matrix_norm(whitened, 2)) ** 2
    assert limit == pytest.approx(2 / torch.linalg.eigvals(linear).real.max().item(), rel=1e-9)
    assert limit <= 2 * 250 / 500
    for factor, bound in ((0.5, 1 + 1e-9), (1.0, 1 + 1e-9)):
        layer = torch.eye(500) - factor * limit * linear
        assert torch.linalg.matrix_norm(scale[:, None] * layer / scale, 2) <= bound
    layer = torch.eye(500) - 1.05 * limit * linear
    assert torch.linalg.matrix_norm(scale[:, None] * layer / scale, 2) > 1.09


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_atoms_need_no_unit_norm(scale):
    D = scale * gaussian(8, 14) * torch.linspace(0.5, 3, 14)
    W = analytic_weights(D)
    coherence = W.T @ D
    assert (coherence.diag() - 1).abs().max() < 1e-10
    reference = energy_by_kkt(D)
    assert float(coherence.square().sum()) == pytest.approx(reference, rel=1e-9)


def energy_by_kkt(D):
    """The optimum of each column's quadratic programme from its linear optimality system."""
    m = len(D)
    total, gram = 0.0, D @ D.T
    for d in D.T:
        system = torch.zeros(m + 1, m + 1, dtype=D.dtype)
        system[:m, :m], system[:m, m], system[m, :m] = gram, d, d
        right = torch.zeros(m + 1, dtype=D.dtype)
        right[m] = 1
        w = torch.linalg.solve(system, right)[:m]
        total += float((w @ D).square().sum())
    return total


def test_rank_deficient_tall_and_ill_conditioned_dictionaries():
    D = gaussian(8, 14)
    deficient = torch.cat([D, D[:2] + D[2:4]])  # two rows more, no rank more
    for matrix in (deficient, gaussian(14, 8), torch.cat([D, D[:, :2]], 1)):
        W = analytic_weights(matrix)
        projector = torch.linalg.pinv(matrix) @ matrix
        torch.testing.assert_close(W.T @ matrix, projector / projector.diag()[:, None], atol=1e-11, rtol=0)
    U, _, V = torch.linalg.svd(D, full_matrices=False)
    ill = U * torch.logspace(0, -9, 8, dtype=D.dtype) @ V
    W, C = analytic_weights(ill, regularisation=1e-4), analytic_whitening(ill, regularisation=1e-4)
    assert ((W * ill).sum(0) - 1).abs().max() < 1e-10 and W.abs().max() < 1e4
    inverse = torch.linalg.inv(ill @ ill.T + 1e-4 * torch.eye(8, dtype=D.dtype))
    torch.testing.assert_close(C.T @ C, inverse, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "seed"), [(8, 14, 0), (20, 40, 1)])
def test_symmetric_weights_are_the_constrained_minimum(m, n, seed):
    D = gaussian(m, n, seed)
    C = analytic_whitening(D, symmetric=True)
    W = analytic_weights(D, symmetric=True)
    coherence = W.T @ D
    torch.testing.assert_close(coherence, coherence.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(coherence.diag(), torch.ones(n, dtype=D.dtype), atol=1e-10, rtol=0)
    torch.testing.assert_close(W, C.T @ C @ D, atol=1e-10, rtol=0)
    best, generator = coherence.square().sum(), torch.Generator().manual_seed(0)
    constraints = torch.einsum("ij,kj->jik", D, D).reshape(n, -1)  # <d_j d_j', K> for every atom
    _, values, Vh = torch.linalg.svd(constraints)
    free = Vh[int((values > 1e-10).sum()) :]
    for _ in range(20):
        direction = (torch.randn(len(free), generator=generator, dtype=D.dtype) @ free).reshape(m, m)
        for size in (1e-3, -1e-3, 0.1):
            moved = D.T @ (C.T @ C + size * (direction + direction.T)) @ D
            assert moved.square().sum() >= best - 1e-12
    assert off_diagonal_energy(W, D) >= off_diagonal_energy(analytic_weights(D), D) - 1e-9


def test_dictionaries_without_symmetric_weights_are_refused():
    D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]], dtype=torch.float64)
    square = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(analytic_weights(square, symmetric=True), square)
    with pytest.raises(DataError, match="no symmetric analytic weights"):
        analytic_weights(torch.cat([D, D[:, :1], 10 * D[:, :1] + 1e-3 * D[:, 1:2]], 1), symmetric=True)


# -- convolutions --------------------------------------------------------------------------------------------------


def correlation_energy(w, d):
    """The sum of squares of all full cross-correlations, by direct convolution."""
    size = d.shape[2:]
    padding = [p for s in reversed(size) for p in (s - 1, s - 1)]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    return float(convolve(F.pad(w, padding), d).square().sum())


def kernels(*shape, seed=0):
    d = torch.tensor(np.random.default_rng(seed).standard_normal(shape))
    return d / d.flatten(1).norm(dim=1).reshape(-1, *[1] * (d.dim() - 1))


def test_target_of_the_convolutional_closed_form():
    d = kernels(64, 1, 7, 7)
    convolutional_weights(d)
    started = time.perf_counter()
    w = convolutional_weights(d)
    elapsed = time.perf_counter() - started
    assert elapsed < 0.05
    assert ((w * d).flatten(1).sum(1) - 1).abs().max() < 1e-10
    assert correlation_energy(w, d) <= correlation_energy(by_projected_gradient(d), d) * (1 + 1e-9)


def by_projected_gradient(d, steps=500, step=0.002):
    """As the authors of ALISTA: descent on the correlations, then back onto <w_i, d_i> = 1 (atoms of unit norm)."""
    taps = torch.eye(49, dtype=d.dtype).reshape(49, 1, 7, 7)
    correlations = F.conv2d(F.pad(taps, (6, 6, 6, 6)), d).flatten(1)
    gram, columns = correlations @ correlations.T, d.flatten(1).T
    w = columns.clone()
    for _ in range(steps):
        w = w - step * gram @ w
        w = w + columns * (1 - (w * columns).sum(0))
    return w.T.reshape(d.shape)


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 2, 5), (4, 1, 3, 2), (3, 3, 3, 3), (2, 2, 2, 3, 2)])
def test_convolutional_weights_are_minimal(shape):
    d = kernels(*shape)
    w = convolutional_weights(d)
    assert ((w * d).flatten(1).sum(1) - 1).abs().max() < 1e-10
    best, generator = correlation_energy(w, d), torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(5):
            move = size * torch.randn(w.shape, generator=generator, dtype=w.dtype)
            move = move - d * (move * d).flatten(1).sum(1).reshape(-1, *[1] * (d.dim() - 1))
            assert correlation_energy(w + move, d) >= best - 1e-10


def test_maps_get_maps_of_their_kind():
    D = gaussian(5, 8)
    torch.testing.assert_close(analytic_weights(Dense(D)).weight, analytic_weights(D))
    assert analytic_weights(D.float()).dtype == torch.float32
    d = kernels(4, 2, 3, 3)
    w = convolutional_weights(d)
    adjoint = analytic_weights(Convolution(d, (2, 8, 8), "zero").T)
    torch.testing.assert_close(adjoint.T.kernel, w)
    assert adjoint.T.padding == "zero" and adjoint.domain == (4, 8, 8)
    direct = analytic_weights(Convolution(d.transpose(0, 1), (4, 8, 8)))
    torch.testing.assert_close(direct.kernel, w.transpose(0, 1))
    alone = analytic_weights(Convolution(d[0, 0], (3, 8, 8)))
    torch.testing.assert_close(alone.kernel, convolutional_weights(d[:1, :1])[0, 0])


@pytest.mark.parametrize("channels", [1, 2])
def test_the_circular_whitening_is_that_of_the_matrix(channels):
    d = kernels(5, channels, 3, 3)
    for D in (Convolution(d, (channels, 5, 6)).T, Convolution(d.transpose(0, 1), (5, 5, 6))):
        matrix, C = D.matrix(), analytic_whitening(D)
        torch.testing.assert_close(C.matrix() @ C.matrix(), torch.linalg.inv(matrix @ matrix.T), atol=1e-9, rtol=0)
        W = analytic_weights(matrix)
        torch.testing.assert_close(weights_of(D, C).matrix(), W, atol=1e-10, rtol=0)
        p = energies(D, C)
        assert p.shape == (5, 1, 1)
        torch.testing.assert_close(
            p.expand(5, 5, 6).flatten(), energies(Dense(matrix), Dense(analytic_whitening(matrix))), atol=1e-10, rtol=0
        )
        expected = C.matrix() @ matrix / p.expand(5, 5, 6).flatten().sqrt()
        torch.testing.assert_close(whitened(D, C).matrix(), expected, atol=1e-10, rtol=0)
        smoothed = analytic_whitening(D, regularisation=0.3).matrix()
        inverse = torch.linalg.inv(matrix @ matrix.T + 0.3 * torch.eye(len(matrix), dtype=matrix.dtype))
        torch.testing.assert_close(smoothed @ smoothed, inverse, atol=1e-10, rtol=0)
        torch.testing.assert_close(atoms(D).flatten(1).norm(dim=1), torch.ones(5, dtype=d.dtype), atol=1e-12, rtol=0)


def test_frequencies_that_no_atom_has_are_left_out():
    d = torch.tensor([[[0.5, -0.5]], [[-0.5, 0.5]]], dtype=torch.float64)  # differences: no constants
    D = Convolution(d, (1, 8)).T
    C = analytic_whitening(D).matrix()
    torch.testing.assert_close(C @ C, torch.linalg.pinv(D.matrix() @ D.matrix().T), atol=1e-9, rtol=0)


def test_equal_kernels_have_weights_although_q_is_singular():
    d = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    d[:, 0, 1, 1] = 1
    torch.testing.assert_close(convolutional_weights(d), d)
    channels = kernels(1, 1, 3, 3).repeat(2, 2, 1, 1) / 2**0.5  # both channels alike: Q has half its rank
    w = convolutional_weights(channels)
    assert ((w * channels).flatten(1).sum(1) - 1).abs().max() < 1e-8


def test_what_is_refused():
    zero = gaussian(4, 6)
    zero[:, 1] = 0
    with pytest.raises(DataError, match="not zero"):
        analytic_weights(zero)
    with pytest.raises(DataError, match="finite"):
        analytic_weights(torch.full((3, 4), float("nan")))
    with pytest.raises(ShapeError, match="matrix"):
        analytic_weights(torch.randn(3, 4, 5))
    with pytest.raises(ShapeError, match="real matrix"):
        analytic_whitening(torch.randn(3, 4, dtype=torch.complex64))
    with pytest.raises(SettingsError, match="regularisation"):
        analytic_weights(gaussian(4, 6), regularisation=-1.0)
    with pytest.raises(SettingsError, match="a dictionary is"):
        analytic_weights(Gradient((1, 4, 4)))
    with pytest.raises(SettingsError, match="matrices only"):
        analytic_weights(Convolution(kernels(2, 1, 3, 3), (1, 8, 8)).T, symmetric=True)
    with pytest.raises(DataError, match="not zero"):
        convolutional_weights(torch.zeros(2, 1, 3, 3))
    with pytest.raises(SettingsError, match="use circular ones"):
        analytic_whitening(Convolution(kernels(2, 1, 3, 3), (1, 8, 8), "zero").T)
    with pytest.raises(SettingsError, match="matrices only"):
        analytic_whitening(Convolution(kernels(2, 1, 3, 3), (1, 8, 8)).T, symmetric=True)
