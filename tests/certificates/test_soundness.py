"""lower <= exact <= upper on random networks: every bound, in every basis, against enumeration and real Jacobians."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firmly import attack, certify, unroll
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
from firmly.algorithms import Tikhonov as TikhonovTerm
from firmly.certificates.relax import Norms
from firmly.errors import NotDiagonal
from firmly.linear import (
    Blur,
    Convolution,
    Dense,
    DenseBasis,
    Diagonal,
    FourierBasis,
    Gradient,
    LinearMap,
    Mask,
    singular_basis,
)
from firmly.prox import L1, MCP, TV, Box, Clip, ElasticNet, GroupL1, LinearSpline, NonNegative, Ridge

from .systems import Net, all_bounds, attained, blocks_of, bounds, double, exact, system_of

ROUNDING = 1 + 1e-9

PIECEWISE = [  # every slope between the ends of the interval, or an end, is a slope of the function
    torch.relu,
    lambda x: F.leaky_relu(x, 1.8),
    lambda x: F.leaky_relu(x, -0.7),
    torch.abs,
    lambda x: F.softshrink(x, 0.1),
    lambda x: x.clamp(-1, 1),
    lambda x: F.prelu(x, torch.tensor([0.3], **double)),
]
SMOOTH = [F.gelu, F.silu, F.selu, lambda x: F.elu(x, 2.0), torch.tanh, torch.sin, F.mish, F.hardswish]


class RandomNetwork(nn.Module):
    """A random program on flat features: layers, scaled sums, products with weights, skips, concatenations."""

    def __init__(self, seed: int, activations, slopes: int):
        super().__init__()
        self.draw = random.Random(seed)
        self.weights = nn.ParameterList()
        self.steps = []
        generator = torch.Generator().manual_seed(seed)
        sizes = [self.draw.choice([1, 2, 3])]
        self.size = sizes[0]
        left = slopes
        for _ in range(self.draw.randint(3, 9)):
            kind = self.draw.choice(["linear", "linear", "nonlinear", "nonlinear", "sum", "cat", "entries", "roll"])
            i = len(sizes) - 1 if self.draw.random() < 0.7 else self.draw.randrange(len(sizes))
            if kind == "nonlinear":
                if sizes[i] > left:
                    continue
                left -= sizes[i]
                self.steps.append((kind, i, self.draw.choice(activations), None))
                sizes.append(sizes[i])
            elif kind == "linear":
                out = self.draw.choice([1, 2, 3])
                self.weights.append(torch.randn(out, sizes[i], generator=generator, **double))
                self.steps.append((kind, i, len(self.weights) - 1, None))
                sizes.append(out)
            elif kind == "entries":
                self.weights.append(torch.randn(sizes[i], generator=generator, **double))
                self.steps.append((kind, i, len(self.weights) - 1, None))
                sizes.append(sizes[i])
            elif kind == "roll":
                self.steps.append((kind, i, None, None))
                sizes.append(sizes[i])
            elif kind == "cat":
                j = self.draw.randrange(len(sizes))
                self.steps.append((kind, i, j, None))
                sizes.append(sizes[i] + sizes[j])
            else:
                same = [j for j in range(len(sizes)) if sizes[j] == sizes[i]]
                self.steps.append((kind, i, self.draw.choice(same), self.draw.uniform(-2, 2)))
                sizes.append(sizes[i])
        self.bias = [torch.randn(n, generator=generator, **double) for n in sizes]

    def forward(self, x):
        values = [x]
        for kind, i, what, factor in self.steps:
            value = values[i]
            if kind == "nonlinear":
                value = what(value + self.bias[len(values)])
            elif kind == "linear":
                value = F.linear(value, self.weights[what], self.bias[len(values)])
            elif kind == "entries":
                value = value * self.weights[what] / 1.5
            elif kind == "roll":
                value = torch.roll(value, 1, 1)
            elif kind == "cat":
                value = torch.cat([value, -values[what]], dim=1)
            else:
                value = factor * values[what] - value
            values.append(value)
        return values[-1]


def assert_sound(found: dict[str, float], least: float):
    for name, bound in found.items():
        assert least <= bound * ROUNDING, (name, least, bound)


def slowly(*seeds: int):
    return [pytest.param(seed, marks=pytest.mark.slow) for seed in seeds]


@pytest.mark.parametrize("seed", [0, 100, *slowly(*range(1000, 6000, 1000))])
def test_random_networks_against_enumeration(seed):
    for s in range(seed, seed + (60 if seed < 1000 else 200)):
        net = RandomNetwork(s, PIECEWISE, slopes=8)
        system = system_of(net, (net.size,))
        true = exact(blocks_of(system))
        found = all_bounds(system, tolerance=1e-2)
        assert_sound(found, true)
        assert attained(net, [(net.size,)], 4, s) <= true * ROUNDING + 1e-12
        assert_sound(all_bounds(system, Norms(), tolerance=1e-2), true)


@pytest.mark.parametrize("seed", [0, *slowly(100, 200, 300)])
def test_random_smooth_networks_against_jacobians(seed):
    for s in range(seed, seed + 20):
        net = RandomNetwork(s, [*SMOOTH, lambda x: x.softmax(-1)], slopes=12)
        system = system_of(net, (net.size,))
        least = attained(net, [(net.size,)], 6, s)
        assert_sound(all_bounds(system, tolerance=1e-2), least)
        assert_sound(all_bounds(system, Norms(), tolerance=1e-2), least)


def test_certify_brackets_random_networks():
    for s in range(300, 320):
        net = RandomNetwork(s, PIECEWISE, slopes=8)
        true = exact(blocks_of(system_of(net, (net.size,))))
        cert = certify(net, shape=(net.size,))
        assert cert.lower <= true * ROUNDING + 1e-12
        assert true <= cert.upper * ROUNDING


# -- convolutions --------------------------------------------------------------------------------------------------


def conv(seed: int, inside: int, outside: int, size: int = 3, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv1d(inside, outside, size, padding=options.pop("padding", size // 2), dtype=torch.float64, **options)


def circular(seed: int, inside: int, outside: int, size: int = 3) -> nn.Module:
    return conv(seed, inside, outside, size, padding_mode="circular")


def convolutional(kind: str, seed: int, act) -> nn.Module:
    a, b = circular(seed, 1, 2), circular(seed + 1, 2, 1)
    if kind == "chain":
        return Net(lambda x: b(act(a(x))), a, b)
    if kind == "residual":
        return Net(lambda x: x - 0.5 * b(act(a(x))), a, b)
    if kind == "dense skip":
        c = circular(seed + 2, 3, 1)
        return Net(lambda x: c(torch.cat([x, act(a(x))], dim=1)), a, c)
    if kind == "zero padding":
        a, b = conv(seed, 1, 2), conv(seed + 1, 2, 1)
        return Net(lambda x: b(act(a(x))), a, b)
    if kind == "mixed padding":
        a = conv(seed, 1, 2)
        return Net(lambda x: x + b(act(a(x))), a, b)
    if kind == "strided":
        a = conv(seed, 1, 2, stride=2)
        return Net(lambda x: act(a(x)), a)
    if kind == "dilated and grouped":
        a, b = conv(seed, 1, 2, dilation=2, padding=2), conv(seed, 2, 2, groups=2)
        return Net(lambda x: b(act(a(x))), a, b)
    norm = nn.BatchNorm1d(2, dtype=torch.float64).eval()
    torch.manual_seed(seed)
    norm.running_var.uniform_(0.2, 3.0)
    nn.init.normal_(norm.weight)
    return Net(lambda x: b(act(norm(a(x)))), a, b, norm)


KINDS = [
    "chain",
    "residual",
    "dense skip",
    "zero padding",
    "mixed padding",
    "strided",
    "dilated and grouped",
    "batch norm",
]


@pytest.mark.parametrize("kind", KINDS)
def test_convolutional_networks(kind):
    for seed, act in enumerate([torch.relu, lambda x: F.leaky_relu(x, 1.6), torch.abs, F.gelu]):
        net = convolutional(kind, 10 * seed, act)
        system = system_of(net, (1, 5))
        dense = blocks_of(system)
        width = dense.width - 5
        true = exact(dense) if width <= 12 and act is not F.gelu else attained(net, [(1, 5)], 10, seed)
        assert_sound(all_bounds(system, DenseBasis(), 1e-3), true)
        assert_sound(all_bounds(system, Norms(), 1e-3), true)
        if kind == "strided":
            with pytest.raises(NotDiagonal):
                blocks_of(system, FourierBasis((5,)))
        else:
            assert_sound(all_bounds(system, FourierBasis((5,)), 1e-3), true)
            assert_sound(all_bounds(system, FourierBasis((5,), full=True), 1e-3), true)


def test_fourier_equals_dense_for_circular_networks():
    """Averaging multipliers over shifts loses nothing (notes, section 5): one per channel does as well."""
    for seed in range(3):
        net = convolutional("residual", seed, torch.relu)
        system = system_of(net, (1, 5))
        dense, fourier = all_bounds(system, DenseBasis(), 1e-6), all_bounds(system, FourierBasis((5,)), 1e-6)
        for name in ("product", "averaged"):
            assert fourier[name] == pytest.approx(dense[name], rel=1e-9)
        for name in ("layer", "neuron"):
            assert fourier[name] == pytest.approx(dense[name], rel=1e-4)


# -- algorithms ----------------------------------------------------------------------------------------------------

SHAPE = (1, 3, 4)


def blur(seed: int) -> Convolution:
    kernel = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(seed), **double)
    return Convolution(kernel / kernel.sum() * 1.3, SHAPE)


def sensing(seed: int) -> Dense:
    return Dense(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), **double))


def clipped(seed: int) -> Ridge:
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed), **double)
    return Ridge(kernel, Clip(2, torch.tensor([0.3, 1.0])), cap=1.5)


def weakly_convex(seed: int) -> Ridge:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(2, 1, 3, 3, generator=generator, **double)
    spline = LinearSpline(2, knots=5, reach=1.0, low=-0.5, high=1.0)
    spline.raw.data.copy_(1.5 * torch.rand(2, 6, generator=generator) - 0.5)
    return Ridge(kernel, spline, cap=0.9)


class Case:
    """An algorithm, what to waive, and whether all its maps are shift-invariant."""

    def __init__(self, algorithm: Algorithm, waive=(), fourier: bool = False, operator: LinearMap | None = None):
        self.algorithm, self.waive, self.fourier, self.operator = algorithm, waive, fourier, operator


def cases(seed: int) -> dict[str, Case]:
    A, B = sensing(seed), blur(seed)
    D, G = (
        Dense(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed + 1), **double)),
        Gradient(SHAPE, "circular"),
    )
    L = A.norm().upper ** 2
    mask = Mask((torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) > 0.4).double())
    return {
        "forward-backward": Case(ForwardBackward(A, L1(0.1), step_size=1.7 / L), operator=A),
        "forward-backward, nonconvex": Case(ForwardBackward(A, MCP(0.3, concavity=3.0), step_size=0.9 / L), ("prior",)),
        "forward-backward, ridge": Case(ForwardBackward(B, ElasticNet(0.1, 0.5), ridge=clipped(seed)), fourier=True),
        "forward-backward, weakly convex ridge": Case(
            ForwardBackward(B, Box(-1.0, 2.0), ridge=weakly_convex(seed)), ("ridge",), True
        ),
        "forward-backward, group": Case(
            ForwardBackward(Diagonal(torch.tensor([[0.5], [1.5]], **double), (2, 3)), GroupL1(0.3)), fourier=True
        ),
        "forward-backward, mask": Case(ForwardBackward(mask, TV(0.1, accuracy=1e-6)), fourier=True),
        "fista": Case(Fista(A, NonNegative()), operator=A),
        "douglas-rachford": Case(DouglasRachford(A, L1(0.1), step_size=0.7, relaxation=1.5), operator=A),
        "admm": Case(Admm(A, L1(0.1), penalty=0.6), operator=A),
        "admm, analysis": Case(Admm(B, L1(0.1), penalty=0.6, K=G), fourier=True),
        "chambolle-pock": Case(ChambollePock(A, L1(0.1), D)),
        "chambolle-pock, gradient": Case(ChambollePock(B, GroupL1(0.1), G), fourier=True),
        "condat-vu": Case(CondatVu(B, L1(0.1), G, constraint=NonNegative()), fourier=True),
        "dual forward-backward": Case(DualForwardBackward(D, L1(0.1)), operator=D),
        "heavy ball": Case(HeavyBall(B, TikhonovTerm(0.3 * Blur.gaussian(0.6, SHAPE))), fourier=True),
        "hqs": Case(Hqs(A, L1(0.1), penalty=0.8), operator=A),
        "hqs, ridge": Case(Hqs(B, ridge=clipped(seed), penalty=0.3), fourier=True),
    }


NAMES = list(cases(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrt", ["data", "start", "both"])
def test_every_algorithm_in_every_basis(name, wrt):
    for seed, depth in ((0, 1), (1, 2)):
        case = cases(seed)[name]
        net = unroll(case.algorithm, depth, learn=(), waive=case.waive)
        data, image = net.inputs["data"], net.inputs["start"]
        y = torch.randn(1, *data, generator=torch.Generator().manual_seed(seed), **double)
        function, shapes, names = {
            "data": (net, [data], ("data",)),
            "start": (lambda x, net=net, y=y: net(y, start=x), [image], ("start",)),
            "both": (lambda d, x, net=net: net(d, start=x), [data, image], ("data", "start")),
        }[wrt]
        least = attained(function, shapes, 3, seed)
        system = system_of(net, net.inputs, names)
        bases = [DenseBasis(), Norms()]
        if case.fourier:
            spatial = tuple(image[1:])
            bases += [FourierBasis(spatial), FourierBasis(spatial, full=True)]
        if case.operator is not None:
            bases += [singular_basis(case.operator), singular_basis(case.operator, cells=200)]
        for basis in bases:
            assert_sound(all_bounds(system, basis, 0.1), least)


def test_certificates_bound_the_attack_on_the_default_start():
    """`wrt="data"` is about net(y), whose start follows the data."""
    for seed in range(3):
        for name in ("forward-backward", "hqs", "admm"):
            net = unroll(cases(seed)[name].algorithm, 3, learn=())
            cert = certify(net)
            y = torch.randn(1, *net.inputs["data"], **double)
            for radius in (1e-3, 1.0, 1e3):
                assert attack(net, y, radius).ratio <= cert.upper * ROUNDING


def test_a_joint_bound_covers_both_inputs():
    for seed in range(3):
        net = unroll(cases(seed)["fista"].algorithm, 2, learn=())
        both = bounds(net, net.inputs, ("data", "start"))["neuron"]
        assert bounds(net, net.inputs, ("start",))["neuron"] <= both * (1 + 1e-6)


# -- values that look alike and are not ----------------------------------------------------------------------------


def test_relaxed_blocks_of_different_values_are_different():
    """Two nonlinearities or two maps between the same two maps are different values, though they have equal norms."""
    A = sensing(0)
    relu = torch.relu
    first = Dense(torch.diag(torch.tensor([1.0, 0.5], **double)))
    second = Dense(torch.diag(torch.tensor([0.5, 1.0], **double)))
    C, E = Dense(torch.eye(2, **double)), Dense(torch.eye(3, **double))
    networks = [
        (lambda x: 0.1 * x + A.T(relu(A(x))) - A.T(relu(A(x) + 1.0)), 5),
        (lambda x: 0.1 * x + A.T(A(x)) - A.T(relu(A(x))), 5),
        (lambda x: 0.1 * x + A.T(relu(A(x))) - A.T(torch.tanh(A(x))), 5),
        (lambda x: 0.1 * x + C(first(x)) - C(second(x)), 2),
        (lambda x: 0.1 * A(x) + relu(A(x)) - relu(A(x) + 1.0), 5),
        (lambda x: A(0.1 * x) + E(relu(A(x))) - E(relu(A(x) + 1.0)), 5),
    ]
    for function, size in networks:
        net = Net(function, A, first, second, C, E)
        least = attained(net, [(size,)], 40)
        for basis in (DenseBasis(), Norms()):
            assert_sound(bounds(net, (size,), basis=basis, tolerance=1e-3), least)


def test_an_input_met_after_a_relaxed_block_is_still_an_input():
    S = Dense(0.3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0), **double))

    def forward(x, y):
        return x - 2.0 * S.T(S(x) - y) + 3.0 * torch.relu(x)

    system = system_of(Net(forward, S), {"x": (6,), "y": (2,)})
    least = attained(forward, [(6,), (2,)], 20)
    blocks = blocks_of(system, Norms())
    assert [s.start for s in blocks.inputs] == [0, 1]
    assert_sound(all_bounds(system, Norms(), 1e-3), least)


def test_two_images_of_a_hidden_input_share_its_norm():
    """y is seen through two maps only: |A y|^2 + |B y|^2 <= (|A|^2 + |B|^2) |y|^2."""
    A, B = sensing(0), sensing(1)

    def forward(y):
        return torch.relu(A.T(y)) + 2.0 * B.T(y)

    assert_sound(bounds(Net(forward, A, B), (3,), basis=Norms(), tolerance=1e-3), attained(forward, [(3,)], 20))


def test_small_data_do_not_pass_for_a_common_bias():
    """The virtual network needs one bias for all layers; gains of 1e-13 are no reason to see one."""
    from firmly.certificates.forward_backward import virtual_bound
    from firmly.errors import NotCertifiable

    for size in (1.0, 1e-8, 1e-13):
        first = Dense(size * torch.diag(torch.tensor([1.0, 0.1], **double)))
        second = Dense(size * torch.diag(torch.tensor([0.1, 1.0], **double)))
        net = Net(lambda y, a=first, b=second: torch.relu(0.5 * torch.relu(a(y)) + b(y)), first, second)
        with pytest.raises(NotCertifiable):
            virtual_bound(blocks_of(system_of(net, (2,)), Norms()))
        K = Diagonal(torch.tensor([1.0, 0.3], **double))
        chain = Net(lambda y, s=size, K=K: torch.relu(0.5 * torch.relu(s * y) - s * K.T(K(y))), K)
        blocks = blocks_of(system_of(chain, (2,)), singular_basis(K))
        assert virtual_bound(blocks) >= attained(chain, [(2,)], 10)


@pytest.mark.parametrize("depth", [5, 40])
def test_errors_do_not_grow_past_use_with_depth(depth):
    """Frobenius norms of matrices as factors of errors made dense certificates of deep linear chains meaningless."""
    A = Dense(torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), **double))[0])
    K = Diagonal(torch.linspace(0.1, 1, 12, **double))
    net = unroll(HeavyBall(K, step_size=1.0, momentum=0.3), depth, learn=())
    found = bounds(net, net.inputs, ("start",))["product"]
    true = attained(lambda x: net(torch.zeros(1, 12, **double), start=x), [(12,)], 1)
    assert true <= found * ROUNDING
    assert math.isfinite(found)
    if depth == 5:
        assert found <= true * (1 + 1e-6)
    assert A is not None
