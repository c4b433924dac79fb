"""PENCIL: labels that are learned together with the model, per pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softmax

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.prox.prior import Prior
from firmly.robust.losses import VOID
from firmly.robust.noise_models import valid_labels


def label_logits(labels: Tensor, classes: int, strength: float = 10.0, void: int = VOID) -> Tensor:
    """The first label logits, strength e_y (0 on void): labels (batch, *spatial) -> (batch, class, *spatial)."""
    given, _ = given_laws(labels, classes, void)
    return strength * given.to(torch.get_default_dtype())


def pencil_loss(
    logits: Tensor, states: Tensor, labels: Tensor, kappa: float = 1.0, beta: float = 0.0, void: int = VOID
) -> Tensor:
    """KL(p, d) - kappa log d_y - beta sum_k p_k log p_k at every pixel, with p = softmax(logits), d = softmax(states).

    (batch, class, *spatial) twice and labels (batch, *spatial) -> (batch, *spatial), 0 on void: the paper's L_c + K
    alpha L_o + beta L_e with kappa = K alpha, that is K times its loss for classification. Labels may be laws (batch,
    class, *spatial), 0 on void. Take the mean, or any `risk`, over the valid pixels. The paper's stages: cross-entropy
    alone; model and states together; then `kappa=0` with states detached.

    Source: Yi and Wu, Probabilistic end-to-end noise correction for learning with noisy labels, 2019.
    The released code applies the softmax twice in L_o; docs/robust_risks says what that changes.
    """
    if logits.shape != states.shape:
        raise ShapeError(f"logits {tuple(logits.shape)} and label states {tuple(states.shape)} differ")
    weights_are_fine(kappa, beta)
    given, valid = given_laws(labels, logits.shape[1], void)
    log_p, log_d = log_softmax(logits, 1), log_softmax(states, 1)
    p = log_p.exp()
    loss = (p * (log_p - log_d)).sum(1) - kappa * (given * log_d).sum(1) - beta * (p * log_p).sum(1)
    return torch.where(valid, loss, 0)


def label_step(probabilities: Tensor, labels: Tensor, kappa: float = 1.0, void: int = VOID) -> Tensor:
    """d = (p + kappa e_y) / (1 + kappa), the minimiser of `pencil_loss` over labels for fixed predictions p.

    No rate and no state: kappa says by how much the probability of another class has to exceed that of the given one
    before the label flips, so that at kappa >= 1 none does. On void d = p. Labels may be laws, in the place of e_y.
    Source: derived in docs/theory/robust_risks.
    """
    weights_are_fine(kappa, 0.0)
    if labels.is_floating_point():
        given, valid = given_laws(labels, probabilities.shape[1], void)
        if given.shape != probabilities.shape:
            raise ShapeError(f"probabilities {tuple(probabilities.shape)} do not fit laws {tuple(labels.shape)}")
        share = valid.unsqueeze(1) * (kappa / (1 + kappa))
        return (1 - share) * probabilities + share * given.to(probabilities)
    valid = valid_labels(labels, probabilities.shape[1], void)
    if probabilities.shape != (labels.shape[0], probabilities.shape[1], *labels.shape[1:]):
        raise ShapeError(f"probabilities {tuple(probabilities.shape)} do not fit labels {tuple(labels.shape)}")
    return towards_labels(probabilities, labels, valid * (kappa / (1 + kappa)))


def towards_labels(laws: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """(1 - share) p + share e_y, with a share (batch, *spatial) that is 0 on void."""
    index = torch.where(share > 0, labels, 0).long().unsqueeze(1)
    share = share.to(laws.dtype).unsqueeze(1)
    return (laws * (1 - share)).scatter_add(1, index, share)


def smooth_label_step(
    states: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    prior: Prior,
    kappa: float = 1.0,
    step_size: float = 1.0,
    void: int = VOID,
) -> Tensor:
    """One proximal gradient step on the label logits of `pencil_loss` + prior: (batch, class, *spatial) -> the same.

        states <- prox_{t prior}(states - t (d - p + kappa (d - e_y))),  d = softmax(states),

    with `prior` on the maps of logits, `firmly.prox.TV(weight)` for contours that are short. The step is normalised
    per pixel, so that neither image size nor batch size slows labels down. The gradient is (1 + kappa) / 2 Lipschitz:
    t below 4 / (1 + kappa) converges. Without a prior the limit is `label_step`.
    """
    weights_are_fine(kappa, 0.0)
    if not 0 < step_size < 4 / (1 + kappa):
        raise SettingsError(f"the step lies in (0, {4 / (1 + kappa):g}) for kappa = {kappa:g}, given {step_size}")
    given, valid = given_laws(labels, states.shape[1], void)
    if given.shape != states.shape or probabilities.shape != states.shape:
        raise ShapeError(
            f"states {tuple(states.shape)}, probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}"
        )
    d = softmax(states, 1)
    weight = kappa * valid.unsqueeze(1)
    return prior.prox(states - step_size * (d - probabilities + weight * (d - given.to(d))), step_size)


def given_laws(labels: Tensor, classes: int, void: int) -> tuple[Tensor, Tensor]:
    """Laws (batch, class, *spatial), 0 on void, and where labels are valid: of integers one-hot, of laws themselves."""
    if not labels.is_floating_point():
        valid = valid_labels(labels, classes, void)
        laws = one_hot(torch.where(valid, labels, 0).long(), classes).movedim(-1, 1)
        return laws * valid.unsqueeze(1), valid
    if labels.dim() < 2 or labels.shape[1] != classes or not bool((labels >= 0).all()):
        raise DataError(
            f"labels are integers (batch, *spatial), or laws (batch, {classes}, *spatial) that are not negative; given "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    return labels, labels.sum(1) > 0


def weights_are_fine(kappa: float, beta: float) -> None:
    if not (0 <= kappa < math.inf and 0 <= beta < math.inf):
        raise SettingsError(f"kappa and beta are finite and not negative, given {kappa} and {beta}")
