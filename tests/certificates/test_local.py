"""Local bounds against Jacobians and changes sampled on the ball; slope intervals against dense grids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import firmly as fm
from firmly.certificates import certify, local
from firmly.certificates.signal import trace
from firmly.certificates.slopes import interval_slopes
from firmly.certificates.system import Nonlinear
from firmly.errors import DataError, NotCertifiable, ShapeError
from firmly.linear import Convolution, Dense
from firmly.prox import L1, Box, ChannelThreshold, ElasticNet, GroupL1, NonNegative, proximal

from .systems import Net, double


def random_net(activation, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 6), activation, nn.Linear(6, 3)).double()


def in_ball(y: torch.Tensor, radius: float, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(count, *y.shape[1:], generator=generator, **double)
    size = radius * torch.rand(count, generator=generator, **double) ** 0.3
    return y + d * (size / d.flatten(1).norm(dim=1)).reshape(-1, *[1] * (y.dim() - 1))


ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Hardtanh(-0.3, 0.4), nn.Softshrink(0.2), nn.SiLU(), nn.ELU()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_jacobians_and_changes_on_the_ball(activation):
    net, y = random_net(activation), torch.randn(1, 4, generator=torch.Generator().manual_seed(1), **double)
    everywhere = certify(net, shape=(4,)).upper
    before = 0.0
    for radius in (0.01, 0.3, 3.0):
        found = local(net, y, radius)
        points = in_ball(y, radius, 300)
        J = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(points).detach()
        assert float(torch.linalg.matrix_norm(J, 2).max()) <= found.upper
        change = (net(points) - net(y)).abs().detach()
        assert bool((change <= found.error_map).all())
        assert float(change.norm(dim=1).max()) <= found.change
        assert bool((found.attacked <= found.error_map).all())
        assert float(found.perturbation.norm()) <= radius
        assert found.lower <= found.upper <= everywhere * (1 + 2e-3)
        assert found.upper >= before * (1 - 1e-2)
        before = found.upper


def test_where_all_units_are_decided_the_bound_is_exact():
    net, y = random_net(nn.ReLU()), torch.randn(1, 4, generator=torch.Generator().manual_seed(1), **double)
    found = local(net, y, 1e-6)
    J = torch.autograd.functional.jacobian(lambda x: net(x)[0], y)[:, 0]
    assert [share for _, share in found.decided] == [1.0, 1.0]
    assert found.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-6)
    assert torch.allclose(found.error_map, 1e-6 * J.norm(dim=1), rtol=1e-6)
    assert found.gap <= 1 + 1e-5


def test_sparse_coding_network_keeps_its_support():
    torch.manual_seed(0)
    D = torch.randn(5, 8, **double)
    net = fm.unroll(fm.algorithms.ForwardBackward(Dense(D), L1(0.5)), depth=4, learn=())
    y = torch.randn(1, 5, **double)
    found = local(net, y, 1e-4)
    J = torch.autograd.functional.jacobian(lambda x: net(x)[0], y)[:, 0]
    assert found.upper <= certify(net).upper
    assert float(torch.linalg.matrix_norm(J, 2)) <= found.upper
    if all(share == 1 for _, share in found.decided):
        assert found.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-6)
        assert bool((found.error_map[net(y)[0] == 0] == 0).all())


def test_images_inside_a_box_see_a_linear_network():
    blur = Convolution(torch.ones(3, 3, **double) / 9, (1, 24, 24))
    net = fm.unroll(fm.algorithms.ForwardBackward(blur, Box(0, 1)), depth=3, learn=())
    linear = fm.unroll(fm.algorithms.ForwardBackward(blur, Box(-1e9, 1e9)), depth=3, learn=())
    y = 0.5 + 0.1 * torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0), **double)
    found = local(net, y, 0.05)
    J = torch.autograd.functional.jacobian(lambda x: linear(x).flatten(), y).reshape(576, 576)
    assert found.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-4)
    assert torch.allclose(found.error_map.flatten(), 0.05 * J.norm(dim=1), rtol=1e-6)
    assert found.upper <= certify(net).upper


def test_pixels_far_below_zero_do_not_change():
    kernel = torch.zeros(3, 3, **double)
    kernel[1, 1], kernel[0, 1] = 1.0, 0.2
    A = Convolution(kernel, (1, 24, 24))
    y = torch.ones(1, 1, 24, 24, **double)
    y[..., :12] = -1
    found = local(Net(lambda x: torch.relu(A(x)), A), y, 0.1, shape=(1, 24, 24))
    inside = A(y)[0] < -0.5
    assert bool((found.error_map[inside] == 0).all())
    assert float(found.error_map[~inside].min()) > 0.09


def test_inputs_held_fixed_decide_slopes():
    A = Dense(torch.eye(2, **double))
    net = Net(lambda data, start: torch.relu(A(data) + start), A)
    shapes = {"data": (2,), "start": (2,)}
    zero, far = torch.zeros(1, 2, **double), torch.tensor([[-5.0, 5.0]], **double)
    found = local(net, {"data": zero, "start": far}, 1.0, shape=shapes)
    assert torch.allclose(found.error_map, torch.tensor([0.0, 1.0], **double))
    with pytest.raises(DataError, match="start"):
        local(net, zero, 1.0, shape=shapes)


def test_in_place_and_biased_values_are_followed():
    """The value at the centre follows biases and operations in place; a stale one would fix the wrong slopes."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)]).double()

    def forward(x):
        z = layers[0](x)
        z += 0.7
        z = F.relu(z, inplace=True)
        w = layers[1](z)
        w -= z
        return layers[2](torch.relu(w) + z)

    net, y = Net(forward, *layers), torch.randn(1, 3, **double)
    for radius in (0.05, 0.5):
        found = local(net, y, radius, shape=(3,))
        points = in_ball(y, radius, 500)
        assert bool(((net(points) - net(y)).detach().abs() <= found.error_map).all())
        J = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(points).detach()
        assert float(torch.linalg.matrix_norm(J, 2).max()) <= found.upper


