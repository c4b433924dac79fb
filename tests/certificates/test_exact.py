"""The exact constant of a class: against full enumeration, for signs that agree, and inside the bracket."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from firmly import certify, verify
from firmly.certificates.exact import Units, branch_and_bound, exact_bound, signs_agree
from firmly.certificates.layers import layers
from firmly.certificates.lipsdp import lipsdp_multipliers
from firmly.errors import NotCertifiable

from .systems import Net, blocks_of, double, exact, system_of
from .test_lipsdp import layers_of, perceptron
from .test_published import S2, chain
from .test_soundness import PIECEWISE, RandomNetwork


def test_s1_and_s2():
    first = chain([[1, 0], [0, 0.5]], [[0.5, 0], [0, 1]])
    assert certify(first, shape=(2,), method="exact").upper == pytest.approx(0.5, rel=1e-8)
    assert certify(chain(*S2), shape=(2,), method="exact").upper == pytest.approx(3 * math.sqrt(5), rel=1e-8)


@pytest.mark.parametrize("multipliers", [True, False], ids=["with multipliers", "without"])
@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_random_programs_against_enumeration(seed, multipliers):
    net = RandomNetwork(seed, PIECEWISE, slopes=8)
    system = system_of(net, (net.size,))
    mu = lipsdp_multipliers(layers(system), 0.1).mu if multipliers else None
    true = exact(blocks_of(system))
    assert true * (1 - 1e-13) <= exact_bound(system, mu) <= true * (1 + 1e-8) + 1e-12


def test_twenty_neurons_by_branch_and_bound():
    net = perceptron(6, 20, 4)
    system = system_of(net, (6,))
    lipsdp, found = (certify(net, shape=(6,), method=m) for m in ("lipsdp", "exact"))
    assert found.lower <= found.upper <= lipsdp.upper
    W, V = net[0].weight.detach(), net[2].weight.detach()
    patterns = (torch.rand(4000, 20, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    sampled = torch.linalg.matrix_norm((V * patterns[:, None, :]) @ W, 2).max()
    assert float(sampled) <= found.upper
    assert exact_bound(system, None if found.multipliers is None else 0.7 * found.multipliers) == pytest.approx(
        found.upper, rel=1e-8
    )
    assert verify(found, net)


def test_errors_of_the_symbols_are_paid_for():
    system = system_of(perceptron(3, 3, 2), (3,))
    clean = layers(system)
    mu = lipsdp_multipliers(clean, 0.1).mu
    before = branch_and_bound(Units(clean), mu)
    for row in (*clean.rows, clean.output):
        for block in row.values():
            block.error = torch.tensor([1e-4], **double)
    assert branch_and_bound(Units(clean), mu) > before + 1e-5


# -- signs that agree ----------------------------------------------------------------------------------------------


def nonnegative(*widths: int) -> nn.Sequential:
    net = perceptron(*widths)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    return net


def product_of(net: nn.Sequential) -> torch.Tensor:
    product = torch.eye(net[0].in_features, **double)
    for module in net:
        product = module.weight.detach() @ product if isinstance(module, nn.Linear) else product
    return product


def test_nonnegative_weights_of_any_width_are_one_product():
    net = nonnegative(50, 80, 70, 10)
    cert = certify(net, shape=(50,))
    assert cert.method == "exact"
    true = float(torch.linalg.matrix_norm(product_of(net), 2))
    assert true <= cert.upper <= true * (1 + 1e-9)
    assert cert.gap < 1 + 1e-4  # large positive inputs pass all layers
    assert verify(cert, net)


def test_signs_may_be_those_of_rows_and_columns():
    net = nonnegative(4, 6, 5, 3)
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(0, 2, (4,), generator=generator) * 2.0 - 1
    after = torch.randint(0, 2, (3,), generator=generator) * 2.0 - 1
    hidden = torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1
    with torch.no_grad():
        net[0].weight.mul_(hidden[:, None] * before)
        net[2].weight.mul_(hidden)
        net[4].weight.mul_(after[:, None])
    system = system_of(net, (4,))
    assert signs_agree(layers(system, reduced=False))
    assert exact_bound(system) == pytest.approx(exact(blocks_of(system)), rel=1e-12)
    with torch.no_grad():
        net[2].weight[1, 1] *= -1
    assert not signs_agree(layers(system_of(net, (4,)), reduced=False))


def test_slopes_that_reach_further_down_than_up_do_not_agree():
    x = torch.eye(2, **double)
    assert not signs_agree(layers_of(Net(lambda d: nn.functional.leaky_relu(d @ x, -1.5)), (2,), reduced=False))
    assert signs_agree(layers_of(Net(lambda d: nn.functional.leaky_relu(d @ x, -0.5)), (2,), reduced=False))


@pytest.mark.parametrize("seed", range(0, 60))
def test_agreeing_signs_of_random_programs_are_exact(seed):
    net = RandomNetwork(seed, [torch.relu, lambda x: x.clamp(-1, 1)], slopes=8)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    system = system_of(net, (net.size,))
    if signs_agree(layers(system, reduced=False)):
        assert exact_bound(system) == pytest.approx(exact(blocks_of(system)), rel=1e-9, abs=1e-12)


def test_what_is_out_of_reach_is_refused():
    with pytest.raises(NotCertifiable, match="40 neurons"):
        certify(perceptron(5, 40, 3), shape=(5,), method="exact")
    with pytest.raises(NotCertifiable, match="separable"):
        A = torch.randn(3, 3, **double, generator=torch.Generator().manual_seed(0))
        certify(Net(lambda x: torch.softmax(x @ A, -1) @ A), shape=(3,), method="exact")


# -- auto ----------------------------------------------------------------------------------------------------------


def test_auto_stops_when_the_gap_is_closed():
    methods = [b.method for b in certify(nn.Linear(3, 2, **double), shape=(3,)).bounds]
    assert methods == ["product"]


def test_auto_goes_from_cheap_to_tight():
    cert = certify(perceptron(4, 4, 4, 2), shape=(4,))
    assert [b.method for b in cert.bounds] == ["product", "averaged", "lipsdp", "exact"]
    values = [b.value for b in cert.bounds]
    assert values == sorted(values, reverse=True) or values[-1] == pytest.approx(values[-2], rel=1e-6)


def test_auto_stops_when_time_is_up():
    """What norms alone prove takes next to nothing; no search begins."""
    cert = certify(perceptron(4, 4, 4, 2), shape=(4,), budget_s=0.0)
    assert [b.method for b in cert.bounds] == ["product", "averaged"]


def test_agreeing_signs_say_nothing_of_nonlinearities_that_mix_entries():
    """Softmax of (x, 0) seen through (1, 10): by signs alone the bound would be 1/2, and 9/4 is attained."""
    first, last = (nn.Linear(n, m, bias=False) for n, m in ((1, 2), (2, 1)))
    first.weight.data, last.weight.data = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 10.0]])
    net = nn.Sequential(first, nn.Softmax(-1), last)
    assert not signs_agree(layers(system_of(net, (1,)), reduced=False))
    with pytest.raises(NotCertifiable, match="separable"):
        certify(net, shape=(1,), method="exact")
    cert = certify(net, shape=(1,))
    assert 2.25 * (1 - 1e-6) <= cert.lower <= cert.upper
