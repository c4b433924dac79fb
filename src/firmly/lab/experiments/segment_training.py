"""Training from wrong labels: the methods of the segmentation study, and one loop for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.segment_models import Model
from firmly.lab.training import rise_and_fall
from firmly.robust import (
    LabelStore,
    View,
    co_trained,
    contour_offsets,
    forward_correction,
    generalised_cross_entropy,
    label_risk,
    label_step,
    move_contours,
    of_labels,
    risk,
    symmetric_cross_entropy,
    transition_from_clean,
)
from firmly.robust.losses import VOID

WARM = 0.3  # of the training, in which labels are believed as they are
BATCH = 4


class Labelled(NamedTuple):
    """What a model sees of images (n, channels, height, width), and their labels (n, height, width)."""

    inputs: Tensor
    labels: Tensor


class Now(NamedTuple):
    """A batch in training: scores, losses of every class, given labels; the images and views they are of; progress."""

    scores: Tensor
    losses: Tensor
    labels: Tensor
    images: list[int]
    views: list[View]
    progress: float

    @property
    def valid(self) -> Tensor:
        return self.labels != VOID

    @property
    def grown(self) -> float:
        """From 0 to 1 between the warm start and twice its length."""
        return min(max(self.progress / WARM - 1, 0.0), 1.0)

    def mean(self, losses: Tensor) -> Tensor:
        return of_labels(losses, self.labels).sum() / self.valid.sum()


Objective = Callable[[list[Now]], Tensor]


class Context(NamedTuple):
    """What a method may look at besides the batch: the network, its data and the few clean slices."""

    network: nn.Module
    given: Labelled
    clean: Labelled
    classes: int


@dataclass(frozen=True)
class Method:
    """A way to learn from wrong labels; one of `parameters` is chosen on clean slices.

    `probabilistic` methods need the probabilities of classes, which a support vector machine has not;
    for one that `finishes` the parameter is the last part of the training, by cross-entropy on clean slices.
    """

    name: str
    make: Callable[[float, Context], Objective]
    parameters: tuple[float, ...] = (0.0,)
    probabilistic: bool = False
    networks: int = 1
    finishes: bool = False


def plain(parameter: float, context: Context) -> Objective:
    return lambda now: now[0].mean(now[0].losses)


def corrected(budget: float, context: Context) -> Objective:
    """The optimistic label Wasserstein risk: the fraction `budget` of the labels of every class may change."""

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        return by_class(
            one, lambda here: label_risk(one.losses, one.labels, budget * one.grown, mask=here, over="batch").risk
        )

    return objective


def by_class(now: Now, risk_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over pixels of risks that are taken for each given class apart: rare classes are not given up first."""
    classes = [here for k in range(now.losses.shape[1]) if bool((here := now.labels == k).any())]
    return torch.stack([here.sum() * risk_of(here) for here in classes]).sum() / now.valid.sum()


def pencil(kappa: float, context: Context) -> Objective:
    """Labels are those of `label_step`, from the running means of predictions."""
    store = LabelStore(context.given.labels, context.classes, momentum=0.7, kept=min(3, context.classes))

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        store.update(one.images, one.scores.detach().softmax(1), one.views)
        if one.grown == 0:
            return one.mean(one.losses)
        believed = store.labels(one.images, one.views, kappa)
        return of_labels(one.losses, believed * one.valid[:, None]).sum() / one.valid.sum()

    return objective


def generalised(q: float, context: Context) -> Objective:
    return lambda now: now[0].mean(generalised_cross_entropy(now[0].scores, q))


def symmetric(forward: float, context: Context) -> Objective:
    return lambda now: now[0].mean(symmetric_cross_entropy(now[0].scores, forward))


def trimmed(rate: float, context: Context) -> Objective:
    """Two networks, each on the pixels that the other one finds easy."""

    def objective(now: list[Now]) -> Tensor:
        first, second = (of_labels(one.losses, one.labels) for one in now)

        def trusting(here: Tensor) -> Tensor:
            both = co_trained(first, second, rate * now[0].grown, here)
            return both.first + both.second

        return by_class(now[0], trusting)

    return objective


def forward(parameter: float, context: Context) -> Objective:
    """Forward correction by a transition that the warm model shows on the clean slices."""
    found: list[Tensor] = []

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        if one.progress < WARM:
            return one.mean(one.losses)
        if not found:
            found.append(
                transition_from_clean(scores(context.network, context.clean.inputs).softmax(1), context.clean.labels)
            )
        return one.mean(forward_correction(one.scores, found[0]))

    return objective


