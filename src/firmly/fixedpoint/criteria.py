"""What hyperparameters are chosen by: hold-out, cross-validation, and Stein's unbiased risk estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError


class Criterion(NamedTuple):
    """An inner problem and an outer objective, as `bilevel(*criterion, parameters)` takes them."""

    inner: Callable[[Any, Any, float], Any]
    outer: Callable[[Any, Any], Tensor]


class Estimate(NamedTuple):
    """Solutions x (batch, ...) and the data (batch, ...) that they belong to."""

    x: Tensor
    data: Tensor


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean()


def hold_out(
    predict: Callable[[Any], Tensor], target: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = mean_square
) -> Callable[[Any, Any], Tensor]:
    """outer(x, parameters) = loss(predict(x), target), on data that the inner problem has not seen."""

    def outer(x: Any, parameters: Any) -> Tensor:
        return loss(predict(x), target)

    return outer


def cross_validation(folds: Sequence[Criterion]) -> Criterion:
    """The mean of the outer objectives of all folds, each on the solution of its own inner problem.

    The solution is the tuple of all solutions; each fold goes on from its own.
    """
    if not folds:
        raise SettingsError("cross-validation has at least one fold")

    def inner(parameters: Any, start: Any, tol: float) -> tuple[Any, ...]:
        starts = [None] * len(folds) if start is None else start
        return tuple(fold.inner(parameters, begin, tol) for fold, begin in zip(folds, starts, strict=True))

    def outer(solutions: Any, parameters: Any) -> Tensor:
        errors = [fold.outer(x, parameters) for fold, x in zip(folds, solutions, strict=True)]
        return torch.stack([e.reshape(()) for e in errors]).mean()

    return Criterion(inner, outer)


def k_folds(count: int, folds: int, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
    """(training, test) indices of `folds` parts of 0 ... count - 1 that differ by at most one in size, shuffled."""
    if not 2 <= folds <= count:
        raise SettingsError(f"between 2 and {count} folds can be made of {count} samples, given {folds}")
    order = torch.randperm(count, generator=generator)
    parts = [part.sort().values for part in order.tensor_split(folds)]
    return [(torch.cat([p for j, p in enumerate(parts) if j != i]).sort().values, part) for i, part in enumerate(parts)]


def divergence(image: Tensor, y: Tensor, probes: Tensor | None = None) -> Tensor:
    """sum_i d image_i / d y_i for every element of a batch: (batch,), itself differentiable.

    `image` (batch, *shape) is a function of y (batch, *shape), element by element, in autograd's graph. Exact with
    `probes=None`, at the cost of one derivative an entry; else the mean of <b, J b> over the probes b (count, batch,
    *shape), random with independent entries of mean 0 and variance 1 (Hutchinson 1989).
    """
    refuse_other_space(image, y)
    vectors = units(y) if probes is None else probes
    found = []
    for b in vectors:
        (pulled,) = torch.autograd.grad(image, y, b, create_graph=True, retain_graph=True)
        found.append((pulled * b).flatten(1).sum(1))
    total = torch.stack(found).sum(0)
    return total if probes is None else total / len(probes)


def refuse_other_space(image: Tensor, y: Tensor) -> None:
    if image.shape != y.shape or image.is_complex():
        raise DataError(
            f"a divergence is of real maps to the same space, given {tuple(y.shape)} -> {tuple(image.shape)}"
        )


def units(y: Tensor) -> Tensor:
    """The unit vectors of one element, for all elements of the batch: (entries, batch, *shape)."""
    entries = y[0].numel()
    eye = torch.eye(entries, dtype=y.dtype, device=y.device)
    return eye.reshape(entries, 1, *y.shape[1:]).expand(-1, *y.shape)


def sure(
    solve: Callable[[Tensor, Any, Any, float], Tensor],
    y: Tensor,
    sigma: float,
    predict: Callable[[Tensor], Tensor] | None = None,
    step: float | None = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
) -> Criterion:
    """Stein's unbiased estimate of the risk |mu(y) - E y|^2 / n, without a clean image and without validation data:

        |mu(y) - y|^2 / n - sigma^2 + 2 sigma^2 div mu(y) / n,     y = (batch, *shape) with n entries each,

    for Gaussian noise of the known standard deviation `sigma`, averaged over the batch. mu = predict(x), x =
    solve(data, parameters, start, tol) the solution of the inner problem for data like y; `predict` (None: x itself)
    maps to the space of the data.

    The divergence is <b, mu(y + step b) - mu(y)> / step, the mean over so many Rademacher `probes` b, drawn once from
    the generator, or over all unit vectors (None). The default step 2 sigma / n^0.3 is that of Deledalle et al., whose
    gradient in the parameters is asymptotically that of the risk. With `step=0` it is the derivative: unbiased, one
    inner problem, for estimators whose derivative is smooth in the parameters. For a Lasso it is not: the number of
    active entries is piecewise constant, its gradient is zero and its jumps are missed, and a search by gradients
    would always lower the weight.

    Sources: Stein, Estimation of the mean of a multivariate normal distribution, 1981; Ramani, Blu and Unser,
    Monte-Carlo SURE, 2008; Deledalle, Vaiter, Fadili and Peyre, Stein Unbiased GrAdient estimator of the Risk, 2014.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise SettingsError(f"sigma is the positive standard deviation of the noise, given {sigma}")
    if y.dim() < 2 or not y.is_floating_point():
        raise DataError(f"the data are real and of shape (batch, ...), given {tuple(y.shape)} of {y.dtype}")
    if probes is not None and probes < 1:
        raise SettingsError(f"probes is at least 1 or None, given {probes}")
    n = y[0].numel()
    length = 2 * sigma / n**0.3 if step is None else step
    if not (length >= 0 and math.isfinite(length)):
        raise SettingsError(f"the step is at least 0 and finite, or None; given {length}")
    y = y.detach()
    vectors = units(y) if probes is None else rademacher(probes, y, generator)
    mu = predict if predict is not None else lambda x: x

    def inner(parameters: Any, start: Any, tol: float) -> Estimate:
        begin = None if start is None else start.x
        if length == 0:
            with torch.enable_grad():
                data = y.clone().requires_grad_()
                return Estimate(solve(data, parameters, begin, tol), data)
        data = torch.cat([y, (y + length * vectors).flatten(0, 1)])
        return Estimate(solve(data, parameters, begin, tol), data)

    def outer(estimate: Estimate, parameters: Any) -> Tensor:
        if length == 0:
            with torch.enable_grad():
                image = mu(estimate.x)
                spread = divergence(image, estimate.data, None if probes is None else vectors)
        else:
            images = mu(estimate.x)
            refuse_other_space(images, estimate.data)
            image, moved = images[: len(y)], images[len(y) :].reshape(vectors.shape)
            products = (vectors * (moved - image)).flatten(2).sum(2) / length
            spread = products.sum(0) if probes is None else products.mean(0)
        misfit = (image - y).square().flatten(1).sum(1)
        return (misfit / n - sigma**2 + 2 * sigma**2 * spread / n).mean()

    return Criterion(inner, outer)


def rademacher(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Entries -1 and 1 with equal probability: (count, *like.shape)."""
    device = generator.device if generator is not None else "cpu"
    signs = torch.randint(0, 2, (count, *like.shape), generator=generator, device=device)
    return (2 * signs - 1).to(like)
