"""The learned ridge regulariser r(x) = sum_i psi_i(K_i x) and its gradient, held inside a certified slope interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import ConditionError, NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol
from firmly.prox.activation import Activation
from firmly.prox.filter_bank import gain, peak_power, response, rounding
from firmly.prox.prior import Slope, sum_over_sample


class Ridge(nn.Module):
    """r(x) = sum_i psi_i(K_i x) on images (batch, 1, *spatial), real or complex (real and imaginary parts apart).

    K_i is the circular correlation with filter i of `kernel` (C, 1, *k), which becomes a learnable parameter; where its
    origin lies changes nothing. `activation` gives phi_i = psi_i' with slopes in [low_i, high_i] on C channels.

    With h_i >= high_i and one multiplier for all channels, the gradient p = sum_i K_i^T phi_i(K_i x) satisfies exactly
    the constraints of p = S R(S x), where S is the shift-invariant map with symbol sqrt(sum_i h_i |k_i(f)|^2) (`gain`)
    and R has slopes in the interval `slope` (derived in the theory notes, 'C channels cost nothing').
    So the slopes of p lie in [slope.low kappa(), kappa()], for images of every size.

    `cap`: the filters used are K / sqrt(max(1, kappa / cap)), so that `kappa() <= cap` by construction; x - p is
    nonexpansive for a convex r and cap <= 2. None leaves the filters free.
    `zero_mean` takes its mean from every filter, so that constant images cost nothing.
    """

    def __init__(self, kernel: Tensor, activation: Activation, cap: float | None = None, zero_mean: bool = False):
        super().__init__()
        if kernel.dim() not in (3, 4, 5) or kernel.shape[1] != 1 or kernel.shape[0] != activation.channels:
            raise ShapeError(
                f"the filters of a ridge have shape (C, 1, *k) with C = {activation.channels} channels of its "
                f"activation and one to three spatial dimensions, given {tuple(kernel.shape)}"
            )
        if cap is not None and not cap > 0:
            raise ConditionError(f"the cap of a ridge is positive or None, given {cap}")
        self.kernel = nn.Parameter(kernel.detach().clone())
        self.activation = activation
        self.cap = cap
        self.zero_mean = zero_mean

    @property
    def slope(self) -> Slope:
        """The slope interval (low, 1) of R in gradient = S R(S x), with S = gain(spatial)."""
        low, high = self.activation.low, self.activation.high
        return Slope(Slope.outward(low / high, 1.0).low if high > 0 else -1.0, 1.0)

    def kappa(self) -> Tensor:
        """A certified, differentiable bound of sum_i h_i |k_i(f)|^2 over all frequencies f, for the filters used."""
        return peak_power(*self._filters())

    def filters(self) -> Tensor:
        """The filters used, (C, 1, *k): of zero mean if asked for, and inside the cap."""
        return self._filters()[0]

    def gain(self, spatial: Sequence[int]) -> LinearMap:
        """The map S on images (1, *spatial), with symbol sqrt(sum_i h_i |k_i(f)|^2), differentiable in the filters."""
        return Gain(self, spatial)

    def value(self, x: Tensor) -> Tensor:  # (batch, 1, *spatial) -> (batch,)
        """r(x), one number for each element of the batch."""
        if x.is_complex():
            return self.value(x.real) + self.value(x.imag)
        return sum_over_sample(self.activation.potential(self._analysis(x, self._response(x))))

    def gradient(self, x: Tensor) -> Tensor:
        """sum_i K_i^T phi_i(K_i x), of the shape of x."""
        return ridge_gradient(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.gradient(x)

    def _weights(self) -> Tensor:
        """The normalising slopes h_i, (C,) in float64: the smallest with phi_i / h_i in the interval `slope`."""
        lowest, highest = (slope.double() for slope in self.activation.interval())
        return highest.maximum(lowest / self.slope.low) if self.slope.low < 0 else highest

    def _filters(self) -> tuple[Tensor, Tensor]:
        """The filters used and the weights h_i, in float64."""
        kernel, weight = self.kernel.double(), self._weights()
        if self.zero_mean:
            kernel = kernel - kernel.mean(dim=tuple(range(2, kernel.dim())), keepdim=True)
        if self.cap is not None:
            excess = peak_power(kernel, weight) / (self.cap * (1 - kernel[0].numel() * rounding(kernel)))
            kernel = kernel / excess.clamp(min=1).sqrt()
        return kernel, weight

    def _response(self, x: Tensor) -> Tensor:
        """Transforms of the filters used on the grid of x, (C, *grid), in the precision of x."""
        if x.dim() != self.kernel.dim() or x.shape[1] != 1:
            raise ShapeError(
                f"this ridge takes (batch, 1, *spatial) with {self.kernel.dim() - 2} spatial dimensions, "
                f"given {tuple(x.shape)}"
            )
        origin = [0] * (x.dim() - 2)
        return response(self.filters()[:, 0], x.shape[2:], origin, half=True).to(x.dtype.to_complex())

    def _analysis(self, x: Tensor, response: Tensor) -> Tensor:
        """K x, (batch, C, *spatial), up to a shift that the adjoint undoes; FFTs measured faster than convolutions."""
        axes = tuple(range(2, x.dim()))
        return torch.fft.irfftn(real_transform(x) * response.conj(), s=x.shape[2:], dim=axes)

    def _gradient(self, x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self._gradient(x.real), self._gradient(x.imag))
        response, axes = self._response(x), tuple(range(2, x.dim()))
        slopes = real_transform(self.activation(self._analysis(x, response)))
        return torch.fft.irfftn((slopes * response).sum(1, keepdim=True), s=x.shape[2:], dim=axes)

    def extra_repr(self) -> str:
        return f"filters={tuple(self.kernel.shape)}, cap={self.cap}, zero_mean={self.zero_mean}"


class RealTransform(torch.autograd.Function):
    """rfftn over the spatial axes, whose backward is one inverse real transform (torch's own is a full complex one)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.fft.rfftn(x, dim=tuple(range(2, x.dim())))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.spatial = inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        size = ctx.spatial[-1]
        weight = torch.full((size // 2 + 1,), 0.5, dtype=gradient.real.dtype, device=gradient.device)
        weight[0] = 1.0  # the frequencies that are their own mirror image stand for one, the others for two
        if size % 2 == 0:
            weight[-1] = 1.0
        axes = tuple(range(2, gradient.dim()))
        return torch.fft.irfftn(gradient * weight, s=ctx.spatial, dim=axes, norm="forward")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.fft.rfftn(tangent, dim=tuple(range(2, tangent.dim())))


def real_transform(x: Tensor) -> Tensor:
    """torch.fft.rfftn over the spatial axes of (batch, channels, *spatial), with a faster backward pass."""
    return RealTransform.apply(x)  # type: ignore[return-value]


def ridge_gradient(ridge: Ridge, x: Tensor) -> Tensor:
    """ridge.gradient(x), open to `__torch_function__` so that a traced input records the ridge instead."""
    if has_torch_function((x,)):
        return handle_torch_function(ridge_gradient, (x,), ridge, x)
    return ridge._gradient(x)


class Gain(LinearMap):
    """The map S of a ridge: self-adjoint, with Fourier symbol sqrt(sum_i h_i |k_i(f)|^2); made by `Ridge.gain`."""

    def __init__(self, ridge: Ridge, spatial: Sequence[int]):
        super().__init__((1, *spatial), (1, *spatial))
        self.ridge = ridge
        self.spatial = self.domain[1:]

    def _multiplier(self, half: bool) -> tuple[Tensor, Tensor]:
        kernel, weight = self.ridge._filters()
        values, error = gain(kernel, weight, self.spatial, half)
        # the filters themselves are the rounded result of taking out means and of dividing by the bound of their peak
        size = (weight * kernel.abs().flatten(1).sum(1) ** 2).sum().sqrt()
        return values, error + (kernel[0].numel() * rounding(kernel) * size).detach()

    def _apply_map(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, x.dim()))
        multiplier = self._multiplier(half=not x.is_complex())[0].to(x.real.dtype)
        if x.is_complex():
            return torch.fft.ifftn(multiplier * torch.fft.fftn(x, dim=axes), dim=axes)
        return torch.fft.irfftn(multiplier * torch.fft.rfftn(x, dim=axes), s=self.spatial, dim=axes)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._apply_map(y)

    def _norm(self) -> Bracket:
        values, error = self._multiplier(half=True)
        return Bracket(float((values - error).amax().clamp(min=0)), float((values + error).amax()))

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, Fourier):
            return super()._symbol(basis)
        if basis.spatial != self.spatial:
            raise NotDiagonal(f"a gain on {self.spatial} has no symbol on the frequencies of {basis.spatial}")
        values, error = self._multiplier(half=not basis.full)
        return basis.bounded(values.reshape(-1, 1, 1), error.flatten(), rows="pixel", columns="pixel")
