"""Every traced operation against the Jacobian of the operation itself: equal where it is linear, never below it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firmly.certificates.relax import Norms
from firmly.certificates.system import Nonlinear
from firmly.certificates.torch_maps import TorchConvolution
from firmly.linear import DenseBasis

from .systems import Net, attained, blocks_of, bounds, double, system_of

W = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), **double)
EVEN = torch.tensor([[True, False, True, False]] * 3)
LINEAR = {
    "linear along the last axis": lambda x: F.linear(x, W.T),
    "matmul on the right": lambda x: x @ W,
    "matmul on the left": lambda x: W @ x,
    "bmm": lambda x: torch.bmm(x, W[None]),
    "sum": lambda x: x.sum(2),
    "sum of all": lambda x: x.sum((1, 2), keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean of the other axis": lambda x: x.mean(1),
    "cumsum": lambda x: x.cumsum(2),
    "average pool": lambda x: F.avg_pool1d(x, 2, 1),
    "average pool, padded": lambda x: F.avg_pool1d(x, 3, 2, 1),
    "average pool, padding not counted": lambda x: F.avg_pool1d(x, 3, 2, 1, True, False),
    "average pool 2d": lambda x: F.avg_pool2d(x[:, None], (2, 3), (1, 2), (1, 0)),
    "average pool 2d, divisor": lambda x: F.avg_pool2d(x[:, None], 2, 1, divisor_override=3),
    "adaptive average pool": lambda x: F.adaptive_avg_pool1d(x, 3),
    "adaptive average pool 2d": lambda x: F.adaptive_avg_pool2d(x[:, None], (2, None)),
    "interpolate nearest": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate linear": lambda x: F.interpolate(x, size=7, mode="linear"),
    "interpolate aligned": lambda x: F.interpolate(x, size=7, mode="linear", align_corners=True),
    "interpolate bilinear": lambda x: F.interpolate(x[:, None], scale_factor=(2.0, 1.5), mode="bilinear"),
    "interpolate bicubic": lambda x: F.interpolate(x[:, None], size=(5, 3), mode="bicubic"),
    "interpolate area": lambda x: F.interpolate(x, size=3, mode="area"),
    "masked fill": lambda x: x.masked_fill(EVEN, 7.0),
    "where": lambda x: torch.where(EVEN, x, 2.0 * x),
    "where with a constant": lambda x: torch.where(EVEN, torch.ones(3, 4, **double), x),
    "stack": lambda x: torch.stack([x, -2.0 * x], dim=2),
    "chunk": lambda x: x.chunk(2, 2)[0] - x.chunk(2, 2)[1],
    "split": lambda x: x.split([1, 3], 2)[1],
    "unbind": lambda x: x.unbind(1)[0] + x.unbind(1)[2],
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, 2),
    "tril": lambda x: torch.tril(x),
    "transpose": lambda x: x.transpose(1, 2) @ W.T @ W,
    "movedim": lambda x: x.movedim(1, 2),
    "select": lambda x: x.select(2, 1),
    "index": lambda x: x[:, [2, 0, 0], 1:],
    "index by a mask": lambda x: x[:, EVEN],
    "flip and roll": lambda x: x - x.flip(1).roll(1, 2),
    "pad": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "pad circular": lambda x: F.pad(x, (3, 2), mode="circular"),
    "pad with a number": lambda x: F.pad(x, (1, -1, 2, 0), value=3.0),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 3, 1), 2),
    "convolution": lambda x: F.conv1d(x, W.reshape(2, 3, 2)),
    "convolution, strided": lambda x: F.conv1d(x, W[:, :, None].expand(4, 3, 3) * torch.arange(3.0), None, 2, 2),
    "convolution, dilated and grouped": lambda x: F.conv1d(x, W[:3, None], None, 1, 3, 2, 3),
    "convolution, same": lambda x: F.conv1d(x, W[:3, None], padding="same", groups=3),
    "transposed convolution": lambda x: F.conv_transpose1d(x, W.T.reshape(3, 2, 2), None, 2, 1, 1),
    "transposed convolution, grouped": lambda x: F.conv_transpose1d(x, W.T.reshape(3, 1, 4), None, 2, 0, 0, 3, 2),
    "batch norm": lambda x: F.batch_norm(
        x, torch.ones(3, **double), torch.tensor([0.1, 1.0, 4.0], **double), torch.tensor([1.0, -2.0, 3.0], **double)
    ),
}
CONTRACTIONS = {
    "max": lambda x: torch.max(x, dim=1, keepdim=True).values,
    "min of rows": lambda x: x.min(2)[0],
    "amax": lambda x: x.amax((1, 2)),
    "maximum": lambda x: torch.maximum(x, 2.0 * x.flip(2)),
    "maximum with a constant": lambda x: torch.maximum(x, torch.zeros(4, **double)),
    "minimum": lambda x: torch.minimum(x, -1.5 * x.roll(1, 1)),
    "max of two": lambda x: torch.max(x, 1.0 - x),
    "sort": lambda x: x.sort(2, descending=True)[0],
    "topk": lambda x: x.topk(2, 1).values,
    "logsumexp": lambda x: x.logsumexp(2),
    "max pool": lambda x: F.max_pool1d(x, 2),
    "max pool, overlapping": lambda x: F.max_pool1d(x, 3, 1, 1),
    "max pool, dilated": lambda x: F.max_pool1d(x, 2, 1, 1, 2),
    "max pool, rounded up": lambda x: F.max_pool1d(x, 3, 2, 1, 1, True),
    "max pool 2d": lambda x: F.max_pool2d(x[:, None], (2, 3), 1),
    "adaptive max pool": lambda x: F.adaptive_max_pool1d(x, 3),
    "maxout": lambda x: torch.maximum(x @ W, x @ W.flip(0)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_are_exact(name):
    function = LINEAR[name]
    true = attained(function, [(3, 4)], 1)
    net = Net(function)
    system = system_of(net, (3, 4))
    assert not any(isinstance(node, Nonlinear) for node in system.nodes)
    found = bounds(net, (3, 4), basis=DenseBasis())
    assert found["product"] == pytest.approx(true, rel=1e-9)
    assert found["product"] >= true * (1 - 1e-14)
    # and as a matrix, entry by entry, up to the sign that the norm hides
    matrix = torch.autograd.functional.jacobian(lambda x: function(x).flatten(), torch.zeros(1, 3, 4, **double))
    torch.testing.assert_close(blocks_of(system).output.value[0], matrix.reshape(-1, 12), atol=1e-10, rtol=1e-10)
    assert bounds(net, (3, 4), basis=Norms())["product"] >= true * (1 - 1e-14)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_are_bounded(name):
    function = CONTRACTIONS[name]
    least = attained(function, [(3, 4)], 25)
    for basis in (DenseBasis(), Norms()):
        found = bounds(Net(function), (3, 4), basis=basis, tolerance=1e-3)
        for bound in found.values():
            assert least <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 3)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 3)),
        (nn.Conv2d(2, 3, (3, 1), padding=(1, 0), padding_mode="reflect"), (2, 4, 3)),
        (nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), (2, 4, 3)),
        (nn.Conv2d(2, 4, 2, stride=(2, 1), dilation=(1, 2), groups=2), (2, 5, 4)),
        (nn.Conv3d(1, 2, 2, stride=2, padding=1), (1, 3, 2, 3)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 3)),
        (nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular", bias=False), (2, 6)),
        (nn.Conv1d(2, 2, 4, padding="valid"), (2, 6)),
    ],
    ids=str,
)
def test_layers_have_the_matrices_that_torch_computes(layer, shape):
    layer = layer.double()
    zero = torch.zeros(1, *shape, **double)
    matrix = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), zero).reshape(-1, zero.numel())
    symbol = blocks_of(system_of(layer, shape)).output
    torch.testing.assert_close(symbol.value[0].detach(), matrix, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_the_norm_of_a_convolution_on_a_torus_bounds_it(seed):
    """Padding, stride, dilation and groups: a part of a circular convolution on a larger torus, with aliases."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    groups, size, stride, dilation = pick(1, 2), pick(1, 2, 3, 5), pick(1, 2, 3), pick(1, 2)
    weight = torch.randn(4, pick(1, 2), size, **double)
    n = (size - 1) * dilation + pick(1, 2, 5, 8)
    convolution = TorchConvolution(weight, (n,), (stride,), (pick(0, 1, 4),), (dilation,), groups)
    true = float(torch.linalg.matrix_norm(convolution.matrix(), 2))
    assert true <= convolution._upper() * (1 + 1e-14)
    assert convolution._upper() <= 2.5 * true
    x, y = torch.randn(2, *convolution.domain, **double), torch.randn(2, *convolution.codomain, **double)
    assert float((convolution(x) * y).sum()) == pytest.approx(float((x * convolution.T(y)).sum()), rel=1e-12)
