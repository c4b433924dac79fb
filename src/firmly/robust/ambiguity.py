"""What an ambiguity set is: the laws near a nominal one, and the worst (or best) expectation of a loss over them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.robust.rows import Rows

Sense = Literal["sup", "inf"]


class WorstCase(NamedTuple):
    """A risk and the weights of the adversary that attain it, which sum to one over the atoms."""

    risk: Tensor
    weights: Tensor


class AmbiguitySet:
    """A set of laws q around a nominal law p, on rows of atoms: sup (or inf) over q of sum_i q_i l_i.

    A subclass gives `worst(rows)`, the weights of the supremum and its value, and the derivatives of the weights, on
    dense rows (rows, atoms) in float64: `curvature` in the losses (the Hessian of the supremum, 0 where the weights are
    piecewise constant) and `drift` in the radius. `radius` is a number, or a tensor of one that gradients reach.
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

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The weights (rows, atoms) of the supremum, in the precision of the losses, and its value (rows,)."""
        raise NotImplementedError

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

        `mask` is True at valid atoms, or holds their nominal weights up to a factor, as for `risk`.
        `trim` is the fraction of the nominal mass with the largest losses that is left out first.
        """
        return self.worst_case(losses, mask, sense, trim).risk

    def worst_case(
        self, losses: Tensor, mask: Tensor | None = None, sense: Sense = "sup", trim: float = 0.0
    ) -> WorstCase:
        """`risks`, and with them the weights of the adversary in the shape of the losses."""
        if sense not in ("sup", "inf"):
            raise SettingsError(f"sense is 'sup' (pessimistic) or 'inf' (optimistic), given {sense!r}")
        if not 0 <= trim < 1:
            raise SettingsError(f"trim is a fraction in [0, 1), given {trim}")
        radius = torch.as_tensor(self.radius, dtype=torch.float64, device=losses.device)
        if radius.requires_grad and self.size == 0:
            raise SettingsError("the derivative in the radius is infinite at radius 0: start from a positive one")
        masses = masses_of(losses, mask)
        flat = losses.flatten(1) if losses.dim() > 1 else losses.unsqueeze(1)
        flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        if masses is not None:
            masses = masses.reshape(flat.shape)
        if trim:
            masses = kept_by_trimming(flat.detach(), masses, trim)
        sign = 1 if sense == "sup" else -1
        turned = flat if sense == "sup" else -flat
        rows = Rows(turned.detach(), masses)
        weights, value = self.worst(rows)
        risk = sign * _Supremum.apply(turned, radius, weights, value, rows, self)
        return WorstCase(risk.to(losses.dtype), weights.to(losses.dtype).reshape(losses.shape))


class _Supremum(torch.autograd.Function):
    """The supremum; its gradient is the weights of the adversary (Danskin), attached for a second derivative."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, radius: Tensor, weights: Tensor, value: Tensor, rows: Rows, of: AmbiguitySet
    ) -> Tensor:
        ctx.save_for_backward(losses, radius, weights)
        ctx.rows, ctx.of = rows, of
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        weights, slope = _Weights.apply(*ctx.saved_tensors, ctx.rows, ctx.of)
        of_radius = (gradients[0] * slope).sum().reshape(ctx.saved_tensors[1].shape)
        return gradients[0].to(weights.dtype).unsqueeze(1) * weights, of_radius, None, None, None, None


@once_differentiable
class _Weights(torch.autograd.Function):
    """The weights, and the slope in the radius, as functions of the losses and the radius."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, radius: Tensor, weights: Tensor, rows: Rows, of: AmbiguitySet):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(losses, radius, weights)
        ctx.rows, ctx.of = rows, of
        slope = radius.new_zeros(len(losses))
        if radius.requires_grad:
            slope = of.slope(*rows.dense(), weights.double())
        return weights.view_as(weights), slope

    @staticmethod
    def backward(ctx: Any, of_weights: Tensor | None, of_slope: Tensor | None):
        losses, radius, weights = ctx.saved_tensors
        if of_slope is not None and radius.requires_grad:
            raise SettingsError("a risk has no second derivative in its radius here: detach the radius once")
        of_losses, of_radius = None, None
        dense = (*ctx.rows.dense(), weights.double())
        if of_slope is not None:
            of_losses = of_slope.unsqueeze(1) * ctx.of.drift(*dense)
        if of_weights is not None:
            of_losses = ctx.of.curvature(*dense, of_weights.double())
            if radius.requires_grad:
                of_radius = (of_weights * ctx.of.drift(*dense)).sum().reshape(radius.shape)
        return None if of_losses is None else of_losses.to(losses.dtype), of_radius, None, None, None


def kept_by_trimming(losses: Tensor, masses: Tensor | None, trim: float) -> Tensor:
    """The nominal law without the fraction `trim` of its mass that has the largest losses."""
    rows = Rows(-losses, masses)
    return rows.law(rows.largest_part(1.0 - trim))[0]


def masses_of(losses: Tensor, mask: Tensor | None) -> Tensor | None:
    """Nominal masses in the shape of the losses, as the mask says: boolean, or weights."""
    if not losses.is_floating_point() or losses.dim() == 0:
        raise DataError(f"losses are a floating-point tensor, given {losses.dtype} of shape {tuple(losses.shape)}")
    if mask is None:
        return None
    if mask.requires_grad:
        raise DataError("a mask holds nominal weights, through which no gradient goes: detach it")
    if mask.dtype != torch.bool and not bool(((mask >= 0) & mask.isfinite()).all()):
        raise DataError("a mask is boolean or holds finite weights that are not negative")
    return on_losses("a mask", mask, losses)


def on_losses(what: str, entries: Tensor, losses: Tensor) -> Tensor:
    """Entries in the shape of the losses: of as many dimensions, or without that of the classes.

    Never aligned from the right alone: for as many images as classes that would take one for the other.
    """
    given, shape = tuple(entries.shape), tuple(losses.shape)
    classless = (shape[0], *shape[2:])
    if len(given) == len(shape) - 1 and len(shape) >= 4 and given == classless and given != shape[1:]:
        entries = entries.unsqueeze(1)
    if entries.dim() != len(shape) or any(n not in (1, m) for n, m in zip(entries.shape, shape)):
        raise ShapeError(
            f"{what} of shape {given} does not fit losses {shape}: give it as many dimensions, each of the same size "
            "or of size 1"
        )
    return entries.expand_as(losses)
