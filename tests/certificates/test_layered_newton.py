"""The two exact solvers of LipSDP: derivatives and factors by other means, and one solver against the other."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from firmly import certify
from firmly.certificates.conic import conic_multipliers, quadratic_form
from firmly.certificates.eclipse import eclipse_multipliers
from firmly.certificates.elimination import block_matrix, factorise
from firmly.certificates.layered_newton import CentralPath, follow_central_path, inverse, log_determinant
from firmly.certificates.lipsdp import lipsdp_multipliers
from firmly.errors import NotCertifiable, SettingsError
from firmly.prox import GroupL1

from .systems import Net, double
from .test_lipsdp import dense_matrix, layers_of, perceptron, residual

CASES = {
    "chain": (perceptron(4, 5, 6, 3), (4,)),
    "residual": (Net(residual), (5,)),
    "negative slopes": (perceptron(3, 4, 5, 3, activation=lambda: nn.LeakyReLU(-0.5)), (3,)),
    "positive slopes": (perceptron(3, 4, 5, 3, activation=lambda: nn.LeakyReLU(0.3)), (3,)),
    "slopes on both sides": (perceptron(3, 4, 3, activation=nn.GELU), (3,)),
    "groups": (Net(lambda x: 2 * GROUPS.prox(torch.relu(x), 1.0) - x, GROUPS := GroupL1(0.1)), (3, 2, 1)),
}


@pytest.fixture(params=CASES)
def found(request):
    return layers_of(*CASES[request.param])


@pytest.mark.parametrize("backwards", [False, True])
def test_inverse_and_determinant(found, backwards):
    order = list(range(len(found.sizes)))[:: -1 if backwards else 1]
    rho, nu = eclipse_multipliers(found)
    factor = factorise(block_matrix(found, 2 * rho * nu, 2 * rho), order)
    assert factor is not None
    whole = dense_matrix(found, 2 * rho * nu, 2 * rho)
    assert torch.allclose(inverse(factor) @ whole, torch.eye(len(whole), **double), atol=1e-9)
    assert log_determinant(factor) == pytest.approx(float(torch.logdet(whole)), rel=1e-10)


def test_derivatives_by_finite_differences(found):
    rho, nu = eclipse_multipliers(found)
    path = CentralPath(found)
    y = 1.3 * rho * torch.cat([torch.ones(1, **double), nu])
    point = path.point(y)
    assert point is not None
    gradient, hessian = path.derivatives(point)
    h = 1e-5
    for k in range(len(y)):
        unit = h * torch.eye(len(y), **double)[k]
        after, before = path.point(y * (1 + unit)), path.point(y * (1 - unit))
        assert after is not None and before is not None
        assert float(gradient[k]) == pytest.approx((after.barrier - before.barrier) / (2 * h), rel=1e-6, abs=1e-6)
        ends = [path.derivatives(p)[0] / p.y * y for p in (after, before)]
        assert torch.allclose(hessian[k], (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-5)


def test_the_barrier_is_infinite_outside(found):
    rho, nu = eclipse_multipliers(found)
    path = CentralPath(found)
    for y in ([0.01 * rho, *(rho * nu)], [rho, *(-rho * nu)], [math.nan, *nu], [2 * rho, *(1e-3 * rho * nu)]):
        assert path.point(torch.tensor(y, **double)) is None


def test_two_solvers_agree(found):
    exact = conic_multipliers(found)
    ours = lipsdp_multipliers(found, 1e-8)
    assert ours.rho == pytest.approx(exact.rho, rel=1e-6)
    assert ours.rho >= exact.rho * (1 - 1e-7)


@pytest.mark.parametrize("widths", [(6, 12, 12, 12, 12, 4), (30, 24, 24, 10), (5, *[8] * 8, 3)])
def test_within_the_tolerance_of_the_optimum(widths):
    found = layers_of(perceptron(*widths), widths[:1])
    exact = conic_multipliers(found).rho
    for tolerance in (1e-2, 1e-4):
        assert exact * (1 - 1e-7) <= lipsdp_multipliers(found, tolerance).rho <= exact * (1 + 2 * tolerance)


def test_few_steps_from_far_away():
    found = layers_of(perceptron(10, 20, 20, 20, 5), (10,))
    path = follow_central_path(found, *eclipse_multipliers(found), 1e-4, time.monotonic() + 20)
    assert path.finished and path.steps < 40
    assert path.rho == pytest.approx(conic_multipliers(found).rho, rel=2e-4)


def test_the_cone_is_the_matrix_inequality(found):
    rho, nu = eclipse_multipliers(found)
    p, q, unknown, value = quadratic_form(found, nu, rho)
    n = sum(found.sizes)
    unknowns = torch.tensor([3.0, *range(1, found.multipliers + 1), 1.0], **double)
    M = torch.zeros(n, n, **double).index_put((p, q), value * unknowns[unknown], accumulate=True)
    root = torch.cat([*(torch.ones(k, **double) for k in found.sizes[: found.inputs]), *found.weights(nu)]).sqrt()
    expected = dense_matrix(found, nu * unknowns[1:-1], 3.0)
    output = dense_matrix(found, 0 * nu, 1e-300)
    expected = expected + output / rho - output
    assert torch.allclose(0.5 * (M + M.T) * root[:, None] * root, expected, atol=1e-10)


def test_certificates_by_either_solver():
    net, shape = CASES["chain"]
    ours, theirs = (certify(net, shape=shape, method="lipsdp", solver=s) for s in ("layered", "clarabel"))
    assert ours.upper == pytest.approx(theirs.upper, rel=1e-4)
    assert theirs.method == "lipsdp"


def test_refusals():
    net, shape = CASES["chain"]
    with pytest.raises(SettingsError, match="clarabel"):
        certify(net, shape=shape, method="eclipse", solver="clarabel")
    with pytest.raises(SettingsError, match="scs"):
        certify(net, shape=shape, method="lipsdp", solver="scs")  # type: ignore[arg-type]
    with pytest.raises(NotCertifiable, match="solver='layered'"):
        certify(perceptron(9, 90, 90, 3), shape=(9,), method="lipsdp", solver="clarabel")


def test_wide_networks_are_dense():
    """All norms of products are known, not only those of the layers."""
    net = perceptron(20, 250, 250, 5)
    product, averaged = (certify(net, shape=(20,), method=m) for m in ("product", "averaged"))
    assert averaged.basis.name == "dense"
    assert averaged.upper < 0.8 * product.upper
    assert averaged.lower > 0


def test_multipliers_that_nothing_limits_do_not_stop_the_search():
    """Units that no later layer sees, and a layer of zeros."""
    net = perceptron(4, 6, 6, 3)
    with torch.no_grad():
        net[2].weight[:, :4] = 0
        net[0].weight[5] = 0
    found = layers_of(net, (4,))
    result = lipsdp_multipliers(found, 1e-6)
    assert result.rho == pytest.approx(conic_multipliers(found).rho, rel=1e-5)
