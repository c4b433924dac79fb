"""Risks: expected losses under the worst, or the best, law near the given one, over pixels, images or groups."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from firmly.errors import SettingsError, ShapeError
from firmly.robust.ambiguity import AmbiguitySet, Sense, WorstCase, masses_of, on_losses
from firmly.robust.divergences import KL, Chi2, CVaR, KLPenalty, TotalVariation
from firmly.robust.label_wasserstein import Wasserstein

Over = Literal["pixel", "image", "class", "annotator"] | Tensor
Divergence = Literal["kl", "chi2", "cvar", "tv", "wasserstein", "kl-penalty"] | AmbiguitySet

SETS: dict[str, type[AmbiguitySet]] = {
    "kl": KL,
    "chi2": Chi2,
    "cvar": CVaR,
    "tv": TotalVariation,
    "wasserstein": Wasserstein,
    "kl-penalty": KLPenalty,
}


def risk(
    losses: Tensor,
    mask: Tensor | None = None,
    over: Over = "pixel",
    divergence: Divergence = "kl",
    radius: float | Tensor | None = None,
    sense: Sense = "sup",
    trim: float = 0.0,
    labels: Literal["clean", "noisy"] = "clean",
) -> Tensor:
    """sup (or inf) over laws q near the nominal law p of sum_i q_i l_i, a scalar; gradients by Danskin's theorem.

    - `losses`: of any shape, `(batch, *spatial)` or `(batch, class, *spatial)`; the loss of every pixel, say.
    - `mask`: True where losses count, or nominal weights up to a factor. Of the dimensions of the losses (sizes of 1
      are repeated), or (batch, *spatial) for losses (batch, class, *spatial). Elsewhere losses may be anything,
      NaN included, and their gradient is exactly 0.
    - `over`: what the adversary weighs. "pixel": all entries, together. "image": the mean losses of the images
      (dimension 0). "class" or "annotator": those of the classes (dimension 1). Or an integer tensor, shaped
      like a mask, that says which group an entry belongs to: labels, annotators, pairs of them. Groups have
      equal nominal weights; groups without a valid entry do not exist.
    - `divergence`: "kl", "chi2", "cvar", "tv", "wasserstein" (0/1 cost) or "kl-penalty", or a set such as `KL(0.1)`.
    - `radius`: of the set, 0.1 if not given; the fraction for "cvar", the temperature for "kl-penalty". A tensor of
      one number may be learned.
    - `sense`: "sup" is robust to shifts of the distribution, and up-weights what is mislabelled; "inf" is robust to
      wrong labels, and neglects what is hard.
    - `trim`: the fraction of the nominal mass with the largest losses that is left out before.
    - `labels`: "noisy" warns where sense is "sup".

    Raises `ShapeError`, `SettingsError`, and `DataError` for valid losses that are not finite and for no valid loss.
    For one risk per image, and nested risks, see `AmbiguitySet.risks`.

    Sources: those of the sets; Zhai, Dan, Kolter and Ravikumar, DORO: distributional and outlier robust optimization,
    2021 (trim); docs/theory/robust_risks.
    """
    return worst_case(losses, mask, over, divergence, radius, sense, trim, labels).risk


def worst_case(
    losses: Tensor,
    mask: Tensor | None = None,
    over: Over = "pixel",
    divergence: Divergence = "kl",
    radius: float | Tensor | None = None,
    sense: Sense = "sup",
    trim: float = 0.0,
    labels: Literal["clean", "noisy"] = "clean",
) -> WorstCase:
    """The `risk`, and the weights of the adversary in the shape of the losses: not negative, 0 off the mask, of sum 1.

    The risk is the sum of weights times losses (minus the price of the weights, for "kl-penalty").
    """
    if sense == "sup" and labels == "noisy":
        warnings.warn(
            "sense='sup' gives the largest weights to the largest losses, and with noisy labels these are the wrong "
            "labels; use sense='inf' or trim, or declare the labels clean",
            stacklevel=2,
        )
    ambiguity = chosen(divergence, radius)
    masses = masses_of(losses, mask)
    if isinstance(over, str) and over == "pixel":
        one = None if masses is None else masses.reshape(1, -1)
        found = ambiguity.worst_case(losses.reshape(1, -1), one, sense, trim)
        return WorstCase(found.risk.squeeze(0), found.weights.reshape(losses.shape))
    groups = groups_of(losses, over)
    number = int(groups.max()) + 1 if groups.numel() else 0
    flat = (torch.ones_like(losses) if masses is None else masses).detach().double().flatten()
    total = flat.new_zeros(number).index_add(0, groups, flat)
    share = flat / total.clamp(min=torch.finfo(torch.float64).tiny)[groups]
    valid = torch.where(flat > 0, losses.flatten(), 0).double()
    means = valid.new_zeros(number).index_add(0, groups, share * valid)
    found = ambiguity.worst_case(means.unsqueeze(0), (total > 0).unsqueeze(0), sense, trim)
    weights = (found.weights.squeeze(0)[groups] * share).reshape(losses.shape)
    return WorstCase(found.risk.squeeze(0).to(losses.dtype), weights.to(losses.dtype))


def chosen(divergence: Divergence, radius: float | Tensor | None) -> AmbiguitySet:
    """The set that a name and a radius stand for, or the set itself."""
    if isinstance(divergence, AmbiguitySet):
        if radius is not None:
            raise SettingsError(f"the radius stands in {divergence!r} already, given radius={radius} as well")
        return divergence
    if divergence not in SETS:
        raise SettingsError(f"divergence is one of {', '.join(SETS)} or an AmbiguitySet, given {divergence!r}")
    return SETS[divergence](0.1 if radius is None else radius)


def groups_of(losses: Tensor, over: Over) -> Tensor:
    """The index of the group of every entry, flat."""
    if isinstance(over, Tensor):
        if over.is_floating_point() or over.is_complex():
            raise SettingsError(f"over is an integer tensor of groups, given {over.dtype}")
        groups = on_losses("a tensor of groups", over.to(losses.device).long(), losses)
        return torch.unique(groups, return_inverse=True)[1].flatten()
    if over not in ("image", "class", "annotator"):
        raise SettingsError(f"over is 'pixel', 'image', 'class', 'annotator' or a tensor of groups, given {over!r}")
    axis = 0 if over == "image" else 1
    if axis == 1 and losses.dim() in (1, 3):
        raise ShapeError(
            f"over={over!r} takes losses (batch, {over}, *spatial), given {tuple(losses.shape)}: for losses without "
            "that dimension pass the groups themselves, over=labels"
        )
    index = torch.arange(losses.shape[axis], device=losses.device)
    return index.reshape([-1 if d == axis else 1 for d in range(losses.dim())]).expand(losses.shape).flatten()
