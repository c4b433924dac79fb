"""A segmentation network under attack: what all attacks ask of it, and what they return."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import DataError, SettingsError, ShapeError


class Adversarial(NamedTuple):
    """Perturbed images, and for each: was the wanted fraction of pixels reached, which was, and at what norm.

    `apsr` (attack pixel success rate) is the fraction of the valid pixels whose class is wrong, or the target; `norm`
    that of the perturbation, in the norm of the attack. All (batch,), in double precision.
    """

    images: Tensor
    success: Tensor
    apsr: Tensor
    norm: Tensor

    @property
    def median_norm(self) -> float:
        """The median norm, that of failures being infinite."""
        ordered = self.norm.where(self.success, torch.inf).sort().values
        return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


@dataclass(frozen=True, kw_only=True)
class SegmentationAttack(ABC):
    """An attack is its settings, and is called with a network, images (batch, channels, H, W) and labels (batch, H, W).

    The network gives scores (batch, classes, H, W). It runs in eval mode; its modes are put back afterwards, and its
    weights and their gradients are not touched. Pixels labelled `ignore` do not count. `targeted`: labels are the
    classes wanted, else those to be left. Perturbed images stay in `box` (None: anywhere). An image is a success when
    the fraction `success` of its valid pixels is reached.
    """

    success: float = 0.99
    targeted: bool = False
    ignore: int = 255
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self):
        if not 0 < self.success <= 1:
            raise SettingsError(f"success is a fraction of the pixels in (0, 1], given {self.success}")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise SettingsError(f"the box is (low, high) with low < high, given {self.box}")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Adversarial:
        """Raises `ShapeError` and `DataError` where images, labels or scores do not fit, or no gradient comes back."""
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            return self.search(AttackedModel(model, images.detach().clone(), labels.clone(), self))

    @abstractmethod
    def search(self, under: AttackedModel) -> Adversarial:
        """The attack itself."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, with all modes as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class AttackedModel:
    """Scores, gradients and success of one batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, attack: SegmentationAttack):
        if images.dim() != 4 or not images.is_floating_point():
            raise ShapeError(
                f"images are (batch, channels, height, width) of floating point, given {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if labels.shape != (len(images), *images.shape[2:]) or labels.is_floating_point():
            raise ShapeError(
                f"labels are integers (batch, height, width), here {(len(images), *images.shape[2:])}, given "
                f"{labels.dtype} {tuple(labels.shape)}"
            )
        if not bool(images.isfinite().all()):
            raise DataError("images contain NaN or infinite values")
        self.low, self.high = attack.box if attack.box is not None else (-torch.inf, torch.inf)
        if not bool(((images >= self.low) & (images <= self.high)).all()):
            raise DataError(
                f"images lie in [{float(images.min()):.3g}, {float(images.max()):.3g}], outside of the box "
                f"{attack.box}: scale them, or give another box"
            )
        self.model, self.images, self.attack = model, images, attack
        labels = labels.to(images.device).long()
        self.valid = labels != attack.ignore
        self.count = self.valid.flatten(1).sum(1)
        if bool((self.count == 0).any()):
            image = int((self.count == 0).nonzero()[0])
            raise DataError(f"image {image} has no pixel with a label: take it out of the batch")
        self.labels = labels.where(self.valid, 0)

    def scores(self, images: Tensor) -> Tensor:
        """The scores of perturbed images, checked."""
        scores = self.model(images)
        shape = (len(images), *images.shape[2:])
        if not isinstance(scores, Tensor) or scores.dim() != 4 or (len(scores), *scores.shape[2:]) != shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ShapeError(
                f"the model gives scores (batch, classes, height, width) for images {tuple(images.shape)}; this one "
                f"gave {given}"
            )
        classes = scores.shape[1]
        if classes < 2 or not bool(((self.labels >= 0) & (self.labels < classes)).all()):
            raise DataError(
                f"the model has {classes} classes; labels lie between {int(self.labels.min())} and "
                f"{int(self.labels.max())}, pixels to leave out are {self.attack.ignore}"
            )
        if not bool(scores.isfinite().all()):
            raise DataError("the scores of perturbed images contain NaN or infinite values")
        return scores

    def with_gradient(self, images: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The scores, and the gradient in the images of a sum over pixels of them; gradients of weights stay."""
        with torch.enable_grad():
            point = images.detach().requires_grad_(True)
            scores = self.scores(point)
            if not scores.requires_grad:
                raise DataError("the scores do not depend on the image in a differentiable way: no gradient to follow")
            (gradient,) = torch.autograd.grad(objective(scores), point)
        if not bool(gradient.isfinite().all()):
            raise DataError("the gradient in the image contains NaN or infinite values")
        return scores.detach(), gradient

    def lead(self, scores: Tensor) -> Tensor:
        """z_y - max over k != y of z_k (batch, height, width), for the label y."""
        label = self.labels.unsqueeze(1)
        others = scores.scatter(1, label, -torch.inf).amax(1)
        return scores.gather(1, label).squeeze(1) - others

    def reached(self, scores: Tensor) -> Tensor:
        """Valid pixels where the attack has what it wants (batch, height, width)."""
        hit = scores.argmax(1) == self.labels
        return self.valid & (hit if self.attack.targeted else ~hit)

    def rate(self, reached: Tensor) -> Tensor:
        """The fraction of the valid pixels (batch,)."""
        return reached.flatten(1).sum(1).double() / self.count

    def inside(self, delta: Tensor) -> Tensor:
        """The perturbed images, in the box."""
        return (self.images + delta).clamp(self.low, self.high)

    def norm(self, images: Tensor, order: float) -> Tensor:
        """The norm of what was really added (batch,), in double precision."""
        return torch.linalg.vector_norm((images.double() - self.images.double()).flatten(1), order, dim=1)


class Record:
    """The best perturbed image met: of the successes that of least norm, before the first one that of most pixels."""

    def __init__(self, under: AttackedModel, order: float, smallest: bool = True):
        self.under, self.order, self.smallest = under, order, smallest
        self.images = under.images.clone()
        self.apsr = under.count.new_full(under.count.shape, -1, dtype=torch.float64)
        self.norm = torch.full_like(self.apsr, torch.inf)

    @property
    def success(self) -> Tensor:
        return self.apsr >= self.under.attack.success

    def meet(self, images: Tensor, reached: Tensor) -> None:
        """Keep what is better; with `smallest` off, more pixels are better than a smaller norm throughout."""
        apsr, norm = self.under.rate(reached), self.under.norm(images, self.order)
        better = (apsr > self.apsr) | ((apsr == self.apsr) & (norm < self.norm))
        if self.smallest:
            succeeds = apsr >= self.under.attack.success
            better = torch.where(self.success, succeeds & (norm < self.norm), better | succeeds)
        self.images = torch.where(better[:, None, None, None], images, self.images)
        self.apsr, self.norm = torch.where(better, apsr, self.apsr), torch.where(better, norm, self.norm)

    def result(self) -> Adversarial:
        return Adversarial(self.images, self.success, self.apsr, self.norm)
