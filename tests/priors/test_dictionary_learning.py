"""What every method of dictionary learning promises, and what single ones do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors import (
    Alternating,
    AnalysisOperator,
    KSvd,
    Mod,
    Online,
    SparseModel,
    Unrolled,
    learn_dictionary,
    learn_from_stream,
    omp,
    recovery,
)
from firmly.priors.learning import Status


def name_of(method):
    return type(method).__name__


METHODS = [
    KSvd(3), KSvd(3, exact=False), KSvd(3, batch_size=100), Mod(3), Online(0.1, batch_size=50),
    Online(sparsity=3, batch_size=50), Alternating(SparseModel(0.1)),
    Unrolled(SparseModel(0.1), steps=10, through=5), AnalysisOperator(0.05, steps=10),
]  # fmt: skip
DESCENT = [Alternating(SparseModel(0.1)), Alternating(SparseModel(0.1), steps=3), AnalysisOperator(0.05, steps=10)]


def problem(m: int = 12, n: int = 20, count: int = 300, noise: float = 0.02, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signals (count, m) of three atoms each, and the true dictionary."""
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(m, n, generator=generator, dtype=torch.float64)
    D = D / D.norm(dim=0)
    mask = torch.rand(count, n, generator=generator).argsort(1) < 3
    codes = mask * torch.randn(count, n, generator=generator, dtype=torch.float64)
    return codes @ D.mT + noise * torch.randn(count, m, generator=generator, dtype=torch.float64), D


@pytest.mark.parametrize("method", METHODS, ids=name_of)
class TestEveryMethod:
    def test_atoms_have_unit_norm_and_objective_falls(self, method):
        data, _ = problem()
        learned = learn_dictionary(data, method, atoms=16, iterations=8)
        torch.testing.assert_close(
            learned.dictionary.norm(dim=0), torch.ones(16, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        quarter = -(-learned.iterations // 4)  # mini-batches differ
        assert sum(learned.objectives[-quarter:]) < sum(learned.objectives[:quarter])
        assert learned.status is Status.LIMIT

    def test_same_seed_same_dictionary(self, method):
        data, _ = problem()
        one, two = (learn_dictionary(data, method, atoms=16, iterations=3, seed=5) for _ in range(2))
        other = learn_dictionary(data, method, atoms=16, iterations=3, seed=6)
        assert torch.equal(one.dictionary, two.dictionary) and one.objectives == two.objectives
        assert not torch.equal(one.dictionary, other.dictionary)

    def test_arguments_are_not_changed(self, method):
        data, _ = problem()
        start = learn_dictionary(data, method, atoms=16, iterations=1).dictionary
        copies = data.clone(), start.clone()
        learn_dictionary(data, method, start=start, iterations=2)
        assert torch.equal(data, copies[0]) and torch.equal(start, copies[1])

    def test_single_precision(self, method):
        data, _ = problem()
        learned = learn_dictionary(data.float(), method, atoms=16, iterations=3)
        assert learned.dictionary.dtype == torch.float32 and learned.dictionary.isfinite().all()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_the_gpu(self, method):
        data, _ = problem()
        learned = learn_dictionary(data.cuda(), method, atoms=16, iterations=3)
        assert learned.dictionary.is_cuda

    def test_interruption_keeps_the_last_whole_round(self, method):
        data, _ = problem()
        kept: list[Tensor] = []

        def stop(iteration: int, dictionary: Tensor, objective: float) -> None:
            kept.append(dictionary)
            if iteration == 3:
                raise KeyboardInterrupt

        learned = learn_dictionary(data, method, atoms=16, iterations=9, callback=stop)
        assert learned.status is Status.INTERRUPTED and learned.iterations == 3
        assert torch.equal(learned.dictionary, kept[-1])

    @pytest.mark.parametrize("data,error", [
        (torch.full((5, 4), float("nan")), DataError), (torch.ones(5, 4, dtype=torch.int32), DataError),
        (torch.ones(0, 4), ShapeError), (torch.ones(4), ShapeError),
    ])  # fmt: skip
    def test_bad_data(self, method, data, error):
        with pytest.raises(error):
            learn_dictionary(data, method, atoms=8)

    def test_bad_start(self, method):
        data, _ = problem()
        for start, error in [(torch.eye(5, dtype=torch.float64), ShapeError), (2 * torch.eye(12).double(), DataError),
                             (torch.eye(12), DataError)]:  # fmt: skip
            with pytest.raises(error):
                learn_dictionary(data, method, start=start)


@pytest.mark.parametrize("method", DESCENT, ids=name_of)
def test_objective_falls_in_every_round(method):
    data, _ = problem(noise=0.2)
    objectives = learn_dictionary(data, method, atoms=16, iterations=15).objectives
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(objectives)), objectives


@pytest.mark.parametrize("method", [KSvd(3), KSvd(3, exact=False), Mod(3)], ids=name_of)
def test_dictionary_steps_never_raise_the_objective(method):
    data, _ = problem(noise=0.2)
    D = learn_dictionary(data, method, atoms=16, iterations=1).dictionary
    memory = method.code(D, data, None)
    values = [method.objective(D, data, memory)]
    for _ in range(10):
        D, memory = method.update(D, data, memory)
        values.append(method.objective(D, data, memory))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values)) and values[-1] < values[0]


