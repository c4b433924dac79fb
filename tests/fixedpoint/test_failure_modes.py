"""Where derivatives of solutions fail: every way is provoked here, and gets its own words."""

from __future__ import annotations

import math

import pytest
import torch
from tests.fixedpoint.test_layer import TRUE, FlatDense, LassoProblem

import firmly as fm
from firmly.errors import ConditionError, NotConverged, SettingsError
from firmly.fixedpoint import (
    AdjointWarning,
    Anderson,
    Ending,
    Implicit,
    Neumann,
    Newton,
    OneStep,
    Picard,
    ProximalGradient,
    Unrolled,
    fixed_point,
    implicit,
)
from firmly.prox import L1, GroupL1


def number(value, grad=False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def lasso_layer(X, weight, adjoint=Implicit("manifold"), **options):  # noqa: B008
    return implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(weight)), adjoint, **options)


@pytest.fixture(scope="module")
def lasso():
    return LassoProblem()


@pytest.fixture(scope="module")
def step(lasso):
    """The proximal gradient map of the Lasso of the notes with step 1 / L, and its solution."""
    t = 100 / float(torch.linalg.matrix_norm(lasso.X, 2)) ** 2
    T = ProximalGradient(lambda b, weight: (b @ lasso.X.mT - lasso.y) @ lasso.X / 100, L1, t)
    start = torch.zeros(1, 200, dtype=torch.float64)
    with torch.no_grad():
        found = fixed_point(T, start, lasso.weight, solver=Anderson(10), tol=1e-14, max_iterations=100_000)
    return T, found.state


def hypergradient(lasso, T, solution, adjoint, tol=1e-12):
    weight = lasso.weight.clone().requires_grad_()
    b = fixed_point(T, solution, weight, adjoint=adjoint, tol=tol).state[0]
    loss = (lasso.validation @ b - lasso.target).square().mean()
    return float(torch.autograd.grad(loss, weight)[0])


def test_a_solution_that_is_not_unique_is_said_to_be():
    X, y = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    found = lasso_layer(X, number(0.1, True)).solve(y)
    assert found.doubts() == []  # the map is smooth: only a derivative can tell
    (found.state.x @ X.mT).sum().backward()
    assert any("not unique" in doubt and "predictions" in doubt for doubt in found.doubts())


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit("dense"), Implicit("normal-cg"), Implicit("manifold")])
def test_what_is_not_unique_has_no_derivative(adjoint):
    X, weight = torch.ones(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64).mul(0.1).requires_grad_()
    b = lasso_layer(X, weight, adjoint)(torch.ones(1, 1, dtype=torch.float64))
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(b[0, 0] - b[0, 1], weight)


def test_a_breakpoint_of_the_path_is_reported_and_gives_an_element_of_the_interval():
    eye, y = torch.eye(2, dtype=torch.float64), torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    weight = number(0.5, True)  # the first entry is about to become active
    layer = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(eye), L1(weight), step_size=0.9))
    found = layer.solve(y)
    assert any("kink" in doubt and "breakpoint" in doubt for doubt in found.doubts())
    derivative = float(torch.autograd.grad(found.state.x[0, 0], weight)[0])
    assert -1 <= derivative <= 0
    beside = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(eye), L1(0.49)))
    assert beside.solve(y).doubts() == []


def test_a_support_that_is_not_identified_is_reported(lasso, step):
    T, solution = step
    with torch.no_grad():
        early = fixed_point(T, torch.zeros_like(solution), lasso.weight, tol=1e-2)
        late = fixed_point(T, torch.zeros_like(solution), lasso.weight, solver=Anderson(10), tol=1e-12)
    assert bool(((early.state != 0) != (solution != 0)).any())
    assert any("not identified" in doubt for doubt in early.doubts())
    assert late.doubts() == []


def test_a_weight_at_its_maximum_has_the_gradient_zero_and_is_reported(lasso):
    top = float((lasso.X.mT @ lasso.y).abs().max()) / 100
    weight = number(1.01 * top, True)
    layer = lasso_layer(lasso.X / 10, weight)
    found = layer.solve(lasso.y[None] / 10)
    loss = (found.state.x @ lasso.validation.mT - lasso.target).square().mean()
    assert float(torch.autograd.grad(loss, weight)[0]) == 0.0
    assert any("nothing is active" in doubt and "largest useful" in doubt for doubt in found.doubts())

    def inner(weight, start, tol):
        return lasso_layer(lasso.X / 10, weight, tol=tol)(lasso.y[None] / 10, start)

    def outer(b, weight):
        return (lasso.validation @ b[0] - lasso.target).square().mean()

    assert fm.bilevel(inner, outer, number(1.01 * top)).status is Ending.FLAT
    clamped = fm.bilevel(inner, outer, number(0.5 * top), bounds=(0.1 * top, 0.999 * top))
    assert all(float(trial.parameters) <= 0.999 * top for trial in clamped.history)
    assert all(float(trial.gradient) != 0 for trial in clamped.history)


