"""What the segmentation study looks like: labels given and believed, predictions, errors, certified pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.certificates import certify
from firmly.lab.charts import at_most
from firmly.lab.experiments.segment_cells import Cell
from firmly.lab.experiments.segment_energy import whole
from firmly.lab.experiments.segment_models import Labelled, scores
from firmly.lab.experiments.segment_problems import Problem
from firmly.lab.experiments.segment_training import CROSS_ENTROPY, METHODS, Task, believed, fit
from firmly.lab.page import Pictures, Section, Table
from firmly.lab.pictures import coloured, png
from firmly.lab.run_folder import RunFolder
from firmly.robust import image_quality, label_errors, pixel_quality
from firmly.segment import certified_pixels


class Trained(NamedTuple):
    """The first network of a cell, trained again."""

    cell: Cell
    network: nn.Module


def again(task: Task, cell: Cell) -> Trained:
    method = METHODS[cell.method]
    return Trained(cell, task.plain if method is CROSS_ENTROPY else fit(task, method, cell.parameter, 0))


def section(
    data: Problem, task: Task, noise: str, rate: float, plain: Cell, best: Cell, run: RunFolder
) -> Section:  # fmt: skip
    """One test slice and one training slice, under one error of annotators."""
    model = task.model
    top = len(data.classes)
    one, other = again(task, plain), again(task, best)
    at, from_train = len(data.test.labels) // 2, len(data.train.labels) // 2
    truth, image = data.test.labels[at], data.test.images[at : at + 1]
    there = Labelled(image, model.seen(image), truth[None])
    found = [task.energies[0].laws(model, t.network, there).argmax(1)[0] for t in (one, other)]
    belief, how = beliefs(task, other)
    right, given = data.train.labels, task.given.labels

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
        blocks.append(search(task, right, [one, other]))
    return Section(f"{model.name} under {noise}, {100 * rate:.0f} % wrong", "", tuple(blocks))


def beliefs(task: Task, trained: Trained) -> tuple[Tensor, str]:
    """Labels that the method believes, or that its predictions contradict confidently; and how they were found."""
    cell, given = trained.cell, task.given
    own = believed(task, cell.method, cell.parameter, trained.network)
    if own is not None:
        return own, f"believed: what {cell.title} trained on at last"
    if not task.model.probabilistic:
        return given.labels, "believed: the method takes the labels as they are"
    found = label_errors(scores(trained.network, given.inputs).softmax(1), given.labels).believed
    return found, "believed: labels given, but those that the network contradicts confidently (label_errors)"


def search(task: Task, right: Tensor, networks: list[Trained]) -> Table:
    """How well networks find the wrong labels that they were trained on."""
    rows, given = [], task.given
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
                trained.cell.title,
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


def certified(data: Problem, task: Task, best: Cell, radius: float, seconds: float, run: RunFolder) -> Section:
    """The pixels of a test slice that no perturbation of the image changes."""
    name = task.model.name
    network = whole(task.model, again(task, best).network, task.energies[0])
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
