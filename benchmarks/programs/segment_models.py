"""Segmentation models beside peers: python -m benchmarks.programs.segment_models SIZE; prints JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peer does not hold firmly

from firmly.data import brain_slices
from firmly.segment import EntropicTV
from firmly.segment.classifiers import SvmSegmenter
from firmly.segment.features import PixelFeatures
from firmly.segment.grid import differences, divergence
from firmly.segment.linear_segmenter import Batch, fit_logistic

C = 1000.0
COUPLING = 0.5


def seconds(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    found = action()
    return found, time.process_time() - started


def logistic(count: int) -> list[dict[str, Any]]:
    """Multinomial regression of the features of so many training slices, without coupling."""
    data = brain_slices(split="train")
    features = PixelFeatures()(data.images[:count].double())
    features = features - features.mean((0, 2, 3), keepdim=True)
    features = features / features.std((0, 2, 3), keepdim=True)
    labels, pixels = data.labels[:count], data.labels[:count].numel()
    ours, s = seconds(
        lambda: fit_logistic([Batch(features, labels, None)], 4, C, coupling=0.0, tol=1e-6, max_iter=2000)
    )
    rows = [{"solver": "firmly", "pixels": pixels, "objective": ours.objective, "s": s, "weights apart": None}]
    if importlib.util.find_spec("sklearn"):
        from sklearn.linear_model import LogisticRegression

        X, y = features.movedim(1, -1).flatten(0, -2).numpy(), labels.flatten().numpy()
        model = LogisticRegression(C=C / pixels, tol=1e-8, max_iter=10_000, solver="newton-cholesky")
        theirs, s = seconds(lambda: model.fit(X, y))
        weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
        scores = torch.from_numpy(X) @ weight.mT + bias
        value = float(weight.square().sum()) / 2 + C * float(
            torch.nn.functional.cross_entropy(scores, labels.flatten())
        )
        apart = float((weight - ours.weight).abs().max() / weight.abs().max())
        rows.append({"solver": "scikit-learn", "pixels": pixels, "objective": value, "s": s, "weights apart": apart})
    return rows


def scores_of(samples: int, height: int, width: int) -> Tensor:
    """Smooth scores with noise, in double precision."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(samples, 4, max(1, height // 8), max(1, width // 8), generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return 2 * (smooth + 0.5 * torch.randn(samples, 4, height, width, generator=generator, dtype=torch.float64))


def energy(size: int) -> list[dict[str, Any]]:
    """The minimiser on size x size pixels of 4 classes: distances per pixel (root mean square) from the exact one."""
    scores = scores_of(1, size, size)
    exact = EntropicTV(COUPLING, accuracy=1e-7, max_iterations=1_000_000)(scores)

    def row(solver: str, x: Tensor, s: float) -> dict[str, Any]:
        return {"solver": solver, "pixels": size**2, "error": float((x - exact).norm()) / size, "s": s}

    rows = []
    for accuracy in (1e-3, 1e-5):
        x, s = seconds(lambda a=accuracy: EntropicTV(COUPLING, accuracy=a, max_iterations=1_000_000)(scores))
        rows.append(row(f"firmly, accuracy {accuracy:g}", x, s))
    for iterations in (100, 1000):
        x, s = seconds(lambda n=iterations: fista(scores, n))
        rows.append(row(f"FISTA, {iterations} iterations", x, s))
    if importlib.util.find_spec("cvxpy"):
        x, s = seconds(lambda: conic(scores[0]))
        rows.append(row("CVXPY, Clarabel", x[None], s))
    return rows


def conic(scores: Tensor) -> Tensor:
    import cvxpy

    classes, height, width = scores.shape
    x = [cvxpy.Variable((height, width)) for _ in range(classes)]
    value = sum(
        cvxpy.sum(cvxpy.multiply(scores[k].numpy(), x[k])) + cvxpy.sum(cvxpy.entr(x[k]))
        - COUPLING * (cvxpy.sum(cvxpy.abs(cvxpy.diff(x[k], axis=0))) + cvxpy.sum(cvxpy.abs(cvxpy.diff(x[k], axis=1))))
        for k in range(classes)
    )  # fmt: skip
    total = sum(x[1:], x[0])
    cvxpy.Problem(cvxpy.Maximize(value), [total == 1]).solve(solver="CLARABEL")
    return torch.stack([torch.from_numpy(part.value) for part in x])


def fista(scores: Tensor, iterations: int) -> Tensor:
    """Accelerated ascent in the dual with the plain step, as one would unroll it."""
    p = ahead = torch.zeros_like(differences(scores))
    momentum = 1.0
    for _ in range(iterations):
        x = (scores - divergence(ahead)).softmax(1)
        new = (ahead + 0.25 * differences(x)).clamp(-COUPLING, COUPLING)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, p, momentum = new + (momentum - 1) / grown * (new - p), new, grown
    return (scores - divergence(p)).softmax(1)


def gradients(samples: int, height: int, width: int) -> list[dict[str, Any]]:
    """Forward and backward of the layer, and of unrolled FISTA, whose gradient is that of its iterations."""
    scores = scores_of(samples, height, width)
    v = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def row(solver: str, layer: Callable[[Tensor], Tensor]) -> tuple[dict[str, Any], Tensor]:
        s = scores.clone().requires_grad_()
        x, forward = seconds(lambda: layer(s))
        (gradient,), backward = seconds(lambda: torch.autograd.grad(x, s, v))
        return {"solver": solver, "input": f"{samples} x {height} x {width}", "s forward": forward,
                "s backward": backward}, gradient  # fmt: skip

    exact = None
    if height <= 48:
        _, exact = row("", EntropicTV(COUPLING, accuracy=1e-7, max_iterations=1_000_000))
    rows = []
    for solver, layer in (
        ("firmly, accuracy 1e-2", EntropicTV(COUPLING, accuracy=1e-2)),
        ("firmly, accuracy 1e-3", EntropicTV(COUPLING, accuracy=1e-3)),
        ("FISTA unrolled, 100", lambda s: fista(s, 100)),
        ("FISTA unrolled, 300", lambda s: fista(s, 300)),
    ):
        if "FISTA" in solver and samples * height * width * int(solver.split()[-1]) > 3_000_000:
            continue  # 40 doubles or more for each entry and iteration
        found, gradient = row(solver, layer)
        error = None if exact is None else float((gradient - exact).norm() / exact.norm())
        rows.append(found | {"error of the gradient": error})
    return rows


def svm(side: int) -> dict[str, Any]:
    """A support vector segmenter with coupling on two slices, or parts of them."""
    data = brain_slices(split="train")
    images, labels = data.images[::15, :, -side:].numpy(), data.labels[::15, -side:].numpy()
    model, s = seconds(lambda: SvmSegmenter(coupling=COUPLING).fit(images, labels))
    fit = model.fit_
    return {"pixels": labels.size, "objective": fit.objective, "proved gap": fit.gap, "planes": fit.iterations, "s": s}


def main(size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    quick = size < 8
    inputs = [(1, 8, 8)] if quick else [(1, 48, 48), (8, 96, 80), (1, 256, 256)]
    return {
        "logistic": logistic(1 if quick else 10),
        "energy": energy(size),
        "gradients": [row for shape in inputs for row in gradients(*shape)],
        "svm": [svm(16 if quick else 96)],
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