@pytest.mark.parametrize("size", [1e-3, 2e-7])
def test_a_group_that_vanishes_is_ill_conditioned_but_right(size):
    A = FlatDense(torch.eye(6, dtype=torch.float64), (3, 2))
    y = torch.tensor([[3.0, 0.4, 0.0, 0.3, 4.0, 0.0]], dtype=torch.float64)  # groups (3, 0, 4) and (0.4, 0.3, 0)
    weight = number(0.5 - size, True)
    algorithm = fm.algorithms.ForwardBackward(A, GroupL1(weight), step_size=0.7)
    layer = implicit(algorithm, Implicit("manifold", tol=1e-8), tol=1e-15)
    found = layer.solve(y)
    derivative = torch.autograd.grad(found.state.x[0, 0, 1], weight)[0]
    assert float(derivative) == pytest.approx(-0.8, abs=1e-6)  # minus the direction of the group
    assert (size < 1e-5) == any("ill-conditioned" in doubt for doubt in found.doubts())
    assert (size < 1e-5) == any("kink" in doubt for doubt in found.doubts())


def test_a_layer_that_is_not_monotone_is_refused():
    W, x = 1.5 * torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ConditionError, match="monotone"):
        fm.fixedpoint.equilibrium(fm.algorithms.PeacemanRachford(fm.linear.Dense(W), fm.prox.NonNegative()), x)
    with pytest.raises(NotConverged, match="was not reached"):
        fixed_point(lambda z, x: torch.relu(z @ W.mT + x), torch.zeros_like(x), x)


def test_a_singular_layer_has_no_derivative():
    W = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # eigenvalues 1 and -1
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    found = fixed_point(lambda z, x: z @ W.mT + x, torch.tensor([[0.5, -0.5]], dtype=torch.float64), x)
    with pytest.raises(NotConverged, match="singular"):
        torch.autograd.grad(found.state.sum(), x)


def test_a_short_series_warns_with_its_residual(lasso, step):
    with pytest.warns(AdjointWarning, match=r"residual 0\.10"):
        assert hypergradient(lasso, *step, Neumann(10)) == pytest.approx(3.044376, abs=1e-6)
    with pytest.warns(AdjointWarning, match="relative residual"):
        assert abs(hypergradient(lasso, *step, OneStep()) - TRUE) > 0.5


def test_a_series_that_grows_is_refused(lasso, step):
    """The optimality map with the wrong sign, 2 x - T(x), has the same solution: a peer returns -15.45 for it."""
    T, solution = step
    with pytest.raises(NotConverged, match="powers of J grow"):
        hypergradient(lasso, lambda b, weight: 2 * b - T(b, weight), solution, Neumann(10))
    right = hypergradient(lasso, lambda b, weight: 2 * b - T(b, weight), solution, Implicit("dense"))
    assert right == pytest.approx(TRUE, abs=1e-8)


def plain_cg(iterations):
    """What a peer does: conjugate gradients on I - J, which is not symmetric. It needs the map that it solves for."""

    def of(T):
        def solver(transposed, x, v, parameters, tol):
            pull = torch.func.vjp(lambda z: T(z, *parameters), x)[1]
            u, left = torch.zeros_like(v), v
            direction, power = left, left.square().sum()
            for _ in range(iterations):
                image = direction - pull(direction)[0]
                length = power / (direction * image).sum()
                u, left = u + length * direction, left - length * image
                direction, power = left + left.square().sum() / power * direction, left.square().sum()
            return u

        return solver

    return of


@pytest.mark.parametrize("iterations", [10, 100, 1000])
def test_plain_conjugate_gradients_are_judged_by_their_residual(lasso, step, iterations):
    T, solution = step
    unit = ProximalGradient(T.gradient, T.prior, 1.0)  # the same solution with a step that peers take
    with pytest.raises(NotConverged, match="relative residual"):
        hypergradient(lasso, unit, solution, Implicit(plain_cg(iterations)(unit)))


def test_plain_conjugate_gradients_pass_where_they_happen_to_be_right(lasso, step):
    T, solution = step
    lucky = Implicit(plain_cg(40)(T), tol=1e-5)
    assert hypergradient(lasso, T, solution, lucky) == pytest.approx(TRUE, abs=1e-4)


