"""What the segmentation study looks like: labels given and believed, predictions, errors, certified pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.certificates import certify
from firmly.lab.charts import at_most
from firmly.lab.experiments.segment_cells import Group, predicted
from firmly.lab.experiments.segment_models import MODELS, Model, whole
from firmly.lab.experiments.segment_problems import Problem
from firmly.lab.experiments.segment_training import CROSS_ENTROPY, METHODS, Labelled, believed, fit, scores
from firmly.lab.page import Pictures, Section, Table
from firmly.lab.pictures import coloured, png
from firmly.lab.run_folder import RunFolder
from firmly.robust import image_quality, label_errors, pixel_quality
from firmly.segment import certified_pixels


class Trained(NamedTuple):
    """A network of the table, trained again."""

    group: Group
    network: nn.Module
    coupling: float


def again(data: Problem, model: Model, group: Group, given: Tensor, steps: int, seed: int) -> Trained:
    """The first network of a group, as it was."""
    method = next(m for m in METHODS if m.name == group.method)
    seen = [model.seen(part.images) for part in (data.train, data.clean)]
    learning = Labelled(seen[1][::2], data.clean.labels[::2])
    network = fit(model, method, group.parameter, Labelled(seen[0], given), learning, len(data.classes), steps, seed)
    return Trained(group, network, group.cells[0].coupling)


def section(
    data: Problem, name: str, noise: str, rate: float, plain: Group, best: Group, given: Tensor, steps: int, seed: int,
    run: RunFolder,
) -> Section:  # fmt: skip
    """One test slice and one training slice, under one error of annotators."""
    model = MODELS[name]
    top = len(data.classes)
    one, other = (again(data, model, group, given, steps, seed) for group in (plain, best))
    at, from_train = len(data.test.labels) // 2, len(data.train.labels) // 2
    truth = data.test.labels[at]
    found = [predicted(t.network, model.seen(data.test.images[at : at + 1]), t.coupling).argmax(1)[0]
             for t in (one, other)]  # fmt: skip
    seen = Labelled(model.seen(data.train.images), given)
    belief, how = beliefs(model, other, seen)
    right = data.train.labels

    def shown(key: str, content: bytes, caption: str) -> tuple[str, str]:
        run.write(f"pictures/{key}.png", content)
        return f"{key}.png", caption

    def map_of(labels: Tensor) -> bytes:
        return coloured(labels / (top - 1))

    tests = [
        shown("image", png(data.test.images[at]), "a test slice"),
        shown("truth", map_of(truth), "its labels"),
        shown(
            "plain", map_of(found[0]), f"{CROSS_ENTROPY.name}: {100 * (found[0] != truth).double().mean():.1f} % wrong"
        ),
        shown("best", map_of(found[1]), f"{best.title}: {100 * (found[1] != truth).double().mean():.1f} % wrong"),
        shown("plain_error", coloured((found[0] != truth).double()), f"errors of {CROSS_ENTROPY.name}"),
        shown("best_error", coloured((found[1] != truth).double()), f"errors of {best.title}"),
    ]

    def wrong(labels: Tensor) -> str:
        return f"{100 * (labels != right).double().mean():.1f} % of all wrong"

    trains = [
        shown("train_truth", map_of(right[from_train]), "a training slice: the truth"),
        shown("given", map_of(given[from_train]), f"labels given ({wrong(given)})"),
        shown("believed", map_of(belief[from_train]), f"labels believed ({wrong(belief)})"),
    ]
    blocks = [Pictures(tests), Pictures(trains, how)]
    if model.probabilistic:
        blocks.append(search(seen, right, [one, other]))
    return Section(f"{name} under {noise}, {100 * rate:.0f} % wrong", "", tuple(blocks))


def beliefs(model: Model, trained: Trained, given: Labelled) -> tuple[Tensor, str]:
    """Labels that the method believes, or that its predictions contradict confidently; and how they were found."""
    group = trained.group
    own = believed(model, group.method, group.parameter, trained.network, given)
    if own is not None:
        return own, f"believed: what {group.title} trained on at last"
    if not model.probabilistic:
        return given.labels, "believed: the method takes the labels as they are"
    found = label_errors(scores(trained.network, given.inputs).softmax(1), given.labels).believed
    return found, "believed: labels given, but those that the network contradicts confidently (label_errors)"


def search(given: Labelled, right: Tensor, networks: list[Trained]) -> Table:
    """How well networks find the wrong labels that they were trained on."""
    rows = []
    wrong = given.labels != right
    for trained in networks:
        laws = scores(trained.network, given.inputs).softmax(1)
        flagged = label_errors(laws, given.labels).wrong
        quality = pixel_quality(laws, given.labels)
        ranks = image_quality(quality).argsort()
        worst = wrong.flatten(1).double().mean(1)
        first = ranks[: max(len(ranks) // 5, 1)]
        rows.append(
            [
                trained.group.title,
                f"{100 * (flagged & wrong).sum() / max(int(wrong.sum()), 1):.0f} %",
                f"{100 * (flagged & wrong).sum() / max(int(flagged.sum()), 1):.0f} %",
                f"{separation(quality, wrong):.3f}",
                f"{100 * worst[first].mean():.0f} % against {100 * worst.mean():.0f} %",
            ]
        )
    columns = (
        "network",
        "wrong labels found",
        "found ones that are wrong",
        "AUC of the score",
        "first fifth of images",
    )
    caption = (
        "Finding wrong labels in the training slices: label_errors, the area under the curve of pixel_quality, and the "
        "fraction of wrong pixels in the images that image_quality ranks lowest, against that of all."
    )
    return Table(columns, rows, caption)


def separation(quality: Tensor, wrong: Tensor) -> float:
    """The probability that a wrong label has a lower score than a right one."""
    order = quality.flatten().argsort()
    bad = wrong.flatten()[order]
    ranks = torch.arange(1, len(bad) + 1, dtype=torch.float64)
    n, m = int(bad.sum()), int((~bad).sum())
    return float("nan") if not n or not m else 1 - (float(ranks[bad].sum()) - n * (n + 1) / 2) / (n * m)


def certified(
    data: Problem, name: str, best: Group, given: Tensor, steps: int, seed: int, radius: float, seconds: float,
    run: RunFolder,
) -> Section:  # fmt: skip
    """The pixels of a test slice that no perturbation of the image changes."""
    model = MODELS[name]
    trained = again(data, model, best, given, steps, seed)
    network = whole(model, trained.network, trained.coupling)
    at = len(data.test.labels) // 2
    image = data.test.images[at : at + 1]
    upper = certify(network.double(), shape=tuple(image.shape[1:]), budget_s=seconds).upper
    items, shares = [], []
    for index, size in enumerate((0.0, radius / 4, radius)):
        found = certified_pixels(network, image, size, upper)
        share = 100 * float(found.certified.double().mean())
        shown = torch.where(found.certified, (found.prediction + 1) / len(data.classes), 0.0)[0]
        run.write(f"pictures/certified{index}.png", coloured(shown))
        items.append((f"certified{index}.png", f"radius {size:g}: {share:.0f} % of the pixels"))
        shares.append(share)
    text = (
        f"{name}, trained by {best.title}, moves its output by at most {at_most(upper)} times a perturbation of the "
        "image (Euclidean norms). Coloured pixels keep their class under every perturbation of the radius; in the "
        "darkest colour are those of which this is not proved. The bound is of the network, not of its labels: one "
        "that learned wrong contours keeps them just as firmly. The U-Net is not certified: its bounds grow too "
        "fast with its depth."
    )
    return Section("Certified pixels", text, (Pictures(items),))