@pytest.mark.parametrize("method", [KSvd(3), KSvd(3, exact=False), Mod(3), Alternating(SparseModel(0.05))], ids=name_of)
def test_a_dictionary_is_recovered_from_nearby(method):
    data, truth = problem(count=1500)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = truth + 0.12 * noise
    start = start / start.norm(dim=0)
    learned = learn_dictionary(data, method, start=start, iterations=60)
    assert recovery(start, truth) < 0.94 and recovery(learned.dictionary, truth) > 0.995


def test_k_svd_fits_every_atom_best():
    """One signal group, one atom: the dictionary step is the leading singular vector."""
    data, _ = problem()
    learned = learn_dictionary(data, KSvd(1), start=torch.eye(12, dtype=torch.float64), iterations=40)
    used = learned.memory.support[:, 0]
    for j in range(12):
        mine = data[used == j]
        if len(mine):
            top = torch.linalg.svd(mine, full_matrices=False)[2][0]
            assert abs(float(top @ learned.dictionary[:, j])) > 1 - 1e-10


def test_mod_solves_its_least_squares():
    data, truth = problem()
    codes = omp(truth, data, 3)
    better, scaled = Mod(3).update(truth, data, codes)
    rest = data - scaled.synthesise(better)
    assert (rest.mT @ scaled.dense()).abs().max() < 1e-10 * len(data)


def test_online_minimises_its_surrogate():
    """Repeated updates on fixed statistics reach a stationary point of 1/2 tr(D'D A) - tr(D'B) over unit atoms."""
    data, truth = problem()
    method = Online(0.1)
    memory = method.code(truth, data, None)
    D, values = truth, []
    for _ in range(400):
        D, _ = method.update(D, data, memory)
        values.append(float(0.5 * (D.mT @ D * memory.second).sum() - (D * memory.cross).sum()))
    assert all(b <= a + 1e-9 for a, b in pairwise(values))
    gradient = D @ memory.second - memory.cross
    tangent = gradient - D * (D * gradient).sum(0)
    assert tangent.abs().max() < 1e-6 * gradient.abs().max()


