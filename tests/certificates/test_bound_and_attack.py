"""The differentiable bound, and the attack: gradients, radii, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from firmly import attack, certify, unroll
from firmly.algorithms import ForwardBackward, Hqs
from firmly.certificates import bound, solved_multipliers
from firmly.errors import DataError
from firmly.linear import Blur, Convolution, Dense
from firmly.prox import L1, Clip, Ridge

from .systems import double


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(1.3), nn.Linear(3, 2)).double()


def circular() -> nn.Module:
    torch.manual_seed(1)
    first = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")).double()


def learned_filters() -> nn.Module:
    torch.manual_seed(2)
    ridge = Ridge(torch.randn(3, 1, 3, 3, **double), Clip(3, 0.2), cap=1.9)
    return unroll(Hqs(Blur.gaussian(0.8, (1, 6, 6)), ridge=ridge, penalty=0.4), 2).double()


def learned_steps() -> nn.Module:
    kernel = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(3), **double) / 5
    return unroll(ForwardBackward(Convolution(kernel, (1, 5, 5)), L1(0.1)), 3).double()


CASES = {
    "perceptron": (perceptron, (3,)),
    "circular convolutions": (circular, (1, 4, 4)),
    "learned filters": (learned_filters, None),
    "learned steps": (learned_steps, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_finite_differences(name):
    make, shape = CASES[name]
    net = make()
    mu = solved_multipliers(net, shape=shape)
    mu = 1.05 * mu  # inside of the domain
    value = bound(net, multipliers=mu, shape=shape)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    tested = 0
    for parameter, gradient in zip(parameters, gradients):
        if gradient is None:
            continue
        for entry in range(0, parameter.numel(), max(1, parameter.numel() // 3)):
            flat, step = parameter.data.view(-1), 1e-6
            old = float(flat[entry])
            values = []
            for sign in (1, -1):
                flat[entry] = old + sign * step
                values.append(float(bound(net, multipliers=mu, shape=shape).detach()))
            flat[entry] = old
            slope = (values[0] - values[1]) / (2 * step)
            assert float(gradient.flatten()[entry]) == pytest.approx(slope, rel=1e-4, abs=1e-6 * float(value.detach()))
            tested += abs(slope) > 1e-6
    assert tested > 0


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_the_spectral_bound_of_a_certificate(name):
    make, shape = CASES[name]
    net = make()
    cert = certify(net, shape=shape, method="spectral", tolerance=1e-7)
    assert cert.multipliers is not None
    with torch.no_grad():
        assert float(bound(net, multipliers=cert.multipliers, shape=shape)) == pytest.approx(cert.upper, rel=1e-5)
        assert float(bound(net, multipliers=cert.multipliers, shape=shape)) <= cert.upper * (1 + 1e-12)
        solved = solved_multipliers(net, shape=shape, tolerance=1e-7)
        assert float(bound(net, multipliers=solved, shape=shape)) == pytest.approx(cert.upper, rel=1e-5)
    assert float(bound(net, shape=shape).detach()) == pytest.approx(cert.upper, rel=2e-3)


def test_multipliers_that_no_longer_prove_a_bound_give_infinity():
    net = perceptron()
    mu = solved_multipliers(net, shape=(3,))
    with torch.no_grad():
        assert math.isinf(float(bound(net, multipliers=0 * mu, shape=(3,))))
        net[4].weight.mul_(100)
        assert math.isinf(float(bound(net, multipliers=mu, shape=(3,))))
        again = solved_multipliers(net, shape=(3,), start=mu)
        assert math.isfinite(float(bound(net, multipliers=again, shape=(3,))))


def test_the_bound_of_a_single_precision_network_is_computed_in_double():
    net = perceptron().float()
    value = bound(net, shape=(3,))
    assert value.dtype == torch.float64
    value.backward()
    assert net[0].weight.grad is not None
    assert net[0].weight.grad.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(certify(net, shape=(3,), method="spectral").upper, rel=2e-3)


# -- attacks -------------------------------------------------------------------------------------------------------


def test_the_attack_on_a_linear_map_finds_its_norm():
    for seed in range(5):
        torch.manual_seed(seed)
        A = Dense(torch.randn(6, 4, **double))
        found = attack(A, torch.randn(1, 4, **double), 0.5, steps=2000)
        assert found.ratio == pytest.approx(A.norm().upper, rel=1e-3)
        assert found.ratio <= A.norm().upper * (1 + 1e-12)
        assert found.change == pytest.approx(found.ratio * float(found.perturbation.norm()), rel=1e-9)


@pytest.mark.parametrize("radius", [1e-6, 0.1, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_is_respected(radius, dtype):
    net = perceptron().to(dtype)
    y = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), **double).to(dtype)
    if dtype == torch.float32 and radius == 1e-6:
        radius = 1e-4
    found = attack(net, y, radius)
    moved = y + found.perturbation
    assert float((moved.double() - y.double()).norm()) <= radius * (1 + 1e-12)
    change = float((net(moved) - net(y)).detach().norm())
    sizes = float((net(y).norm() + net(moved).norm()).detach())
    rounding = 32 * torch.finfo(dtype).eps * sizes  # taken off the change, to stay below it
    assert found.change <= change * (1 + 1e-6)
    assert found.change >= change - rounding - 1e-6 * change


def test_the_attack_is_never_worse_than_its_start():
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        y = torch.randn(1, 4, **double)
        first = attack(net, y, 0.7, steps=0, seed=seed)
        assert attack(net, y, 0.7, steps=20, seed=seed).change >= first.change * (1 - 1e-12)


def test_attacks_stay_below_the_certificate():
    for name in ("perceptron", "circular convolutions"):
        make, shape = CASES[name]
        net = make()
        upper = certify(net, shape=shape).upper
        for radius in (1e-3, 1.0, 1e3):
            assert attack(net, torch.randn(1, *shape, **double), radius).ratio <= upper * (1 + 1e-12)


@pytest.mark.parametrize(
    "y, radius, error",
    [
        (torch.full((1, 3), float("nan"), **double), 1.0, DataError),
        (torch.full((1, 3), float("inf"), **double), 1.0, DataError),
        (torch.zeros(2, 3, **double), 1.0, DataError),
        (torch.zeros(1, 3, **double), -1.0, ValueError),
        (torch.zeros(1, 3, **double), 0.0, ValueError),
        (torch.zeros(1, 3, **double), float("nan"), ValueError),
        (torch.zeros(1, 3, **double), float("inf"), ValueError),
        (torch.full((1, 3), 1e9), 1e-3, DataError),
    ],
)
def test_bad_input_is_refused(y, radius, error):
    with pytest.raises(error):
        attack(perceptron().to(y.dtype), y, radius)
