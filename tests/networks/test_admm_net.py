"""ADMM-Net against its formulas, with explicit transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.errors import NotCertifiable, SettingsError, ShapeError
from firmly.linear import Convolution, Dense, FourierSampling
from firmly.networks import AdmmNet


def network(stages: int = 3) -> tuple[AdmmNet, Tensor]:
    torch.manual_seed(0)
    mask = (torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    net = AdmmNet(FourierSampling(mask), stages, features=4, knots=11).double()
    with torch.no_grad():
        net.activation.raw += torch.randn(net.activation.raw.shape)
        net.synthesis.weight *= 20
        net.gamma.fill_(0.8)
    generator = torch.Generator().manual_seed(1)
    return net, net.A(torch.randn(2, 1, 6, 8, dtype=torch.complex128, generator=generator))


def test_forward_is_the_formulas() -> None:
    net, y = network()
    mask, rho, gamma = net.A.mask, net.penalty, net.gamma

    def F(x: Tensor) -> Tensor:
        return torch.fft.fft2(x, norm="ortho")

    def back(x: Tensor) -> Tensor:
        return torch.fft.ifft2(x, norm="ortho")

    def part(v: Tensor) -> Tensor:
        return net.synthesis(net.activation(net.analysis(v)))

    x, beta = back(y / (mask + rho)), torch.zeros(2, 1, 6, 8, dtype=torch.complex128)
    for _ in range(3):
        v = x + beta
        z = v - torch.complex(part(v.real), part(v.imag))
        beta = beta + gamma * (x - z)
        x = back((y + rho * F(z - beta)) / (mask + rho))
    expected = back(y + (1 - mask) * F(x))
    torch.testing.assert_close(net(y), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(net.A(net(y)), y, rtol=1e-11, atol=1e-11)  # measured frequencies are kept


def test_gradients_reach_everything_and_real_maps_give_real_images() -> None:
    net, y = network()
    net(y).abs().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    blur = Convolution(torch.ones(3, 3, dtype=torch.float64) / 9, (1, 6, 8))
    image = AdmmNet(blur, 2, features=3).double()(torch.randn(1, 1, 6, 8, dtype=torch.float64))
    assert not image.is_complex() and image.shape == (1, 1, 6, 8)


def test_parameters_are_shared_by_the_stages() -> None:
    counts = {sum(p.numel() for p in AdmmNet(FourierSampling(torch.ones(4, 4)), k).parameters()) for k in (1, 10)}
    assert counts == {2 + 128 * 26 + 128 * 25 + 1 + 128 * 102}


def test_a_complex_network_with_parts_is_not_certified() -> None:
    with pytest.raises(NotCertifiable):
        fm.certify(network()[0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="images"):
        AdmmNet(Dense(torch.eye(3)))
    with pytest.raises(SettingsError, match="at least 1"):
        AdmmNet(FourierSampling(torch.ones(4, 4)), stages=0)
