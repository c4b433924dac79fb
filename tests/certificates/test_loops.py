"""Equilibria as loops: against enumeration of slopes, inside chains, in Fourier, and what is refused."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from firmly import attack, certify, verify
from firmly.algorithms import PeacemanRachford
from firmly.certificates import averagedness, bound, gains, local, rows, trace
from firmly.certificates.family import Family
from firmly.certificates.methods import METHODS, Problem
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import represent
from firmly.certificates.system import Nonlinear
from firmly.errors import NotCertifiable, VerificationError
from firmly.fixedpoint import equilibrium
from firmly.linear import Convolution, Dense, FourierBasis, Identity, LinearMap, Monotone
from firmly.networks import MonotoneLayer
from firmly.prox import L1, L2, MCP, ElasticNet, NonNegative, Prior

from .systems import Net, all_bounds, blocks_of, double, spectral


def layer(seed: int, inputs: int, features: int, margin: float, **settings) -> MonotoneLayer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MonotoneLayer(inputs, features, margin, **settings).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=float(parameter.detach().std()) if parameter.numel() > 1 else 1.0)
        nn.init.normal_(made.bias)
    return made


def enumerated(W: Tensor, U: Tensor, response: Callable[[Tensor], Tensor] = lambda v: v, high: float = 1.0) -> float:
    """max over slopes at their ends of |response((I - S W)^-1 S U)|: the maximum over the box (docs/theory/loops)."""
    n = len(W)
    patterns = torch.tensor(list(itertools.product((0.0, high), repeat=n)), **double)
    systems = torch.eye(n, **double) - patterns[:, :, None] * W
    values = torch.linalg.solve(systems, patterns[:, :, None] * U)
    return float(torch.linalg.matrix_norm(response(values), 2).max())


def loop_only(loop: LinearMap, prior: Prior) -> nn.Module:
    """w -> v with v = prox(loop(v) + w)."""
    splitting = PeacemanRachford(loop, prior)
    return Net(lambda w: equilibrium(splitting, w), splitting)


@torch.no_grad()
def uppers(net: nn.Module, inputs: dict) -> dict[str, float]:
    """Every method's proved bound, without the lower end."""
    system = trace(net, inputs, tuple(inputs))
    choice, basis, blocked, notes = represent(system)
    problem = Problem(system, choice, Family(blocked, basis), notes, 1e-6, time.monotonic() + 60)
    return {m: METHODS[m](problem).bound.value for m in ("product", "averaged", "eclipse", "spectral", "lipsdp")}


CASES = [(seed, n, m) for seed, (n, m) in enumerate(itertools.product((2, 3, 4), (0.1, 0.5, 1.0, 2.0)))]


@pytest.mark.parametrize(("seed", "features", "margin"), CASES)
def test_against_all_slopes(seed, features, margin):
    net = layer(seed, 3, features, margin)
    exact = enumerated(net.loop.matrix().detach(), net.input_map.matrix().detach())
    found = uppers(net, net.inputs)
    assert all(exact * (1 - 1e-12) <= upper for upper in found.values())
    assert found["product"] == pytest.approx(net.lipschitz_bound(), rel=1e-9)
    assert found["averaged"] == pytest.approx(net.lipschitz_bound(), rel=1e-9)
    assert found["spectral"] <= found["eclipse"] * (1 + 1e-6)
    assert found["eclipse"] <= net.lipschitz_bound() * (1 + 1e-6)
    assert found["spectral"] <= 1.25 * exact  # not tight in general
    assert found["lipsdp"] == pytest.approx(found["spectral"], rel=1e-3)


@pytest.mark.parametrize("method", ["product", "auto"])
def test_certificates_of_every_method_hold_from_their_file(method, tmp_path):
    net = layer(0, 3, 3, 0.5)
    exact = enumerated(net.loop.matrix().detach(), net.input_map.matrix().detach())
    cert = certify(net, method=method)
    assert cert.lower <= exact * (1 + 1e-9) and exact * (1 - 1e-12) <= cert.upper
    assert verify(cert.save(tmp_path / "loop.certificate"), net)


@pytest.mark.parametrize("seed", range(6))
def test_jacobians_stay_below(seed):
    """The largest Jacobian norm at random points, for separable and for whole activations."""
    prior = [NonNegative(), L1(0.3), ElasticNet(0.2, 0.7), L2(0.4)][seed % 4]
    net = layer(seed, 3, 4, 0.4, prior=prior)
    upper = min(uppers(net, net.inputs).values())
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.1, 1.0, 30.0):
        x = scale * torch.randn(1, 3, generator=generator, **double)
        jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0], x)[:, 0]  # type: ignore[misc]
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= upper * (1 + 1e-9)


