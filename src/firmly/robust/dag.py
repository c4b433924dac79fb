"""Dense adversary generation: gradient steps on the pixels that are not wrong yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.robust.attacked_model import Adversarial, AttackedModel, Record, SegmentationAttack


@dataclass(frozen=True, kw_only=True)
class DAG(SegmentationAttack):
    """x <- x + step g / |g|_inf, g the gradient of the sum of max over k != y of z_k - z_y over the pixels not reached.

    For targets y of z_y - max over k != y of z_k. An image rests when it is a success, and the attack when all do.
    `Adversarial.norm` is the maximum norm.
    Source: Xie, Wang, Zhang, Zhou, Xie and Yuille, Adversarial examples for semantic segmentation and object detection,
    ICCV 2017, algorithm 1 (its step is 0.5 of 255 grey levels, its wrong classes are drawn at random where this takes
    the strongest).
    """

    steps: int = 200
    step: float = 0.5 / 255

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1 or not self.step > 0:
            raise SettingsError(f"steps >= 1 and step > 0, given steps={self.steps}, step={self.step}")

    def search(self, under: AttackedModel) -> Adversarial:
        record = Record(under, torch.inf)
        images = under.images
        for _ in range(self.steps):

            def objective(scores: Tensor) -> Tensor:
                lead = under.lead(scores)
                left = under.valid & ~under.reached(scores)
                return (lead if self.targeted else -lead).where(left, 0).sum()

            scores, gradient = under.with_gradient(images, objective)
            record.meet(images, under.reached(scores))
            if bool(record.success.all()):
                return record.result()
            size = gradient.abs().amax((1, 2, 3), keepdim=True)
            moved = (images + self.step * gradient / size.where(size > 0, 1)).clamp(under.low, under.high)
            images = torch.where(record.success[:, None, None, None], images, moved)
        record.meet(images, under.reached(under.scores(images)))
        return record.result()
