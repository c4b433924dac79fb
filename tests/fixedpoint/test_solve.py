"""How solve ends, what it reports, and what it refuses."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from firmly import Solution, solve
from firmly.algorithms import Fista, ForwardBackward
from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.fixedpoint import Status
from firmly.prox import L1

from ..algorithms.problems import blur, data
from ..algorithms.test_conformance import CASES


def algorithm(**changes) -> ForwardBackward:
    return ForwardBackward(blur(), L1(0.1), **changes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converges_and_reports_the_residual_of_the_undamped_map_at_the_returned_state(case):
    solver, y = case.make(), data()
    solution = solve(solver, y, tol=1e-8)
    assert isinstance(solution, Solution) and solution.converged and solution.status is Status.CONVERGED
    assert torch.equal(solution.x, solver.read(solution.state))
    with torch.no_grad():
        after = solver.undamped(solution.state, y, solution.iterations)
    worst = 0.0
    for i in range(len(y)):
        old = torch.cat([part[i].flatten() for part in solution.state])
        new = torch.cat([part[i].flatten() for part in after])
        worst = max(worst, float((new - old).norm() / max(new.norm(), old.norm())))
    assert solution.residual == pytest.approx(worst, rel=1e-6) and worst <= 1e-8


def test_iteration_limit():
    solution = solve(algorithm(), data(), tol=1e-12, max_iterations=5)
    assert solution.status is Status.LIMIT and not solution.converged and "max_iterations" in str(solution.status)
    assert solution.iterations == 5 and solution.residual > 1e-12 and len(solution.stats["residuals"]) == 6


def test_divergence_is_a_status_and_keeps_the_last_finite_state():
    steep = algorithm(step_size=1e30)
    with pytest.raises(ConditionError, match="step_size = 1e\\+30"):
        solve(steep, data())
    solution = solve(steep, data(), waive=["step_size"])
    assert solution.status is Status.NON_FINITE and bool(torch.isfinite(solution.x).all())
    momentum = Fista(blur(), L1(0.1), step_size=1e30)
    solution = solve(momentum, data(), waive=["step_size"])
    assert solution.status is Status.NON_FINITE and bool(torch.isfinite(solution.x).all())


def test_ctrl_c_keeps_the_last_state():
    seen = []

    def interrupt(iteration, x, residual):
        seen.append((iteration, x, residual))
        if iteration == 7:
            signal.raise_signal(signal.SIGINT)

    solution = solve(algorithm(), data(), tol=1e-12, callback=interrupt)
    assert solution.status is Status.INTERRUPTED and "interrupted" in str(solution.status)
    assert solution.iterations == seen[-1][0] == 7 and solution.residual == seen[-1][2]
    assert torch.equal(solution.x, seen[-1][1])


def test_the_worst_of_the_batch_decides():
    y = data()
    together = solve(algorithm(), y, tol=1e-9)
    alone = [solve(algorithm(), y[i : i + 1], tol=1e-9) for i in range(len(y))]
    assert together.iterations == max(s.iterations for s in alone)
    zero = solve(algorithm(), 0 * y)
    assert zero.converged and zero.residual == 0 and zero.iterations == 0


def test_starting_at_the_solution_takes_no_iterations():
    y = data()
    solution = solve(algorithm(), y, tol=1e-10)
    again = solve(algorithm(), y, tol=1e-9, start=solution.x)
    assert again.converged and again.iterations == 0 and torch.equal(again.x, solution.x)


def test_no_graph_is_recorded():
    solver = algorithm(step_size=torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert not solve(solver, data()).x.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": data()[0]}, ShapeError, r"data has shape \(1, 6, 6\), expected \(batch, 1, 6, 6\)"),
        ({"y": data()[:, :, :5]}, ShapeError, r"data has shape \(2, 1, 5, 6\)"),
        ({"y": data()[:0]}, ShapeError, "a batch of at least one"),
        ({"y": data().long()}, DataError, "data has dtype torch.int64.*use .float()"),
        ({"y": data() / 0}, DataError, "data has 72 of 72 entries that are NaN or infinite"),
        ({"start": data()[:, :, :5]}, ShapeError, "start has shape"),
        ({"start": data() * math.nan}, DataError, "start has 72 of 72 entries"),
        ({"tol": -1.0}, SettingsError, "tol is a finite number"),
        ({"tol": math.nan}, SettingsError, "tol is a finite number"),
        ({"max_iterations": 0}, SettingsError, "max_iterations is at least 1"),
        ({"waive": ["steps"]}, ConditionError, "cannot waive"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        solve(algorithm(), **{"y": data(), **arguments})
