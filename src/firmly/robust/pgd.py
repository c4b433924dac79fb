"""Projected gradient attacks of a given radius, and the smallest radius at which they succeed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.robust.attack_losses import PixelLoss, plain_loss
from firmly.robust.attacked_model import Adversarial, AttackedModel, Record, SegmentationAttack


@dataclass(frozen=True, kw_only=True)
class PGD(SegmentationAttack):
    """Ascend a loss of the pixels inside a ball |delta| <= radius, in the maximum ("linf") or Euclidean norm ("l2").

    delta <- P(delta + step sign(g)), or step g / |g|_2 for "l2", with g the gradient of the sum of `loss` over the
    valid pixels (`plain_loss`, `segpgd_loss` for SegPGD, `margin_loss`; descended for targets) and P the projection
    into ball and box. `step` None is 2.5 radius / steps; a `seed` starts at random in the ball, None at the image.
    Returns for every image the perturbation that reached most pixels, and stops when all are reached. Its norm,
    measured in double precision, is at most the radius; one lost in the rounding of images is refused (`DataError`).
    Source: Madry, Makelov, Schmidt, Tsipras and Vladu, Towards deep learning models resistant to adversarial attacks,
    2018.
    """

    radius: float
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 40
    loss: PixelLoss = plain_loss
    step: float | None = None
    seed: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise SettingsError(f"the radius is positive and finite, given {self.radius}")
        if self.norm not in ("linf", "l2"):
            raise SettingsError(f"the norm is 'linf' or 'l2', given {self.norm!r}")
        if self.steps < 1 or (self.step is not None and not self.step > 0):
            raise SettingsError(f"steps >= 1 and step > 0, given steps={self.steps}, step={self.step}")

    def search(self, under: AttackedModel) -> Adversarial:
        radius = torch.full_like(under.count, self.radius, dtype=torch.float64)
        if not bool((2 * self.rounding(under) < radius).all()):
            raise DataError(
                f"a radius of {self.radius:.3g} is lost in the rounding of {under.images.dtype}: use double precision"
            )
        return self.ascend(under, radius, 1.0)

    @property
    def order(self) -> float:
        return torch.inf if self.norm == "linf" else 2.0

    def rounding(self, under: AttackedModel) -> Tensor:
        """How far rounding may move images + delta (batch,)."""
        size = torch.linalg.vector_norm(under.images.double().flatten(1), self.order, dim=1) + self.radius
        return 2 * torch.finfo(under.images.dtype).eps * size

    def ascend(self, under: AttackedModel, radius: Tensor, enough: float) -> Adversarial:
        """The attack with a radius for every image (batch,), until a fraction `enough` of the pixels is reached."""
        ball = torch.maximum(radius - self.rounding(under), radius / 2)
        step = torch.full_like(ball, self.step) if self.step is not None else 2.5 * ball / self.steps
        ball, step = (r.to(under.images)[:, None, None, None] for r in (ball, step))
        record = Record(under, self.order, smallest=False)
        images = under.inside(self.start(under, ball))
        for t in range(self.steps):

            def objective(scores: Tensor, progress: float = t / self.steps) -> Tensor:
                loss = self.loss(scores, under.labels, under.reached(scores), progress)
                return (-loss if self.targeted else loss).where(under.valid, 0).sum()

            scores, gradient = under.with_gradient(images, objective)
            record.meet(images, under.reached(scores))
            if bool((record.apsr >= enough).all()):
                return record.result()
            if self.norm == "linf":
                delta = images - under.images + step * gradient.sign()
                delta = torch.minimum(torch.maximum(delta, -ball), ball)
            else:
                size = norms(gradient)
                delta = images - under.images + step * gradient / size.where(size > 0, 1)
                size = norms(delta)
                delta = delta * torch.where(size > ball, ball / size, 1)
            images = under.inside(delta)
        record.meet(images, under.reached(under.scores(images)))
        return record.result()

    def start(self, under: AttackedModel, ball: Tensor) -> Tensor:
        x = under.images
        if self.seed is None:
            return torch.zeros_like(x)
        generator = torch.Generator().manual_seed(self.seed)
        if self.norm == "linf":
            return ball * (2 * torch.rand(x.shape, generator=generator).to(x) - 1)
        direction = torch.randn(x.shape, generator=generator).to(x)
        length = torch.rand(len(x), generator=generator).to(x)[:, None, None, None]
        return ball * length * direction / norms(direction)


@dataclass(frozen=True, kw_only=True)
class MinimalPGD(PGD):
    """The least radius, of at most `radius`, at which `PGD` succeeds: `bisections` halvings for every image.

    Returns the success of least norm, and where there is none the attempt that reached most pixels.
    """

    bisections: int = 13

    def __post_init__(self):
        super().__post_init__()
        if self.bisections < 1:
            raise SettingsError(f"at least one bisection, given {self.bisections}")

    def search(self, under: AttackedModel) -> Adversarial:
        record = Record(under, self.order)
        record.meet(under.images, under.reached(under.scores(under.images)))
        high = torch.where(record.success, 0.0, torch.full_like(record.norm, self.radius))
        low, radius = torch.zeros_like(high), high
        for _ in range(self.bisections + 1):  # the first at the whole radius
            if bool((record.success & (record.norm == 0)).all()):
                break
            attempt = self.ascend(under, radius, self.success)
            record.meet(attempt.images, under.reached(under.scores(attempt.images)))
            low = torch.where(attempt.success, low, radius)
            high = torch.where(attempt.success, torch.minimum(attempt.norm, high), high)
            radius = (low + high) / 2
        return record.result()


def norms(x: Tensor) -> Tensor:
    """Euclidean norms of samples (batch, 1, 1, 1), in a precision that holds their squares."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).to(x.dtype)[:, None, None, None]