def test_a_smoother_activation_has_smaller_slopes():
    """The prox of the elastic net has slopes in [0, 1 / (1 + r)]: the loop is then r more monotone."""
    W = Monotone(Dense(torch.zeros(1, 1, **double)), 0.5)
    for r in (0.0, 0.6):
        net = loop_only(W, ElasticNet(0.1, r))
        cert = certify(net, shape=(1,))
        assert cert.upper == pytest.approx(1 / (0.5 + r), rel=1e-6)
        assert cert.lower == pytest.approx(cert.upper, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_loops_in_chains_and_sums(seed):
    """first -> ReLU -> loop -> second plus a skip, and two loops in a row, against enumeration."""
    inner, outer = layer(seed, 2, 2, 0.5), layer(seed + 50, 2, 2, 0.7)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    net = Net(lambda x: outer(inner(torch.relu(first(x)))) + last(x), inner, outer, first, last)

    def gain(s, loop):
        W, U = loop.loop.matrix().detach(), loop.input_map.matrix().detach()
        return torch.linalg.solve(torch.eye(2, **double) - s[:, None] * W, s[:, None] * U)

    ends = [torch.tensor(p, **double) for p in itertools.product((0.0, 1.0), repeat=2)]
    A, P = first.weight.detach(), last.weight.detach()
    exact = max(
        float(torch.linalg.matrix_norm(gain(b, outer) @ gain(a, inner) @ (s[:, None] * A) + P, 2))
        for s, a, b in itertools.product(ends, ends, ends)
    )
    found = uppers(net, {"data": (3,)})
    assert all(exact * (1 - 1e-12) <= upper for upper in found.values())
    assert min(found.values()) <= 1.15 * exact
    if seed == 0:
        cert = certify(net, shape=(3,))
        assert cert.lower <= exact * (1 + 1e-9) and verify(cert, net)


@torch.no_grad()
@pytest.mark.parametrize("spatial", [(5,), (4, 3)], ids=["1-D", "2-D"])
def test_convolutions_against_their_matrix(spatial):
    """In Fourier with one multiplier per channel as tight as the matrix with one per neuron, and verified."""
    net = layer(3, 2, 2, 0.5, spatial=spatial)
    U, W = net.input_map.matrix().detach(), net.loop.matrix().detach()
    n = len(W)
    fourier = certify(net, method="spectral", tolerance=1e-6)
    assert fourier.basis.name == "fourier" and verify(fourier, net)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = MonotoneLayer(U.shape[1], n, 0.5).double()
    dense.input_map.weight.data = U
    dense.loop = Monotone(Dense(net.loop.A.matrix().detach()), 0.5, Dense(net.loop.B.matrix().detach()))
    assert torch.allclose(dense.loop.matrix(), W)
    blocks = blocks_of(trace(dense, dense.inputs, ("data",)))
    assert fourier.upper == pytest.approx(spectral(blocks, per_channel=True, tolerance=1e-7), rel=1e-3)
    if n <= 12:
        assert enumerated(W, U) <= fourier.upper
    assert fourier.upper < net.lipschitz_bound()


def test_a_loop_that_the_basis_does_not_have_is_known_by_its_monotonicity():
    """A zero-padded loop between circular maps: in Fourier slopes [0, 1/m] of the whole loop take its place."""
    C = Convolution(torch.tensor([[[0.3, 0.5, -0.2]]], **double), (1, 9))
    inside = Monotone(Convolution(torch.tensor([[[0.4, 0.6, 0.3]]], **double), (1, 9), "zero"), 0.8)
    splitting = PeacemanRachford(inside, NonNegative())
    system = trace(Net(lambda x: C(equilibrium(splitting, C(x))), C, splitting), {"data": (1, 9)}, ("data",))
    blocked, notes = relaxed(system, FourierBasis((9,)))
    assert any("known only by slopes in [0, 1.25]" in note for note in notes)
    assert not any(n.loop for n in blocked.nodes if isinstance(n, Nonlinear))
    exact = enumerated(inside.matrix(), C.matrix(), lambda v: C.matrix() @ v)
    found = all_bounds(system, FourierBasis((9,)), tolerance=1e-4)
    assert all(exact * (1 - 1e-12) <= upper <= C.norm().upper ** 2 / 0.8 * (1 + 1e-6) for upper in found.values())


def test_without_a_loop_it_is_the_prox():
    """W = 0 has margin 1: an equilibrium with nothing to feed back."""
    U = nn.Linear(3, 4, bias=False).double()
    loop = Monotone(Dense(torch.zeros(4, 4, **double)), 1.0)
    splitting = PeacemanRachford(loop, NonNegative())
    implicit = Net(lambda x: equilibrium(splitting, U(x)), U, splitting)
    explicit = Net(lambda x: torch.relu(U(x)), U)
    one, other = (uppers(net, {"data": (3,)})["spectral"] for net in (implicit, explicit))
    assert one == pytest.approx(other, rel=1e-6)


# -- what has to be proved ----------------------------------------------------------------------------------------


def test_a_loop_that_is_not_proved_monotone_is_refused():
    bad = Dense(1.5 * torch.eye(2, **double))
    with pytest.raises(NotCertifiable, match=r"not proved to be monotone.*-0\.5.*in the network itself"):
        certify(loop_only(bad, NonNegative()), shape=(2,))


def test_a_monotone_loop_given_by_any_map_is_proved_by_a_factorisation():
    W = torch.tensor([[0.2, 3.0], [-3.0, 0.2]], **double)
    net = loop_only(Dense(W), NonNegative())
    cert = certify(net, shape=(2,))
    assert enumerated(W, torch.eye(2, **double)) <= cert.upper <= 1 / 0.8 * (1 + 1e-9)
    assert any("by a factorisation" in text for text in cert.assumptions)


@pytest.mark.parametrize("prior", [MCP(0.3, concavity=3.0)])
def test_activations_that_no_convex_function_has_are_refused(prior):
    W = Monotone(Dense(torch.zeros(2, 2, **double)), 0.5)
    with pytest.raises(NotCertifiable, match="not in \\[0, 1\\]"):
        certify(loop_only(W, prior), shape=(2,))


def test_a_certificate_belongs_to_its_loop():
    net = layer(0, 3, 4, 0.5)
    cert = certify(net)
    before = trace(net, net.inputs, ("data",)).fingerprint()
    net.loop.margin.fill_(0.4)
    assert trace(net, net.inputs, ("data",)).fingerprint() != before
    with pytest.raises(VerificationError, match="other weights"):
        verify(cert, net)


@torch.no_grad()
def test_forgotten_loops_would_be_seen():
    """The same multipliers without the feedback prove a smaller number: the loop is really in the inequality."""
    net = layer(4, 3, 4, 0.1)
    system = trace(net, net.inputs, ("data",))
    (node,) = (n for n in system.nodes if isinstance(n, Nonlinear))
    assert node.loop is not None and node.slope.high == pytest.approx(1 / 0.1)
    feedforward = uppers(Net(lambda x: torch.relu(net.input_map(x)), net), net.inputs)
    assert spectral(blocks_of(system), per_channel=True) > 1.5 * feedforward["spectral"]


# -- the other questions ------------------------------------------------------------------------------------------


def test_other_certificates_take_loops():
    net = layer(1, 3, 3, 0.6)
    W, U = net.loop.matrix().detach(), net.input_map.matrix().detach()
    entry = [enumerated(W, U, lambda v, i=i: v[:, i : i + 1]) for i in range(3)]
    assert bool((rows(net).bounds >= torch.tensor(entry, **double) * (1 - 1e-9)).all())
    upper = uppers(net, net.inputs)["spectral"]
    assert float(bound(net).detach()) == pytest.approx(upper, rel=1e-2)
    at = local(net, -torch.ones(1, 3, **double), 0.1, budget_s=2)
    assert at.lower <= at.upper <= upper * (1 + 1e-3)
    assert 0 < attack(net, -torch.ones(1, 3, **double), 0.5).ratio <= enumerated(W, U)


def test_gains_of_groups_of_inputs():
    net = layer(1, 3, 3, 0.6)
    W, U = net.loop.matrix().detach(), net.input_map.matrix().detach()
    found = gains(net, {"first": ("data", slice(0, 1)), "rest": ("data", slice(1, 3))}, budget_s=2)
    scaled = U / torch.tensor([found.rho["first"], found.rho["rest"], found.rho["rest"]], **double).sqrt()
    assert 0.7 < enumerated(W, scaled) <= 1


def test_the_solution_of_a_monotone_loop_is_firmly_nonexpansive():
    square = loop_only(Monotone(Dense(torch.tensor([[1.0, 0.3], [0.0, 0.8]], **double)), 1.0), NonNegative())
    known = averagedness(square, wrt="data", shape=(2,), budget_s=30)
    assert known.lower <= known.alpha <= 0.5 * (1 + 1e-6)


def test_rough_solvers_do_not_raise_the_lower_end():
    """With a tolerance of 1e-2 the computed outputs jump; the lower end is measured on finer ones."""
    net = layer(2, 3, 3, 0.3)
    net.tol = 1e-2
    exact = enumerated(net.loop.matrix().detach(), net.input_map.matrix().detach())
    cert = certify(net)
    assert cert.lower <= exact * (1 + 1e-9) and verify(cert, net)


def test_in_ball_arithmetic():
    pytest.importorskip("flint")
    net = layer(0, 1, 2, 0.5, spatial=(4,))
    verify(certify(net, method="spectral", budget_s=2), net, exact=True)


def test_identity_loops_in_fourier():
    """W = 0.4 I as a scaled identity has a symbol in every basis."""
    C = Convolution(torch.tensor([0.3, 0.5, -0.2], **double), (1, 9))
    splitting = PeacemanRachford(0.4 * Identity((1, 9)), NonNegative())
    system = trace(Net(lambda x: equilibrium(splitting, C(x)), C, splitting), {"data": (1, 9)}, ("data",))
    assert spectral(blocks_of(system, FourierBasis((9,))), True) == pytest.approx(C.norm().upper / 0.6, rel=1e-6)
