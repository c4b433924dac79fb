"""Baselines for noisy labels that are more than a loss: estimated transitions, co-trained trimming, annotators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from firmly.errors import SettingsError, ShapeError
from firmly.robust.label_quality import checked, refuse_other_than_laws
from firmly.robust.losses import VOID, cross_entropy, log_probabilities
from firmly.robust.noise_models import valid_labels
from firmly.robust.pencil import given_laws


def transition_from_clean(probabilities: Tensor, clean: Tensor, void: int = VOID, prior: float = 1.0) -> Tensor:
    """T_jk = mean of p_k over the pixels whose clean class is j: (classes, classes), the rows laws, for
    `forward_correction`.

    `probabilities` (batch, class, *spatial) are those of a model that was trained on the noisy labels, on images of
    which `clean` labels (batch, *spatial) are known. `prior` pixels of every row agree: a class that does not occur has
    the row of the identity. Source: Hendrycks, Mazeika, Wilson and Gimpel, Using trusted data to train deep networks
    on labels corrupted by severe noise, 2018, equation 1.
    """
    rows, counts = class_sums(probabilities, clean, void)
    if not prior > 0:
        raise SettingsError(f"the prior is a positive number of pixels, given {prior}")
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (rows + prior * eye) / (counts + prior)[:, None]


def transition_from_anchors(probabilities: Tensor, quantile: float = 0.97, mask: Tensor | None = None) -> Tensor:
    """T_j = p(x^j), x^j the pixel at this quantile of p_j: (classes, classes), without any clean label.

    It assumes that every class has pixels of which the model is sure (anchor points), and takes not the surest one,
    which may be an outlier. Source: Patrini, Rozza, Menon, Nock and Qu, Making deep neural networks robust to label
    noise: a loss correction approach, 2017, section 4.
    """
    if not 0 < quantile <= 1:
        raise SettingsError(f"the quantile lies in (0, 1], given {quantile}")
    pixels = probabilities.detach().movedim(1, -1)
    pixels = pixels.flatten(0, -2) if mask is None else pixels[mask]
    if len(pixels) == 0:
        raise SettingsError("no valid pixel to take anchors from")
    refuse_other_than_laws(pixels)
    place = min(int(quantile * len(pixels)), len(pixels) - 1)
    anchors = pixels.sort(0).indices[place]
    return pixels[anchors] / pixels[anchors].sum(1, keepdim=True)


def class_sums(probabilities: Tensor, labels: Tensor, void: int) -> tuple[Tensor, Tensor]:
    """The sums (class, class) of the probabilities over the pixels of every label, and their numbers (class,)."""
    classes, valid = probabilities.shape[1], checked(probabilities, labels, void)
    pixels, given = probabilities.detach().double().movedim(1, -1)[valid], labels[valid].long()
    rows = pixels.new_zeros(classes, classes).index_add(0, given, pixels)
    return rows, torch.bincount(given, minlength=classes).to(rows)


class CoTrained(NamedTuple):
    """The losses of two networks, each the mean over the pixels that the other one trusts, and these pixels."""

    first: Tensor
    second: Tensor
    trusted_by_first: Tensor
    trusted_by_second: Tensor


def co_trained(first: Tensor, second: Tensor, forget: float, mask: Tensor | None = None) -> CoTrained:
    """Two networks that trim for each other: losses (batch, *spatial) of given labels under either -> their objectives.

    Each network names the valid pixels of the batch with the smallest losses, all but the fraction `forget`, and the
    other one learns from these, so that neither confirms its own errors. Let `forget` grow from 0 to the rate of wrong
    labels in the first third of the training, and start the networks apart.
    Source: Han, Yao, Yu, Niu, Xu, Hu, Tsang and Sugiyama, Co-teaching: robust training of deep neural networks with
    extremely noisy labels, 2018, algorithm 1 (over pixels in the place of images).
    """
    if first.shape != second.shape:
        raise ShapeError(f"the losses of the two networks differ: {tuple(first.shape)} and {tuple(second.shape)}")
    valid = torch.ones_like(first, dtype=torch.bool) if mask is None else mask
    one, two = smallest(first, forget, valid), smallest(second, forget, valid)
    return CoTrained(first[two].mean(), second[one].mean(), one, two)


def smallest(losses: Tensor, forget: float, valid: Tensor) -> Tensor:
    """The valid entries with the smallest losses, all but the fraction `forget` (at least one is kept)."""
    if not 0 <= forget < 1:
        raise SettingsError(f"the fraction to forget lies in [0, 1), given {forget}")
    if valid.shape != losses.shape or not bool(valid.any()):
        raise ShapeError(f"the mask is {tuple(losses.shape)} with a valid pixel, given {tuple(valid.shape)}")
    values = losses.detach()[valid]
    kept = max(int(round((1 - forget) * len(values))), 1)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(kept, largest=False, sorted=False).indices] = True
    out = torch.zeros_like(valid)
    out[valid] = chosen
    return out


class AnnotatorConfusion(nn.Module):
    """Confusion matrices of annotators, learned with the network: the mean loss of all their label maps.

        mean over valid pixels i of all annotators r of -log sum_j p_ij A_ri[j, y_ri]
            + trace_weight mean over r of the mean over i of tr A_ri

    for logits (batch, class, *spatial) and annotations (batch, annotator, *spatial), void where one did not label. The
    rows of A are laws (a softmax), diagonal at first by `sure`. A small trace keeps annotators from being believed too
    much. Without a `network` one matrix serves all pixels of an annotator. With one, images (batch, channels, *spatial)
    -> (batch, annotators classes^2, *spatial) are added to the scores of every pixel: people who err where it is hard.
    Source: Tanno et al., Learning from noisy labels by regularized estimation of annotator confusion, 2019; Zhang et
    al., Disentangling human error from the ground truth in segmentation of medical images, 2020, equation 4.
    """

    def __init__(
        self,
        annotators: int,
        classes: int,
        trace_weight: float = 0.01,
        sure: float = 4.0,
        network: nn.Module | None = None,
    ):
        super().__init__()
        if annotators < 1 or classes < 2 or not trace_weight >= 0:
            raise SettingsError(
                f"at least one annotator, two classes, a weight of at least 0: {annotators}, {classes}, {trace_weight}"
            )
        self.scores = nn.Parameter(sure * torch.eye(classes).repeat(annotators, 1, 1))
        self.trace_weight = trace_weight
        self.network = network

    def matrices(self, images: Tensor | None = None) -> Tensor:
        """A[j, k] = P(r says k | the class is j): (annotator, class, class), or (batch, annotator, class, class,
        *spatial) for a network and images.
        """
        return self.log_matrices(images).exp()

    def log_matrices(self, images: Tensor | None) -> Tensor:
        if (images is None) != (self.network is None):
            raise SettingsError("images are given exactly if there is a network that looks at them")
        if self.network is None or images is None:
            return log_softmax(self.scores, 2)
        annotators, classes = self.scores.shape[:2]
        found = self.network(images)
        if found.shape[:2] != (len(images), annotators * classes**2):
            raise ShapeError(
                f"the network gives (batch, {annotators * classes**2}, *spatial) for {annotators} annotators of "
                f"{classes} classes, not {tuple(found.shape)}"
            )
        of_pixels = found.unflatten(1, (annotators, classes, classes))
        everywhere = self.scores.reshape(*self.scores.shape, *[1] * (found.dim() - 2)).to(found)
        return log_softmax(everywhere + of_pixels, 3)

    def forward(self, logits: Tensor, annotations: Tensor, images: Tensor | None = None, void: int = VOID) -> Tensor:
        annotators, classes = self.scores.shape[:2]
        expected = (logits.shape[0], annotators, *logits.shape[2:])
        if annotations.shape != expected or logits.shape[1] != classes:
            raise ShapeError(f"annotations are {expected} of {classes} classes, given {tuple(annotations.shape)}")
        valid = valid_labels(annotations, classes, void)
        if not bool(valid.any()):
            raise ShapeError("no annotator labelled a pixel of this batch")
        logs = self.log_matrices(images).to(logits)
        if images is not None and logs.shape[4:] != logits.shape[2:]:
            raise ShapeError(f"confusion of pixels {tuple(logs.shape[4:])} for logits of {tuple(logits.shape[2:])}")
        total, trace = logits.new_zeros(()), logits.new_zeros(())
        for r in range(annotators):
            pixels = log_probabilities(logits).movedim(1, -1)[valid[:, r]]
            given = annotations[:, r][valid[:, r]].long()
            if images is None:
                rows = logs[r].T[given]  # (pixels, class): log A[j, given]
                trace = trace + logs[r].diagonal().exp().sum()
            else:
                matrices = logs[:, r].movedim((1, 2), (-2, -1))[valid[:, r]]
                rows = matrices.gather(2, given[:, None, None].expand(-1, classes, 1)).squeeze(2)
                trace = trace + matrices.diagonal(dim1=1, dim2=2).exp().sum() / max(len(given), 1)
            total = total - (pixels + rows).logsumexp(-1).sum()
        return total / valid.sum() + self.trace_weight * trace / annotators


def normalised_dice(logits: Tensor, labels: Tensor, power: float = 1.5, void: int = VOID) -> Tensor:
    """mean over classes of sum |p - g|^power / (sum p^2 + sum g^2 + 1e-5), sums over the valid pixels of the batch.

    Between the Dice loss (power 2) and a mean absolute error (power 1), which forgives wrong labels. Logits (batch,
    class, *spatial), labels (batch, *spatial), or laws (batch, class, *spatial) that are 0 on void.
    Source: Wang et al., A noise-robust framework for automatic segmentation of COVID-19 pneumonia lesions from CT
    images, 2020.
    """
    if not 1 <= power <= 2:
        raise SettingsError(f"the power lies in [1, 2], given {power}")
    laws, valid = given_laws(labels, logits.shape[1], void)
    if laws.shape != logits.shape:
        raise ShapeError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    p = torch.exp(-cross_entropy(logits)).movedim(1, -1)[valid]
    g = laws.movedim(1, -1)[valid].to(p)
    difference = (p - g).abs().clamp(min=torch.finfo(p.dtype).tiny)  # a power below 2 has no second derivative at 0
    return (difference**power).sum(0).div(p.square().sum(0) + g.square().sum(0) + 1e-5).mean()
