"""Losses of pixel classifiers that bear wrong labels: of every class, so that labels, laws and risks apply to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError

VOID = 255
STEPS = 100


def of_labels(losses: Tensor, labels: Tensor, void: int = VOID) -> Tensor:
    """The losses (batch, *spatial) of given labels, from those of all classes (batch, class, *spatial).

    `labels` are integers (batch, *spatial), or laws (batch, class, *spatial) under which the expectation is taken.
    Where they are `void` (or the law is 0) the loss is 0, with gradient 0: leave it out of means by mask=labels !=
    void.
    """
    classes = losses.shape[1]
    if labels.shape == losses.shape:
        if not bool((labels >= 0).all()):
            raise DataError("label laws are not negative")
        return torch.where(labels > 0, labels * torch.where(labels > 0, losses, 0), 0).sum(1)
    if labels.shape != (losses.shape[0], *losses.shape[2:]) or labels.is_floating_point():
        raise ShapeError(
            f"labels are integers (batch, *spatial) or laws (batch, class, *spatial) for losses {tuple(losses.shape)}, "
            f"given {labels.dtype} {tuple(labels.shape)}"
        )
    valid = labels != void
    if bool((valid & ((labels < 0) | (labels >= classes))).any()):
        raise DataError(f"labels lie between 0 and {classes - 1}, or are {void} where there is none")
    chosen = losses.gather(1, torch.where(valid, labels, 0).long().unsqueeze(1)).squeeze(1)
    return torch.where(valid, chosen, 0)


def cross_entropy(logits: Tensor) -> Tensor:
    """l_k = -log p_k with p = softmax(logits); all losses here are (batch, class, *spatial) -> the same shape."""
    return -log_probabilities(logits)


def generalised_cross_entropy(logits: Tensor, q: float = 0.7) -> Tensor:
    """l_k = (1 - p_k^q) / q: between the cross-entropy (q -> 0) and 1 - p_k (q = 1); bounded by 1 / q.

    Source: Zhang and Sabuncu, Generalized cross entropy loss for training deep neural networks with noisy labels, 2018.
    """
    if not 0 < q <= 1:
        raise SettingsError(f"q lies in (0, 1], given {q}; q -> 0 is the cross-entropy")
    return -torch.expm1(q * log_probabilities(logits)) / q


def mean_absolute_error(logits: Tensor) -> Tensor:
    """l_k = |p - e_k|_1 = 2 (1 - p_k); its sum over classes is constant, so that uniform noise moves no minimiser.

    Source: Ghosh, Kumar and Sastry, Robust loss functions under label noise for deep neural networks, 2017.
    """
    return -2 * torch.expm1(log_probabilities(logits))


def symmetric_cross_entropy(logits: Tensor, forward: float = 0.1, reverse: float = 1.0, floor: float = -4.0) -> Tensor:
    """l_k = forward (-log p_k) + reverse (-floor) (1 - p_k): cross-entropy and its reverse, where log 0 is `floor`.

    Source: Wang, Ma, Chen, Luo, Yi and Bailey, Symmetric cross entropy for robust learning with noisy labels, 2019.
    """
    if not (forward >= 0 and reverse >= 0 and floor < 0):
        raise SettingsError(f"the weights are not negative and the floor is, given {forward}, {reverse}, {floor}")
    logarithms = log_probabilities(logits)
    return -forward * logarithms + reverse * floor * torch.expm1(logarithms)


def active_passive(logits: Tensor, active: float = 1.0, passive: float = 1.0, floor: float = -4.0) -> Tensor:
    """l_k = active log p_k / sum_j log p_j + passive (-floor) (1 - p_k): normalised and reverse cross-entropy.

    Source: Ma, Huang, Wang, Romano, Erfani and Bailey, Normalized loss functions for deep learning with noisy labels,
    2020 (NCE + RCE).
    """
    if not (active >= 0 and passive >= 0 and floor < 0):
        raise SettingsError(f"the weights are not negative and the floor is, given {active}, {passive}, {floor}")
    logarithms = log_probabilities(logits)
    return active * logarithms / logarithms.sum(1, keepdim=True) + passive * floor * torch.expm1(logarithms)


def forward_correction(logits: Tensor, transition: Tensor) -> Tensor:
    """l_k = -log sum_j p_j T_jk, the cross-entropy of the noisy label; T_jk = P(label k | true class j). Infinite for
    labels k that no class has.

    Source: Patrini, Rozza, Menon, Nock and Qu, Making deep neural networks robust to label noise: a loss correction
    approach, 2017, theorem 2.
    """
    T = stochastic(transition, logits)
    possible = (T > 0).any(0)  # a label that no class has: infinite losses, whose gradient would be NaN
    logarithms = torch.where(possible, T, 1).log().reshape(1, *T.shape, *[1] * (logits.dim() - 2))
    losses = -(log_probabilities(logits).unsqueeze(2) + logarithms).logsumexp(1)
    return torch.where(possible.reshape(1, -1, *[1] * (logits.dim() - 2)), losses, torch.inf)


def backward_correction(losses: Tensor, transition: Tensor) -> Tensor:
    """l_k -> sum_j (T^-1)_kj l_j, unbiased for the clean loss under the noise T; it may be negative and unbounded.

    Source: Patrini et al. 2017, theorem 1.
    """
    T = stochastic(transition, losses)
    if float(torch.linalg.cond(T)) > 1 / math.sqrt(torch.finfo(torch.float64).eps):
        raise DataError("the transition matrix is singular: its rows say the same of two classes")
    return torch.einsum("kj,bj...->bk...", torch.linalg.inv(T).to(losses), losses)


def bi_tempered(logits: Tensor, t1: float = 0.8, t2: float = 1.2) -> Tensor:
    """l_k = -log_t1 p_k - (1 - sum_j p_j^(2 - t1)) / (2 - t1), with p_j = exp_t2(z_j - normaliser); bounded for t1 < 1.

    log_t(x) = (x^(1-t) - 1) / (1 - t), exp_t(x) = (1 + (1 - t) x)_+^(1 / (1 - t)). The normaliser, which makes p sum to
    one, is found by Newton's method on a convex function; gradients are those of the exact one. t1 = t2 = 1 is the
    cross-entropy.
    Source: Amid, Warmuth, Anil and Koren, Robust bi-tempered logistic loss based on Bregman divergences, 2019.
    """
    if not (0 <= t1 <= 1 <= t2 < 2):
        raise SettingsError(f"the temperatures satisfy 0 <= t1 <= 1 <= t2 < 2, given t1 = {t1}, t2 = {t2}")
    if t2 == 1:
        logarithms = log_probabilities(logits)
    else:
        logarithms = tempered_logarithms(logits, t2)
    heavy = torch.expm1((1 - t1) * logarithms) / (1 - t1) if t1 < 1 else logarithms
    return -heavy - (1 - ((2 - t1) * logarithms).exp().sum(1, keepdim=True)) / (2 - t1)


def tempered_logarithms(logits: Tensor, t: float) -> Tensor:
    """log p of the tempered softmax, t > 1: p_j = (1 + (t - 1) (n - z_j))^(-1 / (t - 1)), n such that they sum to 1.

    The sum is convex and decreasing in n >= max z, where it is at least 1: Newton's method from there is monotone.
    """
    shifted = logits - logits.detach().amax(1, keepdim=True)
    power = -1 / (t - 1)

    def newton(z: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        base = 1 + (t - 1) * (n - z)
        excess = (base**power).sum(1, keepdim=True) - 1
        return n + excess / (base ** (power - 1)).sum(1, keepdim=True), excess

    z = shifted.detach().double()
    n = torch.zeros_like(z[:, :1])
    for _ in range(STEPS):
        n, excess = newton(z, n)
        if bool((excess <= 4e-16 * (16 - power) * z.shape[1]).all()):  # the rounding of the powers
            break
    else:
        raise NotConverged(f"the normaliser of a tempered softmax needs more than {STEPS} steps at t2 = {t}")
    n = n.to(shifted.dtype)
    for _ in range(2):  # from the solution, two steps give n its first three derivatives
        n, _ = newton(shifted, n)
    return power * (1 + (t - 1) * (n - shifted)).log()


def early_learning(logits: Tensor, average: Tensor, weight: float = 3.0) -> Tensor:
    """weight log(max(1 - <p, t>, 1e-4)), a term (batch, *spatial) that is added to the cross-entropy of given labels.

    `average` is the running mean t of earlier predictions (`LabelStore.average`): it keeps what was learned before
    labels were memorised. On void pixels the term is there, too: leave them out of means by a mask.
    Source: Liu, Niles-Weed, Razavian and Fernandez-Granda, Early-learning regularization prevents memorization of noisy
    labels, 2020.
    """
    if average.shape != logits.shape:
        raise ShapeError(
            f"the averages have the shape {tuple(logits.shape)} of the logits, given {tuple(average.shape)}"
        )
    if not weight >= 0:
        raise SettingsError(f"the weight is not negative, given {weight}")
    agreement = (log_probabilities(logits).exp() * average.detach()).sum(1)
    return weight * (1 - agreement).clamp(min=1e-4).log()


def log_probabilities(logits: Tensor) -> Tensor:
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ShapeError(f"logits are floating-point (batch, class, *spatial), given {tuple(logits.shape)}")
    return log_softmax(logits, 1)


def stochastic(transition: Tensor, like: Tensor) -> Tensor:
    """The transition matrix in the dtype of the losses, once its rows are laws."""
    classes = like.shape[1]
    if tuple(transition.shape) != (classes, classes):
        raise ShapeError(f"the transition matrix is ({classes}, {classes}), given {tuple(transition.shape)}")
    if not bool((transition >= 0).all()) or not bool(((transition.sum(1) - 1).abs() <= 1e-4).all()):
        raise DataError("the rows of a transition matrix are laws: not negative, of sum one")
    return transition.to(like)
