"""Learnable piecewise-linear activations whose slopes stay in an interval by construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, ShapeError
from firmly.prox.activation import Activation
from firmly.prox.prior import Prior, Slope, largest, positive, smallest, sum_over_sample


class LinearSpline(Activation):
    """Continuous piecewise-linear phi_i for every channel, phi_i(0) = 0, every slope in [low, high].

    The knots t_j = -reach .. reach are uniform and odd in number, so that 0 is one of them; beyond them the outermost
    pieces go on. The parameters are the slopes of the `knots + 1` pieces; the slopes used are their projection on
    [low, high], whose gradient is kept where a descent step would lead back inside, so that none is stuck at an end.
    `slope` is the start: a number, or a function of the centres of the pieces, e.g. `huber_slopes(t)`.
    Sources: Bohra et al., Learning activation functions in deep (spline) neural networks, 2020; Goujon et al.,
    A neural-network-based convex regularizer for inverse problems, 2023.
    """

    def __init__(
        self,
        channels: int,
        knots: int = 21,
        reach: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        slope: float | Callable[[Tensor], Tensor] = 1.0,
    ):
        super().__init__()
        if knots < 1 or knots % 2 == 0:
            raise ShapeError(f"a spline has an odd number of knots, so that 0 is one of them; given {knots}")
        if not low < high or not reach > 0:
            raise ConditionError(f"a spline needs low < high and reach > 0, given {low=}, {high=}, {reach=}")
        self.channels, self.knots, self.low, self.high = channels, knots, float(low), float(high)
        self.spacing = 2 * reach / (knots - 1) if knots > 1 else float(reach)
        centres = (torch.arange(knots + 1) - knots / 2) * self.spacing
        start = slope(centres) if callable(slope) else torch.full((knots + 1,), float(slope))
        if not bool(((start >= low) & (start <= high)).all()):
            found = f"{float(start.min()):.4g} .. {float(start.max()):.4g}"
            raise ConditionError(f"the slopes of this spline stay in [{low}, {high}]; start inside, given {found}")
        self.raw = nn.Parameter(start.to(torch.get_default_dtype()).repeat(channels, 1))  # (channels, knots + 1)

    @property
    def slopes(self) -> Tensor:
        """The slopes used, (channels, knots + 1), from left to right."""
        return _Project.apply(self.raw, self.low, self.high)

    def interval(self) -> tuple[Tensor, Tensor]:
        slopes = self.slopes
        return slopes.amin(1), slopes.amax(1)

    def forward(self, z: Tensor) -> Tensor:
        slopes, piece = self.slopes.to(z.dtype), self._piece(z)
        constants = self._anchored(slopes, self._places(slopes))
        return torch.addcmul(_look_up(constants, piece), _look_up(slopes, piece), z)

    def potential(self, z: Tensor) -> Tensor:
        slopes, piece = self.slopes.to(z.dtype), self._piece(z)
        places = self._places(slopes)
        offsets = self._anchored(slopes, places)
        constants = self._anchored(offsets, places) + self._anchored(slopes, places**2 / 2)
        return _look_up(constants, piece) + z * (_look_up(offsets, piece) + z / 2 * _look_up(slopes, piece))

    def conjugate(self, x: Tensor) -> Tensor:
        """max_z x z - psi_i(z), entry by entry, for slopes >= 0; infinite beyond a flat tail."""
        slopes = self.slopes.to(x.dtype)
        knots, constants = self._places(slopes), self._anchored(slopes, self._places(slopes))
        levels = slopes[:, :-1] * knots + constants[:, :-1]  # phi at the knots, not decreasing: (channels, knots)
        columns = x.movedim(1, 0).flatten(1)
        piece = torch.searchsorted(levels.contiguous(), columns.contiguous(), right=True)
        slope, constant = slopes.gather(1, piece), constants.gather(1, piece)
        nearest = knots[piece.clamp(max=self.knots - 1)]
        z = torch.where(slope > 0, (columns - constant) / torch.where(slope > 0, slope, 1), nearest)
        tolerance = 64 * torch.finfo(x.dtype).eps * (1 + levels.abs().amax(1, keepdim=True))
        beyond = torch.where(
            slope > 0, False, (columns < levels[:, :1] - tolerance) | (columns > levels[:, -1:] + tolerance)
        )
        z = z.reshape(x.movedim(1, 0).shape).movedim(0, 1)
        beyond = beyond.reshape(x.movedim(1, 0).shape).movedim(0, 1)
        return torch.where(beyond, torch.inf, x * z - self.potential(z))

    def _places(self, like: Tensor) -> Tensor:
        return (torch.arange(self.knots, device=like.device) - self.knots // 2).to(like.dtype) * self.spacing

    @staticmethod
    def _anchored(values: Tensor, at: Tensor) -> Tensor:
        """Constants c with values_j at_j + c_j continuous from piece to piece, and 0 on both sides of the origin."""
        sums = ((values[:, :-1] - values[:, 1:]) * at).cumsum(1)
        constants = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)
        return constants - constants[:, constants.shape[1] // 2, None]

    @torch.no_grad()
    def _piece(self, z: Tensor) -> Tensor:
        """The piece that every entry lies on, counted over all channels. NaN goes to the first, and stays NaN."""
        if z.shape[1] != self.channels:
            raise ShapeError(f"this activation has {self.channels} channels, given a tensor {tuple(z.shape)}")
        places = (z / self.spacing + (self.knots // 2 + 1)).clamp(0, self.knots).nan_to_num(0.0)
        first = torch.arange(self.channels, dtype=torch.int32, device=z.device) * (self.knots + 1)
        return places.int().add_(first.reshape(-1, *[1] * (z.dim() - 2)))

    def extra_repr(self) -> str:
        reach = self.spacing * (self.knots // 2)
        return f"channels={self.channels}, knots={self.knots}, reach={reach:.4g}, slopes in [{self.low}, {self.high}]"


class MonotoneSpline(Prior):
    """The prior whose prox is a learned spline R_c on channel c: prox(z, t) = t R_c(z / t), slopes in [low, high].

    Monotone slopes in [0, 1] make R_c the prox of a convex g, high > 1 that of a weakly convex one; the step t is the
    scale of the knots, as for the soft threshold, and t^2 g(x / t) the function that takes the place of t g(x).
    g(x) = max_z (x z - Phi(z)) - x^2 / 2 with Phi' = R, infinite beyond the range of R (a flat tail).
    Source: every monotone R with slopes in [0, 1] is a prox (Moreau 1965, corollary 10.c); Nguyen et al., Learning
    convex regularizers for optimal Bayesian denoising, 2018.
    """

    structure = "channel"
    real_only = True

    def __init__(self, spline: LinearSpline):
        super().__init__()
        if spline.low < 0:
            raise ConditionError(f"a monotone spline has slopes of at least 0, given low = {spline.low}")
        self.spline = spline

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.spline.conjugate(x) - x**2 / 2)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return step * self.spline(z / step)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the step", step)
        low, high = self.spline.interval()
        return Slope(smallest(low), largest(high))


def _look_up(table: Tensor, piece: Tensor) -> Tensor:
    # index_select on a flat table is the fastest gather on CPU, forward and backward
    return table.flatten().index_select(0, piece.flatten()).reshape(piece.shape)


def huber_slopes(threshold: float, low: float = 0.0, high: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Start slopes of the Huber derivative clamp(z, -t, t), the residual of a soft threshold: high inside, else low."""
    return lambda centres: torch.where(centres.abs() < threshold, high, low)


class _Project(torch.autograd.Function):
    """clamp(raw, low, high), whose gradient vanishes only where a descent step would lead further outside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Tensor, low: float, high: float) -> Tensor:
        return raw.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        raw, low, high = inputs
        ctx.save_for_backward(raw)
        ctx.save_for_forward(raw)
        ctx.low, ctx.high = low, high

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (raw,), (gradient,) = ctx.saved_tensors, gradients
        outward = ((raw > ctx.high) & (gradient < 0)) | ((raw < ctx.low) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None, None

    @staticmethod
    def jvp(ctx, *tangents: Tensor):
        (raw,) = ctx.saved_tensors
        return tangents[0].masked_fill((raw > ctx.high) | (raw < ctx.low), 0)
