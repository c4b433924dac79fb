"""ALISTA in its metric: the same network, certified as forward-backward; and networks beyond their depth."""

from __future__ import annotations

import math

import pytest
import torch

import firmly as fm
from firmly.algorithms.algorithm import number
from firmly.errors import NotCertifiable, SettingsError
from firmly.fixedpoint.solve import Status
from firmly.linear import Convolution, Dense
from firmly.networks import Selection, analytic_whitening, beyond_depth, in_metric, lista
from firmly.networks.whitening import energies

from .test_lista import WEIGHT, data, dictionary, ista

M, N, DEPTH = 6, 10, 5
RULES = [None, Selection(0.1, 0.3, ramp=2.0)]


def trained(selection=None, seed=0, **settings):
    """An ALISTA network with steps and thresholds of its own in every layer, inside the certified interval."""
    net = lista(dictionary(M, N, seed), DEPTH, "alista", WEIGHT, selection=selection, **settings)
    limit = float(net.layers[0].rule("step_size").high)
    with torch.no_grad():
        for k, layer in enumerate(net.layers):
            layer.step_size = torch.tensor(limit * (0.95 - 0.1 * k), dtype=torch.float64)
            layer.prior.weight = torch.tensor(0.2 / (k + 1), dtype=torch.float64)
    return net


