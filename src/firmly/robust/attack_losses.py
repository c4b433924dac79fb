"""Losses of pixels that attacks of a given radius make large."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PixelLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(scores, labels, reached, progress) -> (batch, height, width): the loss of the label of every pixel, where `reached`
tells where the attack has what it wants and `progress` in [0, 1) how far the attack is."""


def plain_loss(scores: Tensor, labels: Tensor, reached: Tensor, progress: float) -> Tensor:
    """The cross-entropy."""
    del reached, progress
    return cross_entropy(scores, labels, reduction="none")


def segpgd_loss(scores: Tensor, labels: Tensor, reached: Tensor, progress: float) -> Tensor:
    """The cross-entropy times 1 - progress / 2, and where the attack has what it wants times progress / 2.

    Source: Gu, Zhao, Tresp and Torr, SegPGD: an effective and efficient adversarial attack for evaluating and boosting
    segmentation robustness, ECCV 2022, equation 7.
    """
    weight = torch.where(reached, progress / 2, 1 - progress / 2).to(scores)
    return weight * cross_entropy(scores, labels, reduction="none")


def margin_loss(scores: Tensor, labels: Tensor, reached: Tensor, progress: float) -> Tensor:
    """max over k != y of z_k - z_y, up to 0: pixels that are wrong do not pull any more."""
    del reached, progress
    label = labels.unsqueeze(1)
    others = scores.scatter(1, label, -torch.inf).amax(1)
    return (others - scores.gather(1, label).squeeze(1)).clamp(max=0)