def contours(parameter: float, context: Context) -> Objective:
    """Labels whose contours are moved back, by the offsets that the warm model shows on the clean slices."""
    found: list[Tensor] = []

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        if one.progress < WARM:
            return one.mean(one.losses)
        if not found:
            found.append(moved_back(context.network, context))
        labels = torch.stack([view.of_labels(found[0][i]) for i, view in zip(one.images, one.views)])
        return of_labels(one.losses, labels).sum() / one.valid.sum()

    return objective


def moved_back(network: nn.Module, context: Context) -> Tensor:
    """The given labels after the move that brings predictions on the clean slices nearest to their labels."""
    seen = scores(network, context.clean.inputs).argmax(1)
    offsets = contour_offsets(seen, context.clean.labels, context.classes)
    return move_contours(context.given.labels, offsets)


def pessimistic(fraction: float, context: Context) -> Objective:
    """The mean of the largest losses: the wrong sense, as a negative control."""

    def objective(now: list[Now]) -> Tensor:
        return risk(of_labels(now[0].losses, now[0].labels), now[0].valid, divergence="cvar", radius=fraction)

    return objective


CROSS_ENTROPY = Method("cross-entropy", plain)
CONTOURS = Method("contours moved back", contours)
CONTROL = Method("sup-CVaR (control)", pessimistic, (0.3,))
CLEAN_ALONE = Method("clean slices alone", plain, (1.0,), finishes=True)
FINE_TUNED = Method("then clean slices", plain, (0.3, 0.7), finishes=True)
METHODS = (
    CROSS_ENTROPY,
    Method("label correction", corrected, (0.1, 0.3)),
    Method("PENCIL-prox", pencil, (0.3,), probabilistic=True),
    Method("GCE", generalised, (0.7,), probabilistic=True),
    Method("SCE", symmetric, (0.1,), probabilistic=True),
    Method("co-trained trimming", trimmed, (0.2,), networks=2),
    Method("forward correction", forward, probabilistic=True),
    CONTOURS,
    FINE_TUNED,
    CONTROL,
)


def fit(
    model: Model,
    method: Method,
    parameter: float,
    given: Labelled,
    clean: Labelled,
    classes: int,
    steps: int,
    seed: int,
) -> nn.Module:
    """The network (the first one of those that the method trains together), in eval mode."""
    torch.manual_seed(seed)  # for the first weights
    networks = [model.build(classes, given.inputs) for _ in range(method.networks)]
    objective = method.make(parameter, Context(networks[0], given, clean, classes))
    generator = torch.Generator().manual_seed(seed)
    learned = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(steps):
        finishing = method.finishes and step >= (1 - parameter) * steps
        source = clean if finishing else given
        images, views = drawn(source.labels.shape, model.crop, generator)
        inputs = torch.stack([view.of_image(source.inputs[i]) for i, view in zip(images, views)])
        labels = torch.stack([view.of_labels(source.labels[i]) for i, view in zip(images, views)])
        for group in optimiser.param_groups:
            group["lr"] = model.learning_rate * rise_and_fall((step + 1) / steps)
        now = []
        for network in networks:
            found = network.train()(inputs)
            now.append(Now(found, model.losses(found), labels, images, views, step / steps))
        optimiser.zero_grad(set_to_none=True)
        loss = now[0].mean(now[0].losses) if finishing else objective(now)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
    return networks[0].eval()


def drawn(shape: torch.Size, crop: bool, generator: torch.Generator) -> tuple[list[int], list[View]]:
    """Images for a batch and where to look: at quarters of them anywhere, or at fewer whole ones."""
    count, *size = shape
    images = torch.randint(count, (2 * BATCH if crop else BATCH,), generator=generator).tolist()
    extent = tuple(n // 8 * 4 if crop else n for n in size)
    views = []
    for _ in images:
        corner = [int(torch.randint(n - e + 1, (), generator=generator)) for n, e in zip(size, extent)]
        views.append(View(tuple(corner), extent))
    return images, views


@torch.no_grad()
def scores(network: nn.Module, inputs: Tensor) -> Tensor:
    """Scores (n, class, height, width) in eval mode."""
    training = network.training
    found = network.eval()(inputs)
    network.train(training)
    return found


def believed(model: Model, method: str, parameter: float, network: nn.Module, given: Labelled) -> Tensor | None:
    """The labels (n, height, width) that a method trained on at last; None for methods that have none of their own."""
    make = next(m.make for m in METHODS if m.name == method)
    found = scores(network, given.inputs)
    if make is pencil:
        laws = label_step(found.softmax(1), given.labels, parameter)
    elif make is corrected:
        laws = torch.zeros_like(found)
        for k in given.labels[given.labels != VOID].unique():
            here = given.labels == k
            laws += label_risk(model.losses(found), given.labels, parameter, mask=here, over="batch").labels
    else:
        return None
    return torch.where(given.labels == VOID, VOID, laws.argmax(1))