def test_refusals():
    net, y = random_net(nn.ReLU()), torch.zeros(1, 4, **double)
    with pytest.raises(ValueError, match="radius"):
        local(net, y, 0.0)
    with pytest.raises(ShapeError, match="one sample"):
        local(net, torch.zeros(2, 4, **double), 1.0, shape=(4,))
    with pytest.raises(DataError, match="NaN"):
        local(net, y * float("nan"), 1.0)
    with pytest.raises(NotCertifiable, match="product"):
        local(Net(lambda x: x * x), y, 1.0)


# -- slopes on intervals -------------------------------------------------------------------------------------------

FUNCTIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "abs": torch.abs,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "clamp": lambda x: x.clamp(min=-1.0),
    "softshrink": lambda x: F.softshrink(x, 0.7),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "elu": lambda x: F.elu(x, 1.7),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "box": lambda x: proximal(Box(-0.3, 0.9), x, 1.0),
    "nonnegative": lambda x: proximal(NonNegative(), x, 1.0),
    "l1": lambda x: proximal(L1(0.4), x, 1.5),
    "elastic net": lambda x: proximal(ElasticNet(0.4, 0.5), x, 1.5),
    "thresholds": lambda x: proximal(ChannelThreshold(40, 0.4), x, 1.5),
    "group": lambda x: proximal(GroupL1(0.4), x, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_lie_in_their_interval(name):
    """Difference quotients between any two points of the interval, for random intervals, some of them tiny."""
    function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(1, 40, generator=generator, **double)
    radius = 10 ** (3 * torch.rand(1, 40, generator=generator, **double) - 2.5)
    node = next(
        n for n in trace(Net(function), {"x": (40,)}, ("x",), around={"x": z}).nodes if isinstance(n, Nonlinear)
    )
    low, high = interval_slopes(node, radius)
    assert bool((low >= node.slope.low).all()) and bool((high <= node.slope.high).all())
    if name == "group":
        assert bool((low == 0).all()) and bool((high == 1).all())
        return
    steps = torch.linspace(-1, 1, 201, **double)[:, None]
    points = z + steps * radius
    values = function(points)
    quotient = (values[1:] - values[:-1]) / (points[1:] - points[:-1])
    rounding = 1e-13 * (1 + values.abs().max()) / (0.01 * radius)
    assert bool((quotient >= low - rounding).all()) and bool((quotient <= high + rounding).all())
    if name != "mish":  # which has no pieces
        assert float((high - low).min()) < 0.6 * float(node.slope.high - node.slope.low)


# -- random networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_with_skips(seed):
    torch.manual_seed(seed)
    activations = [torch.relu, torch.tanh, F.silu, F.gelu, lambda x: F.hardtanh(x, -0.2, 0.5), torch.abs, F.hardswish]
    first, middle, last = (nn.Linear(a, b).double() for a, b in ((3, 4), (4, 4), (4, 2)))
    f, g = activations[seed % 7], activations[(3 * seed + 1) % 7]

    def forward(x):
        h = f(first(x))
        h = g(middle(h)) + 0.5 * h if seed % 2 else g(middle(h))
        return torch.relu(last(h)) if seed % 3 == 0 else last(h)

    net, y, radius = Net(forward, first, middle, last), torch.randn(1, 3, **double), 10 ** (seed / 3 - 2)
    found = local(net, y, radius, shape=(3,), budget_s=5)
    points = in_ball(y, radius, 1000)
    J = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(points).detach()
    assert float(torch.linalg.matrix_norm(J, 2).max()) <= found.upper * (1 + 1e-12)
    assert bool(((net(points) - net(y)).detach().abs() <= found.error_map + 1e-15).all())


def test_an_output_that_cannot_move():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.ReLU()).double()
    with torch.no_grad():
        net[2].bias.fill_(-10.0)
    found = local(net, torch.zeros(1, 2, **double), 0.1)
    assert (found.upper, found.change, float(found.error_map.max())) == (0.0, 0.0, 0.0)
