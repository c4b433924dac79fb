"""ECLipsE-Fast: published numbers, its two passes against what they optimise, and never above the product bound."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firmly import certify
from firmly.certificates.eclipse import backward_multipliers, eclipse_multipliers, forward_multipliers, is_chain
from firmly.certificates.elimination import elimination_order, required_rho
from firmly.certificates.layered_proof import layered_gain
from firmly.certificates.layers import layers
from firmly.certificates.norm_bounds import product_bound

from .systems import Net, blocks_of, double, exact, system_of
from .test_lipsdp import layers_of, perceptron, residual
from .test_published import S2, chain
from .test_soundness import PIECEWISE, RandomNetwork

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "expanding": lambda x: F.leaky_relu(x, 1.7),
    "negative": lambda x: F.leaky_relu(x, -0.4),
    "abs": torch.abs,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


def value(found, nu) -> float:
    return math.sqrt(required_rho(found, nu, elimination_order(found)))


def test_s1_and_s2():
    first = layers_of(chain([[1, 0], [0, 0.5]], [[0.5, 0], [0, 1]]), (2,))
    assert value(first, forward_multipliers(first)[1]) == pytest.approx(0.755929, abs=5e-7)
    second = layers_of(chain(*S2), (2,))
    assert value(second, forward_multipliers(second)[1]) == pytest.approx(6.921230041, abs=1e-8)
    assert certify(chain(*S2), shape=(2,), method="eclipse").upper <= 6.9212300411


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_backwards_it_is_at_most_the_product(name, seed):
    net = perceptron(4, 6, 5, 6, 3, seed=seed, activation=lambda: Net(ACTIVATIONS[name]))
    system = system_of(net, (4,))
    found = layers(system)
    product = product_bound(blocks_of(system))
    assert value(found, backward_multipliers(found)) <= product * (1 + 1e-3)  # centre and radius are kept apart
    rho, nu = eclipse_multipliers(found)
    assert layered_gain(found, rho * nu, rho) <= product * (1 + 1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_factors_are_the_best_for_one_layer(name):
    """One layer, one neuron in and out: both passes find the best multiplier, and the bound is the exact one."""
    weight = torch.tensor([[1.5]], **double)
    found = layers_of(Net(lambda x: 2.0 * ACTIVATIONS[name](x @ weight)), (1,))
    low, high = found.slopes[0]
    for nu in (forward_multipliers(found)[1], backward_multipliers(found)):
        assert value(found, nu) == pytest.approx(3.0 * max(abs(low), abs(high)), rel=1e-3)
        for factor in (0.9, 1.05):
            assert required_rho(found, factor * nu, [0, 1]) >= required_rho(found, nu, [0, 1]) * (1 - 1e-3)


def test_a_layer_of_slopes_in_zero_one_is_the_published_formula():
    """X_1 = l I - l^2 K / 4 with K = W W' and l = 2 / lambda_max(K), bound^2 = lambda_max(V X_1^-1 V')."""
    W, V = torch.randn(2, 4, 4, **double, generator=torch.Generator().manual_seed(0))
    found = layers_of(chain(W, V), (4,))
    K = W @ W.T
    scale = 2 / float(torch.linalg.eigvalsh(K)[-1])
    X = scale * torch.eye(4, **double) - scale**2 * K / 4
    expected = float(torch.linalg.eigvalsh(V @ torch.linalg.solve(X, V.T))[-1])
    assert value(found, forward_multipliers(found)[1]) ** 2 == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_against_enumeration(seed):
    net = RandomNetwork(seed, PIECEWISE, slopes=8)
    system = system_of(net, (net.size,))
    found = layers(system)
    rho, nu = eclipse_multipliers(found)
    assert layered_gain(found, rho * nu, rho) >= exact(blocks_of(system)) * (1 - 1e-12)


def test_other_connections_than_chains():
    found = layers_of(Net(residual), (5,))
    assert not is_chain(found)
    assert math.isfinite(value(found, forward_multipliers(found)[1]))


@pytest.mark.parametrize("depth", [2, 12])
def test_the_best_of_the_passes_and_their_mean(depth):
    """The value of a pass is at least what its multipliers prove."""
    found = layers_of(perceptron(4, *[6] * depth, 3), (4,))
    passes = forward_multipliers(found)[1], backward_multipliers(found)
    best = math.sqrt(eclipse_multipliers(found)[0])
    for nu in (*passes, 0.5 * (passes[0] + passes[1])):
        assert best <= value(found, nu) * (1 + 1e-9)


def test_layers_of_zeros_and_linear_networks():
    net = perceptron(3, 4, 4, 2)
    with torch.no_grad():
        net[2].weight.zero_()
    assert certify(net, shape=(3,), method="eclipse").upper < 1e-40
    linear = nn.Linear(3, 2, **double)
    norm = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    assert certify(linear, shape=(3,), method="eclipse").upper == pytest.approx(norm, rel=1e-9)
