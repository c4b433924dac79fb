"""What every algorithm has to do: a new one joins by one line in CASES, on which solve and unroll are tested too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from firmly import unroll
from firmly.algorithms import (
    Admm,
    Algorithm,
    ChambollePock,
    CondatVu,
    DouglasRachford,
    DualForwardBackward,
    EquilibriumForwardBackward,
    Fista,
    ForwardBackward,
    HeavyBall,
    Hqs,
    PeacemanRachford,
    Tikhonov,
)
from firmly.algorithms.algorithm import check, number
from firmly.certificates.signal import trace
from firmly.errors import ConditionError
from firmly.prox import L1, MCP

from .problems import blur, data, edges, loop, ridge


class Case(NamedTuple):
    """An algorithm to be tested: `make(**changes)` builds it; `scalars` are its step sizes with admissible values."""

    name: str
    make: Callable[..., Algorithm]
    scalars: dict[str, float]


CASES = [
    Case("ForwardBackward", lambda **c: ForwardBackward(blur(), L1(0.1), **c), {"step_size": 0.7}),
    Case("ForwardBackward+ridge", lambda **c: ForwardBackward(blur(), L1(0.1), ridge=ridge(), **c), {"step_size": 0.3}),
    Case("Fista", lambda **c: Fista(blur(), L1(0.1), restart=30, **c), {"step_size": 0.7}),
    Case("HeavyBall", lambda **c: HeavyBall(blur(), ridge(), **c), {"step_size": 0.2, "momentum": 0.3}),
    Case(
        "HeavyBall+Tikhonov",
        lambda **c: HeavyBall(blur(), Tikhonov(edges()), **c),
        {"step_size": 0.1, "momentum": 0.3},
    ),
    Case("Hqs", lambda **c: Hqs(blur(), L1(0.1), **c), {"penalty": 0.7}),
    Case("Hqs+ridge", lambda **c: Hqs(blur(), ridge=ridge(), **c), {"penalty": 0.7}),
    Case("DouglasRachford", lambda **c: DouglasRachford(blur(), L1(0.1), **c), {"step_size": 2.0, "relaxation": 1.5}),
    Case("Admm", lambda **c: Admm(blur(), L1(0.1), **c), {"penalty": 0.7}),
    Case("Admm+K", lambda **c: Admm(blur(), L1(0.1), K=edges(), **c), {"penalty": 0.7}),
    Case(
        "ChambollePock",
        lambda **c: ChambollePock(blur(), L1(0.1), edges(), **c),
        {"step_size": 0.5, "dual_step": 0.2},
    ),
    Case("CondatVu", lambda **c: CondatVu(blur(), L1(0.1), edges(), **c), {"step_size": 0.5, "dual_step": 0.1}),
    Case("DualForwardBackward", lambda **c: DualForwardBackward(edges(), L1(0.1), **c), {"step_size": 0.2}),
    Case(
        "EquilibriumForwardBackward", lambda **c: EquilibriumForwardBackward(loop(), L1(0.1), **c), {"step_size": 0.3}
    ),
    Case("PeacemanRachford", lambda **c: PeacemanRachford(loop(), L1(0.1), **c), {"step_size": 0.7}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestAlgorithm:
    def test_default_steps_satisfy_the_conditions(self, case):
        conditions = case.make().conditions()
        check(conditions)
        assert all(c.margin > 0 or c.name in ("prior", "ridge", "metric") for c in conditions)
        assert len({c.name for c in conditions}) == len(conditions)

    def test_given_scalars_are_kept_and_satisfy_the_conditions(self, case):
        algorithm = case.make(**case.scalars)
        assert algorithm.scalars() and set(algorithm.scalars()) == set(case.scalars)
        assert {name: getattr(algorithm, name) for name in case.scalars} == case.scalars
        check(algorithm.conditions())

    def test_scalars_beyond_their_rule_are_refused_with_number_and_rule(self, case):
        algorithm = case.make(**case.scalars)
        for name in case.scalars:
            rule = algorithm.rule(name)
            if number(rule.high) < math.inf:
                steps = {**case.scalars, name: 2 * number(rule.high)}
                with pytest.raises(ConditionError) as refusal:
                    check(case.make(**steps).conditions())
                message = str(refusal.value)
                assert any(f"{n} = {value:.6g} lies in" in message for n, value in steps.items())
                assert rule.text in message and rule.source in message

    def test_scalars_just_inside_and_just_outside_of_their_rule(self, case):
        for name in case.scalars:
            algorithm = case.make(**case.scalars)
            high = number(algorithm.rule(name).high)
            if high < math.inf:
                setattr(algorithm, name, high * (1 - 1e-9))
                check(algorithm.conditions())
                setattr(algorithm, name, high * (1 + 1e-9))
                assert not all(c.holds for c in algorithm.conditions())

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
    def test_senseless_scalars_are_refused_at_construction(self, case, bad):
        for name in case.scalars:
            with pytest.raises(ConditionError, match=f"{name} must be one finite positive number"):
                case.make(**{**case.scalars, name: bad})

    def test_scalars_may_be_tensors_with_gradients(self, case):
        steps = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in case.scalars.items()}
        algorithm = case.make(**steps)
        check(algorithm.conditions())
        state = algorithm.start(data())
        for k in range(3):
            state = algorithm.step(state, data(), k)
        gradients = torch.autograd.grad(sum(part.square().sum() for part in state), list(steps.values()))
        assert all(bool(torch.isfinite(g)) and g != 0 for g in gradients)

    def test_batch_equals_loop(self, case):
        algorithm, y = case.make(), data(3)

        def run(y):
            state = algorithm.start(y)
            for k in range(4):
                state = algorithm.step(state, y, k)
            return algorithm.read(state)

        torch.testing.assert_close(run(y), torch.cat([run(y[i : i + 1]) for i in range(3)]), atol=1e-13, rtol=0)

    def test_the_start_image_enters(self, case):
        algorithm, y, x = case.make(), data(), torch.ones(2, *case.make().image_shape, dtype=torch.float64)
        torch.testing.assert_close(algorithm.read(algorithm.start(y, x)), x)
        first, second = (algorithm.step(algorithm.start(y, s), y, 0) for s in (x, None))
        assert any(not torch.equal(a, b) for a, b in zip(first, second))

    def test_the_step_is_traceable(self, case):
        network = unroll(case.make(), depth=2)
        inputs = {"data": network.data_shape, "start": network.image_shape}
        assert trace(network, inputs, ["data"]).nodes
        assert trace(network, inputs, ["data", "start"]).nodes

    def test_float32_data_stay_float32(self, case):
        algorithm = case.make().float()
        y = data().float()
        state = algorithm.step(algorithm.start(y), y, 0)
        assert all(part.dtype == torch.float32 for part in state)

    def test_undamped_fixed_point_is_a_fixed_point_of_the_step(self, case):
        algorithm, y = case.make(), data()
        state = algorithm.start(y)
        for k in range(1000):
            state = algorithm.undamped(state, y, k)
        for part, after in zip(state, algorithm.step(state, y, 0)):
            torch.testing.assert_close(after, part, atol=1e-7, rtol=0)


def test_conditions_of_nonconvex_terms_are_refused_and_can_be_waived():
    conditions = ForwardBackward(blur(), MCP(0.1, concavity=3.0)).conditions()
    with pytest.raises(ConditionError, match=r"MCP is convex.*waive=\['prior'\]"):
        check(conditions)
    check(conditions, waive=["prior"])
    with pytest.raises(ConditionError, match=r"cannot waive \['prio'\]"):
        check(conditions, waive=["prio"])
