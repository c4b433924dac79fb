"""The penalty of augmented Lagrangian attacks and its derivative."""

import pytest
import torch

from firmly.robust import attack_penalty, penalty_slope


def test_the_slope_where_the_released_code_is_wrong():
    y = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    assert float(penalty_slope(y.detach(), 0.7, 0.01)) == pytest.approx(0.700014, abs=1e-10)
    attack_penalty(y, 0.7, 0.01).backward()
    assert y.grad is not None and float(y.grad) == pytest.approx(0.700014, abs=1e-10)


@pytest.mark.parametrize("rho", [0.01, 1.0, 40.0])
def test_the_slope_is_the_derivative(rho):
    y = torch.linspace(-3, 3, 25, dtype=torch.float64, requires_grad=True)
    mu = torch.linspace(1e-12, 1, 25, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: attack_penalty(y, mu, rho), y)
    (gradient,) = torch.autograd.grad(attack_penalty(y, mu, rho).sum(), y)
    assert torch.allclose(gradient, penalty_slope(y.detach(), mu, rho), rtol=1e-12, atol=0)


def test_at_zero_and_far_away():
    y = torch.tensor([0.0, 1e5, -1e30], dtype=torch.float64, requires_grad=True)
    penalty = attack_penalty(y, 0.5, 2.0)
    penalty.sum().backward()
    assert penalty[0] == 0
    assert float(penalty.detach()[2]) == pytest.approx(-0.25)
    assert y.grad is not None and float(y.grad[0]) == 0.5
    assert bool(y.grad.isfinite().all()) and bool((y.grad >= 0).all())
