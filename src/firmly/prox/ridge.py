"""The learned ridge regulariser r(x) = sum_i psi_i(K_i x) and its gradient, held inside a certified slope interval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import ConditionError, NotDiagonal, ShapeError
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol
from firmly.prox.activation import Activation
from firmly.prox.filter_bank import correlate, gain_on_grid, peak_gain, rounding, size_bound, wrap
from firmly.prox.prior import Slope, sum_over_sample


class Ridge(nn.Module):
    """r(x) = sum_i psi_i(K_i x) on images (batch, 1, *spatial), real or complex (real and imaginary parts apart).

    K_i is the circular cross-correlation with filter i of `kernel` (C, 1, *k), which becomes a learnable parameter, with its
    origin at k // 2; `activation` gives phi_i = psi_i' with slopes in [low_i, high_i] on C channels.

    With h_i >= high_i and one multiplier for all channels the gradient p = sum_i K_i^T phi_i(K_i x) satisfies exactly the
    constraints of p = S R(S x), where S is the shift-invariant map with symbol sqrt(sum_i h_i |k_i(f)|^2) (`gain`) and R
    has slopes in the interval `slope` (derived in the theory notes, 'C channels cost nothing').
    So the Lipschitz constant of p is at most `kappa()`, for images of every size.

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
        if low < 0:
            return Slope(low / high, 1.0) if high > 0 else Slope(-1.0, 1.0)
        return Slope(0.0, 1.0)

    def kappa(self) -> Tensor:
        """A certified bound of max_f sum_i h_i |k_i(f)|^2 over all frequencies, for the filters used; differentiable."""
        return peak_gain(*self._filters())

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
        return sum_over_sample(self.activation.potential(self._analysis(x, self._cast_filters(x))))

    def gradient(self, x: Tensor) -> Tensor:
        """sum_i K_i^T phi_i(K_i x), of the shape of x."""
        return ridge_gradient(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.gradient(x)

    def _weights(self) -> Tensor:
        """The normalising slopes h_i, (C,) in float64: the largest that keep every phi_i / h_i in the interval `slope`."""
        lowest, highest = (slope.double() for slope in self.activation.interval())
        return highest.maximum(lowest / self.slope.low) if self.slope.low < 0 else highest

    def _filters(self) -> tuple[Tensor, Tensor]:
        """The filters used and the weights h_i, in float64."""
        kernel, weight = self.kernel.double(), self._weights()
        if self.zero_mean:
            kernel = kernel - kernel.mean(dim=tuple(range(2, kernel.dim())), keepdim=True)
        if self.cap is not None:
            kernel = kernel / (peak_gain(kernel, weight) / self.cap).clamp(min=1).sqrt()
        return kernel, weight

    def _cast_filters(self, x: Tensor) -> Tensor:
        return self.filters().to(x.dtype)

    def _analysis(self, x: Tensor, filters: Tensor) -> Tensor:
        if x.dim() != filters.dim() or x.shape[1] != 1:
            raise ShapeError(f"this ridge takes (batch, 1, {filters.dim() - 2} spatial dimensions), given {tuple(x.shape)}")
        before = [k // 2 for k in filters.shape[2:]]
        return correlate(wrap(x, before, [k - 1 - b for k, b in zip(filters.shape[2:], before)]), filters)

    def _gradient(self, x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self._gradient(x.real), self._gradient(x.imag))
        filters = self._cast_filters(x)
        coefficients = self.activation(self._analysis(x, filters))
        after = [k // 2 for k in filters.shape[2:]]
        axes = tuple(range(2, filters.dim()))
        padded = wrap(coefficients, [k - 1 - a for k, a in zip(filters.shape[2:], after)], after)
        return correlate(padded, filters.flip(axes).transpose(0, 1))

    def extra_repr(self) -> str:
        return f"filters={tuple(self.kernel.shape)}, cap={self.cap}, zero_mean={self.zero_mean}"


def ridge_gradient(ridge: Ridge, x: Tensor) -> Tensor:
    """ridge.gradient(x), open to `__torch_function__` so that a traced input records the ridge instead."""
    if has_torch_function((x,)):
        return handle_torch_function(ridge_gradient, (x,), ridge, x)
    return ridge._gradient(x)


class Gain(LinearMap):
    """The map S of a ridge: self-adjoint, shift-invariant, with symbol sqrt(sum_i h_i |k_i(f)|^2); made by `Ridge.gain`."""

    def __init__(self, ridge: Ridge, spatial: Sequence[int]):
        super().__init__((1, *spatial), (1, *spatial))
        self.ridge = ridge
        self.spatial = self.domain[1:]

    def _multiplier(self, half: bool) -> Tensor:
        return gain_on_grid(*self.ridge._filters(), self.spatial, half)

    def _error(self) -> Tensor:
        """Rounding bound of the multiplier, which is at most sqrt(size bound), the filters' normalisation included."""
        kernel, weight = self.ridge._filters()
        return kernel[0].numel() * rounding(kernel) * size_bound(kernel, weight).detach().sqrt()

    def _apply_map(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, x.dim()))
        multiplier = self._multiplier(half=not x.is_complex()).to(x.real.dtype)
        if x.is_complex():
            return torch.fft.ifftn(multiplier * torch.fft.fftn(x, dim=axes), dim=axes)
        return torch.fft.irfftn(multiplier * torch.fft.rfftn(x, dim=axes), s=self.spatial, dim=axes)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._apply_map(y)

    def _norm(self) -> Bracket:
        peak, error = float(self._multiplier(half=True).amax()), float(self._error())
        return Bracket(max(0.0, peak - error), peak + error)

    def _symbol(self, basis: Basis) -> Symbol:
        if not isinstance(basis, Fourier):
            return super()._symbol(basis)
        if basis.spatial != self.spatial:
            raise NotDiagonal(f"a gain on {self.spatial} has no symbol on the frequencies of {basis.spatial}")
        values = self._multiplier(half=not basis.full).flatten()
        error = self._error().reshape(1)
        return basis.bounded(values[:, None, None], error, rows="pixel", columns="pixel")
