"""Slope intervals of activations against the slopes that autograd finds on a fine grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firmly.certificates.system import Nonlinear
from firmly.errors import NotCertifiable

from .systems import Net, double, system_of

EXACT = {
    "relu": torch.relu,
    "F.relu": F.relu,
    "method relu": lambda x: x.relu(),
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "method tanh": lambda x: x.tanh(),
    "hardtanh": lambda x: F.hardtanh(x, -2.0, 0.5),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "atan": torch.atan,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=3.0),
    "softshrink": lambda x: F.softshrink(x, 0.7),
    "celu": F.celu,
    "celu alpha": lambda x: torch.celu(x, 2.5),
    "asinh": torch.asinh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-1.0, 2.0),
    "clamp min": lambda x: torch.clamp(x, min=0.3),
    "clamp max": lambda x: torch.clamp_max(x, 0.3),
    "leaky relu": F.leaky_relu,
    "leaky relu steep": lambda x: F.leaky_relu(x, 3.0),
    "leaky relu negative": lambda x: F.leaky_relu(x, -0.5),
    "elu": F.elu,
    "elu 2": lambda x: F.elu(x, 2.0),
    "elu negative": lambda x: F.elu(x, -1.5),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
}
MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(1.7), nn.ELU(2.0), nn.SELU(), nn.CELU(0.3), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Softsign(),
    nn.Tanhshrink(), nn.Softplus(beta=0.5), nn.Softshrink(), nn.LogSigmoid(), nn.ReLU6(), nn.Hardtanh(-1, 3),
    nn.PReLU(init=1.4), nn.Dropout().eval(),
]  # fmt: skip


def slopes_of(function) -> tuple[float, float]:
    """The smallest and the largest slope on [-40, 40]."""
    wide = torch.linspace(-40, 40, 200_001, **double)
    x = torch.cat([wide, torch.linspace(-4, 4, 400_001, **double)])[None].requires_grad_(True)
    (slope,) = torch.autograd.grad(function(x * 1.0).sum(), x)
    if abs(float(slope.max()) - 1 / 6) < 1e-8:  # the backward pass of hardsigmoid has 1/6 in single precision
        slope = slope.clamp(max=1 / 6)
    return float(slope.min()), float(slope.max())


def interval_of(function) -> tuple[float, float]:
    nodes = [n for n in system_of(Net(function), (3,)).nodes if isinstance(n, Nonlinear)]
    assert len(nodes) == 1
    return float(nodes[0].slope.low), float(nodes[0].slope.high)


@pytest.mark.parametrize("name", EXACT)
def test_the_interval_is_exact(name):
    low, high = interval_of(EXACT[name])
    smallest, largest = slopes_of(EXACT[name])
    assert low <= smallest
    assert largest <= high
    assert smallest - low <= (0.03 if name in ("softsign", "atan", "asinh") else 1e-6)  # these fall off slowly
    assert high - largest <= 1e-6


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules_are_traced_like_functions(module):
    module = module.double()
    smallest, largest = slopes_of(module)
    nodes = [n for n in system_of(module, (3,)).nodes if isinstance(n, Nonlinear)]
    if isinstance(module, nn.Dropout):
        assert not nodes
        return
    (node,) = nodes
    assert node.slope.low <= smallest <= largest <= node.slope.high


def test_prelu_takes_the_extremes_of_all_channels():
    weight = torch.tensor([-0.5, 0.2, 1.5], **double)
    assert interval_of(lambda x: F.prelu(x, weight)) == (-0.5, 1.5)


def test_softmax_is_a_gradient_with_slopes_up_to_one_half():
    assert interval_of(lambda x: x.softmax(-1)) == (0.0, 0.5)
    worst = 0.0
    for scale in (0.1, 1.0, 5.0):
        for seed in range(40):
            x = scale * torch.randn(4, generator=torch.Generator().manual_seed(seed), **double)
            J = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), x)
            values = torch.linalg.eigvalsh((J + J.T) / 2)
            assert float(values.min()) >= -1e-15
            worst = max(worst, float(values.max()))
    assert 0.4 < worst <= 0.5 + 1e-15
    (node,) = [n for n in system_of(Net(lambda x: x.softmax(-1)), (3,)).nodes if isinstance(n, Nonlinear)]
    assert node.structure == "whole"


def test_softplus_states_its_jump():
    system = system_of(Net(F.softplus), (3,))
    assert any("softplus" in text for text in system.assumptions)
    gap = F.softplus(torch.tensor(20.0, **double)) - 20
    assert 0 < gap < 2.1e-9


REFUSED = {
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.5, 0.0),
    "celu of negative alpha": lambda x: F.celu(x, -1.0),
    "softplus with an early jump": lambda x: F.softplus(x, 1.0, 1.0),
    "softplus of negative beta": lambda x: F.softplus(x, -1.0),
    "leaky relu of slope nan": lambda x: F.leaky_relu(x, float("nan")),
    "leaky relu of infinite slope": lambda x: F.leaky_relu(x, float("inf")),
    "prelu of slope nan": lambda x: F.prelu(x, torch.tensor([float("nan")], **double)),
    "elu of infinite alpha": lambda x: F.elu(x, float("inf")),
    "elu of alpha nan": lambda x: F.elu(x, float("nan")),
    "square": lambda x: x * x,
    "square by power": lambda x: x**2,
    "pow": lambda x: torch.pow(x, 2.0),
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "reciprocal": lambda x: 1.0 / x,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "round": torch.round,
    "floor": torch.floor,
    "heaviside": lambda x: torch.heaviside(x, torch.zeros(3, **double)),
    "glu": lambda x: F.glu(torch.cat([x, x], 1)),
    "rrelu": F.rrelu,
    "log softmax": lambda x: F.log_softmax(x, -1),
    "gumbel softmax": lambda x: F.gumbel_softmax(x),
    "to integers": lambda x: x.to(torch.int64).to(torch.float64),
    "long": lambda x: x.long().double(),
    "type as integers": lambda x: x.type_as(torch.zeros(1, dtype=torch.int32)),
    "bits": lambda x: x.view(torch.int64),
    "half of the bits": lambda x: x.view(torch.float32),
    "clamp that broadcasts": lambda x: torch.clamp(x, min=torch.zeros(2, 3, **double)),
    "floor division": lambda x: torch.div(x, 2.0, rounding_mode="floor"),
    "remainder": lambda x: x % 1.0,
    "normalisation": lambda x: F.normalize(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_slope_interval_is_refused(name):
    with pytest.raises(NotCertifiable):
        system_of(Net(REFUSED[name]), (3,))


@pytest.mark.parametrize(
    "function", [torch.tanh, torch.sigmoid, torch.sin, F.silu, torch.atan, torch.asinh, F.gelu, lambda x: x.softmax(-1)]
)
def test_activations_of_complex_values_are_refused(function):
    """tanh has poles on the imaginary axis."""
    with pytest.raises(NotCertifiable, match="complex"):
        system_of(Net(function), {"data": (3,)}, is_complex=True)
    with pytest.raises(NotCertifiable, match="complex"):
        system_of(Net(lambda x: function(x * torch.tensor(1j))), (3,))
