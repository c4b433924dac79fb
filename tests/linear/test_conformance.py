"""What every linear map keeps: adding a map is one file in firmly/linear and one line in MAPS."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.sparse
import torch
from torch import Tensor

import firmly.linear as linear
from firmly.errors import NotDiagonal, ShapeError
from firmly.linear import DenseBasis, FourierBasis, LinearMap

pytest.importorskip("pywt")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _resolvents() -> dict[str, LinearMap]:
    circular = linear.Convolution(normal(3, 2, 3, 3), (2, 5, 4))
    mask = (normal(5, 4, seed=3) > 0).double()
    return {
        "Resolvent of a circular convolution": linear.Resolvent(circular, 0.3),
        "Resolvent of a zero-padded convolution": linear.Resolvent(
            linear.Convolution(normal(3, 3), (1, 5, 4), "zero"), 0.3
        ),
        "Resolvent of a mask": linear.Resolvent(linear.Mask(mask[None]), 0.3),
        "Resolvent of a Fourier sampling": linear.Resolvent(linear.FourierSampling(mask), 0.3),
        "Resolvent of a matrix": linear.Resolvent(linear.Dense(normal(3, 5)), 0.3),
    }


MONOTONE = linear.Monotone(
    linear.Convolution(normal(3, 2, 3, 3), (2, 5, 4)), 0.3, linear.Convolution(normal(2, 2, 3, 3, seed=2), (2, 5, 4))
)

MAPS: dict[str, LinearMap] = {
    "Identity": linear.Identity((2, 4, 3)),
    "Dense": linear.Dense(normal(4, 7)),
    "Dense, several vectors": linear.Dense(normal(4, 7), copies=3),
    "Dense complex": linear.Dense(normal(4, 7, dtype=torch.complex128)),
    "BlockSampling": linear.BlockSampling(normal(3, 4, 4), (1, 9, 8)),
    "BlockSampling of a part of a block": linear.BlockSampling(normal(5, 4, 4), (1, 3, 7)),
    "Convolution 1-D": linear.Convolution(normal(3, 2, 4), (2, 9)),
    "Convolution circular": linear.Convolution(normal(3, 2, 3, 3), (2, 6, 5)),
    "Convolution zero": linear.Convolution(normal(3, 2, 3, 4), (2, 6, 5), "zero"),
    "Convolution reflect": linear.Convolution(normal(3, 2, 5, 2), (2, 6, 5), "reflect"),
    "Convolution larger than the image": linear.Convolution(normal(7, 9), (2, 4, 5)),
    "Convolution by frequency": linear.Convolution(normal(3, 2, 9, 9), (2, 5, 4)),
    "Convolution 3-D": linear.Convolution(normal(2, 1, 3, 2, 3), (1, 3, 4, 3)),
    "Blur gaussian": linear.Blur.gaussian(0.7, (2, 8, 7)),
    "Blur motion": linear.Blur.motion(4.0, 30.0, (1, 8, 7), "reflect"),
    "Gradient neumann": linear.Gradient((2, 5, 4)),
    "Gradient circular": linear.Gradient((2, 5, 4), "circular"),
    "Gradient 1-D": linear.Gradient((1, 6)),
    "Differences": linear.Differences(6),
    "Cumulative": linear.Cumulative(7),
    "Wavelet": linear.Wavelet("db4", (2, 8, 4), levels=2),
    "FourierSampling": linear.FourierSampling(normal(6, 5) > 0, channels=2),
    "Mask": linear.Mask(normal(1, 5, 4) > 0, (2, 5, 4)),
    "Diagonal": linear.Diagonal(normal(2, 1, 1), (2, 4, 3)),
    "Diagonal complex": linear.Diagonal(normal(2, 4, 3, dtype=torch.complex128)),
    "Sparse": linear.Sparse(scipy.sparse.random_array((12, 8), density=0.4, rng=0), (2, 4), (12,)),
    "Radon": linear.Radon((1, 6, 5), torch.linspace(0, 3, 5, dtype=torch.float64)),
    "FilteredRadon": linear.FilteredRadon((1, 6, 5), torch.linspace(0, 3, 5, dtype=torch.float64)),
    "from_scipy operator": linear.from_scipy(
        scipy.sparse.linalg.aslinearoperator(normal(6, 8).numpy()), (2, 4), (1, 6)
    ),
    "Scale": -2.5 * linear.Dense(normal(4, 7)),
    "Compose": linear.Gradient((2, 4, 4)) @ linear.Convolution(normal(2, 1, 3, 3), (1, 4, 4), "zero"),
    "Sum": linear.Identity((1, 4, 4)) + linear.Convolution(normal(3, 3), (1, 4, 4)),
    "Stack": linear.Stack([linear.Identity((1, 4, 4)), linear.Convolution(normal(2, 1, 3, 3), (1, 4, 4))]),
    "Adjoint": linear.Convolution(normal(3, 2, 3, 3), (2, 6, 5)).T,
    "Monotone": linear.Monotone(linear.Dense(normal(4, 7)), 0.3, linear.Dense(normal(7, 7))),
    "Monotone convolution": MONOTONE,
    "Tiers": linear.Tiers(
        {(0, 0): normal(2, 2, 3, 3), (1, 0): normal(3, 2, 3, 3, seed=1)},
        (linear.Tier(2, 2),),
        (linear.Tier(2, 2), linear.Tier(3, 1)),
        (3, 2),
    ),
    "LoopResolvent": linear.LoopResolvent(linear.Monotone(linear.Dense(normal(4, 7)), 0.3), 0.8),
    "LoopResolvent of a convolution": linear.LoopResolvent(MONOTONE, 0.8),
    **_resolvents(),
}

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("name", MAPS)
class TestConformance:
    def sample(self, a: LinearMap, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
        dtype = torch.complex128 if a.is_complex else torch.float64
        return normal(batch, *a.domain, seed=seed, dtype=dtype), normal(batch, *a.codomain, seed=seed + 1, dtype=dtype)

    def test_adjoint_identity(self, name: str) -> None:
        a = MAPS[name]
        x, y = self.sample(a)
        left, right = (a(x) * y.conj()).sum(), (x * a.T(y).conj()).sum()
        assert abs(left - right) <= 1e-12 * (a(x).norm() * y.norm() + 1)

    def test_adjoint_of_the_adjoint_is_the_map(self, name: str) -> None:
        a = MAPS[name]
        assert a.T.T is a
        assert (a.T.domain, a.T.codomain) == (a.codomain, a.domain)

    def test_complex_input_is_mapped_complex_linearly(self, name: str) -> None:
        a = MAPS[name]
        x, z = (normal(2, *a.domain, seed=s) for s in (1, 2))
        torch.testing.assert_close(a(torch.complex(x, z)), a(x) + 1j * a(z), rtol=1e-11, atol=1e-11)

    def test_batch_is_a_loop(self, name: str) -> None:
        a = MAPS[name]
        x, _ = self.sample(a)
        torch.testing.assert_close(a(x), torch.cat([a(x[i : i + 1]) for i in range(len(x))]), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("device", DEVICES)
    def test_computes_in_the_precision_and_place_of_its_input(self, name: str, device: str) -> None:
        a = copy.deepcopy(MAPS[name]).to(device)
        x, y = (t.to(device) for t in self.sample(MAPS[name]))
        for values, apply in ((x, a), (y, a.T)):
            single = apply(values.to(torch.complex64 if values.is_complex() else torch.float32))
            double = apply(values)
            assert single.dtype == (torch.complex64 if double.is_complex() else torch.float32)
            assert single.device.type == double.device.type == device
            torch.testing.assert_close(single.to(double.dtype), double, rtol=1e-4, atol=1e-4)

    def test_gradients(self, name: str) -> None:
        a = MAPS[name]
        x, y = self.sample(a, batch=2)
        assert torch.autograd.gradcheck(a, x.requires_grad_())
        assert torch.autograd.gradcheck(a.T, y.requires_grad_())

    def test_directional_derivative_is_the_map(self, name: str) -> None:
        a = MAPS[name]
        x, _ = self.sample(a)
        _, derivative = torch.func.jvp(a, (x,), (x,))
        torch.testing.assert_close(derivative, a(x), rtol=1e-12, atol=1e-12)

    def test_wrong_shapes_are_refused(self, name: str) -> None:
        a = MAPS[name]
        with pytest.raises(ShapeError, match=r"the first dimension is the batch"):
            a(torch.zeros(a.domain, dtype=torch.float64)[..., :-1][None])
        with pytest.raises(ShapeError, match="floating-point"):
            a(torch.zeros(1, *a.domain, dtype=torch.int64))

    def test_norm_bracket_holds_the_norm(self, name: str) -> None:
        a = MAPS[name]
        true = float(torch.linalg.matrix_norm(a.matrix(), 2))
        lower, upper = a.norm()
        assert lower <= true * (1 + 1e-13)
        assert true * (1 - 1e-13) <= upper
        assert upper - lower <= 1e-8 * true
        assert a.T.norm() == a.norm()

    def test_dense_symbol_is_the_matrix(self, name: str) -> None:
        a = MAPS[name]
        symbol = a.symbol(DenseBasis())
        columns = a(torch.eye(math.prod(a.domain), dtype=torch.float64).reshape(-1, *a.domain)).flatten(1).T
        deviation = torch.linalg.matrix_norm(symbol.value[0] - columns)
        assert deviation <= symbol.error[0] + 1e-12 * (1 + columns.norm())
        torch.testing.assert_close(a.T.symbol(DenseBasis()).value, symbol.value.mH)

    def test_gram_diagonal(self, name: str) -> None:
        a = MAPS[name]
        diagonal = a.gram_diagonal()
        if diagonal is not None:
            x, _ = self.sample(a)
            torch.testing.assert_close(a.T(a(x)), diagonal * x, rtol=1e-12, atol=1e-12)

    def test_fourier_symbol_is_the_action_on_frequencies(self, name: str) -> None:
        """F A F* is block diagonal with the symbol's blocks, F unitary; data of a Fourier sampling are frequencies."""
        a = MAPS[name]
        if len(a.domain) < 2:
            return
        basis = FourierBasis(a.domain[1:], full=True)
        try:
            symbol = a.symbol(basis)
        except NotDiagonal:
            return
        x = normal(2, *a.domain, dtype=torch.complex128)
        axes = tuple(range(2, x.dim()))
        image = a(x) if symbol.rows == "frequency" else torch.fft.fftn(a(x), dim=axes, norm="ortho")
        frequencies = torch.fft.fftn(x, dim=axes, norm="ortho").flatten(2)
        acted = torch.einsum("foi,bif->bof", symbol.value.to(x.dtype).expand(basis.blocks, -1, -1), frequencies)
        torch.testing.assert_close(acted, image.flatten(2), rtol=1e-11, atol=1e-11)
        if not a.is_complex:
            half = a.symbol(FourierBasis(a.domain[1:]))
            kept = torch.arange(basis.blocks).reshape(a.domain[1:])[..., : a.domain[-1] // 2 + 1].flatten()
            torch.testing.assert_close(
                half.value.expand(len(kept), -1, -1), symbol.value.expand(basis.blocks, -1, -1)[kept]
            )


def test_list_has_every_map() -> None:
    classes = {type(m) for a in MAPS.values() for m in a.modules()}
    public = {getattr(linear, name) for name in linear.__all__}
    missing = {c for c in public if isinstance(c, type) and issubclass(c, LinearMap)} - classes - {LinearMap}
    assert not missing, f"add a line for {missing} to MAPS"
