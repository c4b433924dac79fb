"""The ridge regulariser: a gradient, held inside a slope interval that is certified at every image size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firmly.errors import ConditionError, NotDiagonal, ShapeError
from firmly.linear import DenseBasis, FourierBasis
from firmly.prox import Clip, LinearSpline, Ridge, dct_filters, peak_power, ridge_gradient
from firmly.prox.filter_bank import gain, power
from firmly.prox.ridge import real_transform


def random_ridge(
    low: float = 0.0, cap: float | None = None, zero_mean: bool = False, size=(3, 4), seed: int = 0
) -> Ridge:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(5, 1, *size, generator=generator, dtype=torch.float64) / 2
    spline = LinearSpline(5, knots=9, reach=1.0, low=low, high=1.2).double()
    spline.raw.data = low + (1.2 - low) * torch.rand(5, 10, generator=generator, dtype=torch.float64)
    return Ridge(kernel, spline, cap, zero_mean)


SETTINGS = [
    {"low": 0.0},
    {"low": -0.3},
    {"low": 0.4, "cap": 1.99},
    {"low": -0.3, "cap": 0.5, "zero_mean": True},
    {"size": (5,), "cap": 2.0},
    {"size": (2, 3, 2), "cap": 2.0},
]


def image(ridge: Ridge, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    spatial = (7, 6, 5)[: ridge.kernel.dim() - 2]
    return torch.randn(batch, 1, *spatial, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SETTINGS, ids=str)
def ridge(request: pytest.FixtureRequest) -> Ridge:
    return random_ridge(**request.param)


def test_gradient_is_that_of_the_value(ridge: Ridge):
    for dtype in (torch.float64, torch.complex128):
        x = image(ridge, dtype=dtype).requires_grad_()
        (expected,) = torch.autograd.grad(ridge.value(x).sum(), x)
        torch.testing.assert_close(ridge.gradient(x), expected)
        assert ridge.value(x).shape == (2,)


def test_gradient_by_plain_convolutions():
    ridge = random_ridge(size=(3, 5), cap=1.5)
    x = image(ridge)
    filters = ridge.filters()
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="circular")
    features = ridge.activation(torch.nn.functional.conv2d(padded, filters))
    padded = torch.nn.functional.pad(features, (2, 2, 1, 1), mode="circular")
    expected = torch.nn.functional.conv2d(padded, filters.flip(2, 3).transpose(0, 1))
    torch.testing.assert_close(ridge.gradient(x), expected)


def test_jacobian_slopes(ridge: Ridge):
    """p = S R(S x): <w - low s, s - w> >= 0 for s = S dx and dp = S w, and so are the eigenvalues of Jacobians."""
    x = image(ridge, batch=1)
    spatial = x.shape[2:]
    n = x.numel()
    S, (low, high) = ridge.gain(spatial), ridge.slope
    matrix = S.matrix()
    assert high == 1.0
    identity = torch.eye(n, dtype=torch.float64)
    for seed in range(5):
        jacobian = torch.autograd.functional.jacobian(ridge.gradient, image(ridge, batch=1, seed=seed)).reshape(n, n)
        torch.testing.assert_close(jacobian, jacobian.T)
        upper = torch.linalg.eigvalsh(matrix @ matrix - jacobian)
        lower = torch.linalg.eigvalsh(jacobian - low * matrix @ matrix)
        assert upper.min() >= -1e-9
        assert lower.min() >= -1e-9
        slopes = torch.linalg.eigvalsh(identity - jacobian)
        assert slopes.min() >= 1 - ridge.kappa().item() - 1e-9
        assert slopes.max() <= 1 - min(low, 0) * ridge.kappa().item() + 1e-9


def test_increments_satisfy_the_quadratic_constraint(ridge: Ridge):
    """sum_i <dv_i - low h_i dz_i, dz_i h_i - dv_i> / h_i seen through S: what the certificate of a layer uses."""
    x, y = image(ridge, 40), image(ridge, 40, seed=2)
    spatial = x.shape[2:]
    axes = tuple(range(2, x.dim()))
    multiplier = gain(*ridge._filters(), spatial, half=False)[0]
    dx, dp = x - y, ridge.gradient(x) - ridge.gradient(y)
    s = multiplier * torch.fft.fftn(dx, dim=axes)
    w = torch.fft.fftn(dp, dim=axes) / multiplier
    form = ((w - ridge.slope.low * s).conj() * (s - w)).real.flatten(1).sum(1)
    assert (form >= -1e-9 * (s.abs() ** 2).flatten(1).sum(1)).all()


def test_the_peak_bound_holds_at_every_size(ridge: Ridge):
    kernel, weight = ridge._filters()
    bound = ridge.kappa().item()
    largest = 0.0
    for n in (1, 2, 3, 5, 8, 13, 31, 64, 97):
        sizes = [n] * (kernel.dim() - 2)
        if n ** len(sizes) > 40000:
            continue
        periodic = torch.zeros(len(kernel), *sizes, dtype=torch.float64)
        for place in (
            torch.cartesian_prod(*[torch.arange(k) for k in kernel.shape[2:]]).reshape(-1, len(sizes)).tolist()
        ):
            periodic[(slice(None), *[p % n for p in place])] += kernel[(slice(None), 0, *place)]  # wrapped
        transform = torch.fft.fftn(periodic, dim=tuple(range(1, periodic.dim())))
        exact = (weight.reshape(-1, *[1] * len(sizes)) * transform.abs() ** 2).sum(0)
        values, error = power(kernel, weight, sizes, half=False)
        assert (values - exact).abs().max() <= error + 1e-13 * exact.max()
        root, spread = gain(kernel, weight, sizes, half=False)
        assert ((root - exact.sqrt()).abs() <= spread + 1e-14).all()
        assert exact.max() <= bound
        largest = max(largest, exact.max().item())
    assert bound <= 1.02 * largest


def test_the_cap_is_kept_and_is_reached():
    for cap in (0.5, 1.99):
        ridge = random_ridge(cap=cap)
        assert 0.99 * cap <= ridge.kappa().item() <= cap
    small = random_ridge(cap=1e6)
    torch.testing.assert_close(small.filters(), small.kernel)
    assert random_ridge(zero_mean=True).filters().mean((2, 3)).abs().max() < 1e-15


def test_the_peak_bound_is_differentiable():
    ridge = random_ridge()
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    kernel = ridge.kernel.detach().requires_grad_()
    assert torch.autograd.gradcheck(peak_power, (kernel, weight.requires_grad_()))
    ridge = random_ridge(cap=0.7, zero_mean=True)
    x = image(ridge)

    def of_kernel(kernel: Tensor) -> Tensor:
        return torch.func.functional_call(ridge, {"kernel": kernel}, (x,))

    assert torch.autograd.gradcheck(of_kernel, (ridge.kernel.detach().requires_grad_(),))

    def symbol(kernel: Tensor) -> Tensor:
        ridge.kernel.data = kernel.detach()
        return gain(kernel, weight.detach(), (6, 7), half=True)[0]

    assert torch.autograd.gradcheck(symbol, (kernel,))


def test_gain_is_a_linear_map(ridge: Ridge):
    x = image(ridge)
    spatial = x.shape[2:]
    S = ridge.gain(spatial)
    matrix = S.matrix()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(S.symbol(DenseBasis()).value[0], matrix)
    exact = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert S.norm().lower <= exact + 1e-12
    assert S.norm().upper >= exact - 1e-12
    assert S.norm().upper - S.norm().lower <= 1e-9
    z = x.to(torch.complex128)
    torch.testing.assert_close(S(z).real, S(x))
    for full in (False, True):
        basis = FourierBasis(spatial, full=full)
        symbol = S.symbol(basis)
        axes = tuple(range(2, x.dim()))
        expected = torch.fft.fftn(S(x), dim=axes) / torch.fft.fftn(x, dim=axes)
        torch.testing.assert_close(symbol.value[:, 0, 0], basis.sample(expected[0, 0]).real)
        assert symbol.error is not None
        assert symbol.error.shape == (basis.blocks,)
    with pytest.raises(NotDiagonal):
        S.symbol(FourierBasis([n + 1 for n in spatial]))


def test_constant_images_pass_where_the_mean_is_zero():
    ridge = random_ridge(zero_mean=True)
    x = image(ridge)
    torch.testing.assert_close(ridge.gradient(x + 3), ridge.gradient(x))
    symbol = ridge.gain((6, 6)).symbol(FourierBasis((6, 6)))
    assert symbol.value[0].item() <= 1e-5  # with its error: the exact value is 0
    assert symbol.error is not None
    assert symbol.value[0].item() <= symbol.error[0].item()


def test_weak_convexity_is_seen_through_the_weights():
    ridge = random_ridge(low=-0.3)
    low = ridge.slope.low
    assert low == pytest.approx(-0.25)
    lowest, highest = ridge.activation.interval()
    weight = ridge._weights()
    assert (lowest >= low * weight - 1e-15).all()
    assert (highest <= weight).all()


def test_filters_that_vanish():
    ridge = Ridge(torch.zeros(2, 1, 3, 3), Clip(2, 0.1), cap=1.0)
    symbol = ridge.gain((4, 4)).symbol(FourierBasis((4, 4)))
    symbol.value.sum().backward()
    assert symbol.error is not None
    assert symbol.value.abs().max() < 1e-99
    assert symbol.error.max() < 1e-99
    assert ridge.kernel.grad is not None
    assert torch.isfinite(ridge.kernel.grad).all()


def test_dct_filters_are_orthonormal():
    for dims, count in ((1, 4), (2, 24), (3, 124)):
        filters = dct_filters(5, dims=dims).flatten(1).double()
        assert len(filters) == count
        torch.testing.assert_close(filters @ filters.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-6)
        assert filters.sum(1).abs().max() < 1e-6
    with pytest.raises(ShapeError, match="filters"):
        dct_filters(3, 9)


def test_the_entry_point_can_be_overridden():
    class Recorder:
        seen: list[object] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return "recorded"

    ridge = Ridge(dct_filters(3), Clip(8, 0.1))
    assert ridge(Recorder()) == "recorded"  # type: ignore[arg-type]
    assert Recorder.seen == [ridge_gradient]


def test_float32_and_batches():
    ridge = Ridge(dct_filters(5), LinearSpline(24, 21, 0.5), cap=1.99, zero_mean=True)
    x = torch.rand(3, 1, 16, 12)
    p = ridge(x)
    assert p.dtype == torch.float32
    torch.testing.assert_close(torch.cat([ridge(x[i : i + 1]) for i in range(3)]), p)
    torch.testing.assert_close(ridge.double()(x.double()), p.double(), rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ShapeError, match="C = 8"):
        Ridge(dct_filters(3, 7), Clip(8, 0.1))
    with pytest.raises(ConditionError, match="cap"):
        Ridge(dct_filters(3), Clip(8, 0.1), cap=0.0)
    with pytest.raises(ShapeError, match="spatial"):
        Ridge(dct_filters(3), Clip(8, 0.1))(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 2, 4, 6), (1, 1, 3, 5), (1, 1, 2, 3, 4)])
def test_real_transform_has_the_derivatives_of_rfftn(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    axes = tuple(range(2, len(shape)))
    assert torch.equal(real_transform(x), torch.fft.rfftn(x, dim=axes))
    assert torch.autograd.gradcheck(real_transform, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(real_transform, x)
