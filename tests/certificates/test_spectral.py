"""The matrix inequality: derivatives against finite differences, minima against an interior-point solver."""

from __future__ import annotations

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse

from firmly.certificates.pencil import Pencil
from firmly.certificates.spectral import causal_multipliers, minimise_rho, smoothed_maximum, smoothed_value

from .systems import double


def random_pencil(
    seed: int, blocks: int, inputs: int, layers: int, is_complex: bool, curved: bool, unpaired=False
) -> Pencil:
    """A causal system: z_i sees d and the v_j before it; the first layer has two entries that share a multiplier."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if is_complex else torch.float64
    width = inputs + layers
    Z = torch.randn(blocks, layers + 1, width, generator=generator, dtype=dtype)
    for row in range(layers):
        Z[:, row, inputs + (row if row > 1 else 0) :] = 0
    Z[:, -1] = 0
    O = torch.randn(blocks, 2, width, generator=generator, dtype=dtype)
    column, row = list(range(inputs, width)), list(range(layers))
    low = -torch.rand(layers, generator=generator, **double) if curved else torch.zeros(layers, **double)
    high = 0.5 + torch.rand(layers, generator=generator, **double)
    owner = [0, *range(layers - 1)]
    if unpaired:  # a block with slopes [-c, c] between sizes 1 and 2: two more rows of z, no more columns of v
        low[-1] = -high[-1]
        column, row, owner = [*column, width], [*row, 0], [*owner, owner[-1]]
        low, high = torch.cat([low, low[-1:]]), torch.cat([high, high[-1:]])
    return Pencil(
        Z=Z, O=O, column=torch.tensor(column), row=torch.tensor(row), owner=torch.tensor(owner), low=low, high=high,
        inputs=inputs, multipliers=max(owner) + 1,
    )  # fmt: skip


CASES = [
    {"blocks": 5, "inputs": 1, "layers": 3, "is_complex": False, "curved": False},
    {"blocks": 5, "inputs": 1, "layers": 4, "is_complex": True, "curved": True},
    {"blocks": 4, "inputs": 3, "layers": 3, "is_complex": False, "curved": True},
    {"blocks": 4, "inputs": 2, "layers": 4, "is_complex": True, "curved": True},
    {"blocks": 1, "inputs": 2, "layers": 2, "is_complex": False, "curved": False},
    {"blocks": 3, "inputs": 2, "layers": 3, "is_complex": True, "curved": True, "unpaired": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("barrier", [0.0, 0.3])
def test_derivatives_of_the_smoothed_maximum(case, barrier):
    family = random_pencil(0, **case)
    mu = 1.5 * causal_multipliers(family)
    beta = 3.0 / float(family.required(mu).max())
    value, mean, gradient, hessian = smoothed_maximum(family, mu, beta, barrier)
    assert value == pytest.approx(smoothed_value(family, mu, beta, barrier), rel=1e-12)
    if barrier == 0:
        assert mean <= value <= float(family.required(mu).max()) * (1 + np.log(family.inputs * len(family)) / 3.0)
    for i in range(len(mu)):
        step = 1e-4 * mu[i]
        up, down = mu.clone(), mu.clone()
        up[i] += step
        down[i] -= step
        slope = (smoothed_value(family, up, beta, barrier) - smoothed_value(family, down, beta, barrier)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7 * float(gradient.abs().max()))
        ahead, behind = (smoothed_maximum(family, m, beta, barrier)[2] for m in (up, down))
        torch.testing.assert_close(
            hessian[i], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6 * float(hessian.abs().max())
        )
    torch.testing.assert_close(hessian, hessian.T)
    assert float(torch.linalg.eigvalsh(hessian).min()) >= -1e-9 * float(hessian.abs().max())


def test_derivatives_at_equal_eigenvalues():
    """The divided differences of the exponential have a limit where eigenvalues meet."""
    family = random_pencil(1, blocks=1, inputs=1, layers=2, is_complex=False, curved=False)
    Z, O = torch.zeros(1, 5, 6, **double), torch.zeros(1, 4, 6, **double)
    for copy in range(2):  # two independent copies of one system with one input each
        places = [copy, 2 + 2 * copy, 3 + 2 * copy]
        for row in range(2):
            Z[0, 2 * copy + row, places] = family.Z[0, row]
            O[0, 2 * copy + row, places] = family.O[0, row]
    doubled = Pencil(
        Z=Z, O=O, column=torch.tensor([2, 3, 4, 5]), row=torch.arange(4), owner=torch.tensor([0, 1, 0, 1]),
        low=torch.zeros(4, **double), high=torch.ones(4, **double), inputs=2, multipliers=2,
    )  # fmt: skip
    mu = causal_multipliers(doubled)
    beta = 2.0 / float(doubled.required(mu).max())
    gradient, hessian = smoothed_maximum(doubled, mu, beta, 0.0)[2:]
    assert bool(hessian.isfinite().all())
    for i in range(2):
        step = torch.zeros(2, **double)
        step[i] = 1e-4 * mu[i]
        ahead, behind = (smoothed_maximum(doubled, m, beta, 0.0) for m in (mu + step, mu - step))
        assert float(gradient[i]) == pytest.approx((ahead[0] - behind[0]) / (2 * float(step[i])), rel=1e-5)
        torch.testing.assert_close(hessian[i], (ahead[2] - behind[2]) / (2 * step[i]), rtol=1e-5, atol=1e-12)


# -- the minimum ---------------------------------------------------------------------------------------------------


def realified(matrix: torch.Tensor) -> np.ndarray:
    """[[Re, -Im], [Im, Re]], positive semidefinite if and only if the Hermitian matrix is."""
    if not matrix.is_complex():
        return matrix.numpy()
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)]).numpy()


def triangle(matrix: np.ndarray) -> np.ndarray:
    """The upper triangle, column by column, with off-diagonal entries times sqrt 2, as clarabel wants it."""
    scaled = matrix * (np.sqrt(2) - (np.sqrt(2) - 1) * np.eye(len(matrix)))
    return np.concatenate([scaled[: j + 1, j] for j in range(len(matrix))])


def interior_point(family: Pencil) -> float:
    """min rho subject to M(rho, mu) >= 0 on every block, mu >= 0, by clarabel, from the definition of M."""
    unknowns = 1 + family.multipliers
    zero = torch.zeros(family.multipliers, **double)
    constant = family.matrix(0.0, zero)
    units = [family.matrix(1.0, zero) - constant]
    for j in range(family.multipliers):
        mu = zero.clone()
        mu[j] = 1.0
        units.append(family.matrix(0.0, mu) - constant)
    rows, right, cones = [], [], []
    for b in range(len(family)):
        right.append(triangle(realified(constant[b])))
        rows.append(-np.stack([triangle(realified(unit[b])) for unit in units], axis=1))
        cones.append(clarabel.PSDTriangleConeT(len(realified(constant[b]))))
    rows.append(np.hstack([np.zeros((family.multipliers, 1)), -np.eye(family.multipliers)]))
    right.append(np.zeros(family.multipliers))
    cones.append(clarabel.NonnegativeConeT(family.multipliers))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cost = np.zeros(unknowns)
    cost[0] = 1.0
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((unknowns, unknowns)),
        cost,
        sparse.csc_matrix(np.vstack(rows)),
        np.concatenate(right),
        cones,
        settings,
    ).solve()
    assert "Solved" in str(solution.status)
    return solution.x[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_minimum_is_that_of_an_interior_point_solver(case):
    for seed in range(3):
        family = random_pencil(seed, **case)
        found = minimise_rho(family, tolerance=1e-6)
        expected = interior_point(family)
        assert found.rho == pytest.approx(expected, rel=1e-5)
        assert found.relaxed <= expected * (1 + 1e-6)
        assert float(family.required(found.mu).max()) <= found.rho * (1 + 1e-12)


def test_many_blocks_by_cutting_planes():
    family = random_pencil(7, blocks=200, inputs=1, layers=4, is_complex=True, curved=True)
    found = minimise_rho(family, tolerance=1e-5)
    assert found.rho == pytest.approx(interior_point(family.select(torch.arange(200))), rel=1e-4)
    assert found.rho == float(family.required(found.mu).max())


def test_required_is_the_smallest_rho():
    for case in CASES:
        family = random_pencil(3, **case)
        mu = 1.3 * causal_multipliers(family)
        for b, rho in enumerate(family.required(mu).tolist()):
            block = family.select(slice(b, b + 1))
            smallest = torch.linalg.eigvalsh(block.matrix(rho, mu))[0, 0]
            scale = float(block.matrix(rho, mu).abs().max())
            assert abs(float(smallest)) <= 1e-9 * scale
            assert float(torch.linalg.eigvalsh(block.matrix(rho * 0.99, mu))[0, 0]) < 0


def test_causal_multipliers_are_always_feasible():
    for seed in range(200):
        generator = np.random.default_rng(seed)
        family = random_pencil(
            seed,
            blocks=int(generator.integers(1, 5)),
            inputs=int(generator.integers(1, 4)),
            layers=int(generator.integers(2, 9)),
            is_complex=bool(seed % 2),
            curved=bool(seed % 3),
            unpaired=bool(seed % 5 == 0),
        )
        scale = 10.0 ** generator.uniform(-3, 3)
        family = Pencil(**{**vars(family), "Z": family.Z * scale})
        assert bool(family.required(causal_multipliers(family)).isfinite().all())


def test_infeasible_multipliers_prove_nothing():
    family = random_pencil(0, blocks=3, inputs=1, layers=3, is_complex=False, curved=False)
    mu = causal_multipliers(family)
    assert not bool(family.required(torch.zeros_like(mu)).isfinite().all())
    assert not bool(family.required(torch.full_like(mu, float("nan"))).isfinite().any())


def test_a_start_that_is_infeasible_is_replaced():
    family = random_pencil(0, blocks=3, inputs=1, layers=3, is_complex=False, curved=False)
    good = minimise_rho(family, 1e-6)
    again = minimise_rho(family, 1e-6, start=torch.zeros(family.multipliers, **double))
    assert again.rho == pytest.approx(good.rho, rel=1e-5)


def test_no_time_gives_a_feasible_point():
    family = random_pencil(0, blocks=3, inputs=1, layers=3, is_complex=False, curved=False)
    hurried = minimise_rho(family, 1e-9, budget_s=0.0)
    assert np.isfinite(hurried.rho)
    assert hurried.rho >= minimise_rho(family, 1e-6).rho * (1 - 1e-6)
