"""Orthogonal matching pursuit against its definition, one signal at a time."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors import omp


def dictionary(m: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    D = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (D / D.norm(dim=0)).to(dtype)


def signals(count: int, m: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(count, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(D: Tensor, y: Tensor, sparsity: int, tolerance: float = 0.0) -> Tensor:
    """Refit by least squares in every step."""
    support: list[int] = []
    z, rest = y.new_zeros(D.shape[1]), y
    while len(support) < sparsity and rest.norm() > tolerance:
        support.append(int((rest @ D).abs().argmax()))
        fitted = torch.linalg.lstsq(D[:, support], y[:, None]).solution[:, 0]
        z = torch.zeros_like(z)
        z[support] = fitted
        rest = y - D @ z
    return z


@pytest.mark.parametrize("m,n,sparsity", [(8, 20, 1), (8, 20, 3), (12, 12, 12), (20, 9, 5), (16, 40, 16)])
def test_equals_its_definition(m, n, sparsity):
    D, Y = dictionary(m, n), signals(30, m)
    found = omp(D, Y, sparsity).dense()
    expected = torch.stack([by_definition(D, y, sparsity) for y in Y])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tolerance", [0.5, 1.5, 2.5])
def test_stops_at_the_tolerance_each_signal_on_its_own(tolerance):
    D, Y = dictionary(10, 25), signals(40, 10)
    code = omp(D, Y, tolerance=tolerance)
    expected = torch.stack([by_definition(D, y, 10, tolerance) for y in Y])
    torch.testing.assert_close(code.dense(), expected, rtol=1e-8, atol=1e-8)
    assert ((Y - code.synthesise(D)).norm(dim=1) <= tolerance * (1 + 1e-9)).all()
    assert len(set((code.values != 0).sum(1).tolist())) > 1


def test_chunks_do_not_matter(monkeypatch):
    D, Y = dictionary(10, 25), signals(50, 10)
    whole = omp(D, Y, 4, 1.0).dense()
    monkeypatch.setattr(sys.modules["firmly.priors.omp"], "CHUNK_BYTES", 1)
    torch.testing.assert_close(omp(D, Y, 4, 1.0).dense(), whole, rtol=1e-12, atol=1e-12)


def test_code_parts_agree():
    D, Y = dictionary(10, 25), signals(50, 10)
    code = omp(D, Y, 4)
    torch.testing.assert_close(code.synthesise(D), code.dense() @ D.mT)
    assert torch.equal(code.usage(), (code.dense() != 0).sum(0))


def test_zero_signals_dependent_atoms_and_exact_sums():
    D = dictionary(6, 10)
    D = torch.cat([D, D[:, :3], -D[:, 3:5]], dim=1)  # copies: no support may hold both
    Y = torch.stack([torch.zeros(6, dtype=torch.float64), 2 * D[:, 0], D[:, 1] - 3 * D[:, 2]])
    code = omp(D, Y, 6)
    assert (code.values[0] == 0).all() and (code.support[0] == 15).all()
    assert int((code.values[1] != 0).sum()) == 1
    torch.testing.assert_close(code.synthesise(D), Y, rtol=1e-10, atol=1e-10)
    assert code.dense().isfinite().all()


def test_single_precision_is_as_good():
    D, Y = dictionary(32, 80), signals(200, 32)
    exact = (Y - omp(D, Y, 8).synthesise(D)).norm(dim=1)
    rough = (Y.float() - omp(D.float(), Y.float(), 8).synthesise(D.float())).norm(dim=1).double()
    assert (rough - exact).abs().median() < 1e-5 and abs(float(rough.mean() / exact.mean()) - 1) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    D, Y = dictionary(16, 40), signals(50, 16)
    torch.testing.assert_close(omp(D.cuda(), Y.cuda(), 4).dense().cpu(), omp(D, Y, 4).dense())


@pytest.mark.parametrize("bad,error", [
    ({"sparsity": 0}, SettingsError), ({"sparsity": 11}, SettingsError), ({}, SettingsError),
    ({"tolerance": -1.0}, SettingsError), ({"tolerance": float("nan")}, SettingsError),
    ({"sparsity": 2, "data": torch.zeros(3, 9)}, ShapeError), ({"sparsity": 2, "data": torch.zeros(10)}, ShapeError),
    ({"sparsity": 2, "data": torch.full((3, 10), float("nan"))}, DataError),
    ({"sparsity": 2, "data": torch.zeros(3, 10, dtype=torch.int64)}, DataError),
    ({"sparsity": 2, "data": torch.zeros(3, 10, dtype=torch.float16)}, DataError),
    ({"sparsity": 2, "dictionary": 2 * dictionary(10, 25)}, DataError),
    ({"sparsity": 2, "dictionary": torch.zeros(10)}, ShapeError),
    ({"sparsity": 2, "dictionary": torch.full((10, 25), float("inf"))}, DataError),
])  # fmt: skip
def test_bad_input_is_refused(bad, error):
    arguments = {"dictionary": dictionary(10, 25), "data": signals(3, 10)} | bad
    with pytest.raises(error):
        omp(**arguments)
