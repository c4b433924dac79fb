"""Linear scores of pixel features under an entropic energy: a convex model of segmentation, and its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import DataError
from firmly.prox.prior import positive, sum_over_sample
from firmly.segment.energy import EntropicTV
from firmly.segment.fenchel_young import loss_and_minimum
from firmly.segment.grid import both_ends, contrast_weights, differences, edge_bounds
from firmly.segment.labels import IGNORE, targets
from firmly.segment.logistic_regression import newton
from firmly.segment.structured_hinge import Best, best_segmentation

TOWARDS = 0.25  # of the way from the best weights to the minimum of the cutting planes
ROUGH, FINE = 0.2, 0.2  # accuracy of segmentations: of the gap, and of the gap asked for
FIRST, LEAST = 0.02, 2e-4  # per pixel: at first, and the finest
FEW = 500  # weights, up to which Newton's method is the faster one


class LinearSegmenter(nn.Module):
    """Images (batch, channels, *spatial) -> x*(weight features + bias), probabilities (batch, classes, *spatial).

    `weight` is (classes, features), `bias` (classes,). With a `contrast` above 0 the edge weights of the energy are
    exp(-contrast |I[i + e_a] - I[i]|^2) of the image (`contrast_weights`), which no certificate is known for.
    """

    def __init__(self, features: nn.Module, weight: Tensor, bias: Tensor, energy: EntropicTV, contrast: float = 0.0):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.energy = energy
        self.contrast = float(contrast)

    def scores(self, images: Tensor) -> Tensor:
        return linear_scores(self.features(images), self.weight, self.bias)

    def edge_weights(self, images: Tensor) -> Tensor | None:
        return contrast_weights(images, self.contrast) if self.contrast > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        return self.energy(self.scores(images), self.edge_weights(images))

    @torch.no_grad()
    def output_error(self, images: Tensor) -> float:
        """A bound of the Euclidean distance of the output from the exact minimiser, the largest over the images."""
        images = images.to(self.weight.dtype)
        return float(self.energy.solve(self.scores(images), self.edge_weights(images)).error.max())


class Batch(NamedTuple):
    """Features (batch, features, *spatial) in float64, class numbers (batch, *spatial), edge weights or None."""

    features: Tensor
    labels: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Fit:
    """What minimises the objective: weight (classes, features), bias (classes,), coupling; and how far it came.

    `gap` is the largest entry of the projected gradient (Fenchel-Young) or the objective above a lower bound of the
    minimum (hinge).
    """

    weight: Tensor
    bias: Tensor
    coupling: float
    objective: float
    gap: float
    iterations: int
    converged: bool


def linear_scores(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight features + bias for every pixel, as a convolution of one pixel, which the certificates know."""
    axes = features.dim() - 2
    convolve: Callable[..., Tensor] = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    weight, bias = (t.to(features.device, features.dtype) for t in (weight, bias))
    return convolve(features, weight.reshape(*weight.shape, *[1] * axes), bias)


def count_valid(batches: list[Batch], ignore: int) -> int:
    valid = sum(int((batch.labels != ignore).sum()) for batch in batches)
    if valid == 0:
        raise DataError("no pixel has a label")
    return valid


