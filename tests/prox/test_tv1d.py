"""The prox of total variation on signals: exact, batched, and its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.errors import ConditionError, DataError, ShapeError
from firmly.prox import TV, TV1D


def signals(count: int, n: int, kind: str = "gauss", seed: int = 0) -> Tensor:
    z = torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {"gauss": z, "walk": z.cumsum(-1), "integers": z.round(), "large": 1e6 * z, "steep": z.mul(8).exp()}[kind]


def optimality(z: Tensor, x: Tensor, threshold: float) -> float:
    """How far x is from the optimality conditions: |u| <= threshold, and u = threshold times the sign at jumps."""
    u, jump = (x - z).cumsum(-1), x.diff(dim=-1)
    bounded = (u[:, :-1].abs() - threshold).clamp(min=0)
    aligned = torch.where(jump.abs() > 1e-9 * (1 + z.abs().max()), (u[:, :-1] - threshold * jump.sign()).abs(), 0)
    return float(torch.cat([bounded.flatten(), aligned.flatten(), u[:, -1].abs()]).max() / (1 + z.abs().max()))


@pytest.mark.parametrize("kind", ["gauss", "walk", "integers", "large", "steep"])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 50, 301])
def test_optimality_conditions(kind: str, n: int):
    z = signals(60, n, kind)
    for threshold in (0.0, 0.01, 0.7, 5.0, 1e4):
        x = TV1D(threshold).prox(z)
        assert optimality(z, x, threshold) < 1e-12 * n * (1 + threshold)
    assert torch.equal(TV1D(0.0).prox(z), z)
    torch.testing.assert_close(TV1D(1e18).prox(z), z.mean(-1, keepdim=True).expand_as(z), rtol=1e-12, atol=1e-9)


def test_against_a_quadratic_programme():
    """200 random signals: the dual min |z - D' u|^2 / 2 over |u| <= threshold by a bounded least-squares solver."""
    from scipy.optimize import lsq_linear

    z, threshold = signals(200, 8, seed=1), 0.4
    x = TV1D(threshold).prox(z).numpy()
    D = np.diff(np.eye(8), axis=0)
    for data, ours in zip(z.numpy(), x):
        dual = lsq_linear(D.T, data, bounds=(-threshold, threshold), method="bvls", tol=1e-15)
        np.testing.assert_allclose(ours, data - D.T @ dual.x, atol=1e-8)


def test_a_long_signal_of_many_scales():
    z = signals(1, 20000, seed=2) + (torch.arange(20000) // 1000 % 3)
    assert optimality(z, TV1D(2.0).prox(z), 2.0) < 1e-11


def test_worst_case_for_cuts_at_the_mean():
    z = 2.0 ** torch.arange(300, dtype=torch.float64)[None]
    assert optimality(z, TV1D(0.5).prox(z), 0.5) < 1e-12


def finite_difference(function, x: Tensor, direction: Tensor, size: float = 1e-6) -> Tensor:
    return (function(x + size * direction) - function(x - size * direction)) / (2 * size)


def test_derivatives_against_finite_differences():
    """Jacobian in z and derivative in the threshold on 200 random signals, all entries."""
    z, threshold = signals(200, 8, seed=3), torch.tensor(0.3, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    jacobian = torch.stack([torch.func.jvp(TV1D(0.3).prox, (z,), (e.expand_as(z),))[1] for e in eye], -1)
    expected = torch.stack([finite_difference(TV1D(0.3).prox, z, e) for e in eye], -1)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-8)
    in_threshold = torch.func.jvp(lambda t: TV1D(1.0).prox(z, t), (threshold,), (torch.ones_like(threshold),))[1]
    expected = finite_difference(lambda t: TV1D(1.0).prox(z, t), threshold, torch.ones_like(threshold))
    torch.testing.assert_close(in_threshold, expected, rtol=0, atol=1e-8)


def test_jacobian_is_block_averaging():
    z = torch.tensor([[3.0, 3.1, 0.0, 0.2, 0.1, 5.0]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(TV1D(0.2).prox, z)[0, :, 0]
    ones = [torch.ones(size, size, dtype=torch.float64) / size for size in (2, 3, 1)]
    torch.testing.assert_close(jacobian, torch.block_diag(*ones), rtol=0, atol=1e-15)


def test_second_derivatives():
    z = signals(3, 7, seed=4).requires_grad_()
    threshold = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z, t: TV1D(1.0).prox(z, t).square(), (z, threshold))


def test_a_weight_for_every_channel():
    z = signals(6, 9, seed=5).reshape(2, 3, 9)
    weight = torch.tensor([[0.1], [0.0], [0.8]], dtype=torch.float64, requires_grad=True)
    together = TV1D(weight).prox(z)
    for channel in range(3):
        alone = TV1D(weight[channel].item()).prox(z[:, channel])
        torch.testing.assert_close(together[:, channel], alone, rtol=0, atol=1e-15)
    together.square().sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape and bool((weight.grad != 0).any())


def test_agrees_with_the_prox_of_images():
    z = signals(4, 12, seed=6)[:, None]
    iterated = TV(0.4, accuracy=1e-9).prox(z)
    torch.testing.assert_close(TV1D(0.4).prox(z), iterated, rtol=0, atol=1e-7)
    torch.testing.assert_close(TV1D(0.4).value(z), TV(0.4).value(z))


def test_networks_with_it_are_certified():
    matrix = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    A = fm.linear.Dense(matrix)
    net = fm.unroll(fm.algorithms.ForwardBackward(A, TV1D(0.1)), depth=4, learn=())
    certificate = fm.certify(net)
    y = torch.randn(2, 500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    moved = (net(y[0]) - net(y[1])).norm(dim=1) / (y[0] - y[1]).norm(dim=1)
    assert moved.max() <= certificate.upper and certificate.upper < 1.5 * certificate.lower


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    z = signals(50, 64, seed=9).requires_grad_()
    on_gpu = z.detach().cuda().requires_grad_()
    ours, theirs = TV1D(0.5).prox(z), TV1D(0.5).prox(on_gpu)
    torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-12)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(on_gpu.grad.cpu(), z.grad, rtol=0, atol=1e-12)


def test_bad_input():
    z = signals(2, 6)
    with pytest.raises(DataError, match="finite"):
        TV1D(0.3).prox(torch.full_like(z, float("nan")))
    with pytest.raises(DataError, match="finite"):
        TV1D(0.3).prox(z, torch.tensor(float("nan")))
    with pytest.raises(ConditionError, match="not negative"):
        TV1D(-0.1)
    with pytest.raises(ShapeError, match="one number"):
        TV1D(torch.ones(6)).prox(z)
    with pytest.raises(ShapeError, match="one number"):
        TV1D(torch.ones(4, 1)).prox(signals(6, 9).reshape(2, 3, 9))
    with pytest.raises(ShapeError, match="signals"):
        TV1D(0.3).prox(z[0])
