"""Codes, gradients and constraints behind dictionary learning, against definitions and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.errors import ConditionError, DataError, ShapeError
from firmly.priors import (
    Alternating,
    AnalysisOperator,
    CircularSynthesis,
    Masks,
    MatrixSynthesis,
    Operators,
    SparseModel,
    TightFrame,
    UnitRows,
    Unrolled,
    lasso,
    learn_dictionary,
    recovery,
)

f64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def unit(D: Tensor) -> Tensor:
    return D / D.norm(dim=0)


def seen_partly(count: int = 6, m: int = 9) -> Operators:
    maps = [fm.linear.Dense(randn(5, m, seed=i)) for i in range(3)]
    return Operators(maps, torch.arange(count) % 3)


MASK = (randn(6, 9, seed=2) > 0).double()
MODELS = {
    "dense": (SparseModel(0.1), unit(randn(9, 14)), randn(6, 9, seed=1)),
    "operators": (SparseModel(0.1, observation=seen_partly()), unit(randn(9, 14)), randn(6, 5, seed=1)),
    "masks": (SparseModel(0.1, observation=Masks(MASK)), unit(randn(9, 14)), randn(6, 9, seed=1)),
    "circular-1d": (SparseModel(0.1, CircularSynthesis((16,), (5,))), unit(randn(5, 3)), randn(6, 16, seed=1)),
    "circular-2d": (SparseModel(0.1, CircularSynthesis((8, 6), (3, 2))), unit(randn(6, 3)), randn(6, 8, 6, seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_adjoint_and_norm(self, name):
        model, D, data = MODELS[name]
        z = torch.randn_like(model.codes(D, data, 1))
        x = model.synthesis.apply(D, z)
        y = torch.randn_like(x)
        torch.testing.assert_close((x * y).sum(), (z * model.synthesis.adjoint(D, y)).sum(), rtol=1e-12, atol=1e-12)
        matrix = torch.func.jacrev(lambda c: model.synthesis.apply(D, c[None])[0])(z[0]).reshape(x[0].numel(), -1)
        exact = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
        assert exact <= model.synthesis.squared_norm(D) <= exact * (1 + 1e-9)
        if model.observation is not None:
            data = torch.randn_like(data)
            torch.testing.assert_close((model.observation.apply(x) * data).sum(),
                                       (x * model.observation.adjoint(data)).sum(), rtol=1e-12, atol=1e-12)  # fmt: skip

    def test_codes_solve_the_lasso(self, name):
        model, D, data = MODELS[name]
        z = model.codes(D, data, 15000 if name in ("operators", "circular-2d") else 4000)
        with torch.enable_grad():
            variable = z.clone().requires_grad_()
            fit = 0.5 * (model.data(D, variable) - data).square().sum()
            (slope,) = torch.autograd.grad(fit, variable)
        assert slope.abs().max() <= model.weight * (1 + 1e-6)
        torch.testing.assert_close(slope[z != 0], -model.weight * z[z != 0].sign(), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("momentum", [True, False])
    @pytest.mark.parametrize("through", [None, 3, 0])
    def test_gradient_against_finite_differences(self, name, momentum, through):
        """The last `through` steps are differentiated, those before and the step size are held fixed."""
        model, D, data = MODELS[name]
        model = FixedNorm(model, 1.3 * model.squared_norm(D))
        steps, last = 8, 8 if through is None else through
        direction = randn(*D.shape, seed=7)

        def value(t: float) -> float:
            moved = D + t * direction
            early = codes_of_two(model, D, moved, data, steps, last, momentum)
            return float(model.value(moved, data, early))

        _, gradient = model.gradient(D, data, steps, momentum, through)
        h = 1e-6
        expected = (value(h) - value(-h)) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


class FixedNorm(SparseModel):
    """A model whose step size does not depend on the dictionary."""

    def __init__(self, model: SparseModel, squared_norm: float):
        super().__init__(model.weight, model.synthesis, model.observation)
        object.__setattr__(self, "fixed", squared_norm)

    def squared_norm(self, dictionary: Tensor) -> float:
        return self.fixed


def codes_of_two(model, early: Tensor, late: Tensor, data: Tensor, steps: int, last: int, momentum: bool) -> Tensor:
    """The iteration written out, the first steps with one dictionary and the last ones with another."""
    step = 1 / model.squared_norm(early)
    z = before = torch.zeros_like(model.codes(early, data, 1))
    for k in range(steps):
        D = late if k >= steps - last else early
        ahead = z + (max(k - 1, 0) / (k + 3) if momentum else 0) * (z - before)
        rest = model.data(D, ahead) - data
        moved = ahead - step * model.synthesis.adjoint(D, model.signal(rest))
        z, before = moved.sgn() * (moved.abs() - step * model.weight).clamp(min=0), z
    return z


def test_all_gradients_agree_at_the_fixed_point():
    """The envelope theorem: at z* the gradient with fixed codes is exact, and the unrolled ones converge to it."""
    D, data = unit(randn(6, 8)), randn(20, 6, seed=1)
    model = SparseModel(0.3)
    exact = lasso(D, data, 0.3, tol=1e-14).code
    expected = (exact @ D.mT - data).mT @ exact / len(data)
    for through in (0, 20, None):
        _, gradient = model.gradient(D, data, 3000, through=through)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_circular_synthesis_by_hand():
    synthesis = CircularSynthesis((5, 4), (2, 3))
    D, z = randn(6, 2), randn(1, 2, 5, 4, seed=1)
    expected = torch.zeros(5, 4, dtype=f64)
    for j, kernel in enumerate(synthesis.filters(D)):
        for row in range(5):
            for column in range(4):
                for a in range(2):
                    for b in range(3):
                        expected[(row + a) % 5, (column + b - 1) % 4] += kernel[a, b] * z[0, j, row, column]
    torch.testing.assert_close(synthesis.apply(D, z)[0], expected)


@pytest.mark.parametrize("shape,size", [((9,), (4,)), ((9,), (9,)), ((5, 4), (2, 3)), ((5, 6), (5, 1))])
def test_circular_synthesis_as_a_linear_map(shape, size):
    synthesis = CircularSynthesis(shape, size)
    D, z = unit(randn(torch.Size(size).numel(), 3)), randn(2, 3, *shape, seed=1)
    A = synthesis.linear_map(D)
    torch.testing.assert_close(A(z)[:, 0], synthesis.apply(D, z))
    assert A.norm().upper ** 2 == pytest.approx(synthesis.squared_norm(D), rel=1e-9)


def test_windows_have_the_most_energy():
    synthesis = CircularSynthesis((7, 6), (3, 2))
    x = randn(4, 7, 6)
    found = synthesis.windows(x)
    for image, window in zip(x, found):
        pieces = [image.roll((-a, -b), (0, 1))[:3, :2].flatten() for a in range(7) for b in range(6)]
        best = max(pieces, key=lambda p: float(p.square().sum()))
        assert torch.equal(best, window)


@pytest.mark.parametrize("shape,size", [((64,), (7,)), ((20, 18), (4, 4))])
def test_convolutional_dictionaries_are_learned(shape, size):
    synthesis = CircularSynthesis(shape, size)
    truth = unit(randn(torch.Size(size).numel(), 3))
    codes = (torch.rand(20, 3, *shape, generator=torch.Generator().manual_seed(1)) < 0.03) * randn(
        20, 3, *shape, seed=2
    )
    data = synthesis.apply(truth, codes) + 0.01 * randn(20, *shape, seed=3)
    start = unit(truth + 0.35 * randn(*truth.shape, seed=4) / truth.shape[0] ** 0.5)
    learned = learn_dictionary(data, Alternating(SparseModel(0.05, synthesis)), start=start, iterations=60)
    assert recovery(start, truth) < 0.96 < 0.99 < recovery(learned.dictionary, truth)
    assert all(b <= a * (1 + 1e-12) for a, b in zip(learned.objectives, learned.objectives[1:]))
    again = learn_dictionary(data, Unrolled(SparseModel(0.05, synthesis), 10, through=5), atoms=3, iterations=5)
    assert again.objectives[-1] < again.objectives[0]


def test_unused_filters_are_replaced_by_windows():
    synthesis = CircularSynthesis((32,), (4,))
    data = synthesis.apply(torch.tensor([[1.0, 1, 1, 1]], dtype=f64).mT / 2, (randn(10, 1, 32) > 1.5).double())
    start = torch.tensor([[0.0, 0, 0, 1], [1, -1, 1, -1]], dtype=f64)
    start = unit(start.mT)
    learned = learn_dictionary(data, Alternating(SparseModel(0.4, synthesis)), start=start, iterations=30)
    assert learned.replaced >= 1 and learned.dictionary.isfinite().all()


# -- several operators -----------------------------------------------------------------------------------------


def random_operators(count: int, rows: int, dimension: int, signals: int) -> Operators:
    maps = [fm.linear.Dense(randn(rows, dimension, seed=50 + i) / dimension**0.5) for i in range(count)]
    return Operators(maps, torch.arange(signals) % count)


@pytest.mark.parametrize("count,blind", [(1, 6), (2, 2), (3, 0)])
def test_identifiability(count, blind):
    seen = random_operators(count, 4, 10, 30).identifiability()
    assert (seen.dimension, seen.blind) == (10, blind) and seen.null_space.shape == (10, blind)
    for A in random_operators(count, 4, 10, 30).maps:
        assert (A.matrix() @ seen.null_space).abs().max() < 1e-10 if blind else True
    assert (seen.smallest == 0) == bool(blind) and str(blind or "all") in str(seen)


def test_identifiability_counts_operators_that_are_used_only():
    maps = [fm.linear.Mask(torch.tensor([1.0, 0])), fm.linear.Mask(torch.tensor([0.0, 1]))]
    assert Operators(maps, torch.tensor([0, 0, 1])).identifiability().blind == 0
    assert Operators(maps, torch.tensor([0, 0, 0])).identifiability().blind == 1
    seen = Masks(torch.tensor([[1.0, 0], [1, 1], [1, 0]])).identifiability()
    assert seen.blind == 0 and seen.smallest == pytest.approx(1 / 3) and seen.largest == pytest.approx(1)


def toy(count: int) -> tuple[SparseModel, Tensor, Tensor, Tensor]:
    """Signals of dimension 20 from 20 atoms, seen through `count` random operators of 8 rows."""
    truth = unit(randn(20, 20))
    codes = (torch.rand(1200, 20, generator=torch.Generator().manual_seed(1)) < 0.1) * randn(1200, 20, seed=2)
    model = SparseModel(0.02, observation=random_operators(count, 8, 20, 1200))
    data = model.data(truth, codes)
    start = unit(truth + 0.6 * randn(20, 20, seed=3) / 20**0.5)
    return model, truth, data, start


def test_one_operator_teaches_nothing_on_its_null_space():
    model, _truth, data, start = toy(1)
    with pytest.raises(ConditionError, match="12 of 20"):
        learn_dictionary(data, Alternating(model), start=start)
    learned = learn_dictionary(data, Alternating(model, blind=True), start=start, iterations=40).dictionary
    hidden = model.observation.identifiability().null_space
    # what is there stays where it was, up to the scale of its atom
    before, after = hidden.mT @ start, hidden.mT @ learned
    cosine = (before * after).sum(0) / (before.norm(dim=0) * after.norm(dim=0))
    assert cosine.min() > 1 - 1e-9


def test_several_operators_recover_the_dictionary():
    model, truth, data, start = toy(12)
    learned = learn_dictionary(data, Alternating(model), start=start, iterations=60).dictionary
    assert recovery(start, truth) < 0.9 and recovery(learned, truth) > 0.97


def test_bad_operators():
    A, B = fm.linear.Dense(randn(4, 9)), fm.linear.Dense(randn(5, 9))
    with pytest.raises(ShapeError):
        Operators([A, B], torch.tensor([0, 1]))
    with pytest.raises(ShapeError):
        Operators([], torch.tensor([0]))
    for which in (torch.tensor([0, 1]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(DataError):
            Operators([A], which)
    with pytest.raises(DataError):
        Masks(torch.full((3, 4), 0.5))
    model = SparseModel(0.1, observation=Operators([B, B], torch.zeros(6, dtype=torch.long)))
    with pytest.raises(ShapeError, match="6 signals"):
        learn_dictionary(randn(7, 5), Alternating(model), start=unit(randn(9, 12)))


# -- analysis operators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [8, 12, 20])
def test_cayley_steps_stay_on_tight_frames(p):
    frame = TightFrame()
    operator = frame.nearest(randn(8, p))
    for k in range(3):
        operator = frame.move(operator, randn(8, p, seed=k + 1), 0.3)
        torch.testing.assert_close(operator @ operator.mT, p / 8 * torch.eye(8, dtype=f64), rtol=0, atol=1e-8)
        torch.testing.assert_close(operator.norm(dim=0), torch.ones(p, dtype=f64), rtol=0, atol=1e-12)


def test_cayley_step_descends_along_the_gradient():
    """For small steps the linear function <G, Gamma> falls at the rate of the tangent part of G."""
    frame, gradient = TightFrame(), randn(6, 6, seed=1)
    operator = frame.nearest(randn(6, 6))
    tangent = (gradient - operator @ gradient.mT @ operator) / 2
    h = 1e-5
    moved = frame.move(operator, gradient, h)
    slope = ((moved - operator) * gradient).sum() / h
    assert float(slope) == pytest.approx(-2 * float(tangent.square().sum()), rel=1e-3)


def test_a_tight_frame_needs_enough_rows():
    with pytest.raises(ShapeError, match="at least as many rows"):
        learn_dictionary(randn(30, 8), AnalysisOperator(0.1), atoms=5)


def test_a_start_outside_the_constraint_is_refused():
    with pytest.raises(DataError, match="nearest"):
        learn_dictionary(randn(30, 8), AnalysisOperator(0.1), start=unit(randn(8, 10)))


def test_denoising_by_an_operator_and_its_gradient():
    """The dual iteration reaches the primal value, whose gradient in Gamma is u x'."""
    method, operator, data = AnalysisOperator(0.2, UnitRows(), steps=4000), unit(randn(5, 7)), randn(6, 5, seed=1)
    u = method.dual(operator, data, torch.zeros(6, 7, dtype=f64))
    x = data - u @ operator.mT
    dual_value = float((0.5 * data.square().sum() - 0.5 * x.square().sum()) / 6)
    assert method.primal(operator, data, u) == pytest.approx(dual_value, rel=1e-7)
    direction, h = randn(5, 7, seed=2), 1e-4

    def value(t: float) -> float:
        moved = operator + t * direction
        return method.primal(moved, data, method.dual(moved, data, u))

    expected = (value(h) - value(-h)) / (2 * h)
    assert float((x.mT @ u / 6 * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_an_analysis_operator_is_recovered_from_nearby():
    truth = TightFrame().nearest(randn(8, 10))
    signals = []
    for k in range(200):
        zeros = truth[:, torch.randperm(10, generator=torch.Generator().manual_seed(k))[:5]]
        free = torch.linalg.svd(zeros.mT)[2][5:]
        signals.append(randn(1, 3, seed=k) @ free)
    data = torch.cat(signals)
    start = TightFrame().nearest(truth + 0.25 * randn(8, 10, seed=1))
    learned = learn_dictionary(data, AnalysisOperator(0.05, steps=10), start=start, iterations=40)
    assert recovery(start, truth) < 0.95 and recovery(learned.dictionary, truth) > 0.995


def test_matrix_synthesis_is_the_default():
    assert isinstance(SparseModel(1.0).synthesis, MatrixSynthesis)


@pytest.mark.parametrize("shape,size", [((8,), (9,)), ((8, 8), (3,)), ((4, 4, 4), (2, 2, 2)), ((8,), (0,))])
def test_bad_circular_shapes(shape, size):
    with pytest.raises(ShapeError):
        CircularSynthesis(shape, size)
