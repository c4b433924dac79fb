"""Segmentation from wrong labels: which method for which error of annotators, and what it costs on clean labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from firmly.lab.experiments.segment_cells import Cell, chosen_coupling, predicted
from firmly.lab.experiments.segment_models import MODELS, Model
from firmly.lab.experiments.segment_page import page
from firmly.lab.experiments.segment_problems import DataName, Problem, mean_overlap, problem
from firmly.lab.experiments.segment_training import CLEAN_ALONE, METHODS, Labelled, Method, fit
from firmly.lab.page import Page
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study

NOISES = ("dilation", "erosion", "jitter", "missing", "merged", "confusion", "regions")


@dataclass(frozen=True)
class SegmentSettings:
    """`data` is a stack of slices; `models` and `noises` are names with commas between them.

    Labels for training are wrong at each of `rates` of the foreground; 0 is always among them. Every network learns
    for `steps` batches, from `seeds` starts, each with errors of its own. `radius` is that of the perturbations which
    certified pixels withstand, in the Euclidean norm of an image; `couplings` are those of total variation to choose
    from, for models that have one.
    """

    data: DataName = "template"
    models: str = "U-Net,logistic-TV"
    noises: str = "dilation,regions"
    rates: tuple[float, ...] = (0.3,)
    couplings: tuple[float, ...] = (0.0, 0.2)
    steps: int = 200
    seeds: int = 1
    radius: float = 0.001
    certify_seconds: float = 10.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        for name, known in (("models", tuple(MODELS)), ("noises", NOISES)):
            chosen = getattr(self, name).split(",")
            require(set(chosen) <= set(known), f"{name} are some of {','.join(known)}; given {getattr(self, name)}")
        require(len(self.rates) > 0 and all(0 <= r <= 0.5 for r in self.rates), "rates lie in 0 .. 0.5")
        require(self.steps >= 1 and self.seeds >= 1, f"steps, seeds >= 1; given {self.steps}, {self.seeds}")
        require(len(self.couplings) > 0 and min(self.couplings) >= 0, "couplings are numbers of at least 0")
        require(self.radius > 0 and self.certify_seconds > 0, "radius and certify_seconds are positive")

    @property
    def conditions(self) -> list[tuple[str, float]]:
        return [("none", 0.0), *((n, r) for r in self.rates if r > 0 for n in self.noises.split(","))]


def run(settings: SegmentSettings, run_folder: RunFolder, listen: Listener) -> Page:
    torch.manual_seed(settings.seed)
    data = problem(settings.data)
    known = {tuple(row["key"]): Cell(**row["cell"]) for row in run_folder.metrics("cell")}
    plans = list(planned(settings))
    cells: list[Cell] = []

    @cache
    def labels(noise: str, rate: float, seed: int) -> tuple[Tensor, float]:
        """Labels for training, and the fraction of the foreground that is wrong."""
        if rate == 0:
            return data.train.labels, 0.0
        found = data.corrupted(noise, rate, settings.seed + seed)
        return found.labels, found.foreground_rate

    seen = {name: [MODELS[name].seen(p.images) for p in (data.train, data.clean, data.test)] for name in MODELS
            if name in settings.models.split(",")}  # fmt: skip
    for done, (model, noise, rate, method, parameter, seed) in enumerate(plans):
        what = f"{model.name}, {method.name}, {noise} {100 * rate:.0f} %"
        listen("work", {"name": what, "done": done, "total": len(plans)})
        key = (model.name, noise, rate, method.name, parameter, seed)
        if key not in known:
            given, wrong = labels(noise, rate, seed)
            trained = Labelled(seen[model.name][0], given)
            known[key] = one_cell(settings, data, model, method, parameter, trained, seen[model.name], key, wrong)
            run_folder.log("cell", key=key, cell=known[key]._asdict())
        cells.append(known[key])
    listen("work", {"name": "training", "done": len(plans), "total": len(plans)})
    return page(settings, data, cells, lambda *of: labels(*of)[0], run_folder, listen)


def planned(settings: SegmentSettings) -> list[tuple[Model, str, float, Method, float, int]]:
    """Every training of the study."""
    out = []
    for model in (MODELS[name] for name in settings.models.split(",")):
        for noise, rate in settings.conditions:
            for method in METHODS if rate > 0 else (*METHODS, CLEAN_ALONE):
                if method.probabilistic and not model.probabilistic:
                    continue
                for parameter in method.parameters:
                    out += [(model, noise, rate, method, parameter, seed) for seed in range(settings.seeds)]
    return out


def one_cell(
    settings: SegmentSettings, data: Problem, model: Model, method: Method, parameter: float, given: Labelled,
    seen: Sequence[Tensor], key: tuple[Any, ...], wrong: float,
) -> Cell:  # fmt: skip
    """Train, choose the coupling on the clean slices, measure on the test slices."""
    classes = len(data.classes)
    learning, choosing = (Labelled(seen[1][half::2], data.clean.labels[half::2]) for half in (0, 1))
    start = settings.seed + key[-1]
    network = fit(model, method, parameter, given, learning, classes, settings.steps, start)
    coupling, best = chosen_coupling(network, choosing, classes, settings.couplings if model.coupled else (0.0,))
    found = predicted(network, seen[2], coupling)
    brier = None
    if model.probabilistic:
        laws = found if coupling > 0 else found.softmax(1)
        brier = float((laws - data.test.probabilities).square().sum(1).mean())
    test = mean_overlap(found.argmax(1), data.test.labels, classes)
    return Cell(*key, 100 * best, 100 * test, brier, coupling, wrong)


def told(settings: SegmentSettings) -> str:
    wrong = ", ".join(f"{100 * rate:.0f}" for rate in settings.rates)
    return f"{settings.models} on {settings.data} with {wrong} % of the labels wrong by {settings.noises}"


STUDY = Study(
    "segment",
    "Segmentation from wrong labels",
    {
        "smoke": SegmentSettings(
            models="logistic-TV", noises="regions", steps=10, couplings=(0.0,), certify_seconds=1.0
        ),
        "default": SegmentSettings(),
        "full": SegmentSettings(
            models=",".join(MODELS), noises=",".join(NOISES), rates=(0.1, 0.3, 0.5), seeds=5, steps=600
        ),
    },
    told,
    run,
)