def test_momentum_is_not_unrolled_because_its_derivative_can_grow():
    """Two curvatures of a scalar function, each with a stable heavy-ball matrix, whose alternation is not."""
    momentum, t = 0.9, 1.0

    def matrix(curvature):
        return torch.tensor([[1 + momentum - t * curvature, -momentum], [1.0, 0.0]], dtype=torch.float64)

    def radius(M):
        return float(torch.linalg.eigvals(M).abs().max())

    growths = []
    for low in torch.linspace(0.01, 1, 12).tolist():
        for high in torch.linspace(1, 3.7, 12).tolist():
            assert radius(matrix(low)) < 1 and radius(matrix(high)) < 1
            for word in ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)):
                product = torch.linalg.matrix_power(matrix(low), word[0]) @ torch.linalg.matrix_power(
                    matrix(high), word[1]
                )
                growths.append(radius(product) ** (1 / sum(word)))
    assert max(growths) > 1.05
    plain = [abs(1 - t * c) for c in (0.01, 1.0, 1.9)]  # the plain step with t < 2 / L never grows
    assert max(plain) < 1
    A = fm.linear.Dense(torch.eye(2, dtype=torch.float64))
    for algorithm in (fm.algorithms.HeavyBall(A), fm.algorithms.Fista(A, L1(0.1))):
        with pytest.raises(SettingsError, match="can diverge near kinks"):
            implicit(algorithm, Unrolled())


def test_a_loosened_backward_pass_warns_and_is_a_doubt(lasso, step):
    T, solution = step
    weight = lasso.weight.clone().requires_grad_()
    found = fixed_point(T, solution, weight, adjoint=Implicit(plain_cg(6)(T), tol=0.5), tol=1e-12)
    with pytest.warns(AdjointWarning, match="as its tolerance 0.5 allows"):
        found.state.sum().backward()
    assert 1e-3 < found.backward_residuals[0] <= 0.5
    assert any("linear system has the relative residual" in doubt for doubt in found.doubts())


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit("manifold"), Implicit("normal-cg"), Neumann(500)], ids=str)
def test_gradients_so_small_that_their_squares_vanish(adjoint):
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(8, 5, generator=generator), torch.randn(1, 8, generator=generator)

    def gradient(scale):
        weight = torch.tensor(0.3, requires_grad=True)
        layer = implicit(fm.algorithms.ForwardBackward(fm.linear.Dense(X), L1(weight)), adjoint)
        return torch.autograd.grad(scale * layer(y).sum(), weight)[0]

    torch.testing.assert_close(gradient(1e-25) * 1e25, gradient(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-25), (torch.float64, 1e-200)])
def test_states_so_small_that_their_squares_vanish_or_so_large_that_they_overflow(dtype, size):
    start = torch.zeros(1, 2, dtype=dtype)
    with torch.no_grad():
        small = fixed_point(lambda x: 0.5 * x + size, start)
        assert small.converged and float(small.state[0, 0]) == pytest.approx(2 * size, rel=1e-3)
        solved = fm.solve(fm.algorithms.HeavyBall(fm.linear.Identity((2,)), step_size=0.5), start + size, start=start)
        assert float(solved.x[0, 0]) == pytest.approx(size, rel=1e-4)
        growing = fixed_point(lambda x: 1.5 * x + 1, start, max_iterations=2000)
        assert not growing.converged and "not finite" in str(growing.status)


def test_a_scalar_parameter_gets_its_gradient():
    p = number(0.5, True)
    x = fixed_point(lambda x, p: p * x + 1, torch.zeros(1, dtype=torch.float64), p, tol=1e-15).state
    assert float(torch.autograd.grad(x.sum(), p)[0]) == pytest.approx(4.0, abs=1e-12)  # x = 1 / (1 - p)


def test_a_state_that_is_not_reached_is_a_doubt():
    with torch.no_grad():
        found = fixed_point(lambda x: 0.99 * x + 1, torch.zeros(1, 1, dtype=torch.float64), max_iterations=2)
    assert any("iteration limit" in doubt for doubt in found.doubts())


