"""Legendre pairs: inverses at the edges, potentials, constants, and the defects of other libraries that are absent."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.errors import DataError, NotCertifiable, SettingsError
from firmly.prox import Legendre, legendre
from firmly.prox.dilogarithm import dilogarithm_of_exponential
from firmly.prox.legendre_pairs import PAIRS

ALL = [
    *(legendre(name) for name in PAIRS),
    legendre("softplus", beta=7.0),
    legendre("softplus", beta=1000.0),
    legendre("bent", c=2.0),
    legendre("hypentropy", beta=0.3),
    legendre("tanh", scale=0.7, rate=3.0),
    legendre("leaky_relu", negative_slope=0.5),
]
SMOOTH = [pair for pair in ALL if math.isfinite(pair.log_derivative_bound)]
each = pytest.mark.parametrize("pair", ALL, ids=str)
each_smooth = pytest.mark.parametrize("pair", SMOOTH, ids=str)


def inside(pair: Legendre, dtype: torch.dtype) -> Tensor:
    """Points of the domain: in the middle, and towards its ends down to the rounding of the type."""
    low, high = (torch.tensor(end, dtype=dtype) for end in pair.domain)
    digits = 37 if dtype == torch.float32 else 300
    small = torch.logspace(-digits, -1, 400, dtype=dtype)
    if low.isinf() and high.isinf():
        # beyond these points exp, and so sinh, overflows
        largest = 1.0 if isinstance(pair, type(legendre("leaky_relu"))) else 87.0 / 80.0
        wide = torch.linspace(0.1, 80.0 * largest, 400, dtype=dtype)
        return torch.cat([-wide, -small, torch.zeros(1, dtype=dtype), small, wide])
    if high.isinf():
        return torch.cat([small, torch.logspace(-1, 3, 400, dtype=dtype)])
    eps = torch.finfo(dtype).eps
    towards = torch.logspace(math.log10(eps), -0.5, 400, dtype=dtype)
    middle = low + (high - low) * torch.linspace(0.05, 0.95, 400, dtype=dtype)
    near = small if low == 0 else torch.cat([-small, small])
    ends = torch.cat([high - towards * high.abs(), *([] if low == 0 else [low + towards * low.abs()])])
    points = torch.cat([near, middle, ends])
    return points[(points > pair.domain[0]) & (points < pair.domain[1])]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_at_the_edges(pair, dtype):
    x = inside(pair, dtype)
    back = pair(pair.inverse(x))
    error = ((back - x).abs() / x.abs().clamp(min=torch.finfo(dtype).tiny)).max()
    assert float(error) <= (1e-5 if dtype == torch.float32 else 1e-12)


@each
def test_inverse_of_moderate_values(pair):
    u = torch.linspace(-3, 3, 601, dtype=torch.float64) / max(1.0, min(pair.log_derivative_bound, 1e3) / 2)
    assert torch.allclose(pair.inverse(pair(u)), u, rtol=1e-11, atol=1e-13)


@each
def test_derivative_is_that_of_autograd(pair):
    u = torch.linspace(-4, 4, 401, dtype=torch.float64).requires_grad_(True)  # zero among them
    (slope,) = torch.autograd.grad(pair(u).sum(), u)
    assert torch.allclose(slope, pair.derivative(u), rtol=1e-12, atol=1e-15)  # 1 - tanh^2 cancels
    assert torch.allclose(pair.log_derivative(u).exp(), pair.derivative(u), rtol=1e-14)


@each_smooth
def test_derivatives_of_the_logarithm(pair):
    u = torch.linspace(-2, 2, 401, dtype=torch.float64)[1:-1].requires_grad_(True)
    (slope,) = torch.autograd.grad(pair.log_derivative(u).sum(), u)
    step = 1e-6 / max(1.0, pair.log_derivative_bound)
    difference = (pair.log_derivative(u + step) - pair.log_derivative(u - step)) / (2 * step)
    assert torch.allclose(slope, difference, rtol=1e-5, atol=1e-6 * pair.log_derivative_bound)


@each
def test_potential_has_the_inverse_as_its_derivative(pair):
    middle = pair(torch.linspace(-2.5, 2.5, 41, dtype=torch.float64) / max(1.0, min(pair.log_derivative_bound, 1e3)))
    x = middle.requires_grad_(True)
    (slope,) = torch.autograd.grad(pair.potential(x).sum(), x)
    assert torch.allclose(slope, pair.inverse(x), rtol=1e-8, atol=1e-9)
    step = 1e-6 * x.detach().abs().clamp(max=1.0, min=1e-3)
    difference = (pair.potential(x + step) - pair.potential(x - step)) / (2 * step)
    assert torch.allclose(difference, pair.inverse(x), rtol=1e-5, atol=1e-5)


@each
def test_gradients_of_the_inverse(pair):
    x = pair(torch.linspace(-2.0, 2.0, 21, dtype=torch.float64)[::2] + 0.05)
    x = x[(x > pair.domain[0]) & (x.abs() > 1e-6)].requires_grad_(True)
    (slope,) = torch.autograd.grad(pair.inverse(x).sum(), x)
    assert torch.allclose(slope, 1 / pair.derivative(pair.inverse(x)), rtol=1e-8)


# -- constants -----------------------------------------------------------------------------------------------------

U = torch.linspace(-60, 60, 240_001, dtype=torch.float64)


@pytest.mark.parametrize(
    "name, parameters, value",
    [
        ("sigmoid", {}, 2.013753),
        ("tanh", {}, 4.055200),
        ("scaled_tanh", {}, 2.542734),
        ("atan", {}, 1.986637),
        ("isru", {}, 2.800127),
        ("asinh", {}, 1.409481),
        ("softplus", {"beta": 2.0}, math.exp(1.4)),
        ("bent", {}, 2.434086),
        ("exp", {}, math.exp(0.7)),
        ("hypentropy", {"beta": 0.5}, 2.013753),
        ("leaky_relu", {"negative_slope": 0.2}, 5.0),
    ],
)
def test_ratio_against_the_largest_quotient(name, parameters, value):
    pair = legendre(name, **parameters)
    b = torch.tensor([0.7], dtype=torch.float64)
    assert float(pair.ratio(b)) == pytest.approx(value, abs=2e-6)
    for push in (0.7, -0.7, 2.5, -2.5):
        quotient = float((pair.log_derivative(U + push) - pair.log_derivative(U)).max().exp())
        bound = float(pair.ratio(b * (push / 0.7)))
        assert quotient <= bound * (1 + 1e-11)
        assert quotient >= bound * (1 - 1e-5)
    assert float(pair.ratio(0 * b)) == 1.0
    if math.isfinite(pair.log_derivative_bound):
        assert float(pair.ratio(b)) <= math.exp(pair.log_derivative_bound * 0.7) * (1 + 1e-12)


@each_smooth
def test_kappa_is_the_steepest_logarithm(pair):
    u = (U / max(1.0, pair.log_derivative_bound)).requires_grad_(True)
    (slope,) = torch.autograd.grad(pair.log_derivative(u).sum(), u)
    steepest = float(slope.abs().max())
    assert steepest <= pair.log_derivative_bound * (1 + 1e-12)
    assert steepest >= pair.log_derivative_bound * (1 - 1e-4)


def test_kappa_of_the_table():
    table = {"sigmoid": 1, "tanh": 2, "scaled_tanh": 1.3332, "atan": 1, "isru": 1.5, "asinh": 0.5, "bent": 1.299038}
    for name, value in table.items():
        assert legendre(name).log_derivative_bound == pytest.approx(value, abs=1e-6)
    assert legendre("softplus", beta=1000.0).log_derivative_bound == 1000


@each
def test_slopes_and_extrema(pair):
    slope = pair.derivative(U)
    assert float(slope.max()) <= pair.lipschitz * (1 + 1e-12)
    assert float(slope.min()) >= pair.slope.low * (1 - 1e-12)
    if math.isfinite(pair.lipschitz):
        assert float(slope.max()) >= pair.lipschitz * (1 - 1e-3)
    low, high = torch.tensor([[-2.0, -1.0, 0.3], [-1.5, 2.0, 0.4]], dtype=torch.float64)
    smallest, largest = pair.slopes_between(low, high)
    for i in range(3):
        within = pair.derivative(torch.linspace(float(low[i]), float(high[i]), 10_001, dtype=torch.float64))
        assert float(smallest[i]) <= float(within.min()) * (1 + 1e-12)
        assert float(largest[i]) >= float(within.max()) * (1 - 1e-12)
        assert float(largest[i]) <= float(within.max()) * (1 + 1e-6)
        assert float(smallest[i]) >= float(within.min()) * (1 - 1e-6)


def test_scaled_tanh_constant():
    assert legendre("scaled_tanh").lipschitz == pytest.approx(1.143819, abs=1e-6)


def test_dilogarithm():
    t = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-8, 2, 60, dtype=torch.float64)])
    k = torch.arange(1, 40_001, dtype=torch.float64)
    found = dilogarithm_of_exponential(t)
    for point, value in zip(t[t > 1e-3].tolist(), found[t > 1e-3].tolist()):
        assert value == pytest.approx(float((torch.exp(-k * point) / k**2).sum()), rel=1e-14)
    assert float(found[0]) == pytest.approx(math.pi**2 / 6, rel=1e-15)


# -- the eight defects of the published package (docs/theory/bregman) ------------------------------------------------


@each
def test_nothing_is_clamped_and_ends_are_refused(pair):
    low, high = pair.domain
    for end in (low, high):
        if math.isfinite(end):
            for dtype in (torch.float32, torch.float64):
                with pytest.raises(DataError, match="domain"):
                    pair.inverse(torch.tensor([float(pair(torch.zeros(1))), end], dtype=dtype))
            with pytest.raises(DataError):
                pair.potential(torch.tensor([end + math.copysign(1e-3, end - 0.1)]))
    with pytest.raises(DataError, match="entries lie outside"):
        pair.inverse(torch.tensor([math.nan]))
    with pytest.raises(DataError, match="floating-point"):
        pair.inverse(torch.tensor([1]))
    with pytest.raises(DataError):
        pair.inverse(torch.tensor([math.inf]))


def test_known_values_that_were_wrong_elsewhere():
    def at(name: str, x: float, **parameters: float) -> float:
        return float(legendre(name, **parameters).inverse(torch.tensor([x], dtype=torch.float64)))

    assert at("sigmoid", 0.5) == 0.0  # not -1.0986
    assert at("bent", 1.0) == 0.75  # not 2
    assert at("atan", -1 + 5e-6) == pytest.approx(math.tan(-1 + 5e-6), rel=1e-14)  # not of the other sign
    assert at("softplus", 1.0, beta=1000.0) == 1.0


def test_underflow_is_not_minus_infinity():
    pair = legendre("softplus", beta=1000.0)
    x = pair(torch.tensor([-1.0]))
    assert float(x) == 0.0
    with pytest.raises(DataError, match="dual coordinates"):
        pair.inverse(x)


def test_overflow_is_refused():
    with pytest.raises(DataError, match="overflows"):
        legendre("asinh").inverse(torch.tensor([100.0]))


def test_what_is_not_admissible():
    for name in ("relu", "sin", "gelu", "silu"):
        with pytest.raises(SettingsError, match="choose one of"):
            legendre(name)
    with pytest.raises(SettingsError, match="does not take"):
        legendre("tanh", beta=1.0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(SettingsError, match="positive finite"):
            legendre("softplus", beta=bad)
    with pytest.raises(SettingsError, match="at most 1"):
        legendre("leaky_relu", negative_slope=1.5)


@each
def test_values_are_frozen_and_equal(pair):
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert hash(pair) == hash(pickle.loads(pickle.dumps(pair)))
    with pytest.raises(AttributeError):
        pair.anything = 1.0  # type: ignore[attr-defined]


def test_large_arguments():
    for pair in ALL:
        u = torch.tensor([-1e4, 1e4, 0.0], dtype=torch.float32)
        if math.isfinite(pair.lipschitz):
            assert bool(pair(u).isfinite().all())
            assert bool(pair.log_derivative(u).isfinite().all())


# -- in the certificate engine -------------------------------------------------------------------------------------


class Activated(torch.nn.Module):
    def __init__(self, pair: Legendre, inverse: bool = False):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 2).double()
        self.function = pair.inverse if inverse else pair

    def forward(self, u: Tensor) -> Tensor:
        return self.last(self.function(self.first(u)))


@each
def test_traced_with_its_slopes(pair):
    torch.manual_seed(0)
    net = Activated(pair)
    if not math.isfinite(pair.lipschitz):
        with pytest.raises(NotCertifiable, match="no upper bound"):
            fm.certify(net, shape=(3,))
        return
    certificate = fm.certify(net, shape=(3,))
    norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in (net.first, net.last)]
    assert 0 < certificate.lower <= certificate.upper <= pair.lipschitz * norms[0] * norms[1] * (1 + 1e-6)
    around = torch.randn(1, 3, dtype=torch.float64)
    near = fm.certificates.local(net, around, 1e-3)
    assert near.lower <= near.upper <= certificate.upper * (1 + 1e-9)
    if isinstance(pair, type(legendre("leaky_relu"))):
        return
    jacobian = torch.autograd.functional.jacobian(net, around)[0, :, 0]
    assert near.upper == pytest.approx(
        float(torch.linalg.matrix_norm(jacobian, 2)), rel=5e-2 * max(1.0, pair.log_derivative_bound)
    )


def test_inverse_in_a_trace():
    torch.manual_seed(0)
    with pytest.raises(NotCertifiable, match="dual coordinates"):
        fm.certify(Activated(legendre("tanh"), inverse=True), shape=(3,))
    for pair, steepest in ((legendre("leaky_relu"), 10.0), (legendre("hypentropy", beta=0.5), 2.0)):
        net = Activated(pair, inverse=True)
        norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in (net.first, net.last)]
        certificate = fm.certify(net, shape=(3,))
        assert certificate.lower <= certificate.upper <= steepest * norms[0] * norms[1] * (1 + 1e-6)
