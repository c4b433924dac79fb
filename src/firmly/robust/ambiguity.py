"""What an ambiguity set is: the laws near a nominal one, and the worst (or best) expectation of a loss over them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.top_fraction import top

Sense = Literal["sup", "inf"]


class WorstCase(NamedTuple):
    """A risk and the weights of the adversary that attain it, which sum to one over the atoms."""

    risk: Tensor
    weights: Tensor


class AmbiguitySet:
    """A set of laws q around a nominal law p, on rows of atoms: sup (or inf) over q of sum_i q_i l_i.

    A subclass gives `worst(losses, nominal)`, the weights of the supremum, and their derivatives: `curvature` in the
    losses (the Hessian of the supremum, 0 where the weights are piecewise constant) and `drift` in the radius. Losses
    and nominal weights are rows (rows, atoms) in float64; the nominal ones are not negative and sum to one, and an atom
    of weight 0 does not exist. `radius` is a number, or a tensor of one number that gradients reach.
    """

    def __init__(self, radius: float | Tensor, low: float = 0.0, high: float = math.inf, meaning: str = "radius"):
        given = torch.as_tensor(radius, dtype=torch.float64).detach()
        if given.numel() != 1 or not (math.isfinite(float(given)) and low <= float(given) <= high):
            interval = f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise SettingsError(
                f"the {meaning} of {type(self).__name__} is one finite number {interval}, given {radius}"
            )
        self.radius = radius

    @property
    def size(self) -> float:
        """The radius outside of the autograd graph."""
        return float(torch.as_tensor(self.radius, dtype=torch.float64).detach())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:g})"

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        """The weights q (rows, atoms) of the supremum."""
        raise NotImplementedError

    def value(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        """The supremum (rows,), given its weights."""
        return (weights * losses).sum(1)

    def curvature(self, losses: Tensor, nominal: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        """The derivative (rows, atoms) of the weights along a direction of the losses; a symmetric map."""
        return torch.zeros_like(losses)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        """The derivative (rows, atoms) of the weights in the radius."""
        raise NotImplementedError

    def slope(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        """The derivative (rows,) of the supremum in the radius."""
        return (losses * self.drift(losses, nominal, weights)).sum(1)

    def risks(self, losses: Tensor, mask: Tensor | None = None, sense: Sense = "sup", trim: float = 0.0) -> Tensor:
        """One risk for every row: (batch, *atoms) -> (batch,); the atoms of an image are its pixels.

        `mask` (broadcast against the losses) is True at valid atoms, or holds their nominal weights up to a factor.
        `trim` is the fraction of the nominal mass with the largest losses that is left out first.
        """
        return self.worst_case(losses, mask, sense, trim).risk

    def worst_case(
        self, losses: Tensor, mask: Tensor | None = None, sense: Sense = "sup", trim: float = 0.0
    ) -> WorstCase:
        """`risks`, and with them the weights of the adversary in the shape of the losses."""
        masses = masses_of(losses, mask)
        valid = masses > 0
        rows = torch.where(valid, losses, 0).flatten(1)
        masses = masses.flatten(1).double()
        total = masses.sum(1, keepdim=True)
        if bool((total == 0).any()):
            raise DataError(
                f"row {int((total == 0).flatten().nonzero()[0])} has no valid atom: take it out of the batch"
            )
        found = self.on_rows(rows, masses / total, sense, trim)
        return WorstCase(found.risk.to(losses.dtype), found.weights.to(losses.dtype).reshape(losses.shape))

    def on_rows(self, losses: Tensor, nominal: Tensor, sense: Sense, trim: float) -> WorstCase:
        """The risk of rows (rows, atoms) in float64, differentiable in the losses and in the radius."""
        if sense not in ("sup", "inf"):
            raise SettingsError(f"sense is 'sup' (pessimistic) or 'inf' (optimistic), given {sense!r}")
        if not 0 <= trim < 1:
            raise SettingsError(f"trim is a fraction in [0, 1), given {trim}")
        sign = 1 if sense == "sup" else -1
        radius = torch.as_tensor(self.radius, dtype=torch.float64, device=losses.device)
        if radius.requires_grad and float(radius.detach()) == 0:
            raise SettingsError("the derivative in the radius is infinite at radius 0: start from a positive one")
        wide = losses.double()
        if trim:
            nominal = top(-wide.detach(), nominal, 1.0 - trim)
        weights = self.worst(sign * wide.detach(), nominal)
        return WorstCase(sign * _Supremum.apply(sign * wide, radius, nominal, weights, self), weights)


class _Supremum(torch.autograd.Function):
    """The supremum; its gradient is the weights of the adversary (Danskin), attached for a second derivative."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, radius: Tensor, nominal: Tensor, weights: Tensor, of: AmbiguitySet) -> Tensor:
        ctx.save_for_backward(losses, radius, nominal, weights)
        ctx.of = of
        return of.value(losses, nominal, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        weights, slope = _Weights.apply(*ctx.saved_tensors, ctx.of)
        of_radius = (gradients[0] * slope).sum().reshape(ctx.saved_tensors[1].shape)
        return gradients[0].unsqueeze(1) * weights, of_radius, None, None, None


class _Weights(torch.autograd.Function):
    """The weights, and the slope in the radius, as functions of the losses and the radius."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, radius: Tensor, nominal: Tensor, weights: Tensor, of: AmbiguitySet):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(losses, radius, nominal, weights)
        ctx.of = of
        slope = of.slope(losses, nominal, weights) if radius.requires_grad else losses.new_zeros(len(losses))
        return weights.view_as(weights), slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weights: Tensor | None, of_slope: Tensor | None):
        losses, radius, nominal, weights = ctx.saved_tensors
        if of_slope is not None and radius.requires_grad:
            raise SettingsError("a risk has no second derivative in its radius here: detach the radius once")
        drift = ctx.of.drift(losses, nominal, weights) if radius.requires_grad else None
        of_losses, of_radius = None, None
        if of_weights is not None:
            of_losses = ctx.of.curvature(losses, nominal, weights, of_weights)
            if drift is not None:
                of_radius = (of_weights * drift).sum().reshape(radius.shape)
        return of_losses, of_radius, None, None, None


def masses_of(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Nominal masses in the shape of the losses, 0 where the mask says so; the losses are checked where they count."""
    if not losses.is_floating_point() or losses.dim() == 0:
        raise DataError(f"losses are a floating-point tensor, given {losses.dtype} of shape {tuple(losses.shape)}")
    if mask is None:
        masses = torch.ones_like(losses, requires_grad=False)
    else:
        if mask.requires_grad:
            raise DataError("a mask holds nominal weights, through which no gradient goes: detach it")
        try:
            masses = mask.to(losses.dtype).expand_as(losses)
        except RuntimeError as shapes:
            raise ShapeError(
                f"a mask {tuple(mask.shape)} does not broadcast against losses {tuple(losses.shape)}"
            ) from shapes
        if not bool(((masses >= 0) & masses.isfinite()).all()):
            raise DataError("a mask is boolean or holds finite weights that are not negative")
    bad = int(((masses > 0) & ~losses.isfinite()).sum())
    if bad:
        raise DataError(f"{bad} of the valid losses are NaN or infinite; mask them, or clip the loss")
    return masses
