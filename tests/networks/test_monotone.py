"""Monotone layers: the equilibrium, its gradient against finite differences, settings, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from firmly.algorithms import EquilibriumForwardBackward, PeacemanRachford
from firmly.errors import ConditionError, NotConverged, NotDiagonal, NotDifferentiable, SettingsError, ShapeError
from firmly.fixedpoint import Status, equilibrium
from firmly.fixedpoint.equilibrium import Attached, Slopes, by_splitting
from firmly.linear import Convolution, Monotone, monotonicity
from firmly.networks import MonotoneLayer
from firmly.prox import L1, MCP, ElasticNet, GroupL1, NonNegative

double = {"dtype": torch.float64}


def made(*args, **settings) -> MonotoneLayer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MonotoneLayer(*args, **settings).double()
        torch.nn.init.normal_(layer.bias)
    return layer


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **double)


CASES = {
    "dense": made(3, 4, 0.5),
    "dense, forward-backward": made(3, 4, 1.2, splitting="forward-backward"),
    "soft threshold": made(3, 4, 0.5, prior=L1(torch.nn.Parameter(torch.tensor(0.2, **double)))),
    "elastic net, 1-D": made(2, 2, 0.7, spatial=(5,), prior=ElasticNet(0.1, 0.4)),
    "2-D": made(2, 3, 0.6, spatial=(4, 3)),
}


@pytest.mark.parametrize("name", CASES)
class TestEquilibrium:
    def test_solves_its_equation(self, name):
        layer = CASES[name]
        x = data(3, *layer.inputs["data"])
        z = layer(x).detach()
        again = layer.prior.prox(layer.loop(z) + layer.input_map(x) + layer.bias)
        torch.testing.assert_close(again, z, rtol=0, atol=1e-9)
        solution = layer.solve(x)
        assert solution.status is Status.CONVERGED and solution.residual <= torch.finfo(torch.float64).eps ** 0.75
        torch.testing.assert_close(solution.x, z, rtol=0, atol=1e-9)

    def test_gradients_against_finite_differences(self, name):
        layer = CASES[name]
        names = [n for n, _ in layer.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

        def run(x, *parameters):
            return functional_call(layer, dict(zip(names, parameters)), (x,))

        assert torch.autograd.gradcheck(run, (data(2, *layer.inputs["data"]).requires_grad_(), *values), fast_mode=True)

    def test_monotone_for_any_weights(self, name):
        layer = CASES[name]
        W = layer.loop.matrix().detach()
        smallest = float(torch.linalg.eigvalsh(torch.eye(len(W), **double) - 0.5 * (W + W.T))[0])
        assert smallest >= monotonicity(layer.loop) - 1e-12

    def test_batch_equals_loop(self, name):
        layer = CASES[name]
        x = data(3, *layer.inputs["data"])
        each = torch.cat([layer(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(layer(x), each, rtol=0, atol=1e-9)


def test_splittings_agree():
    one, other = made(3, 4, 1.2), made(3, 4, 1.2, splitting="forward-backward")
    torch.testing.assert_close(one(data(2, 3)), other(data(2, 3)), rtol=0, atol=1e-9)


def test_gradient_equals_that_of_many_unrolled_iterations():
    layer = CASES["dense"]
    x = data(2, 3).requires_grad_()
    (implicit,) = torch.autograd.grad(layer(x).square().sum(), x)
    algorithm, w = layer.algorithm(), layer.input_map(x) + layer.bias
    state = algorithm.start(w)
    for k in range(200):
        state = algorithm.step(state, w, k)
    (unrolled,) = torch.autograd.grad(algorithm.read(state).square().sum(), x)
    torch.testing.assert_close(implicit, unrolled, rtol=0, atol=1e-9)


def test_single_precision_trains():
    torch.manual_seed(0)
    layer = MonotoneLayer(3, 6, 0.5)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, target = data(16, 3).float(), data(16, 6).float()
    losses = []
    for _ in range(15):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert layer(x).dtype == torch.float32 and losses[-1] < 0.9 * losses[0]


def test_what_does_not_converge_is_refused():
    layer = made(3, 4, 0.5)
    layer.max_iterations = 3
    assert layer.solve(data(2, 3)).status is Status.LIMIT
    with pytest.raises(NotConverged, match=r"the equilibrium was not reached: stopped at the iteration limit.*3 iter"):
        layer(data(2, 3))


@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()], ids=["of a linear loss", "of a square"])
def test_a_second_derivative_is_refused(loss):
    layer, x = CASES["dense"], data(1, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with pytest.raises(NotDifferentiable, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum() + x.sum(), x)


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_margins_are_positive(margin):
    with pytest.raises(ConditionError, match="margin"):
        MonotoneLayer(2, 3, margin)


def test_bad_settings_are_refused():
    with pytest.raises(SettingsError, match="at least 1"):
        MonotoneLayer(0, 3)
    with pytest.raises(SettingsError, match="splitting"):
        MonotoneLayer(2, 3, splitting="douglas")  # type: ignore[arg-type]
    with pytest.raises(ConditionError, match="MCP is convex"):
        made(3, 4, prior=MCP(0.3, 3.0))(data(1, 3))
    with pytest.raises(ShapeError):
        CASES["dense"](data(1, 5))
    dense = CASES["dense"].loop
    with pytest.raises(ShapeError, match="B maps"):
        Monotone(dense.A, 0.5, CASES["2-D"].loop.B)


def test_a_margin_changed_by_loading_weights_is_seen():
    """Margins are stored with the weights, so that a solver never goes on with an old inverse."""
    one, other = made(3, 4, 0.5), made(3, 4, 2.0)
    other(data(1, 3))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(data(1, 3)), one(data(1, 3)))


def test_a_large_loop_without_frequencies_needs_no_matrix():
    C = Convolution(torch.tensor([0.2, 0.5, 0.1], **double), (1, 5000), "zero")
    with pytest.raises(NotDiagonal, match="forward-backward"):
        equilibrium(PeacemanRachford(Monotone(C, 0.9), NonNegative()), data(1, 1, 5000))
    loop = Monotone(C, 0.9)
    v = equilibrium(EquilibriumForwardBackward(loop, NonNegative()), data(1, 1, 5000))
    torch.testing.assert_close(torch.relu(loop(v) + data(1, 1, 5000)), v)


def test_frozen_layers_record_no_graph():
    layer = made(3, 4, 0.5).requires_grad_(False)
    assert not layer(data(2, 3)).requires_grad
    assert layer(data(2, 3).requires_grad_()).requires_grad


def test_priors_whose_derivative_is_not_diagonal():
    """Groups of channels: the transposed system is solved by GMRES."""
    layer = made(2, 4, 0.6, spatial=(5,), prior=GroupL1(0.3))
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (data(2, 2, 5).requires_grad_(), *values), fast_mode=True)


def test_a_gradient_that_is_not_reached_is_refused():
    layer = made(3, 4, 0.5)
    splitting, x = layer.algorithm(), data(2, 3).requires_grad_()
    entering = splitting.loop(layer(x)) + layer.input_map(x) + layer.bias
    u, residual = by_splitting(splitting, entering, torch.ones_like(entering), 1e-12, 1)
    assert residual > 1e-3
    value = Attached.apply(entering, lambda g: (u, residual), 1e-11)
    with pytest.raises(NotConverged, match="the gradient of an equilibrium was not reached"):
        value.sum().backward()


def test_a_linear_activation_has_the_prox_of_its_function():
    d, z = torch.tensor([[0.0, 0.3, 0.7, 1.0]], **double), data(1, 4)
    prior = Slopes(d)
    for step in (1.0, 0.4, 3.0):
        x = prior.prox(z, step)
        optimality = x - z + step * torch.where(d > 0, (1 / d - 1) * x, z - x)
        inner = (d > 0) & (d < 1)
        assert torch.allclose(optimality[inner], torch.zeros(()).double()) and x[0, 0] == 0 and x[0, 3] == z[0, 3]
    torch.testing.assert_close(prior.prox(z), d * z)
    x = torch.tensor([[0.0, 2.0, 1.0, 5.0]], **double)
    torch.testing.assert_close(prior.value(x), torch.tensor([0.5 * ((1 / 0.3 - 1) * 4 + (1 / 0.7 - 1))], **double))


def test_a_loose_tolerance_gives_loose_gradients_within_it():
    layer, x = made(2, 8, 0.5, spatial=(6, 6)), data(2, 2, 6, 6)
    exact = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    layer.tol = 1e-3
    loose = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(exact, loose):
        assert 0 < float((a - b).norm()) <= 0.05 * float(a.norm())


def test_the_fully_connected_network_of_the_paper():
    """784 to 87 with margin 1: at most 30 iterations to 1e-6 with step 1/2, and the gradient of unrolled iterations."""
    layer, x = made(784, 87, 1.0), data(4, 784).requires_grad_()
    layer.step_size, layer.tol = 0.5, 1e-6
    assert layer.solve(x).iterations <= 30
    layer.tol = None
    (implicit,) = torch.autograd.grad(layer(x).square().sum(), x)
    algorithm, w = layer.algorithm(), layer.input_map(x) + layer.bias
    state = algorithm.start(w)
    for k in range(200):
        state = algorithm.step(state, w, k)
    (unrolled,) = torch.autograd.grad(algorithm.read(state).square().sum(), x)
    torch.testing.assert_close(implicit, unrolled, rtol=0, atol=1e-9)
    J = torch.autograd.functional.jacobian(layer, x[:1].detach()).reshape(87, 784)
    assert float(torch.linalg.matrix_norm(J, 2)) <= layer.lipschitz_bound()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_moves_between_devices_and_precisions(device):
    layer = made(2, 8, 0.5, spatial=(4, 4))
    x = data(2, 2, 4, 4)
    expected = layer(x)
    moved = layer.to(device, torch.float32)
    torch.testing.assert_close(moved(x.to(device).float()).cpu().double(), expected, rtol=0, atol=1e-4)
    layer.to("cpu", torch.float64)


def test_autocast_leaves_the_precision_of_the_loop():
    layer = made(3, 4, 0.5).float()
    x = data(2, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    w = (x.bfloat16() @ layer.input_map.weight.bfloat16().T).float() + layer.bias
    torch.testing.assert_close(z, torch.relu(layer.loop(z) + w), rtol=0, atol=1e-5)
    z.sum().backward()
    assert z.dtype == torch.float32 and all(p.grad is not None for p in layer.parameters())


def test_forward_mode_is_refused():
    layer, x = CASES["dense"], data(1, 3)
    with pytest.raises(NotDifferentiable, match="backwards only"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
