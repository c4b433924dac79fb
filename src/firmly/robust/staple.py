"""STAPLE: the truth and the confusion matrix of every annotator, from several label maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError
from firmly.robust.losses import VOID
from firmly.robust.noise_models import valid_labels


class Staple(NamedTuple):
    """`probabilities` (batch, class, *spatial) of the true class (the prior where nobody labelled), in float64.

    `confusion[r, j, k]` = P(annotator r says k | the class is j), `prior` (class,), `log_likelihood` of what the
    annotators said after every iteration: it never falls.
    """

    probabilities: Tensor
    confusion: Tensor
    prior: Tensor
    log_likelihood: tuple[float, ...]

    @property
    def labels(self) -> Tensor:
        return self.probabilities.argmax(1)


def staple(
    annotations: Tensor,
    classes: int,
    prior: Tensor | None = None,
    pseudocount: float = 0.01,
    tol: float = 1e-7,
    max_iterations: int = 500,
    void: int = VOID,
) -> Staple:
    """Annotations (batch, annotator, *spatial), void where one did not label -> the truth, and who errs how.

    Annotators err independently of each other given the class, and alike at all pixels. Then

        q_i(j)   proportional to  prior_j  prod_r A_r[j, y_ri]                            (expectation)
        A_r[j, k] proportional to  pseudocount + sum_i q_i(j) 1[y_ri = k]                 (maximisation)

    from the vote of the majority, until the penalised likelihood per label grows by less than `tol`; `NotConverged`
    after `max_iterations`. `prior` (class,) is kept if it is given, else it is the mean of q. Where all annotators err
    alike, no method can know. Pixels on which all agree are counted too: they decide what a class mostly is.
    Sources: Dawid and Skene, Maximum likelihood estimation of observer error-rates using the EM algorithm, 1979;
    Warfield, Zou and Wells, Simultaneous truth and performance level estimation (STAPLE), 2004.
    """
    if annotations.dim() < 3:
        raise ShapeError(f"annotations are (batch, annotator, *spatial), given {tuple(annotations.shape)}")
    if not (pseudocount >= 0 and tol > 0 and max_iterations >= 1):
        raise SettingsError(f"pseudocount >= 0, tol > 0, max_iterations >= 1: {pseudocount}, {tol}, {max_iterations}")
    valid = valid_labels(annotations, classes, void)
    if not bool(valid.any()):
        raise DataError("no annotator labelled a pixel")
    # pixels where the annotators say the same are one pattern: the iterations cost as many rows as there are patterns
    rows = torch.where(valid, annotations.long(), classes).movedim(1, -1)
    shape, rows = rows.shape[:-1], rows.flatten(0, -2)
    patterns, pattern, count = rows.unique(dim=0, return_inverse=True, return_counts=True)
    count = torch.where((patterns < classes).any(1), count, 0).double()
    said = torch.nn.functional.one_hot(patterns, classes + 1)[..., :classes].double()  # (pattern, annotator, class)
    law = checked_prior(prior, classes, said)

    votes = said.sum(1)
    posterior = (votes + 1e-3) / (votes + 1e-3).sum(1, keepdim=True)
    history: list[float] = []
    labels = float((count[:, None, None] * said).sum())
    for _ in range(max_iterations):
        confusion = torch.einsum("p,pj,prk->rjk", count, posterior, said) + pseudocount
        confusion = confusion / confusion.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        weights = law if prior is not None else (count[:, None] * posterior).sum(0) / count.sum()
        joint = weights.log() + torch.einsum("prk,rjk->pj", said, torch.log(confusion.clamp(min=1e-300)))
        total = joint.logsumexp(1)
        posterior = (joint - total[:, None]).exp()
        history.append(float((count * total).sum() + pseudocount * confusion.clamp(min=1e-300).log().sum()))
        if len(history) > 1 and history[-1] - history[-2] <= tol * labels:
            law = weights
            break
    else:
        raise NotConverged(f"STAPLE still improves after {max_iterations} iterations: allow more, or a larger tol")
    probabilities = posterior[pattern].reshape(*shape, classes).movedim(-1, 1)
    return Staple(probabilities, confusion, law, tuple(history))


def checked_prior(prior: Tensor | None, classes: int, like: Tensor) -> Tensor:
    if prior is None:
        return like.new_full((classes,), 1 / classes)
    if tuple(prior.shape) != (classes,) or not bool((prior > 0).all()) or abs(float(prior.sum()) - 1) > 1e-6:
        raise DataError(f"the prior is a law of {classes} positive probabilities, given {prior.tolist()}")
    return prior.to(like)
