"""All algorithms reach the same solution of the same problem, and that solution is optimal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from firmly import solve
from firmly.algorithms import (
    Admm,
    Algorithm,
    ChambollePock,
    CondatVu,
    DouglasRachford,
    DualForwardBackward,
    Fista,
    ForwardBackward,
    HeavyBall,
    Hqs,
)
from firmly.linear import Dense, FourierSampling, Gradient, Identity, Mask
from firmly.prox import L1, GroupL1, Huber, NonNegative, Slope, Zero

from .problems import SHAPE, blur, data, edges, ridge

SAME_PROBLEM: dict[str, list[Callable[[], Algorithm]]] = {
    "deconvolution with an l1 prior": [
        lambda: ForwardBackward(blur(), L1(0.1)),
        lambda: ForwardBackward(blur(), L1(0.1), step_size=1.9),
        lambda: Fista(blur(), L1(0.1), restart=30),
        lambda: Fista(blur(), L1(0.1)),
        lambda: DouglasRachford(blur(), L1(0.1), step_size=5.0, relaxation=1.7),
        lambda: Admm(blur(), L1(0.1), penalty=0.2),
        lambda: Admm(blur(), L1(0.1), penalty=0.2, K=Identity(SHAPE)),
        lambda: ChambollePock(blur(), L1(0.1), Identity(SHAPE), step_size=4.0),
        lambda: CondatVu(blur(), L1(0.1), Identity(SHAPE)),
        lambda: CondatVu(blur(), Zero(), Identity(SHAPE), constraint=L1(0.1)),
    ],
    "deconvolution with anisotropic total variation": [
        lambda: ChambollePock(blur(), L1(0.1), edges()),
        lambda: CondatVu(blur(), L1(0.1), edges()),
        lambda: Admm(blur(), L1(0.1), K=edges(), penalty=0.3),
    ],
    "denoising with anisotropic total variation": [
        lambda: DualForwardBackward(edges(), L1(0.1)),
        lambda: ChambollePock(Identity(SHAPE), L1(0.1), edges()),
        lambda: CondatVu(Identity(SHAPE), L1(0.1), edges()),
        lambda: Admm(Identity(SHAPE), L1(0.1), K=edges()),
    ],
    "deconvolution with a learned ridge": [
        lambda: ForwardBackward(blur(), Zero(), ridge=ridge()),
        lambda: Fista(blur(), Zero(), ridge=ridge(), restart=30),
        lambda: HeavyBall(blur(), ridge()),
        lambda: Hqs(blur(), ridge=ridge()),
        lambda: CondatVu(blur(), Zero(), Identity(SHAPE), ridge=ridge()),
    ],
}


@pytest.mark.parametrize("problem", SAME_PROBLEM)
def test_fixed_points_agree(problem):
    y = data()
    solutions = [solve(make(), y, tol=1e-12, max_iterations=5000) for make in SAME_PROBLEM[problem]]
    assert all(s.converged for s in solutions), [(s.status, s.residual) for s in solutions]
    for solution in solutions[1:]:
        assert torch.linalg.vector_norm(solution.x - solutions[0].x) < 1e-8


def test_l1_solution_satisfies_the_optimality_conditions():
    """0 in A*(A x - y) + w d|x|_1: the gradient is -w sign(x) where x is not 0, and at most w elsewhere."""
    A, y, weight = blur(), data(), 0.1
    x = solve(ForwardBackward(A, L1(weight)), y, tol=1e-13).x
    gradient = A.T(A(x) - y)
    assert 0 < int((x == 0).sum()) < x.numel()
    torch.testing.assert_close(gradient[x != 0], -weight * x[x != 0].sign(), atol=1e-10, rtol=0)
    assert gradient[x == 0].abs().max() <= weight + 1e-10


def test_hqs_with_a_prior_solves_the_problem_with_its_moreau_envelope():
    """The envelope of w |.|_1 with index r is a Huber function; its gradient r (x - prox_{g/r} x) is a smooth term."""

    class Envelope(torch.nn.Module):
        slope = Slope(0.0, 1.0)

        def gradient(self, x):
            return 0.7 * (x - L1(0.1).prox(x, 1 / 0.7))

        def kappa(self):
            return 0.7

    A, y = blur(), data()
    penalised = solve(Hqs(A, L1(0.1), penalty=0.7), y, tol=1e-12)
    smooth = solve(ForwardBackward(A, Zero(), ridge=Envelope()), y, tol=1e-12)
    huber = solve(ForwardBackward(A, Huber(knee=0.1 / 0.7, weight=0.7)), y, tol=1e-12)
    assert penalised.converged and smooth.converged and huber.converged
    torch.testing.assert_close(penalised.x, smooth.x, atol=1e-9, rtol=0)
    torch.testing.assert_close(penalised.x, huber.x, atol=1e-9, rtol=0)


def test_complex_images_from_masked_fourier_data():
    """Magnetic resonance imaging in small: sampled frequencies, complex soft thresholds; all without a special case."""
    generator = torch.Generator().manual_seed(0)
    A = FourierSampling((torch.rand(6, 6, generator=generator) < 0.7).double())
    y = A(torch.randn(2, *A.domain, generator=generator, dtype=torch.complex128))
    images = [
        solve(algorithm, y, tol=1e-12).x
        for algorithm in (
            ForwardBackward(A, L1(0.2), step_size=0.9),
            DouglasRachford(A, L1(0.2)),
            Admm(A, L1(0.2)),
        )
    ]
    assert images[0].is_complex() and images[0].abs().max() > 0
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], atol=1e-8, rtol=0)


def test_inpainting_with_isotropic_total_variation_in_the_positive_orthant():
    """Mask, Neumann gradient, group prior, and a constraint: Condat-Vu with it against Chambolle-Pock without."""
    mask = (torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    A, D = Mask(mask), Gradient((1, 6, 6))
    y = A(data().abs() + 1)
    primal_dual = solve(ChambollePock(A, GroupL1(0.2), D, step_size=1.0), y, tol=1e-12)
    constrained = solve(CondatVu(A, GroupL1(0.2), D, constraint=NonNegative()), y, tol=1e-12)
    assert primal_dual.converged and constrained.converged and primal_dual.x.min() > 0
    torch.testing.assert_close(constrained.x, primal_dual.x, atol=1e-8, rtol=0)


def test_operators_given_by_a_matrix_are_factorised_once(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    A = Dense(torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    y = torch.ones(1, 12, dtype=torch.float64)
    splitting = solve(DouglasRachford(A, L1(0.1), step_size=0.1), y, tol=1e-13)
    assert splitting.converged and len(calls) <= 1
    torch.testing.assert_close(splitting.x, solve(ForwardBackward(A, L1(0.1)), y, tol=1e-14).x, atol=1e-9, rtol=0)
