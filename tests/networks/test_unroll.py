"""Unrolled networks: equal to the iteration, learnable inside the rules, light on memory, safe to store."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from firmly import unroll
from firmly.algorithms import ChambollePock, DualForwardBackward, ForwardBackward, Hqs
from firmly.algorithms.algorithm import check, number
from firmly.certificates.signal import trace
from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.prox import L1, NonNegative

from ..algorithms.problems import SHAPE, blur, data, edges, ridge
from ..algorithms.test_conformance import CASES

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cases
class TestUnrolled:
    def test_without_learning_it_is_the_iteration(self, case):
        algorithm, y = case.make(), data()
        x = torch.rand(2, *algorithm.image_shape, dtype=torch.float64)
        for start in (None, x):
            state = algorithm.start(y, start)
            for k in range(12):
                state = algorithm.step(state, y, k)
            network = unroll(algorithm, depth=12, learn=())
            assert (network(y, start) - algorithm.read(state)).abs().max() < 1e-14
        assert network.inputs == {"data": algorithm.data_shape, "start": algorithm.image_shape}

    def test_learned_parameters_start_at_the_algorithm(self, case):
        algorithm, y = case.make(**case.scalars).double(), data()
        network = unroll(algorithm, depth=3)
        for layer in network.layers:
            for name, value in case.scalars.items():
                assert number(getattr(layer, name)) == pytest.approx(value, rel=1e-5)
            assert [c.holds for c in layer.conditions()] == [True] * len(layer.conditions())
        torch.testing.assert_close(network(y), unroll(algorithm, 3, learn=())(y), atol=1e-4, rtol=0)

    def test_every_layer_learns_on_its_own(self, case):
        network = unroll(case.make(), depth=3)
        y = data()
        network(y).square().sum().backward()
        own = [dict(layer.named_parameters()) for layer in network.layers]
        assert own[0] and all(set(own[0]) == set(o) for o in own)
        assert len({id(p) for o in own for p in o.values()}) == 3 * len(own[0])
        assert all(p.grad is not None for p in own[0].values())
        before = network(y).detach()
        with torch.no_grad():
            for p in own[1].values():
                p.add_(0.1)
        assert not torch.equal(network(y), before)

    @pytest.mark.parametrize("raw", [-25.0, 25.0])
    def test_learned_scalars_cannot_leave_their_rule(self, case, raw):
        network = unroll(case.make(**case.scalars), depth=2)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if any(scalar in name for scalar in case.scalars):
                    parameter.fill_(raw)
        for layer in network.layers:
            check(layer.conditions())
        for layer in network.float().layers:
            check(layer.conditions())

    def test_gradients_of_two_layers(self, case):
        network, y = unroll(case.make(), depth=2).double(), data(1)
        parameters = dict(network.named_parameters())
        seen = [n for n in parameters if "kernel" not in n]

        def loss(y, *values):
            replaced = dict(zip(seen, values, strict=True))
            return torch.func.functional_call(network, replaced, (y,)).flatten()[:4]

        values = [parameters[n].detach().requires_grad_() for n in seen]
        assert torch.autograd.gradcheck(loss, (y.requires_grad_(), *values), atol=1e-6)

    def test_state_dict_holds_every_tensor_once_and_round_trips(self, case, tmp_path):
        y = data()
        network, fresh = (unroll(case.make(), depth=3) for _ in range(2))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        tensors = network.state_dict()
        assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
        save_file(tensors, tmp_path / "weights.safetensors")
        fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(fresh(y), network(y))

    def test_copies_are_independent(self, case):
        network, y = unroll(case.make(), depth=2), data()
        copied, before = copy.deepcopy(network), network(y).detach()
        assert torch.equal(copied(y), before)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.1)
        assert torch.equal(network(y), before) and not torch.equal(copied(y), before)


@pytest.mark.parametrize("make", [lambda: ForwardBackward(blur(), L1(0.01)), lambda: Hqs(blur(), ridge=ridge())])
@pytest.mark.parametrize("every", [1, 7, 100])
def test_checkpointing_gives_equal_gradients(make, every):
    y = data()
    plain, light = unroll(make(), depth=20), unroll(make(), depth=20, checkpoint=every)
    assert torch.equal(plain(y), light(y))
    for network in (plain, light):
        network(y).square().sum().backward()
    for a, b in zip(plain.parameters(), light.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad)


def test_checkpointing_does_not_stand_in_the_way_of_a_trace():
    network = unroll(ForwardBackward(blur(), L1(0.01)), depth=4, checkpoint=2)
    for wrt in (["data"], ["start"]):
        plain = trace(unroll(ForwardBackward(blur(), L1(0.01)), depth=4), network.inputs, wrt, keep_gradients=True)
        assert len(trace(network, network.inputs, wrt, keep_gradients=True).nodes) == len(plain.nodes)


def test_depth_of_hundreds_keeps_few_states():
    """With a checkpoint every 20 layers the graph between checkpoints is not kept: far fewer saved tensors."""
    y = data()
    kept = {}
    for every in (0, 20):
        network, kept[every] = unroll(ForwardBackward(blur(), L1(0.01)), depth=400, checkpoint=every), 0

        def count(tensor, every=every):
            kept[every] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            result = network(y)
        result.sum().backward()
        assert all(bool(torch.isfinite(p.grad)) for p in network.parameters())
    assert kept[20] < kept[0] / 20


def test_what_is_not_learned_is_one_object():
    algorithm = ForwardBackward(blur(), L1(0.1))
    network = unroll(algorithm, depth=3, learn=("step_size",))
    assert all(layer.A is algorithm.A and layer.prior is algorithm.prior for layer in network.layers)
    assert sorted(network.state_dict()) == [
        *(f"layers.{k}.parametrizations.step_size.original" for k in range(3)),
        "shared.A.kernel",
    ]
    network.float()
    assert network.layers[2].A.kernel.dtype == torch.float32 and network.layers[2].A is network.shared.A


def test_a_learned_dual_step_follows_the_learned_primal_step():
    network = unroll(ChambollePock(blur(), L1(0.1), edges()), depth=1, learn=("step_size", "dual_step"))
    layer = network.layers[0]
    before = number(layer.step_size) * number(layer.dual_step)
    with torch.no_grad():
        layer.parametrizations.step_size.original.add_(1.0)
    assert number(layer.step_size) * number(layer.dual_step) == pytest.approx(before)
    check(layer.conditions())


def test_a_learned_primal_step_alone_respects_the_fixed_dual_step():
    network = unroll(ChambollePock(blur(), L1(0.1), edges(), dual_step=0.2), depth=1, learn=("step_size",))
    with torch.no_grad():
        network.layers[0].parametrizations.step_size.original.fill_(30.0)
    check(network.layers[0].conditions())


def test_training_with_huge_steps_stays_inside_the_conditions():
    network, y = unroll(ForwardBackward(blur(), L1(0.1), ridge=ridge()), depth=3), data()
    optimiser = torch.optim.SGD(network.parameters(), lr=10.0)
    for _ in range(5):
        optimiser.zero_grad()
        (network(blur()(y)) - y).square().mean().backward()
        optimiser.step()
        for layer in network.layers:
            check(layer.conditions())


def test_names_that_cannot_be_learned_are_refused():
    algorithm = ForwardBackward(blur(), NonNegative())
    with pytest.raises(SettingsError, match=r"ForwardBackward cannot learn 'steps'; it can learn \('step_size',\)"):
        unroll(algorithm, depth=2, learn=("steps",))
    with pytest.raises(SettingsError, match=r"the prior of this ForwardBackward, NonNegative.*nothing to learn"):
        unroll(algorithm, depth=2, learn=("prior",))
    with pytest.raises(SettingsError, match="the ridge of this ForwardBackward, None, has nothing to learn"):
        unroll(algorithm, depth=2, learn=("ridge",))
    with pytest.raises(SettingsError, match=r"write learn=\('step_size',\)"):
        unroll(algorithm, depth=2, learn="step_size")
    with pytest.raises(SettingsError, match="depth is at least 1"):
        unroll(algorithm, depth=0)


def test_conditions_are_checked_and_can_be_waived():
    algorithm = ForwardBackward(blur(), L1(0.1), step_size=3.0)
    with pytest.raises(ConditionError, match="step_size = 3"):
        unroll(algorithm, depth=2)
    network = unroll(algorithm, depth=2, waive=["step_size"])
    assert number(network.layers[0].step_size) == pytest.approx(3.0)


def test_scalars_at_the_end_of_their_rule_cannot_be_learned():
    algorithm = ForwardBackward(blur(), L1(0.1))
    algorithm.step_size = number(algorithm.rule("step_size").high) * (1 - 1e-9)
    with pytest.raises(ConditionError, match="start further inside"):
        unroll(algorithm, depth=1, learn=("step_size",))


def test_weights_of_priors_stay_positive():
    network = unroll(ForwardBackward(blur(), L1(0.1)), depth=1, learn=("prior",))
    prior = network.layers[0].prior
    with torch.no_grad():
        prior.parametrizations.weight.original.fill_(-50.0)
    assert 0 < number(prior.weight) < 1e-20
    with pytest.raises(ConditionError, match="only positive weights can be learned"):
        unroll(ForwardBackward(blur(), L1(0.0)), depth=1, learn=("prior",))


def test_misfit_data_are_refused():
    network = unroll(DualForwardBackward(edges(), L1(0.1)), depth=2)
    with pytest.raises(ShapeError, match=r"the data has shape \(1, 6, 6\), this network takes \(batch, 1, 6, 6\)"):
        network(data()[0])
    with pytest.raises(ShapeError, match="the start has shape"):
        network(data(), start=torch.zeros(2, 1, 5, 6))
    assert network.image_shape == SHAPE


def test_a_hook_on_one_layer_is_not_one_on_all():
    network, calls = unroll(ForwardBackward(blur(), L1(0.1)), depth=3), []
    network.layers[1].register_forward_hook(lambda *_: calls.append(1))
    network(data())
    assert len(calls) == 1
