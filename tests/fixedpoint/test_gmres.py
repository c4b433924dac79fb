"""GMRES for a batch: against direct solves, restarts, singular systems, and the residual that it reports."""

from __future__ import annotations

import pytest
import torch

from firmly.fixedpoint.gmres import gmres

double = {"dtype": torch.float64}


def matrices(batch: int, n: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.eye(n, **double) + spread * torch.randn(batch, n, n, generator=generator, **double) / n**0.5


@pytest.mark.parametrize(("n", "spread"), [(1, 0.5), (7, 0.5), (150, 0.8)])
def test_against_a_direct_solve(n, spread):
    A = matrices(3, n, spread)
    right = torch.randn(3, n, generator=torch.Generator().manual_seed(1), **double)
    right[1] = 0  # converged at once, while the others go on
    x, residual = gmres(lambda u: (A @ u[:, :, None])[:, :, 0], right, 1e-12)
    assert residual <= 1e-12
    torch.testing.assert_close(x, torch.linalg.solve(A, right), rtol=0, atol=1e-9)


def test_shapes_and_complex_systems():
    A = matrices(2, 6, 0.4).to(torch.complex128) * torch.exp(torch.tensor(0.4j))
    right = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    x, residual = gmres(lambda u: (A @ u.flatten(1)[:, :, None])[:, :, 0].reshape(u.shape), right, 1e-11)
    assert residual <= 1e-11 and x.shape == right.shape


def test_a_system_without_a_solution_reports_its_residual():
    A = torch.diag(torch.tensor([1.0, 0.0], **double))
    x, residual = gmres(lambda u: u @ A, torch.ones(1, 2, **double), 1e-10)
    assert residual == pytest.approx(0.5**0.5) and bool(x.isfinite().all())


def test_the_limit_of_products_holds():
    count = 0
    A = matrices(1, 400, 1.5)

    def apply(u):
        nonlocal count
        count += 1
        return (A @ u[:, :, None])[:, :, 0]

    _, residual = gmres(apply, torch.ones(1, 400, **double), 1e-12, max_products=100)
    assert count <= 100 + 62 and residual > 1e-12