def fit_logistic(
    batches: list[Batch],
    classes: int,
    C: float,
    coupling: float | None = None,
    ignore: int = IGNORE,
    accuracy: float = 1e-3,
    tol: float = 1e-5,
    max_iter: int = 200,
) -> Fit:
    """min over (W, b, coupling >= 0) of |W|^2 / 2 + C (sum of Fenchel-Young losses) / (number of labelled pixels).

    Jointly convex; a `coupling` that is given is kept. L-BFGS-B on the exact gradients, with the duals of the images
    kept from one step to the next, until no entry of the projected gradient is above `tol`. Without coupling, and with
    few weights, by Newton's method.
    """
    import numpy as np
    from scipy.optimize import minimize

    positive("C", C)
    features = batches[0].features.shape[1]
    count = count_valid(batches, ignore)
    start = np.zeros(classes * (features + 1) + 1)
    start[-1] = 0.0 if coupling is None else coupling
    if coupling == 0 and len(start) <= FEW:
        plain = fit_pixels(batches, classes, C, ignore, tol, max_iter)
        if plain.converged or plain.iterations == max_iter:
            return plain
        start[:-1] = torch.cat([plain.weight.flatten(), plain.bias]).numpy()
    duals: list[Tensor | None] = [None] * len(batches)

    def unpacked(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return theta[: classes * features].reshape(classes, features), theta[classes * features : -1], theta[-1]

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.from_numpy(vector).clone().to(batches[0].features.device).requires_grad_()
        weight, bias, beta = unpacked(theta)
        energy = EntropicTV(beta, accuracy=accuracy)
        (weight.square().sum() / 2).backward(retain_graph=True)
        total = float(weight.detach().square().sum()) / 2
        for k, batch in enumerate(batches):
            scores = linear_scores(batch.features, weight, bias)
            loss, found = loss_and_minimum(scores, batch.labels, energy, batch.weights, ignore, duals[k])
            duals[k] = found.dual
            (C / count * loss.sum()).backward(retain_graph=True)
            total += C / count * float(loss.detach().sum())
        assert theta.grad is not None
        gradient = theta.grad.cpu().numpy()
        if coupling is not None:
            gradient[-1] = 0.0
        return total, gradient

    free = [(None, None)] * (len(start) - 1) + [(0.0, None) if coupling is None else (coupling, coupling)]
    options = {"maxiter": max_iter, "gtol": tol, "ftol": 0.0, "maxfun": 20 * max_iter, "maxcor": 30}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=free, options=options)
    weight, bias, beta = unpacked(torch.from_numpy(found.x))
    gradient = np.where((found.x == 0) & (np.arange(len(start)) == len(start) - 1), np.minimum(found.jac, 0), found.jac)
    gap = float(np.abs(gradient).max())
    return Fit(weight.clone(), bias.clone(), float(beta), float(found.fun), gap, int(found.nit), gap <= tol)


def fit_pixels(batches: list[Batch], classes: int, C: float, ignore: int, tol: float, max_iter: int) -> Fit:
    """`fit_logistic` without coupling, multinomial logistic regression of the labelled pixels, by Newton's method."""
    rows, laws = [], []
    for features, labels, _ in batches:
        y, valid = targets(labels, features[:, :1].expand(-1, classes, *labels.shape[1:]), ignore)
        rows.append(torch.cat([features, torch.ones_like(features[:, :1])], 1).movedim(1, -1)[valid])
        laws.append(y.movedim(1, -1)[valid])
    start = rows[0].new_zeros(rows[0].shape[1], classes)
    found = newton(torch.cat(rows), torch.cat(laws), start[1:, 0] + 1 / C, start, tol / C, max_iter)
    weight, gap = found.weights.mT.cpu(), C * found.slope
    return Fit(weight[:, :-1].clone(), weight[:, -1].clone(), 0.0, C * found.value, gap, found.steps, gap <= tol)


