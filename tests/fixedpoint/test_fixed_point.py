"""Fixed points as functions: solvers agree, derivatives of every kind and order are right, the wrong is refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError
from firmly.fixedpoint import (
    AdjointWarning,
    Anderson,
    Broyden,
    Checkpointed,
    Implicit,
    Neumann,
    Newton,
    OneStep,
    Picard,
    Status,
    Unrolled,
    fixed_point,
)

SOLVERS = [Picard(), Picard(0.7), Anderson(), Broyden(), Newton()]


def contraction(size=4, batch=3, factor=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    A = factor * A / torch.linalg.matrix_norm(A, 2)
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    return A.requires_grad_(), b.requires_grad_()


def T(x, A, b):
    return torch.tanh(x @ A.mT + b)


def zeros(b):
    return torch.zeros_like(b)


def solution(A, b, **options):
    return fixed_point(T, zeros(b), A, b, tol=1e-13, **options).state


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_agree(solver):
    A, b = contraction(factor=0.9)
    found = fixed_point(T, zeros(b), A, b, solver=solver, tol=1e-12)
    assert found.status is Status.CONVERGED and float(found.residual.max()) <= 1e-12
    torch.testing.assert_close(found.state, solution(A, b), rtol=0, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_batch_is_its_elements(solver):
    A, b = contraction(batch=4)
    together = fixed_point(T, zeros(b), A, b, solver=solver, tol=1e-11)
    for k in range(4):
        alone = fixed_point(T, zeros(b[[k]]), A, b[[k]], solver=solver, tol=1e-11)
        torch.testing.assert_close(together.state[[k]], alone.state, rtol=0, atol=1e-11)
        if not isinstance(solver, Newton):  # whose inner tolerance looks at the whole batch
            torch.testing.assert_close(together.state[[k]], alone.state, rtol=0, atol=1e-13)
            assert int(together.iterations[k]) == int(alone.iterations[0])


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Newton()], ids=str)
def test_accelerations_need_fewer_iterations(solver):
    A, b = contraction(factor=0.99, size=6)
    plain = fixed_point(T, zeros(b), A, b, tol=1e-10)
    fast = fixed_point(T, zeros(b), A, b, tol=1e-10, solver=solver)
    assert fast.converged and int(fast.iterations.max()) < int(plain.iterations.max())


def test_the_error_bound_holds():
    A, b = contraction()
    exact = solution(A, b)
    found = fixed_point(T, zeros(b), A, b, tol=1e-4, contraction=0.5)
    assert bool(((found.state - exact).norm(dim=1) <= found.error_bound).all())
    assert float(found.error_bound.max()) < 1e-2


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit("normal-cg"), Implicit("dense"), Unrolled(), Checkpointed(7)])
def test_gradients(adjoint):
    A, b = contraction()
    wanted = torch.autograd.grad(solution(A, b).pow(3).sum(), (A, b))
    found = torch.autograd.grad(solution(A, b, adjoint=adjoint).pow(3).sum(), (A, b))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradcheck_of_any_order_and_direction():
    A, b = contraction(size=3, batch=2)
    assert torch.autograd.gradcheck(solution, (A, b))
    assert torch.autograd.gradcheck(solution, (A, b), check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(solution, (A, b))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_function_transforms():
    A, b = contraction(size=3, batch=2)
    A, b = A.detach(), b.detach()
    wanted = torch.autograd.functional.jacobian(lambda b: solution(A, b), b)
    torch.testing.assert_close(torch.func.jacrev(lambda b: solution(A, b))(b), wanted)
    torch.testing.assert_close(torch.func.jacfwd(lambda b: solution(A, b))(b), wanted)
    stacked = torch.func.vmap(lambda b: solution(A, b))(torch.stack([b, 2 * b]))
    torch.testing.assert_close(stacked[1], solution(A, 2 * b), rtol=0, atol=1e-12)
    hessian = torch.autograd.functional.hessian(lambda b: solution(A, b).square().sum(), b)
    torch.testing.assert_close(torch.func.hessian(lambda b: solution(A, b).square().sum())(b), hessian)


def test_adjoint_and_tangent_are_transposes():
    A, b = contraction()
    direction, cotangent = torch.randn_like(b), torch.randn_like(b)
    pushed = torch.func.jvp(lambda b: solution(A.detach(), b), (b.detach(),), (direction,))[1]
    pulled = torch.func.vjp(lambda b: solution(A.detach(), b), b.detach())[1](cotangent)[0]
    assert float((pushed * cotangent).sum() - (pulled * direction).sum()) == pytest.approx(0, abs=1e-12)


def test_named_tuples_are_states():
    class Pair(NamedTuple):
        x: Tensor
        u: Tensor

    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def step(state, weight):
        return Pair(weight * state.u.sum(1, keepdim=True) + 1, 0.5 * weight * state.x.expand(-1, 2))

    start = Pair(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    found = fixed_point(step, start, weight, tol=1e-13)
    assert isinstance(found.state, Pair)
    torch.testing.assert_close(found.state.x, (1 / (1 - weight**2)).expand(2, 1))
    gradient = torch.autograd.grad(found.state.x.sum(), weight)[0]
    torch.testing.assert_close(gradient, 2 * 2 * weight / (1 - weight**2) ** 2, check_dtype=False)


def test_truncated_series_stay_below_their_bound_and_warn():
    A, b = contraction(factor=0.7)
    wanted = torch.autograd.grad(solution(A, b).sum(), b)[0]
    for terms in (0, 1, 5, 10):
        with pytest.warns(AdjointWarning, match="relative residual"):
            found = torch.autograd.grad(solution(A, b, adjoint=Neumann(terms, tol=1e-12)).sum(), b)[0]
        away = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(away.max()) <= 0.7 ** (terms + 1) * 1.7 / 0.3
    with pytest.warns(AdjointWarning):
        torch.autograd.grad(solution(A, b, adjoint=OneStep()).sum(), b)
    exact = torch.autograd.grad(solution(A, b, adjoint=Neumann(200)).sum(), b)[0]
    torch.testing.assert_close(exact, wanted)


def test_a_series_that_grows_is_refused():
    b = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    # Newton finds the fixed point of an expansion, whose Neumann series diverges
    found = fixed_point(lambda x, b: 3 * x + b, zeros(b), b, solver=Newton(), adjoint=Neumann(20))
    with pytest.raises(NotConverged, match="no contraction"):
        found.state.sum().backward()


def test_residuals_of_the_backward_pass_are_reported():
    A, b = contraction()
    found = fixed_point(T, zeros(b), A, b)
    assert found.backward_residuals == []
    found.state.sum().backward()
    assert len(found.backward_residuals) == 1 and found.backward_residuals[0] < 1e-10


def test_a_singular_system_is_refused():
    b = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)

    def cusp(x, b):  # T'(0) = 1 at the solution 0
        return x - x**3 + 0 * b

    found = fixed_point(cusp, torch.zeros(1, 1, dtype=torch.float64), b)
    with pytest.raises(NotConverged, match="singular"):
        found.state.sum().backward()


def test_no_derivative_without_a_solution():
    A, b = contraction(factor=0.99)
    with pytest.raises(NotConverged, match="was not reached"):
        fixed_point(T, zeros(b), A, b, max_iterations=3)
    with torch.no_grad():
        found = fixed_point(T, zeros(b), A, b, max_iterations=3)
    assert found.status is Status.LIMIT and float(found.residual.max()) > 1e-6


def test_hidden_parameters_are_refused():
    A, b = contraction()
    with pytest.raises(SettingsError, match="holds on to tensors"):
        fixed_point(lambda x, b: T(x, A, b), zeros(b), b)


def test_unrolling_accelerated_iterations_is_refused():
    A, b = contraction()
    with pytest.raises(SettingsError, match="plain iterations"):
        fixed_point(T, zeros(b), A, b, solver=Anderson(), adjoint=Unrolled())


@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        (torch.full((1, 2), float("nan")), DataError, "NaN"),
        (torch.zeros(0, 2), DataError, "at least one element"),
        (torch.zeros(1, 2, dtype=torch.int64), DataError, "floating-point"),
        ((torch.zeros(1, 2), torch.zeros(2, 2)), ShapeError, "share their batch"),
    ],
)
def test_bad_starts_are_refused(start, error, match):
    with pytest.raises(error, match=match):
        fixed_point(lambda x: x, start)


def test_settings_out_of_range_are_refused():
    start = torch.zeros(1, 2)
    with pytest.raises(ShapeError, match="the map returns"):
        fixed_point(lambda x: x[:, :1], start)
    with pytest.raises(SettingsError, match="contraction"):
        fixed_point(lambda x: x, start, contraction=1.0)
    with pytest.raises(SettingsError, match="tensors"):
        fixed_point(lambda x, a: x, start, 0.3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="gmres, normal-cg or dense"):
        Implicit("cg")  # type: ignore[arg-type]


def test_values_that_are_not_finite_end_the_loop():
    with torch.no_grad():
        found = fixed_point(lambda x: 1e200 * (x + 1) ** 2, torch.ones(1, 2, dtype=torch.float64))
    assert found.status is Status.NON_FINITE


def test_half_precision_regions_do_not_spoil_the_residual():
    A, b = (t.detach().float().requires_grad_() for t in contraction())
    with torch.autocast("cpu", torch.bfloat16):
        found = fixed_point(T, zeros(b), A, b)
    assert found.state.dtype == torch.float32 and float(found.residual.max()) < 1e-5
    found.state.sum().backward()
    assert b.grad.dtype == torch.float32


def test_export_as_one_loop():
    A, b = (t.detach() for t in contraction())

    class Net(torch.nn.Module):
        def forward(self, A, b):
            return fixed_point(T, torch.zeros_like(b), A, b).state

    program = torch.export.export(Net(), (A, b), strict=False)
    torch.testing.assert_close(program.module()(A, b), solution(A, b), rtol=0, atol=1e-9)
