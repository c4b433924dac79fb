"""Training from wrong labels: the methods of the segmentation study, and one loop for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.segment_energy import Energy, tuned_energy
from firmly.lab.experiments.segment_models import Labelled, Model, scores
from firmly.lab.training import rise_and_fall
from firmly.robust import (
    CleanedLabels,
    LabelStore,
    Seen,
    View,
    clean_labels,
    co_trained,
    early_learning,
    forward_correction,
    generalised_cross_entropy,
    label_risk,
    label_step,
    of_labels,
    risk,
    symmetric_cross_entropy,
    transition_from_clean,
)
from firmly.robust.losses import VOID

WARM = 0.3  # of the training, in which labels are believed as they are
BATCH = 4
HALVES = 2  # of the clean slices: one to learn from, the other one to judge by


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


class Task:
    """A model, the labels that it is given, the few clean slices, a seed: what all methods have in common."""

    def __init__(self, model: Model, given: Labelled, clean: Labelled, classes: int, steps: int, seed: int):
        self.model, self.given, self.clean, self.classes = model, given, clean, classes
        self.steps, self.seed = steps, seed

    @property
    def halves(self) -> list[list[int]]:
        """The clean slices from the first on and from the middle on, so that few neighbours are parted."""
        count = len(self.clean.labels)
        return [list(range(count // HALVES)), list(range(count // HALVES, count))]

    def half(self, fold: int) -> Labelled:
        return Labelled(*(part[self.halves[fold]] for part in self.clean))

    @cached_property
    def plain(self) -> nn.Module:
        """What cross-entropy makes of the labels as they are."""
        return fit(self, CROSS_ENTROPY, 0.0, 0)

    @cached_property
    def cleaned(self) -> CleanedLabels:
        """The labels cleaned by what the plain network says of the clean slices."""
        given, clean = (
            Seen(part.images, scores(self.plain, part.inputs), part.labels) for part in (self.given, self.clean)
        )
        return clean_labels(given, clean, self.halves)

    @cached_property
    def energies(self) -> list[Energy]:
        """For each half of the clean slices the energy that suits the scores of the plain network there."""
        if not self.model.coupled:
            return [Energy(0.0, 1.0)] * HALVES
        return [tuned_energy(self.model, self.plain, self.half(fold)) for fold in range(HALVES)]


@dataclass(frozen=True)
class Method:
    """A way to learn from wrong labels; one of `parameters` is chosen on clean slices.

    `make(parameter, task, fold)` is its objective. `probabilistic` methods need the probabilities of classes, which a
    support vector machine has not. One that `learns` from clean slices is trained once for each half of them. One that
    `finishes` spends the last part of the training, its parameter, on the clean slices.
    """

    name: str
    make: Callable[[float, Task, int], Objective]
    parameters: tuple[float, ...] = (0.0,)
    probabilistic: bool = False
    networks: int = 1
    learns: bool = False
    finishes: bool = False

    @property
    def folds(self) -> range:
        return range(HALVES if self.learns else 1)


def plain(parameter: float, task: Task, fold: int) -> Objective:
    return lambda now: now[0].mean(now[0].losses)


def corrected(budget: float, task: Task, fold: int) -> Objective:
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


def pencil(kappa: float, task: Task, fold: int) -> Objective:
    """Labels are those of `label_step`, from the running means of predictions."""
    store = LabelStore(task.given.labels, task.classes, momentum=0.7)

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        store.update(one.images, one.scores.detach().softmax(1), one.views)
        if one.grown == 0:
            return one.mean(one.losses)
        believed = store.labels(one.images, one.views, kappa)
        return of_labels(one.losses, believed * one.valid[:, None]).sum() / one.valid.sum()

    return objective


def early(weight: float, task: Task, fold: int) -> Objective:
    """Early-learning regularisation (ELR): predictions stay near their running means."""
    store = LabelStore(task.given.labels, task.classes, momentum=0.7)

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        store.update(one.images, one.scores.detach().softmax(1), one.views)
        average = store.average(one.images, one.views).to(one.scores)
        return one.mean(one.losses + early_learning(one.scores, average, weight * one.grown)[:, None])

    return objective


def generalised(q: float, task: Task, fold: int) -> Objective:
    return lambda now: now[0].mean(generalised_cross_entropy(now[0].scores, q))


def symmetric(forward: float, task: Task, fold: int) -> Objective:
    return lambda now: now[0].mean(symmetric_cross_entropy(now[0].scores, forward))


def trimmed(rate: float, task: Task, fold: int) -> Objective:
    """Two networks, each on the pixels that the other one finds easy."""

    def objective(now: list[Now]) -> Tensor:
        first, second = (of_labels(one.losses, one.labels) for one in now)

        def trusting(here: Tensor) -> Tensor:
            both = co_trained(first, second, rate * now[0].grown, here)
            return both.first + both.second

        return by_class(now[0], trusting)

    return objective


def forward(parameter: float, task: Task, fold: int) -> Objective:
    """Forward correction by the transition that the plain network shows on the clean slices."""
    half = task.half(fold)
    transition = transition_from_clean(scores(task.plain, half.inputs).softmax(1), half.labels)
    return lambda now: now[0].mean(forward_correction(now[0].scores, transition))


def cleaned(parameter: float, task: Task, fold: int) -> Objective:
    """Cross-entropy with the laws of `clean_labels`."""
    laws = task.cleaned.fold_laws[fold].to(task.given.inputs.dtype)

    def objective(now: list[Now]) -> Tensor:
        (one,) = now
        here = torch.stack([view.of_image(laws[i]) for i, view in zip(one.images, one.views)])
        return of_labels(one.losses, here * one.valid[:, None]).sum() / one.valid.sum()

    return objective


def pessimistic(fraction: float, task: Task, fold: int) -> Objective:
    """The mean of the largest losses: the wrong sense, as a negative control."""

    def objective(now: list[Now]) -> Tensor:
        return risk(of_labels(now[0].losses, now[0].labels), now[0].valid, divergence="cvar", radius=fraction)

    return objective


CROSS_ENTROPY = Method("cross-entropy", plain)
CONTROL = Method("sup-CVaR (control)", pessimistic, (0.3,))
CLEAN_ALONE = Method("clean slices alone", plain, (1.0,), learns=True, finishes=True)
METHODS = {
    method.name: method
    for method in (
        CROSS_ENTROPY,
        Method("label correction", corrected, (0.1,)),
        Method("PENCIL-prox", pencil, (0.3,), probabilistic=True),
        Method("GCE", generalised, (0.7,), probabilistic=True),
        Method("SCE", symmetric, (0.1,), probabilistic=True),
        Method("ELR", early, (3.0,), probabilistic=True),
        Method("co-trained trimming", trimmed, (0.2,), networks=2),
        Method("forward correction", forward, probabilistic=True, learns=True),
        Method("then clean slices", plain, (0.5,), learns=True, finishes=True),
        Method("cleaned labels", cleaned, learns=True),
        CLEAN_ALONE,
        CONTROL,
    )
}


def trained(task: Task, method: Method, parameter: float) -> list[nn.Module]:
    """One network, or one for each half of the clean slices that it learns from."""
    return [task.plain] if method is CROSS_ENTROPY else [fit(task, method, parameter, fold) for fold in method.folds]


def fit(task: Task, method: Method, parameter: float, fold: int) -> nn.Module:
    """The network (the first one of those that the method trains together), in eval mode."""
    objective = method.make(parameter, task, fold)
    torch.manual_seed(task.seed)  # for the first weights
    networks = [task.model.build(task.classes, task.given.inputs) for _ in range(method.networks)]
    generator = torch.Generator().manual_seed(task.seed)
    learned = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(task.steps):
        finishing = method.finishes and step >= (1 - parameter) * task.steps
        source = task.half(fold) if finishing else task.given
        images, views = drawn(source.labels.shape, task.model.crop, generator)
        inputs = torch.stack([view.of_image(source.inputs[i]) for i, view in zip(images, views)])
        labels = torch.stack([view.of_labels(source.labels[i]) for i, view in zip(images, views)])
        for group in optimiser.param_groups:
            group["lr"] = task.model.learning_rate * rise_and_fall((step + 1) / task.steps)
        now = []
        for network in networks:
            found = network.train()(inputs)
            now.append(Now(found, task.model.losses(found), labels, images, views, step / task.steps))
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


def believed(task: Task, method: str, parameter: float, network: nn.Module) -> Tensor | None:
    """The labels (n, height, width) that a method trained on at last; None for methods that have none of their own."""
    make, given = METHODS[method].make, task.given.labels
    if make is cleaned:
        laws = task.cleaned.fold_laws[0]
    elif make is pencil:
        laws = label_step(scores(network, task.given.inputs).softmax(1), given, parameter)
    elif make is corrected:
        losses = task.model.losses(scores(network, task.given.inputs))
        laws = torch.zeros_like(losses)
        for k in given[given != VOID].unique():
            laws += label_risk(losses, given, parameter, mask=given == k, over="batch").labels
    else:
        return None
    return torch.where(given == VOID, VOID, laws.argmax(1))