def fit_hinge(
    batches: list[Batch],
    classes: int,
    C: float,
    coupling: float = 0.0,
    ignore: int = IGNORE,
    tol: float = 1e-2,
    max_iter: int = 200,
) -> Fit:
    """min over (W, b) of (|W|^2 + |b|^2) / 2 + C (sum of structured hinge losses) / (number of labelled pixels).

    The bias is the weight of a constant feature, as in the linear SVM of scikit-learn. Cutting planes: every
    segmentation found bounds the loss from below by an affine function, and a small quadratic program gives the minimum
    of the largest of them. The next (W, b) lies between the best one so far and that minimum, which keeps the planes
    where they matter. Ends when the best objective is within `tol` times itself of the minimum; segmentations are found
    to a part of the gap that is left.
    Sources: Joachims, Finley and Yu, Cutting-plane training of structural SVMs, 2009; Ben-Ameur and Neto, Acceleration
    of cutting-plane and column generation algorithms, 2007 (the point between).
    """
    features = batches[0].features.shape[1]
    count = count_valid(batches, ignore)
    theta = torch.zeros(classes, features + 1, dtype=torch.float64, device=batches[0].features.device)
    slopes: list[Tensor] = []
    offsets: list[float] = []
    best, best_theta, gap = float("inf"), theta, float("inf")
    starts: list[Best | None] = [None] * len(batches)
    labelled = count / sum(batch.labels.numel() for batch in batches)  # accuracies are per pixel, losses per label
    while len(slopes) < max_iter:
        accuracy = labelled * (max(ROUGH * gap, FINE * tol * best) / C if slopes else FIRST)
        upper, slope, offset = 0.0, torch.zeros_like(theta), 0.0
        for k, batch in enumerate(batches):
            y, valid = targets(batch.labels, torch.empty(len(batch.labels), classes, *batch.labels.shape[1:]), ignore)
            y, valid = y.to(theta.device), valid.to(theta.device)
            scores = linear_scores(batch.features, theta[:, :-1], theta[:, -1])
            bounds = edge_bounds(coupling, batch.weights, scores) * both_ends(valid)[:, None]
            found = best_segmentation((scores + 1 - y) * valid[:, None], bounds, accuracy, 20_000, starts[k])
            starts[k] = found if coupling > 0 else None
            change = (found.x - y) * valid[:, None]
            of_x, of_y = (float((bounds * differences(z).abs()).sum()) for z in (found.x, y))
            upper += float(found.upper.sum()) + of_y - float((scores * y).sum())
            slope[:, :-1] += torch.einsum("bk...,bf...->kf", change, batch.features)
            slope[:, -1] += change.transpose(0, 1).flatten(1).sum(1)
            offset += float(sum_over_sample(valid[:, None] * (1 - y) * found.x).sum()) - of_x + of_y
        value = float(theta.square().sum()) / 2 + C / count * upper
        if value < best:
            best, best_theta = value, theta
        slopes.append((C / count * slope).flatten())
        offsets.append(C / count * offset)
        model, lower = model_minimum(torch.stack(slopes), torch.tensor(offsets, dtype=torch.float64), theta.shape)
        gap = best - lower
        if gap <= tol * best:
            break
        theta = best_theta + TOWARDS * (model - best_theta)
    return Fit(
        best_theta[:, :-1].clone(), best_theta[:, -1].clone(), coupling, best, gap, len(slopes), gap <= tol * best
    )


def model_minimum(slopes: Tensor, offsets: Tensor, shape: torch.Size) -> tuple[Tensor, float]:
    """argmin over theta of |theta|^2 / 2 + max(0, max_j <slopes_j, theta> + offsets_j), and a lower bound of its value.

    In the dual: theta = -sum alpha_j slopes_j, alpha >= 0 with sum at most 1. Any such alpha gives a lower bound.
    """
    import clarabel
    import numpy as np
    from scipy import sparse

    count = len(offsets)
    gram = (slopes @ slopes.mT).cpu().numpy()
    rows = sparse.vstack([-sparse.eye(count), np.ones((1, count))], format="csc")
    cones = [clarabel.NonnegativeConeT(count + 1)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    right = np.concatenate([np.zeros(count), [1.0]])
    quadratic = sparse.triu(sparse.csc_matrix(gram), format="csc")
    solved = clarabel.DefaultSolver(quadratic, -offsets.numpy(), rows, right, cones, settings).solve()
    alpha = torch.tensor(solved.x, dtype=torch.float64).clamp(min=0)
    alpha = (alpha / max(1.0, float(alpha.sum()))).to(slopes.device)
    theta = -(alpha @ slopes)
    return theta.reshape(shape), float(alpha.cpu() @ offsets) - float(theta.square().sum()) / 2