def test_a_stream_equals_its_batches_and_goes_on():
    data, _ = problem()
    batches = list(data.split(60))
    whole = learn_from_stream(batches, Online(0.1), atoms=16)
    first = learn_from_stream(iter(batches[:3]), Online(0.1), atoms=16)
    rest = learn_from_stream(iter(batches[3:]), Online(0.1), start=first.dictionary, memory=first.memory)
    torch.testing.assert_close(rest.dictionary, whole.dictionary, rtol=1e-12, atol=1e-12)
    assert whole.iterations == len(batches)
    with pytest.raises(SettingsError, match="Online"):
        learn_from_stream(batches, KSvd(2), atoms=16)
    with pytest.raises(DataError, match="no batch"):
        learn_from_stream([], Online(0.1), atoms=16)
    with pytest.raises(ShapeError):
        learn_from_stream([data, data[:, :5]], Online(0.1), atoms=16)


@pytest.mark.parametrize("method", [KSvd(2), Mod(2), Online(0.1), Alternating(SparseModel(0.1)),
                                    Unrolled(SparseModel(0.1))], ids=name_of)  # fmt: skip
def test_unused_atoms_are_replaced_and_counted(method):
    """The signals live in the first four coordinates; the start lives in the others."""
    data, _ = problem()
    data[:, 4:] = 0
    start = torch.zeros(12, 8, dtype=torch.float64)
    start[4 + torch.arange(8), torch.arange(8)] = 1
    learned = learn_dictionary(data, method, start=start, iterations=10)
    assert learned.replaced >= 4
    assert learned.objectives[-1] < 0.5 * float(0.5 * data.square().sum(1).mean())


def test_an_objective_that_overflows_is_refused():
    data, _ = problem()
    with pytest.raises(DataError, match="scale"):
        learn_dictionary(1e25 * data.float(), KSvd(2), atoms=5)


def test_unrolled_steps_never_raise_the_unrolled_objective():
    data, _ = problem(noise=0.2)
    for through in (0, 3, None):
        method = Unrolled(SparseModel(0.1), steps=8, through=through)
        D = learn_dictionary(data, method, atoms=12, iterations=1).dictionary
        memory = method.code(D, data, None)
        for _ in range(6):
            before = method.objective(D, data, memory)
            D, memory = method.update(D, data, memory)
            assert method.objective(D, data, memory) <= before


def test_few_signals_and_many_atoms():
    data, _ = problem(count=3)
    learned = learn_dictionary(data, KSvd(1), atoms=10, iterations=4)
    assert learned.dictionary.isfinite().all() and learned.objectives[-1] < 1e-20
    zeros = learn_dictionary(torch.zeros(4, 6), KSvd(1), atoms=3, iterations=2)
    assert zeros.dictionary.isfinite().all()


def test_tolerance_ends_learning():
    data, _ = problem()
    learned = learn_dictionary(data, KSvd(3), atoms=16, iterations=500, tol=1e-3)
    assert learned.status is Status.CONVERGED and learned.iterations < 100


@pytest.mark.parametrize("settings", [
    {}, {"atoms": 0}, {"atoms": 4, "iterations": 0}, {"atoms": 4, "tol": -1.0}, {"atoms": 4, "start": torch.eye(12)},
])  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(SettingsError):
        learn_dictionary(problem()[0], KSvd(2), **settings)


@pytest.mark.parametrize("make", [
    lambda: KSvd(0), lambda: Mod(-1), lambda: Online(0.0), lambda: Online(), lambda: Online(0.1, 3),
    lambda: Online(sparsity=0), lambda: Online(sparsity=-1), lambda: Online(0.1, batch_size=0),
    lambda: Online(0.1, steps=0),
    lambda: SparseModel(-1.0), lambda: SparseModel(float("nan")), lambda: Alternating(SparseModel(0.1), steps=0),
    lambda: Unrolled(SparseModel(0.1), steps=5, through=6), lambda: AnalysisOperator(0.0),
])  # fmt: skip
def test_bad_methods(make):
    with pytest.raises(SettingsError):
        make()


def test_recovery_knows_order_and_sign():
    _, D = problem()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert recovery(-D[:, order], D) == pytest.approx(1)
    with pytest.raises(ShapeError):
        recovery(D, D[:, :5])
