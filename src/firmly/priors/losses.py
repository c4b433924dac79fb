"""Losses of generalised linear models: squared, logistic, and the cross-entropy of several classes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from firmly.errors import DataError


class Loss(Protocol):
    """A convex loss of scores (n, K) against targets (n, K), sample by sample."""

    bend: float  # an upper bound of the eigenvalues of every sample's Hessian
    error: float  # how many of it the usual error is: a squared error is twice the loss
    shifted: bool  # whether adding one number to all K scores of a sample changes nothing

    def check(self, target: Tensor) -> None:
        """Raises `DataError` for targets that it is not for."""
        ...

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        """(n,)."""
        ...

    def slope(self, scores: Tensor, target: Tensor) -> Tensor:
        """The gradient in the scores, (n, K)."""
        ...

    def curvature(self, scores: Tensor) -> Tensor:
        """The Hessian in the scores, (n, K, K)."""
        ...


class Squared:
    """|s - y|^2 / 2."""

    bend, error, shifted = 1.0, 2.0, False

    def check(self, target: Tensor) -> None:
        pass

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (scores - target).square().sum(1)

    def slope(self, scores: Tensor, target: Tensor) -> Tensor:
        return scores - target

    def curvature(self, scores: Tensor) -> Tensor:
        return torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device).expand(len(scores), -1, -1)


class Logistic:
    """log(1 + exp s) - y s for y in [0, 1]: two classes, K = 1."""

    bend, error, shifted = 0.25, 1.0, False

    def check(self, target: Tensor) -> None:
        if target.shape[1] != 1 or not bool(((target >= 0) & (target <= 1)).all()):
            raise DataError("the targets of Logistic are numbers in [0, 1], in one column: 0 and 1, not -1 and 1")

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return (softplus(scores) - target * scores).sum(1)

    def slope(self, scores: Tensor, target: Tensor) -> Tensor:
        return scores.sigmoid() - target

    def curvature(self, scores: Tensor) -> Tensor:
        return (scores.sigmoid() * (-scores).sigmoid())[:, :, None]


class Softmax:
    """log sum_k exp s_k - <y, s> for y >= 0 with sum 1: K classes, multinomial regression."""

    bend, error, shifted = 0.5, 1.0, True

    def check(self, target: Tensor) -> None:
        if target.shape[1] < 2 or not bool((target >= 0).all()) or float((target.sum(1) - 1).abs().max()) > 1e-5:
            raise DataError("the targets of Softmax are probabilities of at least two classes: rows with the sum 1")

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return scores.logsumexp(1) - (target * scores).sum(1)

    def slope(self, scores: Tensor, target: Tensor) -> Tensor:
        return scores.softmax(1) - target

    def curvature(self, scores: Tensor) -> Tensor:
        p = scores.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
