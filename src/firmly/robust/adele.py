"""ADELE: labels are corrected, class by class, from when the network begins to memorise the wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust.label_store import LINEAR
from firmly.robust.losses import VOID
from firmly.robust.noise_models import valid_labels

FEWEST = 3  # epochs; a curve of three parameters is not known from fewer


@dataclass
class Adele:
    """What to correct, and when: `observe` after every epoch, `corrected` before the next one.

    A class is corrected from its `memorisation_onset` in the overlaps of predictions and training labels on: of pixels
    with such a label, those whose most probable class is another such class of probability above `confidence` get that
    one. The class `background` is always among them (None: no class is). `overlaps` (epoch, class) and `started` are
    the state, to be saved with the model's.
    Source: Liu, Liu, Zhu, Shen and Fernandez-Granda, Adaptive early-learning correction for segmentation from noisy
    annotations, 2022; the rule for both classes and the settings are those of the released code. Its third part, that a
    class must be among the labels of the image, is for labels of images and left out.
    """

    classes: int
    threshold: float = 0.9
    confidence: float = 0.8
    background: int | None = 0
    overlaps: list[list[float]] = field(default_factory=list)
    started: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.classes < 2 or not (0 < self.threshold < 1 and 0 <= self.confidence < 1):
            raise SettingsError(
                f"two classes, a threshold in (0, 1) and a confidence in [0, 1): given {self.classes}, "
                f"{self.threshold}, {self.confidence}"
            )
        if self.background is not None and not 0 <= self.background < self.classes:
            raise SettingsError(f"the background is a class below {self.classes}, or None; given {self.background}")
        self.started = self.started or [False] * self.classes

    def observe(self, overlaps: Tensor) -> list[bool]:
        """Take the overlaps (class,) of one more epoch, `class_overlaps` of the training images; which classes have
        started.
        """
        if overlaps.shape != (self.classes,):
            raise ShapeError(f"overlaps are ({self.classes},), given {tuple(overlaps.shape)}")
        if bool(((overlaps < 0) | (overlaps > 1)).any()):
            raise DataError(f"overlaps lie in [0, 1], or are NaN for a class without labels; given {overlaps.tolist()}")
        self.overlaps.append(overlaps.tolist())
        for k, curve in enumerate(zip(*self.overlaps)):
            known = [value for value in curve if value == value]  # NaN: a class without labels
            self.started[k] = self.started[k] or memorisation_onset(known, self.threshold) is not None
        return list(self.started)

    def corrected(self, laws: Tensor, labels: Tensor, void: int = VOID) -> Tensor:
        """Labels (batch, *spatial) from predictions (batch, class, *spatial), the mean of `multiscale_laws`, say."""
        if laws.shape != (len(labels), self.classes, *labels.shape[1:]):
            raise ShapeError(f"laws {tuple(laws.shape)} of {self.classes} classes do not fit {tuple(labels.shape)}")
        valid = valid_labels(labels, self.classes, void)
        open_to = torch.tensor(self.started, device=labels.device)
        if self.background is not None:
            open_to[self.background] = True
        sure, best = laws.max(1)
        changes = valid & (sure > self.confidence) & open_to[best] & open_to[torch.where(valid, labels, 0).long()]
        return torch.where(changes, best.to(labels.dtype), labels)


def memorisation_onset(overlaps: Sequence[float], threshold: float = 0.9) -> int | None:
    """The first epoch t = 1, 2, ... with (f'(1) - f'(t)) / f'(1) > threshold, None if it has not come yet.

    f(t) = a (1 - exp(-b t^c)) with 0 <= a, c <= 1 and b > 0 is the least-squares fit of the overlaps after epochs 1, 2,
    ..., the last of weight 100 and the first of weight 1 (geometric between). Fast early learning has then ended, and
    what is still learned is mostly wrong labels. Three epochs at least; overlaps lie in [0, 1].
    Source: Liu et al. 2022; weights and bounds of the released code.
    """
    if not 0 < threshold < 1:
        raise SettingsError(f"the threshold lies in (0, 1), given {threshold}")
    y = torch.tensor(list(overlaps), dtype=torch.float64)
    if not bool(((y >= 0) & (y <= 1)).all()):
        raise DataError(f"overlaps lie in [0, 1], given {list(overlaps)}")
    if len(y) < FEWEST:
        return None
    t = torch.arange(1, len(y) + 1, dtype=torch.float64)
    b, c = fitted(t, y)
    change = 1 - t ** (c - 1) * torch.exp(-b * (t**c - 1))
    found = (change > threshold).nonzero()
    return int(t[found[0, 0]]) if len(found) else None


def fitted(t: Tensor, y: Tensor) -> tuple[float, float]:
    """b and c of the fit: a search over a grid that is refined around its best point; a is known in closed form."""
    weights = torch.logspace(0, 2, len(t), dtype=torch.float64)
    low, high = torch.tensor([-7.0, 0.02]).double(), torch.tensor([4.0, 1.0]).double()  # of log b and c
    centre, half = (low + high) / 2, (high - low) / 2
    for _ in range(12):
        steps = torch.linspace(-1, 1, 41, dtype=torch.float64)
        logs, powers = ((centre[k] + half[k] * steps).clamp(low[k], high[k]) for k in (0, 1))
        shape = 1 - torch.exp(-logs.exp()[:, None, None] * t ** powers[:, None])  # (b, c, epoch)
        a = ((weights * shape * y).sum(2) / (weights * shape.square()).sum(2)).clamp(0, 1)
        errors = (weights * (a[:, :, None] * shape - y).square()).sum(2)
        best = divmod(int(errors.argmin()), len(steps))
        centre, half = torch.stack([logs[best[0]], powers[best[1]]]), half / 3
    return float(centre[0].exp()), float(centre[1])


def class_overlaps(prediction: Tensor, labels: Tensor, classes: int, void: int = VOID) -> Tensor:
    """Intersection over union of predicted classes and labels, for every class (class,); NaN for one without labels.

    Both are (batch, *spatial); all pixels that are not void are counted together.
    """
    if prediction.shape != labels.shape:
        raise ShapeError(f"predictions {tuple(prediction.shape)} do not fit labels {tuple(labels.shape)}")
    valid = valid_labels(labels, classes, void)
    valid_labels(torch.where(valid, prediction, 0), classes, void)
    pairs = torch.bincount(labels[valid].long() * classes + prediction[valid].long(), minlength=classes**2)
    counts = pairs.reshape(classes, classes).double()
    both, labelled = counts.diagonal(), counts.sum(1)
    return torch.where(labelled > 0, both / (labelled + counts.sum(0) - both), torch.nan)


def multiscale_laws(
    network: nn.Module, images: Tensor, scales: Sequence[float] = (0.7, 1.0, 1.5), multiple: int = 1
) -> Tensor:
    """softmax of a network's scores on rescaled images, scaled back: (scale, batch, class, *spatial).

    Their mean q corrects labels. Sizes are rounded to a `multiple` that the network needs.
    """
    if not scales or not all(s > 0 for s in scales) or multiple < 1:
        raise SettingsError(f"scales and the multiple are positive, given {tuple(scales)} and {multiple}")
    size, mode = images.shape[2:], LINEAR[images.dim() - 2]
    found = []
    for scale in scales:
        target = [max(round(scale * n / multiple), 1) * multiple for n in size]
        seen = images if scale == 1 else interpolate(images, size=target, mode=mode, align_corners=False)
        laws = network(seen).softmax(1)
        if laws.shape[2:] != size:
            laws = interpolate(laws, size=size, mode=mode, align_corners=False)
        found.append(laws)
    return torch.stack(found)


def multiscale_consistency(laws: Tensor) -> Tensor:
    """1/S sum over scales s of KL(p_s, q), q = mean of the p_s: (scale, batch, class, *spatial) -> (batch, *spatial).

    A term for the loss (the Jensen-Shannon divergence of the scales): the network shall say the same at all of them.
    Source: Liu et al. 2022.
    """
    q = laws.mean(0)
    tiny = torch.finfo(laws.dtype).tiny
    logarithms = laws.clamp(min=tiny).log() - q.clamp(min=tiny).log()
    return (laws * logarithms).sum(2).mean(0)
