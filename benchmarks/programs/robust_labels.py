"""Wrong labels found beside cleanlab: python -m benchmarks.programs.robust_labels STRIDE; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peer does not hold firmly

from firmly.data import brain_slices, organ_slices
from firmly.robust import (
    BoundaryJitter,
    BoundaryShift,
    ClassConfusion,
    MissingObjects,
    RegionFlips,
    at_rate,
    image_quality,
    label_errors,
    pixel_quality,
)
from firmly.robust.label_quality import Prune
from firmly.segment.features import PixelFeatures

RATE, FOLDS, RIDGE = 0.2, 5, 1e-4
STACKS = {"brain": lambda: brain_slices("template"), "organs (CT)": lambda: organ_slices("ct")}
NOISES = {
    "confusion": ClassConfusion(1.0),
    "regions": RegionFlips(0.1),
    "jitter": BoundaryJitter(1.0),
    "dilation": BoundaryShift(1.0),
    "missing": MissingObjects(0.3),
}


def main(stride: int, steps: int = 60) -> dict[str, Any]:
    """Every `stride`-th slice of each stack; with a stride above 3 only the first stack and two errors."""
    torch.set_num_threads(1)
    few = stride > 3
    rows, apart, differ, pixels, refused = [], [0.0, 0.0], 0, 0, ""
    for stack in list(STACKS)[: 1 if few else None]:
        slices = STACKS[stack]()
        images, labels, classes = slices.images[::stride], slices.labels[::stride], len(slices.classes)
        for errors in list(NOISES)[: 2 if few else None]:
            _, found = at_rate(NOISES[errors], labels, classes, RATE)
            p = out_of_sample(images.double(), found.labels, classes, steps)
            row: dict[str, Any] = {"slices": stack, "errors": errors, "wrong pixels": f"{100 * found.rate:.1f} %"}
            masks: dict[str, Tensor] = {}
            for prune in get_args(Prune):
                errors_found, milliseconds = timed(partial(label_errors, p, found.labels, prune))
                masks[prune] = errors_found.wrong
                if prune == "both":
                    row["ms firmly"] = milliseconds
            peer = cleanlab(p, found.labels)
            if peer is not None:
                masks["cleanlab"] = torch.from_numpy(peer["wrong"])
                row["ms cleanlab"] = peer["ms"]
                quality = pixel_quality(p, found.labels)
                pairs = (quality, peer["pixels"]), (image_quality(quality), peer["images"])
                apart = [max(a, float((x - torch.from_numpy(y)).abs().max())) for a, (x, y) in zip(apart, pairs)]
                differ += int((masks["rank"] != masks["cleanlab"]).sum())
                pixels += labels.numel()
                refused = peer["void"]
            rows.append(row | {name: shares(mask, found.changed) for name, mask in masks.items()})
    return {"rows": rows, "apart": apart, "differ": differ, "pixels": pixels, "void": refused}


def out_of_sample(images: Tensor, given: Tensor, classes: int, steps: int) -> Tensor:
    """Laws (batch, class, height, width) of a multinomial logistic model that did not see the slice nor its fold.

    Features are smoothed values, gradients and curvatures at three scales, and polynomials of the place; folds are
    neighbouring slices.
    """
    height, width = images.shape[2:]
    places = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width)]
    y, x = torch.meshgrid(*places, indexing="ij")
    place = torch.stack([y, x, y * y, x * x, x * y]).expand(len(images), -1, -1, -1)
    features = torch.cat([PixelFeatures(padding="replicate")(images), place], 1)
    features = (features - features.mean((0, 2, 3), keepdim=True)) / features.std((0, 2, 3), keepdim=True)
    fold = torch.arange(len(images)) * FOLDS // len(images)
    laws = torch.empty(len(images), classes, height, width, dtype=torch.float64)
    for k in fold.unique():
        model = torch.nn.Conv2d(features.shape[1], classes, 1, dtype=torch.float64)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        optimiser = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")
        seen, targets = features[fold != k], given[fold != k]

        def closure(model=model, optimiser=optimiser, seen=seen, targets=targets) -> Tensor:
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(seen), targets) + RIDGE * model.weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        with torch.no_grad():
            laws[fold == k] = model(features[fold == k]).softmax(1)
    return laws


def cleanlab(p: Tensor, labels: Tensor) -> dict[str, Any] | None:
    """Its mask, scores and time, and what it says of labels with void pixels; None if it is not there."""
    try:
        from cleanlab.segmentation.filter import find_label_issues
        from cleanlab.segmentation.rank import get_label_quality_scores
    except ImportError:
        return None
    given, laws = labels.numpy(), p.numpy()
    wrong, milliseconds = timed(lambda: find_label_issues(given, laws, n_jobs=1, verbose=False))
    images, pixels = get_label_quality_scores(given, laws, verbose=False)
    given = given.copy()
    given[:, :2] = 255
    try:
        find_label_issues(given, laws, n_jobs=1, verbose=False)
        said = "accepts them"
    except Exception as refusal:
        said = f"stops with {type(refusal).__name__}"
    return {"wrong": wrong, "ms": milliseconds, "images": images, "pixels": pixels, "void": said}


def shares(mask: Tensor, changed: Tensor) -> tuple[float, float]:
    """Recall and precision."""
    hit = float((mask & changed).sum())
    return hit / float(changed.sum()), hit / max(float(mask.sum()), 1.0)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    value = action()
    return value, 1e3 * (time.process_time() - started)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
