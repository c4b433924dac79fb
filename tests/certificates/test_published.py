"""The numbers of the theory notes (sections 7.1 and 11), recomputed through the tracer.

S1 to S9 are the checks of section 11. Values there have six to ten digits; the tolerances are those of their rounding.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from firmly import certify, unroll
from firmly.algorithms import DouglasRachford, DualForwardBackward, ForwardBackward, Hqs
from firmly.certificates.forward_backward import BIAS, JOINT, best_leakage_bound, virtual_bound
from firmly.certificates.forward_backward import virtual_network_bound as virtual
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.linear import Dense, Diagonal, singular_basis
from firmly.prox import NonNegative

from .systems import Net, all_bounds, blocks_of, bounds, double, exact, spectral, system_of

J = torch.relu


def matrix(rows) -> Dense:
    return Dense(torch.as_tensor(rows, **double))


def close(value: float, digits: str):
    """Agreement with a number printed in the notes, to half a unit of its last digit."""
    places = len(digits.split(".")[1])
    return value == pytest.approx(float(digits), abs=0.51 * 10**-places)


def chain(*matrices, activation=torch.relu) -> nn.Module:
    maps = [matrix(m) for m in matrices]

    def forward(x):
        for linear in maps[:-1]:
            x = activation(linear(x))
        return maps[-1](x)

    return Net(forward, *maps)


# -- S1, S2: multilayer perceptrons --------------------------------------------------------------------------------


def test_s1():
    found = bounds(chain([[1, 0], [0, 0.5]], [[0.5, 0], [0, 1]]), (2,))
    assert found == pytest.approx({"product": 1.0, "averaged": 0.75, "layer": 0.625, "neuron": 0.5}, rel=1e-6)


S2 = ([[1, 2], [-1, 1]], [[1, -1], [2, 0]], [[1, 1]])


def test_s2():
    system = system_of(chain(*S2), (2,))
    found = all_bounds(system)
    assert close(found["product"], "7.451938501")
    assert close(found["averaged"], "6.996937771")
    assert found["layer"] == pytest.approx(6.898373670, rel=1e-7)
    assert found["neuron"] == pytest.approx(3 * math.sqrt(5), rel=1e-7)
    assert exact(blocks_of(system)) == pytest.approx(3 * math.sqrt(5), rel=1e-14)
    assert found["neuron"] >= 3 * math.sqrt(5)


@pytest.mark.parametrize("alpha, expected", [(0.3, "6.776069894"), (0.8, "7.286595745")])
def test_s2_with_averaged_operators(alpha, expected):
    """alpha-averaged: slopes in [1 - 2 alpha, 1]."""
    leaky = nn.functional.leaky_relu
    net = chain(*S2, activation=lambda x: leaky(x, 1 - 2 * alpha))
    assert close(averaged_bound(blocks_of(system_of(net, (2,)))), expected)


def test_s2_linear():
    assert bounds(chain(*S2, activation=lambda x: x), (2,))["product"] == pytest.approx(math.sqrt(41), rel=1e-12)


# -- S3: forward-backward on three eigenvalues ---------------------------------------------------------------------

BETA = torch.tensor([1.0, 0.25, 0.01], **double)
TAU, LIPSCHITZ, DEPTH = 0.1, 1.1, 3


def layers(t: float, start, data):
    """x_0 = start(d), x_n = relu(x - t (T*T + tau) x + t data(d)); either may be None (fixed)."""
    H = Diagonal(BETA + TAU)

    def forward(d):
        x = None if start is None else start(d)
        b = None if data is None else t * data(d)
        for _ in range(DEPTH):
            z = b if x is None else x - t * H(x) if b is None else x - t * H(x) + b
            x = J(z)
        return x

    return Net(forward, H)


ADJOINT = Diagonal(BETA.sqrt())
ENTRIES = {
    "x": (lambda d: d, None),
    "b": (None, lambda d: d),
    "xb": (lambda d: d, lambda d: d),
    "y": (None, ADJOINT),
    "yy": (ADJOINT, ADJOINT),
}


def s3(t: float, entry: str) -> dict[str, float]:
    return bounds(layers(t / LIPSCHITZ, *ENTRIES[entry]), (3,))


def test_s3_a():
    x, b, y, yy = s3(0.9, "x"), s3(0.9, "b"), s3(0.9, "y"), s3(0.9, "yy")
    assert close(x["product"], "0.753571")
    assert close(x["averaged"], "0.753571")
    assert close(b["product"], "2.240263636")
    assert close(b["averaged"], "2.240263636")
    assert close(s3(0.9, "xb")["averaged"], "2.993834636")
    assert close(y["averaged"], "1.590790909")
    assert y["layer"] == pytest.approx(1.054296, abs=2e-6)
    assert close(yy["averaged"], "1.634720909")
    assert yy["layer"] == pytest.approx(1.108732, abs=2e-6)


def test_s3_b():
    x, b, y, yy = s3(1.9, "x"), s3(1.9, "b"), s3(1.9, "y"), s3(1.9, "yy")
    assert close(x["averaged"], "0.729")
    assert close(b["product"], "4.680909091")
    assert close(b["averaged"], "4.501747727")
    assert b["layer"] == pytest.approx(4.259627273, rel=1e-6)
    joint = s3(1.9, "xb")
    assert close(joint["averaged"], "5.110280477")
    assert joint["layer"] == pytest.approx(4.791068273, rel=1e-6)
    assert close(y["averaged"], "2.464798554")
    assert y["layer"] == pytest.approx(1.907972, abs=2e-6)
    assert close(yy["averaged"], "2.157125")
    assert yy["layer"] == pytest.approx(1.762483, abs=2e-6)


@pytest.mark.parametrize(
    "t, state, bias, joint",
    [(0.9, "2.842481553", "2.272295567", "3.310122867"), (1.9, "7.172973815", "6.345534345", None)],
)
def test_s3_virtual_network(t, state, bias, joint):
    step = t / LIPSCHITZ
    beta, steps = (1 - step * (BETA + TAU)).expand(DEPTH, -1), torch.full((DEPTH,), step, **double)
    assert close(virtual(beta, steps, output="state"), state)
    assert close(virtual(beta, steps, entry=BIAS), bias)
    if joint:
        assert close(virtual(beta, steps, entry=JOINT), joint)


def test_s3_b_best_leakage():
    """Every leakage gives a bound, and so does the best geometric one; the best of all is that of the notes."""
    from scipy.optimize import minimize

    step = 1.9 / LIPSCHITZ
    beta, steps = (1 - step * (BETA + TAU)).expand(DEPTH, -1), torch.full((DEPTH,), step, **double)

    def value(logarithms) -> float:
        return virtual(beta, steps, torch.tensor([1.0, *np.exp(logarithms)], **double), BIAS)

    best = minimize(
        value, np.zeros(DEPTH), method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-9, "fatol": 1e-10}
    )
    assert close(best.fun, "4.437279")
    assert 4.259627 <= best.fun <= best_leakage_bound(beta, steps, BIAS) <= virtual(beta, steps, entry=BIAS)


# -- S4: many eigenvalues, by singular values ----------------------------------------------------------------------


def s4(P: int, m: int):
    """beta (m, P), steps (m,), and the traced network with the polynomial layers x - t (K*K + tau) x + t b."""
    values, tau = torch.linspace(0, 1, P, **double), 0.02
    steps = torch.as_tensor(np.random.default_rng(0).uniform(0.3, 1.95, m) / 1.02)
    K = Diagonal(values)

    def forward(b):
        x = J(float(steps[0]) * b)
        for t in steps[1:]:
            x = J(x - float(t) * (K.T(K(x)) + tau * x) + float(t) * b)
        return x

    return 1 - steps[:, None] * (values**2 + tau), steps, Net(forward, K)


@pytest.mark.parametrize(
    "P, m, one, ratio, best, direct",
    [
        (50, 20, "6213.37", 1.16, "107.07", "18.290884"),
        (500, 10, "97.5498", None, "18.0401", "10.681847"),
        (2000, 5, "5.7154", None, "4.6964", "4.210177"),
    ],
)
def test_s4(P, m, one, ratio, best, direct):
    beta, steps, net = s4(P, m)
    assert close(virtual(beta, steps, entry=BIAS), one)
    if ratio:
        assert close(virtual(beta, steps, ratio ** torch.arange(m + 1, **double), BIAS), best)
    assert best_leakage_bound(beta, steps, BIAS) == pytest.approx(float(best), rel=0.02)

    blocks = blocks_of(system_of(net, (P,)), singular_basis(net.parts[0]))
    assert blocks.rows[1].value.shape[0] == P
    assert close(averaged_bound(blocks), direct)
    linear = 0.0 * beta[0]
    for b, t in zip(beta, steps):
        linear = b * linear + t
    assert averaged_bound(blocks) >= float(linear.max())
    assert averaged_bound(blocks) == pytest.approx(float(linear.max()), rel=1e-9)
    # the traced chain has one more (first) layer that only passes the data on, and a grid of leakages
    assert virtual_bound(blocks) >= float(linear.max())
    if m < 20:
        found = spectral(blocks, per_channel=False, tolerance=1e-6)
        assert float(linear.max()) <= found <= float(linear.max()) * (1 + 1e-4)


# -- S6, S7: rates -------------------------------------------------------------------------------------------------


def quadratic(spectrum) -> Dense:
    """A with A*A = diag(spectrum)."""
    return Dense(torch.diag(torch.as_tensor(spectrum, **double).sqrt()))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_s6_douglas_rachford(m):
    """((1 + delta) / 2)^m for the auxiliary variable z, with the best step 1 / sqrt(mu L)."""
    mu, L = 0.1, 1.0
    H = torch.linspace(mu, L, 4, **double)
    g = 1 / math.sqrt(mu * L)
    algorithm = DouglasRachford(quadratic(H), NonNegative(), step_size=g)
    y = torch.zeros(1, 4, **double)

    def forward(z):
        state = algorithm.start(y, z)
        for k in range(m):
            state = algorithm.step(state, y, k)
        return state.z

    delta = max((1 - g * mu) / (1 + g * mu), (g * L - 1) / (g * L + 1))
    found = bounds(Net(forward, algorithm), (4,))
    assert found["averaged"] == pytest.approx(((1 + delta) / 2) ** m, rel=1e-9)
    assert found["layer"] == pytest.approx(((1 + delta) / 2) ** m, rel=1e-5)  # proved in steps of powers of ten


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_s6_hqs(tau):
    """sup_s tau s / (1 + tau s^2) = sqrt(tau) / 2, at s = 1 / sqrt(tau), for one layer without its start."""
    s = torch.tensor([0.1, tau**-0.5, 3.0], **double)
    algorithm = Hqs(Dense(torch.diag(s)), NonNegative(), penalty=1 / tau)

    def forward(y):
        return algorithm.step(algorithm.start(y, torch.zeros(1, 3, **double)), y, 0).x

    found = bounds(Net(forward, algorithm), (3,))
    assert found["product"] == pytest.approx(math.sqrt(tau) / 2, rel=1e-11)
    assert found["product"] == pytest.approx(0.70710678, abs=1e-8) or tau != 2.0


def test_s6_gradient_descent():
    net = unroll(ForwardBackward(quadratic([0.1, 0.5, 1.0]), NonNegative(), step_size=1.9), 2, learn=())
    found = bounds(net, net.inputs, ("start",))
    assert found["averaged"] ** 2 == pytest.approx(0.6561, rel=1e-9)
    assert found["layer"] ** 2 == pytest.approx(0.6561, rel=1e-6)


@pytest.mark.parametrize(
    "k, expected", [(1, "1.455314"), (2, "1.372450"), (3, "1.046892"), (5, ".465512"), (10, ".035052")]
)
def test_s7_heavy_ball(k, expected):
    mu, L = 0.1, 1.0
    t = 4 / (math.sqrt(L) + math.sqrt(mu)) ** 2
    b = ((math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))) ** 2
    assert close(t, "2.308862")
    assert close(b, ".269874")
    H = Diagonal(torch.linspace(mu, L, 19, **double))

    def forward(state):
        x, previous = state[:, :19], state[:, 19:]
        for _ in range(k):
            x, previous = x - t * H(x) + b * (x - previous), x
        return torch.cat([x, previous], dim=1)

    assert close(product_bound(blocks_of(system_of(Net(forward, H), (38,)))), expected)


# -- S8: convolutions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, expected", [("circular", 9.0), ("zeros", 8.945745084817752)])
def test_s8_norms_of_convolutions(mode, expected):
    convolution = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)
    nn.init.ones_(convolution.weight)
    cert = certify(convolution, shape=(1, 32, 32), method="product")
    assert expected * (1 - 1e-12) <= cert.upper <= expected * (1 + 1e-2)
    assert cert.lower <= expected * (1 + 1e-12)
    assert cert.lower >= 0.99 * expected


def test_s8_torch_spectral_norm_is_not_the_norm():
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    nn.init.ones_(convolution.weight)
    wrapped = nn.utils.parametrizations.spectral_norm(convolution, n_power_iterations=50).eval()
    cert = certify(wrapped, shape=(1, 8, 8))
    assert cert.lower > 2.5


# -- the table of section 7.1 --------------------------------------------------------------------------------------

_generator = np.random.default_rng(0)
_G = _generator.standard_normal((4, 3))
_H = _G.T @ _G / np.linalg.norm(_G, 2) ** 2
_K = _generator.standard_normal((2, 3))
H, K, D = matrix(_H), matrix(_K / np.linalg.norm(_K, 2)), matrix(_generator.standard_normal((4, 3)))
MU = float(np.linalg.eigvalsh(_H)[0])


def resolvent(gamma: float) -> Dense:
    """(I + gamma H)^-1."""
    return matrix(np.linalg.inv(np.eye(3) + gamma * _H))


def forward_backward(x, b):
    for _ in range(3):
        x = J(x - 1.9 * H(x) + 1.9 * b)
    return x


def fista(x, previous, b):
    t = 1.0
    for k in range(3):
        grown = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum, t = ((t - 1) / grown if k else 0.0), grown
        z = x + momentum * (x - previous)
        previous, x = x, J(z - H(z) + b)
    return x


def inertial(x, previous, b):
    for _ in range(3):
        previous, x = x, J(x + 0.5 * (x - previous) - H(x) + b)
    return x


def douglas_rachford(x, b):
    g = 1 / math.sqrt(MU)
    R = resolvent(g)
    for _ in range(3):
        p = R(x + g * b)
        x = x + J(2.0 * p - x) - p
    return x


def hqs(x, b):
    R = resolvent(1.0)
    for _ in range(3):
        x = J(R(x + b))
    return x


def admm(z, u, b):
    R = resolvent(1.0)
    for _ in range(3):
        w = R(b + z - u) + u
        z = J(w)
        u = w - z
    return z


def chambolle_pock(x, u, b):
    s = 0.99
    for _ in range(2):
        new = J(x - s * K.T(u) + s * b)
        u, x = J(u + s * K(2.0 * new - x)), new
    return x


TABLE = [
    (forward_backward, "x", ".877294", ".877294"),
    (forward_backward, "b", "5.460079", "5.460079"),
    (fista, ("x", "previous"), ".916086", ".916086"),
    (fista, "b", "3.733929", "3.733929"),
    (douglas_rachford, "x", ".657669", ".657669"),
    (douglas_rachford, "b", "15.232803", "15.232803"),
    (hqs, "x", ".935501", ".935501"),
    (hqs, "b", "2.870046", "2.870046"),
    (admm, ("z", "u"), ".935737", ".935737"),
    (admm, "b", "2.870046", "2.870046"),
    (inertial, ("x", "previous"), "2.065873", "1.940061"),
    (inertial, "b", "4.160612", "4.160612"),
    (chambolle_pock, ("x", "u"), "2.585516", "1.407160"),
    (chambolle_pock, "b", "2.950299", "1.98"),
]


@pytest.mark.parametrize("step, wrt, averaged, layer", TABLE, ids=lambda v: getattr(v, "__name__", None))
def test_table(step, wrt, averaged, layer):
    names = step.__code__.co_varnames[: step.__code__.co_argcount]
    shapes = {name: ((2,) if name == "u" and step is chambolle_pock else (3,)) for name in names}
    system = system_of(Net(step), shapes, (wrt,) if isinstance(wrt, str) else wrt)
    found = all_bounds(system)
    assert close(found["averaged"], averaged)
    assert found["layer"] == pytest.approx(float(layer), rel=3e-6)
    true = exact(blocks_of(system))
    assert true == pytest.approx(float(layer), rel=1e-6)
    assert true <= found["neuron"] <= found["layer"] * (1 + 1e-6)


@pytest.mark.parametrize(
    "depth, averaged, neuron, true",
    [(1, "1.874", "1.000", "1.000"), (2, "2.529", "1.404", "1.2819"), (3, "3.251", "1.647", "1.3058")],
)
def test_table_dual_forward_backward(depth, averaged, neuron, true):
    size = np.linalg.norm(D.weight.numpy(), 2)
    algorithm = DualForwardBackward(D, Positive(), step_size=1.99 / size**2)
    net = unroll(algorithm, depth, learn=())
    system = system_of(net, net.inputs, ("data",))
    found = all_bounds(system)
    assert close(found["averaged"], averaged)
    assert found["neuron"] == pytest.approx(float(neuron), abs=6e-4)
    assert close(exact(blocks_of(system)), true)


class Positive(NonNegative):
    """g with prox_{t g*} = relu: g is the indicator of the non-positive numbers."""

    def conjugate_prox(self, z, step=1.0):
        return torch.relu(z)


def test_table_through_unroll():
    """Forward-backward of the library is that of the notes."""
    A = matrix(_G / np.linalg.norm(_G, 2))
    net = unroll(ForwardBackward(A, NonNegative(), step_size=1.9), 3, learn=())
    found = bounds(net, net.inputs, ("start",))
    assert close(found["averaged"], ".877294")
    assert found["layer"] == pytest.approx(0.877294, rel=2e-6)
