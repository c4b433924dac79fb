"""Multivariate gains, sensitivity per group, and bounds of single output entries."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.certificates import Grouped, certify, gains, rows, star
from firmly.errors import ShapeError, VerificationError
from firmly.linear import Convolution, Dense, FourierSampling
from firmly.prox import L1, NonNegative, Zero

from .systems import Net, double


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*sizes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def jacobians(net: nn.Module, size: int, count: int = 200) -> torch.Tensor:
    points = torch.randn(count, size, generator=generator(1), **double) * 3
    return torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(points).detach()


# -- gains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 0.25)])
def test_two_scalar_inputs_of_a_linear_network(weights):
    """rho >= J*J for J = [a b]: the smallest w_1 rho_1 + w_2 rho_2 is
    w_1 |a|^2 + w_2 |b|^2 + 2 sqrt(w_1 w_2) |<a, b>|."""
    J = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 1.0]], **double)
    a, b = J.T
    parts = {"a": ("data", slice(0, 1)), "b": ("data", slice(1, 2))}
    found = gains(Net(Dense(J), Dense(J)), parts, (2,), weights=dict(zip("ab", weights)), tolerance=1e-6)
    smallest = weights[0] * a @ a + weights[1] * b @ b + 2 * math.sqrt(weights[0] * weights[1]) * (a @ b).abs()
    total = sum(w * r for w, r in zip(weights, found.rho.values()))
    assert total == pytest.approx(float(smallest), rel=1e-5)
    assert total >= float(smallest) * (1 - 1e-12)


def test_gains_bound_all_jacobians():
    net = mlp(4, 6, 6, 3)
    parts = {"first": ("data", slice(0, 1)), "rest": ("data", torch.tensor([False, True, True, True]))}
    found = gains(net, parts, (4,))
    rho = torch.tensor([found.rho["first"], *[found.rho["rest"]] * 3], **double)
    J = jacobians(net, 4)
    assert float(torch.linalg.eigvalsh(torch.diag(rho) - J.mT @ J).min()) >= 0
    assert found.bound({"first": 1.0}) >= float(J[:, :, 0].norm(dim=1).max())
    assert found.bound({"first": 0.3, "rest": 2.0}) == pytest.approx(
        math.sqrt(0.09 * found.rho["first"] + 4 * found.rho["rest"])
    )
    found.verify(net, parts, (4,))
    with pytest.raises(VerificationError):
        found.verify(mlp(4, 6, 6, 3, seed=1), parts, (4,))


def test_one_group_of_everything_is_the_lipschitz_bound():
    net = mlp(3, 5, 2)
    found, cert = gains(net, ("data",), (3,)), certify(net, shape=(3,))
    assert math.sqrt(found.rho["data"]) == pytest.approx(cert.upper, rel=1e-4)


def test_data_and_start_of_an_unrolled_network():
    A = Dense(torch.randn(4, 3, generator=generator(), **double))
    net = fm.unroll(fm.algorithms.ForwardBackward(A, L1(0.1)), depth=3, learn=())
    found = gains(net)
    alone = {name: c.upper for name, c in star(net).groups.items()}
    assert alone["data"] < certify(net, wrt="data").upper  # which lets the start A* y move along
    for name, upper in alone.items():
        assert found.rho[name] >= upper**2 * (1 - 1e-3)
    assert sum(found.rho.values()) <= sum(u**2 for u in alone.values()) * 2 * (1 + 1e-3)  # (a + b)^2 <= 2 (a^2 + b^2)


def test_bias_as_an_input():
    """b = A* y as an input of its own: H = A*A as the operator that the data pass, so that A*A x - b is left."""
    H = torch.diag(torch.tensor([1.0, 0.25, 0.01], **double)) + 0.1 * torch.eye(3, **double)
    W, step = Dense(torch.eye(3, **double) - 1.9 / 1.1 * H), 1.9 / 1.1

    def forward(start, bias):
        x = start
        for _ in range(3):
            x = torch.relu(W(x) + step * bias)
        return x

    net = Net(forward, W)
    shapes = {"start": (3,), "bias": (3,)}
    assert certify(net, wrt=("bias",), shape=shapes).upper == pytest.approx(4.259627273, rel=1e-4)  # S3b of the notes
    found = gains(net, ("start", "bias"), shapes)
    assert math.sqrt(found.rho["bias"]) >= 4.2596272
    assert math.sqrt(found.rho["start"]) >= 0.729


def test_groups_of_channels_stay_in_fourier():
    kernel = torch.randn(2, 3, 3, 3, generator=generator(), **double)
    net = Net(lambda x: torch.relu(A(x)), A := Convolution(kernel, (3, 8, 8)))
    split = Grouped(net, {"one": ("data", slice(0, 1)), "others": ("data", slice(1, 3))}, (3, 8, 8))
    assert split.inputs == {"one": (1, 8, 8), "others": (2, 8, 8)}
    found = star(split.net, {"one": ("data", slice(0, 1)), "others": ("data", slice(1, 3))}, (3, 8, 8))
    assert found.groups["one"].upper == pytest.approx(Convolution(kernel[:, :1], (1, 8, 8)).norm().upper, rel=1e-6)
    assert found.joint.basis.name == "fourier"


def test_star_orders_the_constants():
    found = star(mlp(4, 6, 3), {"a": ("data", slice(0, 2)), "b": ("data", slice(2, 4))}, (4,))
    uppers = [c.upper for c in found.groups.values()]
    assert max(uppers) <= found.joint.upper * (1 + 1e-6)
    assert found.lower <= found.upper <= math.sqrt(sum(u**2 for u in uppers)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": ("image", slice(0, 1))}, "the inputs are"),
        ({"a": ("data", slice(0, 2)), "b": "data"}, "disjoint"),
        ({"a": ("data", slice(3, 3))}, "empty"),
        ({"a": ("data", torch.ones(5, dtype=torch.bool))}, "broadcasts"),
    ],
)
def test_groups_that_are_none(groups, words):
    with pytest.raises(ShapeError, match=words):
        gains(mlp(4, 3), groups, (4,))


def test_weights_of_unknown_groups():
    with pytest.raises(ValueError, match="weights"):
        gains(mlp(4, 3), ("data",), (4,), weights={"start": 1.0})


# -- rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_matrix_are_their_norms():
    A = torch.randn(5, 7, generator=generator(), **double)
    found = rows(Net(Dense(A), Dense(A)), shape=(7,))
    assert torch.allclose(found.bounds, A.norm(dim=1), rtol=1e-10)
    assert bool((found.bounds >= A.norm(dim=1) * (1 - 1e-15)).all())


@pytest.mark.parametrize("seed", range(3))
def test_rows_bound_the_rows_of_jacobians(seed):
    net = mlp(4, 7, 6, 3, seed=seed)
    found = rows(net, shape=(4,))
    assert bool((jacobians(net, 4).norm(dim=2).amax(0) <= found.bounds).all())
    assert found.upper <= certify(net, shape=(4,)).upper * (1 + 1e-3)


def test_rows_in_fourier_are_means_over_frequencies():
    A = Convolution(torch.randn(3, 3, generator=generator(), **double), (1, 8, 9))
    net = fm.unroll(fm.algorithms.ForwardBackward(A, Zero()), depth=4, learn=())
    J = torch.autograd.functional.jacobian(lambda y: net(y).flatten(), torch.zeros(1, 1, 8, 9, **double))
    found = rows(net)
    assert found.basis == "fourier"
    assert torch.allclose(found.bounds.flatten(), J.flatten(1).norm(dim=1), rtol=1e-9)
    nonlinear = rows(fm.unroll(fm.algorithms.ForwardBackward(A, NonNegative()), depth=4, learn=()))
    assert float(nonlinear.bounds.min()) >= float(found.bounds.max()) * (1 - 1e-9)


def test_rows_of_data_over_frequencies():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:3] = True
    A = FourierSampling(mask)
    net = Net(A, A)
    found = rows(net, shape=(1, 8, 8))
    assert bool((found.bounds >= A.matrix().norm(dim=1).reshape(found.bounds.shape) * (1 - 1e-9)).all())
