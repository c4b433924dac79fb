"""LipSDP per neuron: against published numbers, Clarabel, enumeration, and at the size of real networks."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from firmly import certify, verify
from firmly.certificates.eclipse import eclipse_multipliers
from firmly.certificates.elimination import block_matrix, elimination_order, factorise, required_rho
from firmly.certificates.layered_proof import block_errors, layered_gain
from firmly.certificates.layers import Layers, full, layers
from firmly.certificates.lipsdp import Search, lipsdp_multipliers
from firmly.errors import NotCertifiable, VerificationError
from firmly.linear import Dense
from firmly.prox import GroupL1

from .systems import Net, all_bounds, blocks_of, double, exact, system_of
from .test_published import S2, chain
from .test_soundness import PIECEWISE, RandomNetwork


def perceptron(*widths: int, seed: int = 0, activation=nn.ReLU, gain: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for n, m in pairwise(widths):
        linear = nn.Linear(n, m, **double)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(m, n, generator=generator, **double) * gain / math.sqrt(n))
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1])


def residual(x):
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        A, B = torch.randn(2, 5, 5, generator=generator, **double) / 3
        x = x + torch.relu(x @ A) @ B
    return x


def layers_of(net, shape, reduced: bool = True) -> Layers:
    with torch.no_grad():
        return layers(system_of(net, shape), reduced)


def proved(found: Layers, tolerance: float = 1e-4) -> float:
    result = lipsdp_multipliers(found, tolerance, 20.0)
    return layered_gain(found, result.mu, result.rho)


def dense_matrix(found: Layers, mu: torch.Tensor, rho: float) -> torch.Tensor:
    blocks = block_matrix(found, mu, rho)
    rows = []
    for i, n in enumerate(found.sizes):
        row = [blocks.get((i, j), None) if i >= j else None for j in range(len(found.sizes))]
        rows.append(torch.cat([torch.zeros(n, m, **double) if b is None else b for b, m in zip(row, found.sizes)], 1))
    low = torch.cat(rows)
    return low.tril() + low.tril(-1).T


# -- values --------------------------------------------------------------------------------------------------------


def test_s1_and_s2():
    first = chain([[1, 0], [0, 0.5]], [[0.5, 0], [0, 1]])
    assert certify(first, shape=(2,), method="lipsdp").upper == pytest.approx(0.5, rel=1e-6)
    second = certify(chain(*S2), shape=(2,), method="lipsdp").upper
    assert 3 * math.sqrt(5) <= second <= 3 * math.sqrt(5) * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_s5_never_below_the_exact_constant_and_never_above_the_layer_bound(seed):
    """linear <= exact <= neuron <= layer: the first two orders strictly after verification."""
    net = perceptron(3, 4, 4, 2, seed=seed)
    system = system_of(net, (3,))
    true = exact(blocks_of(system))
    found = proved(layers(system))
    assert true <= found
    others = all_bounds(system, tolerance=1e-6)
    assert found <= others["layer"] * (1 + 1e-3)
    assert found == pytest.approx(others["neuron"], rel=2e-2)


def clarabel_rho(found: Layers) -> float:
    """min rho with M(rho, mu) >= 0 and mu >= 0, by a conic solver."""
    import clarabel
    from scipy import sparse

    zero = torch.zeros(found.multipliers, **double)
    base = dense_matrix(found, zero, 0.0)
    parts = [dense_matrix(found, zero, 1.0) - base]
    parts += [dense_matrix(found, unit, 0.0) - base for unit in torch.eye(found.multipliers, **double)]
    n = len(base)
    row, column = np.triu_indices(n)
    weight = np.where(row == column, 1.0, math.sqrt(2.0))
    order = np.lexsort((row, column))
    vector = lambda m: (m.numpy()[row, column] * weight)[order]  # noqa: E731
    A = np.concatenate([-np.stack([vector(p) for p in parts], axis=1), -np.eye(len(parts))])
    b = np.concatenate([vector(base), np.zeros(len(parts))])
    cones = [clarabel.PSDTriangleConeT(n), clarabel.NonnegativeConeT(len(parts))]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    objective = np.eye(len(parts))[0]
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix((len(parts), len(parts))), objective, sparse.csc_matrix(A), b, cones, settings
    )
    return float(solver.solve().x[0])


@pytest.mark.parametrize(
    "net, shape",
    [
        (perceptron(4, 5, 5, 3), (4,)),
        (perceptron(3, 4, 3, activation=lambda: nn.LeakyReLU(-0.5)), (3,)),
        (perceptron(3, 4, 3, activation=nn.GELU), (3,)),
        (Net(residual), (5,)),
    ],
    ids=["chain", "negative slopes", "slopes on both sides", "residual"],
)
def test_against_a_conic_solver(net, shape):
    best = math.sqrt(clarabel_rho(layers_of(net, shape)))
    upper = certify(net, shape=shape, method="lipsdp").upper
    assert best * (1 - 1e-6) <= upper <= best * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_against_enumeration(seed):
    net = RandomNetwork(seed, PIECEWISE, slopes=8)
    system = system_of(net, (net.size,))
    found = layers(system)
    true = exact(blocks_of(system))
    assert proved(found, 0.1) >= true * (1 - 1e-12)
    assert proved(layers(system, reduced=False), 0.1) >= true * (1 - 1e-12)


# -- the factorisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net, shape", [(perceptron(4, 5, 3, 2), (4,)), (Net(residual), (5,))], ids=["chain", "skip"])
@pytest.mark.parametrize("backwards", [False, True])
def test_blockwise_is_the_whole_matrix(net, shape, backwards):
    found = layers_of(net, shape)
    result = lipsdp_multipliers(found, 0.1)
    order = list(range(len(found.sizes)))[:: -1 if backwards else 1]
    for rho in (0.99 * result.rho, 1.01 * result.rho):
        mu = 0.99 * result.mu * (rho / result.rho)
        whole = dense_matrix(found, mu, rho)
        least = float(torch.linalg.eigvalsh(whole)[0])
        assert (factorise(block_matrix(found, mu, rho), order) is not None) == (least > 0)


def test_a_chain_is_eliminated_without_new_blocks():
    found = layers_of(perceptron(4, 5, 6, 3, 2), (4,))
    factor = factorise(block_matrix(found, 0.9 * eclipse_multipliers(found)[1]), elimination_order(found))
    assert factor is not None
    assert all(len(below) <= 1 for below in factor.below.values())


def test_gradient_by_finite_differences():
    found = layers_of(Net(residual), (5,))
    rho, nu = eclipse_multipliers(found)
    search = Search(found, nu, math.inf)
    theta = (0.9 * nu).log()
    gradient = search.smoothed(theta, 4.0)[1]
    assert math.isfinite(rho)
    for k in (0, 4, 11):
        step = 1e-5 * torch.eye(len(nu), **double)[k]
        numeric = (search.smoothed(theta + step, 4.0)[0] - search.smoothed(theta - step, 4.0)[0]) / 2e-5
        assert float(gradient[k]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


# -- wide inputs and outputs ---------------------------------------------------------------------------------------


def test_wide_inputs_and_outputs_are_reduced_without_loss():
    net = perceptron(60, 4, 5, 40)
    wide, narrow = layers_of(net, (60,), reduced=False), layers_of(net, (60,))
    assert (narrow.sizes[0], narrow.outputs) == (4, 5)
    mu = lipsdp_multipliers(narrow, 1e-3).mu
    order = elimination_order(wide)
    rho = required_rho(narrow, mu / 100, order)
    assert required_rho(wide, mu / 100, order) == pytest.approx(rho, rel=1e-8)
    assert layered_gain(narrow, mu, 1e4 + rho) == pytest.approx(layered_gain(wide, mu, 1e4 + rho), rel=1e-9)


def test_the_error_of_the_reduction_covers_a_wrong_factor():
    from firmly.certificates.layers import orthogonal_error

    A = torch.randn(20, 4, **double, generator=torch.Generator().manual_seed(0))
    Q, R = torch.linalg.qr(A)
    assert float(orthogonal_error(A, Q, R)) < 1e-11
    wrong = R + 1e-6 * torch.randn(4, 4, **double, generator=torch.Generator().manual_seed(1))
    P = torch.linalg.qr(Q)[0] * torch.sign(torch.diagonal(Q.T @ torch.linalg.qr(Q)[0]))
    assert float(torch.linalg.matrix_norm(A - P @ wrong, 2)) <= float(orthogonal_error(A, Q, wrong))
    tilted = Q + 1e-6 * torch.randn(20, 4, **double, generator=torch.Generator().manual_seed(2))
    left, _, right = torch.linalg.svd(tilted, full_matrices=False)
    assert float(torch.linalg.matrix_norm(A - left @ right @ R, 2)) <= float(orthogonal_error(A, tilted, R))


# -- proofs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.99, 1 - 1e-6])
def test_no_bound_below_the_truth_is_proved(factor):
    """Linear networks: the constant is a norm, and no multipliers are needed."""
    A, B = torch.randn(2, 6, 6, **double, generator=torch.Generator().manual_seed(0))
    found = layers_of(Net(lambda x: x @ A @ B), (6,))
    true = float(torch.linalg.matrix_norm((A @ B).T, 2))
    mu = torch.zeros(0, **double)
    assert layered_gain(found, mu, (factor * true) ** 2) >= true
    assert layered_gain(found, mu, true**2) <= true * (1 + 1e-9)


def test_errors_of_the_layers_are_paid_for():
    net = perceptron(3, 4, 2)
    found = layers_of(net, (3,))
    result = lipsdp_multipliers(found, 1e-3)
    clean = layered_gain(found, result.mu, result.rho)
    for row in (*found.rows, found.output):
        for block in row.values():
            block.error = torch.tensor([1e-4], **double)
    dirty = layered_gain(found, result.mu, result.rho)
    assert dirty > clean * (1 + 1e-5)
    scales = [torch.ones(n, **double) for n in found.sizes]
    perturbed = layers_of(net, (3,))
    generator = torch.Generator().manual_seed(0)
    for row in (*perturbed.rows, perturbed.output):
        for j, block in row.items():
            noise = torch.randn(block.value.shape, generator=generator, **double)
            row[j] = type(block)(block.value + 1e-4 * noise / torch.linalg.matrix_norm(noise, 2), block.error)
    actual = block_matrix(perturbed, result.mu, result.rho), block_matrix(found, result.mu, result.rho)
    errors = block_errors(found, scales, result.rho, result.mu)
    for place, block in actual[0].items():
        assert float(torch.linalg.matrix_norm(block - actual[1][place], 2)) <= float(errors[place])


@pytest.mark.parametrize("method", ["lipsdp", "eclipse", "exact"])
def test_certificates_are_verified_without_a_solver(method, tmp_path, monkeypatch):
    net = perceptron(3, 4, 4, 2)
    cert = certify(net, shape=(3,), method=method)
    assert cert.method == method
    path = cert.save(tmp_path / "a")
    for solver in ("firmly.certificates.lipsdp.Search", "firmly.certificates.spectral.minimise_rho"):
        monkeypatch.setattr(solver, None)
    assert verify(path, net).upper == cert.upper
    cert.upper *= 1 - 1e-6
    with pytest.raises(VerificationError):
        verify(cert, net)
    if method != "exact":
        cert.upper *= 1 + 2e-6
        for multipliers in (None, torch.zeros(8, **double), cert.multipliers[:-1], -cert.multipliers):
            cert.multipliers = multipliers
            with pytest.raises(VerificationError):
                verify(cert, net)


# -- structure, refusals, size -------------------------------------------------------------------------------------


def test_groups_share_a_multiplier():
    prior = GroupL1(0.1)
    found = layers_of(Net(lambda x: prior.prox(x, 1.0), prior), (3, 2, 2))
    assert found.counts == [4]
    assert found.owner[0].tolist() == list(range(4)) * 3
    assert proved(found) == pytest.approx(1.0, rel=1e-3)
    whole = layers_of(Net(lambda x: torch.softmax(x @ torch.eye(4, **double), -1)), (4,))
    assert whole.counts == [1]
    assert proved(whole) == pytest.approx(0.5, rel=1e-3)


def test_two_inputs_are_bounded_jointly():
    A, B = torch.randn(2, 4, 4, **double, generator=torch.Generator().manual_seed(3))
    net = Net(lambda data, start: torch.relu(data @ A + start @ B))
    cert = certify(net, shape={"data": (4,), "start": (4,)}, wrt="both", method="lipsdp")
    assert cert.upper == pytest.approx(float(torch.linalg.matrix_norm(torch.cat([A, B]), 2)), rel=1e-3)


@pytest.mark.parametrize("method", ["lipsdp", "eclipse", "exact"])
def test_complex_networks_are_refused(method):
    with pytest.raises(NotCertifiable, match="complex"):
        certify(Dense(torch.eye(3, dtype=torch.complex128)), shape=(3,), method=method)


def test_networks_that_are_too_large_are_refused():
    convolution = nn.Conv2d(1, 4, 3, padding=1, **double)
    with pytest.raises(NotCertifiable, match="entries"):
        certify(nn.Sequential(convolution, nn.ReLU()), shape=(1, 128, 128), method="lipsdp")


@pytest.mark.parametrize("depth, budget", [(3, 4.0), (20, 4.0)])
def test_wide_networks_in_bounded_time(depth, budget):
    """Better than ECLipsE-Fast within seconds, and no matrix larger than a layer."""
    found = layers_of(perceptron(784, *[96] * depth, 10), (784,))
    assert max(found.sizes) == 96
    assert all(full(b, found.outputs).value.shape[1] <= 96 for b in found.output.values())
    result = lipsdp_multipliers(found, 1e-2, budget)
    assert result.rho < 0.8 * eclipse_multipliers(found)[0]
    assert layered_gain(found, result.mu, result.rho) <= math.sqrt(result.rho) * (1 + 1e-5)
