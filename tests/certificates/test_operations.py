"""Rules for torch operations: bounds against Jacobians, closed forms, and refusals that list everything."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import firmly as fm
from firmly.certificates import certify, verify
from firmly.certificates.norm_bounds import product_bound
from firmly.certificates.system import Linear, Nonlinear
from firmly.certificates.torch_maps import AxisMaps, Rearrange, TorchConvolution, frequency_grid
from firmly.errors import NotCertifiable
from firmly.linear import DenseBasis
from firmly.linear.basis import Fourier

from .systems import Net, attained, blocks_of, double, system_of

SHAPE = (2, 6, 6)
matrix = torch.arange(24, **double).reshape(4, 6) / 24
steps = torch.arange(6) > 2


def parts_of(x):
    first, second = x.chunk(2, 1)
    return torch.cat([3 * second, first, x.narrow(2, 0, 6)], 1)


LINEAR = {
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pool without the border": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pool with a last window": lambda x: F.avg_pool2d(x, (2, 3), (2, 2), (1, 1), True),
    "average pool with a divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "average pool of lines": lambda x: F.avg_pool1d(x.flatten(2), 4, 3, 2),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, (4, None)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear between corners": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(9, 4), mode="bicubic"),
    "bicubic without aliases": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),
    "trilinear": lambda x: F.interpolate(x[:, None], scale_factor=(1.5, 2, 1), mode="trilinear"),
    "average pool of volumes": lambda x: F.avg_pool3d(x[:, None], 2, divisor_override=5),
    "area": lambda x: F.interpolate(x, size=(4, 3), mode="area"),
    "mean": lambda x: x.mean((2, 3)),
    "mean of channels": lambda x: torch.mean(x, 1, keepdim=True),
    "sum": lambda x: torch.sum(x, dim=-1),
    "running sum": lambda x: x.cumsum(2),
    "pieces": parts_of,
    "stack": lambda x: torch.stack([x, 2 * x.flip(2)], 1),
    "where": lambda x: torch.where(steps, x, -2 * x),
    "where with a constant": lambda x: torch.where(steps, 1.0, x),
    "masked fill": lambda x: x.masked_fill(steps, 4.0),
    "pad with a value": lambda x: F.pad(x, (1, -1, 2, 0), value=3.0),
    "pad by reflection": lambda x: F.pad(x, (1, 1, 2, 0), "reflect"),
    "pad by replication": lambda x: F.pad(x, (1, 1, 2, 0), "replicate"),
    "matrix from the left": lambda x: matrix @ x,
    "matrix from the right": lambda x: x @ matrix.T,
    "linear along the last axis": lambda x: F.linear(x, matrix),
    "einsum": lambda x: torch.einsum("oi,bcit->bcto", matrix, x),
    "einsum in groups": lambda x: torch.einsum("bcij,ckj->bcik", x, weights(2, 5, 6)),
    "einsum with an index of its own": lambda x: torch.einsum("bcij,kj->bci", x, matrix),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "select": lambda x: x.select(2, 1),
    "transposed convolution": lambda x: F.conv_transpose2d(x, weights(2, 3, 3, 3), stride=2, padding=1),
    "transposed with output padding": lambda x: F.conv_transpose2d(
        x, weights(2, 3, 3, 3), stride=2, padding=1, output_padding=1
    ),
    "transposed in groups, dilated": lambda x: F.conv_transpose2d(x, weights(2, 2, 3, 3), groups=2, dilation=2),
    "strided convolution": lambda x: F.conv2d(x, weights(3, 2, 3, 3), stride=2, padding=1),
}
NONEXPANSIVE = {
    "maximum pool": (lambda x: F.max_pool2d(x, 2), 1.0),
    "maximum pool that overlaps": (lambda x: F.max_pool2d(x, 3, 1, 1), 3.0),
    "maximum pool, dilated": (lambda x: F.max_pool2d(x, 2, 2, dilation=2), 2.0),
    "maximum pool of lines": (lambda x: F.max_pool1d(x.flatten(2), 4, 2), math.sqrt(2)),
    "adaptive maximum pool": (lambda x: F.adaptive_max_pool2d(x, 4), 2.0),
    "maximum over channels": (lambda x: x.max(1)[0], 1.0),
    "minimum over channels": (lambda x: torch.min(x, 1, keepdim=True).values, 1.0),
    "maximum over pixels": (lambda x: x.amax((2, 3)), 1.0),
    "sort": (lambda x: x.sort(2).values, 1.0),
    "largest entries": (lambda x: x.flatten(1).topk(5)[0], 1.0),
    "log-sum-exp": (lambda x: x.logsumexp(1), 1.0),
}


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), **double) / 3


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_have_the_norm_of_their_matrix(name):
    blocks = blocks_of(system_of(LINEAR[name], SHAPE), DenseBasis())
    assert blocks.rows == []
    exact = attained(LINEAR[name], [SHAPE], points=1, scales=(1.0,))
    assert exact * (1 - 1e-12) <= product_bound(blocks) <= exact * (1 + 1e-9)


@pytest.mark.parametrize("name", NONEXPANSIVE)
def test_maxima_and_sorting_are_nonexpansive_up_to_the_overlap(name):
    function, constant = NONEXPANSIVE[name]
    bound = product_bound(blocks_of(system_of(function, SHAPE)))
    assert constant <= bound <= constant * (1 + 1e-10)
    assert attained(function, [SHAPE], points=6) <= bound * (1 + 1e-9)


def test_an_overlapping_maximum_attains_its_constant():
    """One large pixel is the maximum of all nine windows that see it."""
    x = torch.zeros(1, 1, 5, 5, **double)
    x[0, 0, 2, 2] = 1.0
    change = F.max_pool2d(2 * x, 3, 1, 1) - F.max_pool2d(x, 3, 1, 1)
    assert float(change.norm()) == 3.0


def test_the_maximum_of_two_branches_is_as_good_as_its_inequality():
    """|max(a, b) - max(a', b')|^2 <= |a - a'|^2 + |b - b'|^2: sqrt(1 + 4) for the branches x and 2 x."""
    certificate = certify(Net(lambda x: torch.maximum(x, 2 * x.flip(1))), shape=(4,), tolerance=1e-8)
    assert 2.0 <= certificate.upper <= math.sqrt(5) * (1 + 1e-6)
    for function in (torch.minimum, torch.max, torch.min, torch.fmax):
        net = Net(lambda x, f=function: f(x, 2 * x.flip(1)))
        assert certify(net, shape=(4,)).upper <= math.sqrt(5) * (1 + 1e-3)


def test_a_maximum_with_a_constant_is_a_relu():
    (node,) = [n for n in system_of(lambda x: torch.maximum(x, torch.zeros(1)), (3,)).nodes if isinstance(n, Nonlinear)]
    assert node.slope == (0.0, 1.0)
    with pytest.raises(NotCertifiable, match="larger"):
        system_of(lambda x: torch.maximum(x, torch.zeros(4, 3)), (3,))


@pytest.mark.parametrize("use", [lambda i: i + 1.0, torch.relu, lambda i: i.float()])
def test_positions_of_maxima_are_refused_where_they_are_used(use):
    with pytest.raises(NotCertifiable, match="positions of maxima"):
        system_of(lambda x: use(x.max(1)[1]), (3,))


def test_parts_of_one_value_become_one_rearrangement():
    system = system_of(lambda x: torch.cat([x[:, :, -1:], x, x[:, :, :1]], 2), (2, 5))
    maps = [n.map for n in system.pruned().nodes if isinstance(n, Linear)]
    assert len(maps) == 1
    assert isinstance(maps[0], Rearrange)
    assert maps[0].norm().upper == pytest.approx(math.sqrt(2))


def test_writing_into_a_piece_of_a_value_is_refused_afterwards():
    def net(x):
        first, _ = x.chunk(2, 1)
        first += 1.0 * first
        return x

    with pytest.raises(NotCertifiable, match="in place"):
        system_of(net, (4,))


@pytest.mark.parametrize("stride, size", [((1, 1), 3), ((2, 2), 3), ((2, 3), 4), ((3, 2), 5)])
def test_the_norm_of_strided_convolutions_is_bounded_by_their_aliased_blocks(stride, size):
    torch.manual_seed(size)
    weight = torch.randn(3, 2, size, size, **double)
    small = TorchConvolution(weight, (9, 10), stride, (1, 1), (1, 1), 1)
    exact = float(torch.linalg.matrix_norm(small.matrix(), 2))
    whole = TorchConvolution(weight, (9, 10), (1, 1), (1, 1), (1, 1), 1)._upper()
    assert exact <= small._upper() <= min(1.3 * exact, whole * (1 + 1e-12))


@pytest.mark.parametrize("stride, size", [((1, 1), 3), ((2, 2), 3), ((1, 2), 4), ((2, 3), 5)])
def test_a_coarse_grid_of_frequencies_bounds_images_of_any_size(stride, size, monkeypatch):
    """Ehlich and Zeller: at most the factor 1 / cos(pi r / N) per axis above the largest value on N frequencies."""
    torch.manual_seed(size)
    convolution = TorchConvolution(torch.randn(3, 2, size, size, **double), (40, 37), stride, (1, 1), (1, 1), 1)
    exact = convolution._upper()
    for entries in (2**12, 2**11, 2**10, 2**6):
        monkeypatch.setattr("firmly.certificates.torch_maps.SYMBOL_ENTRIES", entries)
        factor = frequency_grid((40, 37), convolution.weight.shape, stride)[1]
        assert exact <= convolution._upper() <= 1.03 * factor * exact
    assert factor == math.inf  # so few entries leave Young's inequality only


def test_axis_maps_of_channels_are_diagonal_in_fourier():
    mixing = AxisMaps((3, 4, 4), [torch.ones(2, 3, **double), None, None])
    symbol = mixing.symbol(Fourier((4, 4)))
    assert torch.equal(symbol.value[0], torch.ones(2, 3, **double))
    x = torch.randn(2, 3, 4, 4, **double)
    y = torch.randn(2, 2, 4, 4, **double)
    assert float((mixing(x) * y).sum()) == pytest.approx(float((x * mixing.T(y)).sum()))


# -- zero padding on a larger torus --------------------------------------------------------------------------------


def convolutions(channels: int, depth: int, kernel: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, channels, kernel, padding=kernel // 2)]
    for _ in range(depth - 2):
        layers += [nn.ReLU(), nn.Conv2d(channels, channels, kernel, padding=kernel // 2)]
    layers += [nn.LeakyReLU(), nn.Conv2d(channels, 1, kernel, padding=kernel // 2)]
    return nn.Sequential(*layers).double()


def test_zero_padded_networks_are_certified_on_a_larger_torus():
    net = convolutions(3, 3)
    residual = Net(lambda x: x - net(x), net)
    certificate = certify(residual, shape=(1, 16, 16), method="spectral", budget_s=5)
    assert certificate.basis.spatial == (17, 17)
    assert any("torus" in text for text in certificate.assumptions)
    assert certificate.upper < 0.8 * product_bound(blocks_of(system_of(residual, (1, 16, 16)), Fourier((17, 17))))
    verify(certificate, residual)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("chain", [False, True])
def test_the_torus_bounds_what_the_dense_basis_knows_exactly(kernel, chain):
    """Also two convolutions without a nonlinearity between them: there the crop is a block of its own."""
    net = convolutions(2, 3, kernel)
    if chain:
        net = nn.Sequential(*(m for m in net if isinstance(m, nn.Conv2d)))
    system = system_of(Net(lambda x: net(x) + net[0](x).mean(1, keepdim=True), net), (1, 5, 6))
    dense = product_bound(blocks_of(system, DenseBasis()))
    torus = blocks_of(system, Fourier((5 + kernel // 2, 6 + kernel // 2)))
    assert ("crop to the image" in [n.where for n in torus.system.nodes if isinstance(n, Nonlinear)]) == chain
    worst = attained(lambda x: net(x) + net[0](x).mean(1, keepdim=True), [(1, 5, 6)], points=5)
    assert worst <= product_bound(torus)
    assert dense <= product_bound(torus) * (1 + 1e-9)


def test_scaled_and_adjoint_convolutions_are_cropped_on_the_torus():
    """A gradient step x - t A^T (A x - y): between A and A^T stands a crop, which a circular convolution has not."""
    A = fm.linear.Convolution(torch.ones(3, 3, **double), shape=(1, 4, 5), padding="zero")
    step = 0.2 * A.T

    def net(x):
        return torch.relu(x - step(A(x)))

    system = system_of(net, (1, 4, 5))
    torus = blocks_of(system, Fourier((5, 6)))
    assert "crop to the image" in [n.where for n in torus.system.nodes if isinstance(n, Nonlinear)]
    assert attained(net, [(1, 4, 5)], points=3) <= product_bound(torus)
    linear = system_of(lambda x: step(A(x)), (1, 4, 5))
    assert product_bound(blocks_of(linear, DenseBasis())) <= product_bound(blocks_of(linear, Fourier((5, 6))))


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "layer normalisation": nn.LayerNorm(4),
    "group normalisation": nn.GroupNorm(2, 4),
    "instance normalisation": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2)),
    "root-mean-square": nn.RMSNorm(4),
    "local response": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LocalResponseNorm(2)),
    "length one": Net(F.normalize),
    "attention": Net(lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 2, 2)] * 3)),
    "product of two traced values": Net(lambda x: torch.einsum("bi,bi->b", x, x)),
    "einsum": Net(lambda x: torch.einsum("bi,ij->j", x, matrix[:, :4])),
    "product of two traced": Net(lambda x: torch.matmul(x.reshape(1, 2, 2), x.reshape(1, 2, 2))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_global_bound_is_refused_with_the_reason(name):
    with pytest.raises(NotCertifiable, match=name):
        system_of(REFUSED[name], (4,))


def test_normalisation_with_stored_statistics_is_affine():
    layer = nn.InstanceNorm1d(2, affine=True, track_running_stats=True).double().eval()
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))
    bound = product_bound(blocks_of(system_of(layer, (2, 3))))
    assert bound == pytest.approx(1 / math.sqrt(0.25 + 1e-5), rel=1e-9)


def test_a_refusal_lists_everything_that_stands_in_the_way_and_where():
    net = nn.Sequential(
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.ReLU(),
        nn.Linear(4, 4),
        nn.Hardshrink(),
        nn.Linear(4, 4),
        nn.GroupNorm(2, 4),
    )
    with pytest.raises(NotCertifiable) as caught:
        system_of(net, (4,))
    text = str(caught.value)
    assert "3 operations" in text
    for place in ("'1' (LayerNorm)", "'4' (Hardshrink)", "'6' (GroupNorm)"):
        assert place in text
    assert "may be more" not in text


def test_a_trace_that_cannot_go_on_says_that_there_may_be_more():
    def net(x):
        x = F.layer_norm(x, (4,))
        return x if x.sum() > 0 else -x

    with pytest.raises(NotCertifiable, match="may be more") as caught:
        system_of(net, (4,))
    assert "layer normalisation" in str(caught.value)
    assert "decision" in str(caught.value) or "sum" in str(caught.value)


def test_one_obstacle_met_twice_is_listed_once():
    layer = nn.LayerNorm(4)
    with pytest.raises(NotCertifiable) as caught:
        system_of(Net(lambda x: layer(layer(x)), layer), (4,))
    assert str(caught.value).count("layer normalisation") == 1