def in_norm(z, p):
    return (p * z.square()).sum(1).sqrt()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_same_network(rule, symmetric):
    whitening = analytic_whitening(dictionary(M, N), symmetric=symmetric) if symmetric else None
    net, y = trained(rule, whitening=whitening), data()
    view = in_metric(net)
    for code, inside in zip(net.codes(y), view.network.codes(view.whitening(y)), strict=True):
        torch.testing.assert_close(code, inside / view.scale, atol=1e-12, rtol=0)
    if symmetric:
        torch.testing.assert_close(view.scale, torch.ones(N, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_and_is_sharper_than_the_sum_of_steps(seed):
    net = trained(None, seed)
    view = in_metric(net)
    assert all(c.holds for conditions in view.network.conditions() for c in conditions)
    certificate = fm.certify(view.network, budget_s=5)
    p, steps = view.scale**2, sum(number(layer.step_size) for layer in net.layers)
    y, generator = data(500, M), torch.Generator().manual_seed(1)
    correlation = net.shared.W.weight.T
    for size in (1e-4, 0.3):
        move = size * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        with torch.no_grad():
            moved = net(y + move) - net(y)
            assert bool((in_norm(moved, p) <= certificate.upper * view.whitening(move).norm(dim=1) + 1e-12).all())
            assert bool((moved.norm(dim=1) <= view.euclidean(certificate.upper) * move.norm(dim=1) + 1e-12).all())
            assert bool((in_norm(moved, p) <= steps * in_norm(move @ correlation.T, p) + 1e-12).all())  # the theory's
    assert certificate.upper <= steps * (1 + 1e-6)  # the theory has sum g |F*| there, and |F*| > 1


def test_layers_are_nonexpansive_up_to_the_limit_and_not_beyond():
    for seed in range(3):
        net = trained(None, seed)
        limit = float(net.layers[0].rule("step_size").high)
        for factor in (0.5, 1 - 1e-6, 1.05):
            single = lista(dictionary(M, N, seed), 1, "alista", WEIGHT, selection=None)
            with torch.no_grad():
                single.layers[0].step_size = torch.tensor(factor * limit, dtype=torch.float64)
            view = in_metric(single)
            certificate = fm.certify(view.network, wrt="start", budget_s=2)
            if factor < 1:
                assert certificate.upper <= 1 + 1e-9
                assert [c.holds for c in view.network.conditions()[0] if c.name == "step_size"] == [True]
            else:
                assert certificate.lower > 1.05 and not single.conditions()[0][0].holds
                assert view.network.project() == [0] and view.network.conditions()[0][0].holds


def test_certificates_with_continuous_selection(tmp_path):
    net = trained(RULES[1])
    view = in_metric(net)
    one = fm.certify(lista_of_one(net, 0).network, wrt="start", budget_s=2)
    assert one.upper <= 1.5 * (1 + 1e-6)
    certificate = fm.certify(view.network, budget_s=3)
    plain = fm.certify(in_metric(trained(None)).network, budget_s=3)
    assert plain.upper < certificate.upper < plain.upper * 1.5**DEPTH
    certificate.save(tmp_path / "alista.certificate")
    fm.verify(tmp_path / "alista.certificate", in_metric(net).network)


def lista_of_one(net, k):
    single = lista(dictionary(M, N), 1, "alista", WEIGHT, selection=Selection(0.1, 0.3, ramp=2.0))
    with torch.no_grad():
        single.layers[0].step_size = net.layers[k].step_size
        single.layers[0].prior.weight = net.layers[k].prior.weight
    return in_metric(single)


def test_the_fixed_point_solves_the_weighted_lasso():
    net, y = lista(dictionary(M, N), 1, "alista", WEIGHT, selection=None), data()
    layer = net.layers[0]
    with torch.no_grad():
        layer.step_size = torch.tensor(0.5, dtype=torch.float64)
    z = fm.solve(layer, y, tol=1e-13, max_iterations=100_000).x
    D, C = net.shared.D.weight, analytic_whitening(dictionary(M, N))
    p, weight = energies(Dense(D), Dense(C)), number(layer.prior.weight) / 0.5
    slope = (C.T @ (C @ (D @ z.T - y.T))).T @ D  # gradient of 1/2 |C (D z - y)|^2
    assert ((slope.abs() - p * weight).clamp(min=0)).max() < 1e-10
    active = z != 0
    torch.testing.assert_close(slope[active], (-(p * weight) * z.sign())[active], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_circular_convolutions_have_the_metric_too(rule):
    kernel = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    D = Convolution(kernel, (1, 6, 8)).T
    whitening = analytic_whitening(D)
    net = lista(D, 3, "alista", WEIGHT, selection=rule, whitening=whitening, certified=True)
    y = torch.randn(20, 1, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    view = in_metric(net)
    torch.testing.assert_close(net(y), view.network(view.whitening(y)) / view.scale, atol=1e-10, rtol=0)
    flat = in_metric(lista(D.matrix(), 3, "alista", WEIGHT, selection=rule, certified=True))
    assert flat.network.layers[0].rule("step_size").high == pytest.approx(net.layers[0].limit, rel=1e-9)
    certificate = fm.certify(view.network, budget_s=3)
    assert certificate.basis.name == "fourier" and certificate.lower <= certificate.upper
    moved = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    change = (net(moved) - net(y)).flatten(1).norm(dim=1)
    assert bool((change <= view.euclidean(certificate.upper) * (moved - y).flatten(1).norm(dim=1)).all())


def test_what_has_no_metric_is_refused():
    D = dictionary(M, N)
    with pytest.raises(NotCertifiable, match="only ALISTA"):
        in_metric(lista(D, 2, "cp"))
    with pytest.raises(NotCertifiable, match="only ALISTA"):
        in_metric(lista(Convolution(torch.randn(2, 1, 3, 3), (1, 6, 6)).T, 2, "alista"))
    with pytest.raises(NotCertifiable, match="discontinuous"):
        in_metric(lista(D, 2, "alista"))
    changed = trained()
    changed.shared.W.weight += 0.01
    with pytest.raises(NotCertifiable, match="differ from the analytic ones"):
        in_metric(changed)


def test_limits_follow_the_weights():
    one, other = (lista(dictionary(M, N, seed), 2, "alista", WEIGHT, certified=True) for seed in (0, 1))
    limits = [net.layers[0].limit for net in (one, other)]
    assert limits[0] != pytest.approx(limits[1])
    one.load_state_dict(other.state_dict())
    assert one.layers[0].limit == limits[1] and one.conditions()[1][0].holds
    y = data(5, M)
    torch.testing.assert_close(one(y), other(y), atol=1e-15, rtol=0)


def test_single_precision_is_certified_in_double():
    net = lista(dictionary(M, N).float(), 3, "alista", WEIGHT, selection=None)
    view = in_metric(net)
    assert view.network.shared.D.weight.dtype == torch.float64
    y = data().float()
    torch.testing.assert_close(
        net(y).double(), view.network(view.whitening(y.double())) / view.scale, atol=1e-4, rtol=1e-4
    )


# -- beyond the depth ----------------------------------------------------------------------------------------------


def test_ista_run_on_reaches_the_lasso_solution():
    D, y = dictionary(), data()
    found = beyond_depth(lista(D, 5, "step", WEIGHT), y, tol=1e-13, max_iterations=50_000)
    expected = ista(D, y, 20_000)[-1]
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.limit, expected, atol=1e-9, rtol=0)
    distance = (ista(D, y, 5)[-1] - expected).norm(dim=1) / expected.norm(dim=1)
    torch.testing.assert_close(found.distance, distance, atol=1e-8, rtol=0)
    assert found.residuals[0][1] > found.residuals[-1][1]


@pytest.mark.parametrize("layers", [1, 3])
def test_certified_networks_converge_beyond_their_depth(layers):
    net = trained(None)
    found = beyond_depth(net, data(), layers=layers, tol=1e-10, max_iterations=50_000)
    assert found.status is Status.CONVERGED
    state = found.limit
    for layer in list(net.layers)[-layers:]:
        state = layer(layer.start(data(), state), data(), 0).x
    torch.testing.assert_close(state, found.limit, atol=1e-8, rtol=0)


def test_divergence_is_told():
    net = lista(dictionary(), 3, "step", WEIGHT)
    with torch.no_grad():
        net.layers[-1].step_size = torch.tensor(20.0, dtype=torch.float64)
    found = beyond_depth(net, data(), max_iterations=5000)
    assert found.status is not Status.CONVERGED
    assert found.status is Status.NON_FINITE or math.isfinite(float(found.distance.max()))


@pytest.mark.parametrize("variant", ["fista", "lista", "facnet", "hyper", "ti"])
def test_every_kind_of_layer_can_be_run_on(variant):
    net = lista(dictionary(), 3, variant, WEIGHT)
    found = beyond_depth(net, data(), max_iterations=20)
    assert found.limit.shape == (5, 10) and len(found.residuals) >= 1


def test_layers_are_counted():
    net = lista(dictionary(), 3, "cp", WEIGHT)
    for layers in (0, 4):
        with pytest.raises(SettingsError, match="layers is between"):
            beyond_depth(net, data(), layers=layers)
