"""Maps of other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import firmly.linear as linear
from firmly.errors import ConditionError, NotCertifiable, ShapeError

RNG = np.random.default_rng(0)


class Physics(nn.Module):
    """Quacks like deepinv's linear physics: single precision, A and A_adjoint on batches."""

    def __init__(self, size: int, wrong: float = 1.0):
        super().__init__()
        self.register_buffer("weight", torch.rand(2, 1, 1, generator=torch.Generator().manual_seed(0)) + 1)
        self.size, self.wrong = size, wrong

    def A(self, x: Tensor) -> Tensor:
        return self.weight * x.cumsum(-1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.wrong * (self.weight * y).flip(-1).cumsum(-1).flip(-1)


def test_sparse_matrices_and_arrays() -> None:
    matrix = scipy.sparse.random_array((12, 8), density=0.4, rng=0)
    for given in (matrix, scipy.sparse.csc_matrix(matrix)):
        a = linear.from_scipy(given, domain=(2, 4), codomain=(3, 4))
        np.testing.assert_allclose(a.matrix().numpy(), matrix.toarray())
    with pytest.raises(ShapeError, match="12 x 8"):
        linear.from_scipy(matrix, domain=(2, 5))
    with pytest.raises(ConditionError, match="leave norm out"):
        linear.from_scipy(matrix, norm=3.0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_scipy_operators(dtype: str) -> None:
    matrix = RNG.standard_normal((6, 8)).astype(dtype)
    if dtype.startswith("complex"):
        matrix = matrix + 1j * RNG.standard_normal((6, 8))
    a = linear.from_scipy(scipy.sparse.linalg.aslinearoperator(matrix))
    torch.testing.assert_close(a.matrix(), torch.as_tensor(matrix).to(a.matrix().dtype), rtol=1e-6, atol=1e-6)
    true = np.linalg.norm(matrix.astype("complex128"), 2)
    assert a.norm().lower <= true <= a.norm().upper


def test_large_operators_need_a_declared_norm() -> None:
    n = 3000
    diagonal = np.linspace(0, 2, n)
    operator = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=lambda x: diagonal * x.ravel(), rmatvec=lambda x: diagonal * x.ravel(), dtype=np.float64
    )
    with pytest.raises(NotCertifiable, match=r"norm=\.\.\."):
        linear.from_scipy(operator).norm()
    bracket = linear.from_scipy(operator, norm=2.5).norm()
    assert 1.9 < bracket.lower <= 2 < bracket.upper == 2.5
    with pytest.raises(ConditionError, match="declared"):
        linear.from_scipy(operator, norm=1.0).norm()


def test_deepinv_physics() -> None:
    a = linear.from_deepinv(Physics(5), domain=(2, 4, 5))
    assert a.codomain == (2, 4, 5)
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    assert a(x).dtype == torch.float64
    bracket = a.norm()
    columns = Physics(5).double().A(torch.eye(40, dtype=torch.float64).reshape(40, 2, 4, 5)).flatten(1)
    true = float(torch.linalg.matrix_norm(columns, 2))
    assert bracket.lower <= true <= bracket.upper
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(a(x).sum(), x)
    torch.testing.assert_close(gradient, a.T(torch.ones(3, 2, 4, 5, dtype=torch.float64)))
    assert "source.weight" in a.state_dict()


def test_functions_that_are_not_adjoint_are_refused() -> None:
    with pytest.raises(ConditionError, match="not adjoint"):
        linear.from_deepinv(Physics(5, wrong=1.1), domain=(2, 4, 5))
    with pytest.raises(ShapeError, match="declared"):
        linear.from_deepinv(Physics(5), domain=(2, 4, 5), codomain=(2, 4, 6))


def test_pylops() -> None:
    pylops = pytest.importorskip("pylops")
    a = linear.from_pylops(pylops.FirstDerivative((6, 5), axis=0, kind="forward"))
    assert a.domain == a.codomain == (1, 6, 5)
    x = torch.randn(2, 1, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(a(x)[:, :, :-1], x.diff(dim=2))
