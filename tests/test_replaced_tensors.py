"""Calls with other tensors: modules that stand at two places keep their parameters, and their gradients."""

import torch
from torch import nn

import firmly as fm
from firmly.fixedpoint import Implicit
from firmly.networks import BregmanLayer, inverse, invertible_weight
from firmly.replaced_tensors import call_with


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_gradients_twice(parameters, output):
    """The gradients of two passes, as in two steps of training."""
    first, second = (torch.autograd.grad(output().square().sum(), parameters) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    return first


def against_differences(parameters, output, gradients):
    for p, gradient in zip(parameters, gradients, strict=True):
        direction, h, kept = randn(*p.shape, seed=5), 1e-6, p.detach().clone()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                p.copy_(kept + sign * h * direction)
                values.append(float(output().square().sum()))
                p.copy_(kept)
        torch.testing.assert_close(
            (gradient * direction).sum().item(), (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-7
        )


def test_a_module_beside_its_adjoint_keeps_its_parameters():
    layer = BregmanLayer(invertible_weight(5, 1.0, rank=2, gain=1.5).double(), fm.prox.legendre("tanh"))
    parameters, v = list(layer.parameters()), randn(2, 5)
    gradients = same_gradients_twice(parameters, lambda: inverse(layer, v))
    against_differences(parameters, lambda: inverse(layer, v), gradients)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert all(isinstance(p, nn.Parameter) for p in layer.parameters())


def test_an_algorithm_of_a_gram_matrix_learns_in_every_step():
    B = fm.linear.Dense(nn.Parameter(torch.eye(4, 3, dtype=torch.float64) + randn(4, 3, seed=1) / 10))
    algorithm = fm.algorithms.ForwardBackward(B.T @ B, fm.prox.L1(0.01), step_size=0.5)
    for adjoint in (Implicit(), Implicit("manifold")):
        layer, y = fm.implicit(algorithm, adjoint, tol=1e-12, max_iterations=100_000), randn(2, 3, seed=2)
        gradients = same_gradients_twice([B.weight], lambda layer=layer, y=y: layer(y))
        against_differences([B.weight], lambda layer=layer, y=y: layer(y), gradients)
    assert isinstance(B.weight, nn.Parameter)


def test_one_parameter_of_two_modules_is_replaced_in_both():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    both, other, x = nn.Sequential(first, second), torch.randn(3, 3), torch.randn(2, 3)
    torch.testing.assert_close(call_with(both, {"0.weight": other}, (x,)), x @ other.mT @ other.mT)
    assert first.weight is second.weight and isinstance(first.weight, nn.Parameter)
