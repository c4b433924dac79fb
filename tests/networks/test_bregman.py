"""BregmaNets: the mirror form is the published layer, averages change the width, deep ones train, certificates hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import firmly as fm
from firmly.errors import ConditionError, DataError, NotCertifiable, SettingsError, ShapeError, VerificationError
from firmly.linear import Convolution, Dense
from firmly.networks import BregmaNet, BregmanLayer, BregmanMean
from firmly.prox import Legendre, RowStochastic, legendre
from firmly.prox.legendre_mean import mean

NAMES = ["sigmoid", "tanh", "scaled_tanh", "atan", "isru", "asinh", "softplus", "bent", "hypentropy", "leaky_relu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def learned(net: Any, size: float = 0.3) -> Any:
    """The network in double precision with weights off their start."""
    net = net.double()
    for parameter in net.parameters():
        parameter.data += size * torch.rand_like(parameter)
    return net


# -- two forms of one network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features, spatial", [((4, 4, 4), ()), ((5, 3, 6), ()), ((2, 3, 2), (4, 6)), (3, (5,))])
def test_mirror_form_is_the_published_layer(name, features, spatial):
    net = BregmaNet(features, activation=name, spatial=spatial)
    learned(net, 0.2 if name == "hypentropy" else 0.3)
    u = torch.randn(3, *net.inputs["data"], dtype=torch.float64)
    x = net.activation(u)
    for layer in net.layers:
        x = layer.primal(x)
    assert torch.allclose(net.activation(net(u)), x, rtol=1e-10, atol=1e-10)


def test_forms():
    nets = {form: BregmaNet(4, 3, "sigmoid", form=form).double() for form in ("dual", "primal", "mixed")}
    for net in nets.values():
        net.load_state_dict(nets["dual"].state_dict())
    u = torch.randn(5, 4, dtype=torch.float64)
    out = nets["dual"](u)
    assert torch.allclose(nets["primal"](torch.sigmoid(u)), torch.sigmoid(out), rtol=1e-12)
    assert torch.equal(nets["mixed"](u), torch.sigmoid(out))
    with pytest.raises(DataError, match="domain"):
        nets["primal"](u)


def test_mirror_form_where_the_inverse_is_lost():
    net = BregmaNet(4, 3, "tanh")
    u = 30 * torch.randn(5, 4)
    assert bool(net(u).isfinite().all())
    with pytest.raises(DataError, match="dual coordinates"):
        net.layers[0].primal(net.activation(u))


def test_gradients():
    net = learned(BregmaNet([3, 3, 2], activation="tanh"))
    u = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(u: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip((n for n, _ in net.named_parameters()), weights))
        return torch.func.functional_call(net, named, (u,))

    weights = [p.detach().clone().requires_grad_(True) for p in net.parameters()]
    assert torch.autograd.gradcheck(run, (u, *weights))


def test_refusals():
    with pytest.raises(SettingsError, match="form"):
        BregmaNet(3, 2, form="both")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="depth of 2"):
        BregmaNet([3, 3, 3], 5)
    for features, depth in ((0, 2), ([3], None), (3, 0)):
        with pytest.raises(SettingsError, match="at least one layer"):
            BregmaNet(features, depth)
    with pytest.raises(SettingsError, match="choose one of"):
        BregmaNet(3, 2, "relu")
    with pytest.raises(SettingsError, match="kernel_size"):
        BregmaNet(3, 2, spatial=(4, 4), kernel_size=0)
    with pytest.raises(ShapeError, match="skip"):
        BregmanLayer(Dense(torch.randn(3, 4)), legendre("tanh"))
    with pytest.raises(ShapeError, match="skip"):
        BregmanLayer(Dense(torch.randn(3, 4)), legendre("tanh"), average=RowStochastic(4, 2))
    with pytest.raises(ShapeError, match="given"):
        BregmaNet(3, 2)(torch.randn(2, 4))


# -- invertible ones (more in test_bregman_invertible) ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["dual", "primal", "mixed"])
def test_inverse_and_log_det_in_every_form(form):
    # in primal coordinates a saturated output has lost the digits of its input
    net = learned(BregmaNet(4, 3, "tanh", invertible=True, form=form), 0.5 if form == "dual" else 0.1)
    u = torch.randn(6, 4, dtype=torch.float64)
    x = torch.tanh(u) if form == "primal" else u
    assert torch.allclose(net.inverse(net(x)), x, rtol=1e-9, atol=1e-10)
    assert torch.allclose(net.log_det(x), torch.linalg.slogdet(jacobians(net, x)).logabsdet, atol=1e-9)


def test_inverse_of_convolutions():
    net = learned(BregmaNet(2, 3, "softplus", invertible=True, spatial=(4, 4)), 0.3)
    u = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert torch.allclose(net.inverse(net(u)), u, rtol=1e-9, atol=1e-10)
    assert torch.allclose(net.log_det(u), torch.linalg.slogdet(jacobians(net, u)).logabsdet, atol=1e-9)


def test_what_is_not_invertible_is_refused():
    with pytest.raises(ConditionError, match="keeps its width"):
        BregmaNet([4, 3], invertible=True)
    with pytest.raises(ConditionError):
        BregmaNet(3, 2, "exp", invertible=True)
    net = BregmaNet([4, 4, 3], activation="tanh").double()
    with pytest.raises(ConditionError, match="keep their width"):
        net.inverse(torch.zeros(1, 3, dtype=torch.float64))
    single = BregmaNet(1, 1).double()
    single.layers[0].linear.weight.data.fill_(-1.5)
    with pytest.raises(ConditionError):
        single.inverse(torch.zeros(1, 1, dtype=torch.float64))
    with pytest.raises(ConditionError):
        single.log_det(torch.zeros(1, 1, dtype=torch.float64))


# -- averages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial, pool", [((), 1), ((4,), 1), ((4, 6), 2), ((2, 2, 4), 2)])
def test_row_stochastic_maps(spatial, pool):
    average = learned(RowStochastic(3, 5, spatial, pool))
    matrix = average.matrix().detach()
    assert bool((matrix >= 0).all())
    assert torch.allclose(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), atol=1e-14)
    x, y = torch.randn(2, *average.domain).double(), torch.randn(2, *average.codomain).double()
    assert torch.allclose((average(x) * y).sum(), (x * average.T(y)).sum(), rtol=1e-12)
    bracket = average.norm()
    assert bracket.lower <= float(torch.linalg.matrix_norm(matrix, 2)) * (1 + 1e-12)
    assert bracket.upper >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-12)
    assert average._upper() >= bracket.upper * (1 - 1e-9)
    logs = average.log_average(x.log_softmax(1))
    assert torch.allclose(logs, average(x.softmax(1)).log(), rtol=1e-12)


def test_projection_is_the_nearest_point_of_the_simplex():
    average = RowStochastic(3, 1).double()
    average.raw.data = torch.tensor([[0.1, 0.2, 5.0]], dtype=torch.float64)
    assert torch.equal(average.channel_matrix().detach(), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))
    average.raw.data = torch.tensor([[0.5, 0.3, -0.4]], dtype=torch.float64)
    assert torch.allclose(average.channel_matrix(), torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64))
    average = RowStochastic(2, 4).double()
    assert torch.equal(average.channel_matrix().detach(), torch.eye(2).double().repeat(2, 1))
    assert torch.autograd.gradcheck(
        lambda raw: fm.prox.simplex.onto_simplex(raw, 1.0, 1), torch.rand(3, 4).double().requires_grad_()
    )
    with pytest.raises(SettingsError, match="divide"):
        RowStochastic(2, 2, (5,), pool=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 12.0])
def test_means_lie_between_and_keep_constants(name, size):
    size = min(size, 3.0) if name == "hypentropy" else size
    pair, average = legendre(name), learned(RowStochastic(4, 3))
    u = (size * torch.randn(50, 4, dtype=torch.float64)).requires_grad_(True)
    m = mean(pair, average, u)
    used = (average.channel_matrix() > 0)[None].expand(50, -1, -1)
    lowest = torch.where(used, u[:, None], math.inf).amin(2)
    highest = torch.where(used, u[:, None], -math.inf).amax(2)
    assert bool((m >= lowest - 1e-9 * size).all() and (m <= highest + 1e-9 * size).all())
    same = torch.linspace(-size, size, 11, dtype=torch.float64)[:, None].expand(-1, 4)
    assert torch.allclose(mean(pair, average, same), same[:, :3], rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(m.sum(), u)
    assert bool(gradient.isfinite().all() and (gradient >= 0).all())


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "exp"])
def test_means_of_underflowing_values(name):
    pair, average = legendre(name), learned(RowStochastic(3, 2))
    average.raw.data[0] = torch.tensor([0.5, 0.5, -3.0])  # whose mean leaves the last out
    u = torch.tensor([[-2000.0, -1999.0, 4.0], [-5000.0, -900.0, -30.0]], dtype=torch.float64, requires_grad=True)
    m = mean(pair, average, u)
    assert bool((m >= u.amin(1, keepdim=True) - 1e-9).all() and (m <= u.amax(1, keepdim=True) + 1e-9).all())
    rate = 2.0 if name == "tanh" else 1.0
    assert float(m[0, 0].detach()) == pytest.approx(-2000 + math.log(0.5 + 0.5 * math.exp(rate)) / rate, abs=1e-9)
    (gradient,) = torch.autograd.grad(m[0, 0], u)
    assert torch.allclose(gradient[0].sum(), torch.ones(()).double(), atol=1e-9)
    near = u.detach() / 300
    assert torch.allclose(
        fm.prox.legendre_mean._mean_of_logarithms(pair, average, near), mean(pair, average, near), rtol=1e-9, atol=1e-9
    )


def test_derivatives_of_logarithmic_means_at_zeros_of_the_average():
    average = RowStochastic(3, 2).double()
    average.raw.data = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    u = torch.randn(2, 3, dtype=torch.float64)

    def through(raw: Tensor, logarithmic: bool) -> Tensor:
        def run(u: Tensor) -> Tensor:
            return average.log_average(u) if logarithmic else average(u.exp()).log()

        return torch.func.functional_call(Runner(average, run), {"average.raw": raw}, (u,)).square().sum()

    def derivatives(logarithmic: bool) -> tuple[Tensor, Tensor]:
        raw = average.raw.detach().clone().requires_grad_(True)
        (first,) = torch.autograd.grad(through(raw, logarithmic), raw, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), raw)[0]

    for found, expected in zip(derivatives(True), derivatives(False)):
        assert torch.allclose(found, expected, rtol=1e-10)


class Runner(nn.Module):
    def __init__(self, average: RowStochastic, run):
        super().__init__()
        self.average, self.run = average, run

    def forward(self, u: Tensor) -> Tensor:
        return self.run(u)


# -- certificates --------------------------------------------------------------------------------------------------


def steepest_jacobian(net: nn.Module, shape: tuple[int, ...], sizes=(0.3, 1.0, 5.0), count: int = 60) -> float:
    points = torch.cat([size * torch.randn(count, *shape, dtype=torch.float64) for size in sizes])
    return float(torch.linalg.matrix_norm(jacobians(net, points), 2).max())


def jacobians(net: nn.Module, points: Tensor) -> Tensor:
    """(batch, outputs, inputs)."""
    x = points.detach().requires_grad_(True)
    outputs = net(x).flatten(1)
    rows = [torch.autograd.grad(outputs[:, i].sum(), x, retain_graph=True)[0] for i in range(outputs.shape[1])]
    return torch.stack(rows, 1).flatten(2)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "exp"])
@pytest.mark.parametrize("widths", [(4, 2), (2, 5)])
def test_means_are_certified(name: str, widths: tuple[int, int]):
    net = learned(BregmanMean(legendre(name), RowStochastic(*widths)))
    certificate = fm.certify(net, shape=widths[:1], budget_s=5)
    assert steepest_jacobian(net, widths[:1]) <= certificate.upper
    assert certificate.upper <= math.sqrt(widths[1]) * (1 + 1e-6)
    assert "row-stochastic" in " ".join(certificate.assumptions)


def test_means_that_select_are_linear():
    net = BregmaNet([2, 4], activation="atan").double()
    assert fm.certify(net).upper > math.sqrt(2) * (1 - 1e-9)
    u = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(mean(legendre("atan"), net.layers[0].average, u), u.repeat(1, 2), rtol=1e-12)


def test_certificate_files(tmp_path):
    net = learned(BregmaNet([4, 3, 3], activation="tanh"))
    fm.certify(net, budget_s=3).save(tmp_path / "net.certificate")
    fm.verify(tmp_path / "net.certificate", net)
    net.layers[0].average.raw.data[0] += torch.tensor([0.3, 0.0, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(VerificationError):
        fm.verify(tmp_path / "net.certificate", net)


def test_a_weight_that_rounding_hides_is_not_forgotten():
    average = RowStochastic(2, 3).double()
    average.raw.data = torch.tensor([[1.0, 1e-17], [1.0, 1e-17], [1.0, 0.0]], dtype=torch.float64)
    assert float(average.channel_matrix().detach().amax()) == 1.0
    assert average.selects() == bool((average.channel_matrix().detach().count_nonzero(1) == 1).all())
    net = BregmanMean(legendre("sigmoid"), average)
    points = torch.tensor([[-45.0, 20.0], [-60.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    steepest = float(torch.linalg.matrix_norm(jacobians(net, points), 2).max())
    assert steepest <= fm.certify(net, shape=(2,), budget_s=5).upper


def test_pooled_means_are_certified():
    net = learned(BregmanMean(legendre("tanh"), RowStochastic(2, 3, (4, 4), pool=2)))
    certificate = fm.certify(net, shape=(2, 4, 4), budget_s=5)
    assert steepest_jacobian(net, (2, 4, 4), count=20) <= certificate.upper <= math.sqrt(3) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["atan", "isru", "asinh", "bent"])
def test_means_without_a_bound_are_refused(name):
    with pytest.raises(NotCertifiable, match="has no bound"):
        fm.certify(learned(BregmaNet([4, 2], activation=name)))


def test_means_of_leaky_relus():
    net = learned(BregmanMean(legendre("leaky_relu", negative_slope=0.5), RowStochastic(3, 2)))
    certificate = fm.certify(net, shape=(3,), budget_s=5)
    assert steepest_jacobian(net, (3,)) <= certificate.upper
    assert certificate.upper <= 2 * net.average.norm().upper * (1 + 1e-6)


def test_certificates_of_random_networks():
    """100 of the 1,000 networks that the benchmark counts."""
    violations, beaten = 0, []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        name = ("sigmoid", "tanh", "atan", "softplus", "leaky_relu")[seed % 5]
        width, depth = 2 + seed % 3, 1 + seed % 4
        net = BregmaNet(width, depth, name, form=("dual", "mixed")[seed % 2]).double()
        for layer in net.layers:
            layer.linear.weight.data = torch.randn(width, width, generator=generator, dtype=torch.float64)
        certificate = fm.certify(net, budget_s=0.05)
        product = math.prod(
            1 + net.activation.lipschitz * float(torch.linalg.matrix_norm(layer.linear.weight.detach(), 2))
            for layer in net.layers
        ) * (1.0 if net.form == "dual" else net.activation.lipschitz)
        points = 2 * torch.randn(20, width, generator=generator, dtype=torch.float64)
        sampled = float(torch.linalg.matrix_norm(jacobians(net, points), 2).max())
        violations += not max(certificate.lower, sampled) <= certificate.upper <= product * (1 + 1e-9)
        beaten.append(product / certificate.upper)
    assert violations == 0
    assert math.prod(beaten) ** (1 / len(beaten)) > 1.2


def test_groups_and_locality():
    net = learned(BregmaNet(4, 3, "tanh"))
    star = fm.certificates.star(net, {"left": ("data", slice(0, 2)), "right": ("data", slice(2, 4))}, budget_s=6)
    whole = fm.certify(net, budget_s=3)
    assert max(c.lower for c in star.groups.values()) <= whole.upper
    assert star.upper >= whole.lower
    near = fm.certificates.local(net, torch.randn(1, 4, dtype=torch.float64), 0.01, budget_s=5)
    assert near.lower <= near.upper <= whole.upper * (1 + 1e-6)


# -- training ------------------------------------------------------------------------------------------------------


def spirals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    label = torch.arange(count) % 2
    angle = 0.5 + 2.5 * torch.rand(count, generator=generator).sqrt() * math.pi
    arm = angle[:, None] / 8 * torch.stack([angle.cos(), angle.sin()], 1) * (1 - 2 * label[:, None])
    return arm + 0.02 * torch.randn(count, 2, generator=generator), label


@pytest.mark.parametrize("name", ["tanh", "atan"])
def test_a_hundred_layers_train(name):
    x, label = spirals(128, torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(2, 8), BregmaNet(8, 100, name, form="mixed"), nn.Linear(8, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), label)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_averages_learn():
    net = BregmaNet([6, 2], activation="sigmoid")
    before = net.layers[0].average.channel_matrix().detach().clone()
    u = torch.randn(64, 6)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        (net(u) - u[:, 1:3]).square().mean().backward()
        optimiser.step()
    after = net.layers[0].average.channel_matrix().detach()
    assert float((after - before).abs().max()) > 0.05
    assert torch.allclose(after.sum(1), torch.ones(2), atol=1e-6)


def test_saved_and_loaded():
    net, twin = (BregmaNet([3, 4, 4], activation="tanh", spatial=(4, 4)) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    u = torch.randn(2, 3, 4, 4)
    assert torch.equal(net(u), twin(u))
    assert isinstance(net.layers[1].weight(), Convolution)
    assert isinstance(net.activation, Legendre)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("features, spatial", [((5, 3, 6), ()), ((2, 3, 2), (4, 6))])
def test_on_cuda(features, spatial):
    net = BregmaNet(features, activation="tanh", spatial=spatial)
    u = torch.randn(3, *net.inputs["data"])
    expected = net(u)
    assert torch.allclose(net.cuda()(u.cuda()).cpu(), expected, atol=1e-4)