def test_doubts_of_elements_and_states_of_several_tensors():
    start = (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    shift = torch.tensor([[0.1], [0.3], [2.0]], dtype=torch.float64)

    def T(state):
        x, u = state
        return torch.relu(0.5 * x + shift - 0.3), 0.5 * u + 1

    with torch.no_grad():
        doubts = fixed_point(T, start, solver=Picard()).doubts()
    assert len(doubts) == 1 and "elements [1]" in doubts[0] and "kink" in doubts[0]


@pytest.mark.parametrize("seed", range(5))
def test_error_bounds_are_never_below_the_distance(seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    B, b = normal(6, 6), normal(4, 6)
    m = 0.2
    symmetric = m * torch.eye(6, dtype=torch.float64) + 0.3 * B @ B.mT / 6 + (B - B.mT)  # an expansion of Lipschitz > 1

    def T(x):
        return x - x @ symmetric.mT + b

    assert float(torch.linalg.matrix_norm(torch.eye(6, dtype=torch.float64) - symmetric, 2)) > 1
    exact = torch.linalg.solve(symmetric, b.mT).mT
    with torch.no_grad():
        for limit in (1, 3, 10):
            found = fixed_point(T, torch.zeros_like(b), solver=Newton(), max_iterations=limit, strong_monotonicity=m)
            away = (found.state - exact).norm(dim=1)
            assert found.error_bound is not None and bool((away <= found.error_bound + 1e-12).all())
        start = fixed_point(T, normal(4, 6), max_iterations=1, strong_monotonicity=m)
        assert start.error_bound is not None
        assert bool(((start.state - exact).norm(dim=1) <= start.error_bound).all())


@pytest.mark.parametrize("seed", range(4))
def test_derived_error_bounds_of_algorithms(seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tall, wide, y = fm.linear.Dense(normal(12, 5)), fm.linear.Dense(normal(3, 5)), normal(2, 12)
    make = fm.algorithms.ForwardBackward
    loop = fm.linear.Monotone(fm.linear.Dense(normal(4, 5)), 0.3, fm.linear.Dense(normal(5, 5)))
    for algorithm, data in (
        (make(tall, L1(0.5)), y),
        (make(wide, fm.prox.ElasticNet(0.2, 0.5)), y[:, :3]),
        (make(wide, L1(0.2), ridge=fm.algorithms.Tikhonov(fm.linear.Identity((5,)))), y[:, :3]),
        (fm.algorithms.EquilibriumForwardBackward(loop, fm.prox.NonNegative()), y[:, :5]),
    ):
        r = fm.fixedpoint.contraction_factor(algorithm)
        assert r is not None and 0 < r < 1
        with torch.no_grad():
            exact = implicit(algorithm, tol=1e-15, solver=Anderson())(data)
            for limit in (1, 10, 100):
                found = implicit(algorithm, tol=1e-6, max_iterations=limit).solve(data)
                away = (algorithm.read(found.state) - exact).norm(dim=1)
                assert found.error_bound is not None and bool((away <= found.error_bound + 1e-13).all())
    assert fm.fixedpoint.contraction_factor(make(wide, L1(0.2))) is None
    changed = make(wide, fm.prox.ElasticNet(0.2, number(0.5)))
    found = implicit(changed).solve(y[:, :3])
    assert found.error_bound is not None
    changed.prior.curvature = number(5.0)
    assert found.error_bound is None  # the solution is that of another problem
    assert implicit(make(wide, L1(0.2)), tol=1e-3).solve(y[:, :3].clone()).error_bound is None
    with pytest.raises(SettingsError, match="strong monotonicity"):
        fixed_point(lambda x: x, torch.zeros(1, 1), strong_monotonicity=0.0)


def saved_numbers(iterations):
    """How many numbers autograd keeps for the backward pass of a solution after so many iterations."""
    A = (0.4 * torch.eye(20, dtype=torch.float64)).requires_grad_()
    b = torch.ones(3, 20, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        start = torch.full_like(b, 10.0 ** (math.log10(0.4) * -iterations))  # so far away that so many are needed
        found = fixed_point(lambda x, A: x @ A.mT + b, start, A, tol=1e-3, max_iterations=10_000)
    assert bool((found.iterations >= iterations).all())
    return sum(kept)


def test_memory_does_not_grow_with_the_iterations():
    assert saved_numbers(200) <= 1.05 * saved_numbers(20)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_same_state_and_gradient(backend, tmp_path, monkeypatch):
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            pytest.skip(f"no compiler for torch.compile: {error}")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    A = (0.2 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    b = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def T(x, A, b):
        return torch.tanh(x @ A.mT + b)

    def answer(step):
        x = fixed_point(step, torch.zeros_like(b), A, b, tol=1e-13).state
        return x, *torch.autograd.grad(x.square().sum(), (A, b))

    for one, other in zip(answer(torch.compile(T, backend=backend)), answer(T), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
