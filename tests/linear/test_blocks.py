"""Products of all frequencies by real matrices: against the matrix of the map, on every kind of grid."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import NotDiagonal
from firmly.linear import (
    Convolution,
    Dense,
    Identity,
    LoopResolvent,
    Monotone,
    Scale,
    balanced_step,
    blocks,
    monotonicity,
)
from firmly.linear.blocks import Blocks, restored, transformed, turn

double = {"dtype": torch.float64}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


def loop(channels: int, *spatial: int) -> Monotone:
    kernel = (channels, channels, *[3] * len(spatial))
    shape = (channels, *spatial)
    return Monotone(Convolution(normal(*kernel), shape), 0.4, Convolution(normal(*kernel, seed=1), shape))


GRIDS = [(1,), (2,), (5,), (1, 1), (4, 3), (5, 2), (3, 2, 4)]


@pytest.mark.parametrize("spatial", GRIDS)
@pytest.mark.parametrize("long", [False, True])
class TestGrids:
    def test_transform(self, spatial, long, monkeypatch):
        monkeypatch.setattr(blocks, "LONGEST_AXIS", 0 if long else 128)
        x = normal(*spatial, 2, 3)
        axes = (*range(1, len(spatial)), 0)  # the first axis is the one that is halved
        expected = torch.view_as_real(torch.fft.rfftn(x, dim=axes)).movedim(-1, len(spatial))
        found = transformed(x, len(spatial))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(restored(found, spatial), x, rtol=0, atol=1e-14)

    def test_products_are_those_of_the_matrix(self, spatial, long, monkeypatch):
        monkeypatch.setattr(blocks, "LONGEST_AXIS", 0 if long else 128)
        W = loop(2, *spatial)
        matrix, x = W.matrix(), normal(3, 2, *spatial)
        for adjoint, rows in ((False, matrix), (True, matrix.T)):
            expected = (x.flatten(1) @ rows.T).reshape(x.shape)
            torch.testing.assert_close(Blocks(W)(x, adjoint), expected, rtol=0, atol=1e-12)
            z = torch.complex(x, x.flip(0))
            torch.testing.assert_close(Blocks(W)(z, adjoint), torch.complex(expected, expected.flip(0)))
            single = Blocks(W)(x.float(), adjoint)
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), expected, rtol=0, atol=3e-5)


def test_turn_is_its_own_inverse():
    x = normal(2, 3, 4, 5)
    assert turn(x).shape == (5, 4, 3, 2) and turn(x).is_contiguous() and torch.equal(turn(turn(x)), x)


def test_many_channels_go_by_frequency_and_agree():
    channels = 8
    W, x = loop(channels, 4, 3), normal(2, channels, 4, 3)
    assert W._by_frequency and not loop(2, 4, 3)._by_frequency
    W._by_frequency = False
    for way in (W, W.T):
        expected = way(x)
        W._by_frequency = True
        torch.testing.assert_close(way(x), expected, rtol=0, atol=1e-11)
        W._by_frequency = False


@pytest.mark.parametrize("parameter", [True, False])
def test_gradients_reach_kernels(parameter):
    """Parameters and tensors that only require gradients alike."""
    kernel = normal(8, 8, 3)
    if parameter:
        kernel = torch.nn.Parameter(kernel)
    else:
        kernel.requires_grad_()
    W, x = Monotone(Convolution(kernel, (8, 5)), 0.4), normal(2, 8, 5)
    weights = normal(2, 8, 5, seed=4)
    (found,) = torch.autograd.grad((W(x) * weights).sum(), kernel)
    W._by_frequency = False
    (expected,) = torch.autograd.grad((W(x) * weights).sum(), kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_matrices_follow_their_weights_and_precision():
    W = loop(8, 5)
    x = normal(2, 8, 5)
    first = W(x)
    with torch.no_grad():
        W.A.kernel.mul_(2.0)
    changed = W(x)
    W._by_frequency = False
    torch.testing.assert_close(changed, W(x), rtol=0, atol=1e-11)
    W._by_frequency = True
    assert not torch.allclose(changed, first)
    assert W(x.float()).dtype == torch.float32 and W(x).dtype == torch.float64


def test_autocast_leaves_the_precision():
    W, x = loop(8, 5).float(), normal(2, 8, 5).float()
    expected = W(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(W(x), expected)


def test_what_has_no_frequencies_and_is_large_is_refused():
    with pytest.raises(NotDiagonal, match="over 4096 entries"):
        LoopResolvent(Monotone(Convolution(normal(3), (1, 5000), "zero"), 0.5), 1.0)(normal(1, 1, 5000))


@pytest.mark.parametrize("W", [loop(3, 6), Monotone(Dense(normal(5, 5)), 0.3, Dense(normal(5, 5, seed=1)))])
def test_reflections_and_adjoints_of_resolvents(W):
    V, x = LoopResolvent(W, 0.7), normal(3, *W.domain)
    torch.testing.assert_close(V.reflection(x), 2 * V(x) - x, rtol=0, atol=1e-13)
    torch.testing.assert_close(V.reflection(x, adjoint=True), 2 * V.T(x) - x, rtol=0, atol=1e-13)
    eye = torch.eye(len(W.matrix()), **double)
    torch.testing.assert_close(V.matrix(), torch.linalg.inv(eye + 0.7 * (eye - W.matrix())), rtol=0, atol=1e-13)
    assert monotonicity(W.T) == monotonicity(W)


def test_the_balanced_step_lies_between_its_extremes():
    W = loop(3, 6)
    largest = float(torch.linalg.matrix_norm(torch.eye(18, **double) - W.matrix(), 2))
    step = balanced_step(W)
    assert 2**-0.5 / (0.4 * largest) ** 0.5 <= step <= 1 / 0.4
    assert step == balanced_step(W) == 2.0 ** (round(2 * torch.log2(torch.tensor(step)).item()) / 2)


def test_the_balanced_step_of_what_has_none():
    assert balanced_step(Dense(3 * torch.eye(2, **double))) == 1.0
    assert balanced_step(Scale(0.5, Identity((3,)))) == 2.0
    broken = Monotone(Dense(torch.full((2, 2), torch.nan, **double)), 0.5)
    assert balanced_step(broken) == 1.0
