"""Residual networks of Bregman blocks: the two forms agree, they train, they are certified."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.errors import SettingsError, ShapeError
from firmly.networks import BregmanBlock, BregmanMean, BregmanResNet
from firmly.networks.bregman_blocks import bregman_block
from firmly.prox import legendre


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "atan", "softplus"])
def test_blocks_in_both_coordinates(name):
    torch.manual_seed(0)
    block = bregman_block(legendre(name), 3, (4, 6), 1.0).double()
    block.bias.data += 0.1
    u = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(block.activation(block(u)), block.primal(block.activation(u)), rtol=1e-10, atol=1e-12)


def test_shapes_and_refusals():
    net = BregmanResNet(3, 10, (8, 8), channels=(4, 6), blocks=2)
    assert net(torch.randn(5, 3, 8, 8)).shape == (5, 10)
    assert [type(layer) for layer in net.layers] == [BregmanBlock] * 2 + [BregmanMean] + [BregmanBlock] * 2
    assert BregmanResNet(1, 2, (8,), channels=(2, 3, 4), blocks=1)(torch.randn(2, 1, 8)).shape == (2, 2)
    for spatial in ((6, 8), ()):
        with pytest.raises(SettingsError, match="halve"):
            BregmanResNet(3, 10, spatial, channels=(4, 4, 4))
    with pytest.raises(SettingsError, match="at least 1"):
        BregmanResNet(3, 10, (8, 8), blocks=0)
    narrow, wide = (bregman_block(legendre("tanh"), n, (4,), 1.0) for n in (2, 3))
    with pytest.raises(ShapeError, match="returns"):
        BregmanBlock(narrow.inner, wide.outer, legendre("tanh"), narrow.inner_bias, narrow.bias)


def test_certificate():
    torch.manual_seed(0)
    net = BregmanResNet(1, 3, (4, 4), channels=(2, 3), blocks=1).double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    certificate = fm.certify(net, budget_s=5)
    x = torch.randn(50, 1, 4, 4, dtype=torch.float64).requires_grad_(True)
    outputs = net(x)
    rows = [torch.autograd.grad(outputs[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(3)]
    steepest = float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())
    assert max(steepest, certificate.lower) <= certificate.upper
    assert certificate.upper < 200 * certificate.lower


def test_training():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    label = torch.arange(32) % 2
    columns = torch.arange(8)
    stripes = torch.where(label[:, None] == 0, columns % 2, (columns // 2) % 2).float()
    images = stripes[:, None, None, :] + 0.3 * torch.randn(32, 1, 8, 8, generator=generator)
    net = BregmanResNet(1, 2, (8, 8), channels=(4, 8), blocks=2)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(images), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
