"""Segmentation from wrong labels: which method for which error of annotators, and what it costs on clean labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from firmly.lab.experiments.segment_cells import Cell, measured
from firmly.lab.experiments.segment_models import MODELS, Labelled
from firmly.lab.experiments.segment_page import page
from firmly.lab.experiments.segment_problems import DataName, Part, problem
from firmly.lab.experiments.segment_training import CLEAN_ALONE, CROSS_ENTROPY, METHODS, Method, Task, trained
from firmly.lab.page import Page
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study

NOISES = ("dilation", "erosion", "jitter", "missing", "merged", "confusion", "regions")
SHORT = "label correction,GCE,cleaned labels,clean slices alone"


@dataclass(frozen=True)
class SegmentSettings:
    """`data` is a stack of slices; `models`, `noises` and `methods` are names with commas between them.

    Labels for training are wrong at each of `rates` of the foreground; 0 is always among them, and cross-entropy among
    the methods. Every network learns for `steps` batches, from `seeds` starts, each with errors of its own. `radius` is
    that of the perturbations which certified pixels withstand, in the Euclidean norm of an image. With one thread sums
    have one order, and a run repeats itself.
    """

    data: DataName = "template"
    models: str = "U-Net,logistic-TV"
    noises: str = "dilation,regions"
    methods: str = SHORT
    rates: tuple[float, ...] = (0.3,)
    steps: int = 200
    seeds: int = 1
    radius: float = 0.0005
    certify_seconds: float = 10.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, known in (("models", tuple(MODELS)), ("noises", NOISES), ("methods", tuple(METHODS))):
            chosen = getattr(self, name).split(",")
            require(set(chosen) <= set(known), f"{name} are some of {','.join(known)}; given {getattr(self, name)}")
        require(len(self.rates) > 0 and all(0 <= r <= 0.5 for r in self.rates), "rates lie in 0 .. 0.5")
        require(self.steps >= 1 and self.seeds >= 1, f"steps, seeds >= 1; given {self.steps}, {self.seeds}")
        require(self.radius > 0 and self.certify_seconds > 0, "radius and certify_seconds are positive")

    @property
    def conditions(self) -> list[tuple[str, float]]:
        return [("none", 0.0), *((n, r) for r in self.rates if r > 0 for n in self.noises.split(","))]

    def trainings(self, model: str, rate: float) -> list[tuple[Method, float]]:
        """Methods and their parameters; what the clean slices teach alone does not depend on errors elsewhere."""
        wanted = {CROSS_ENTROPY.name, *self.methods.split(",")}
        return [
            (method, parameter)
            for method in METHODS.values()
            if method.name in wanted
            and (MODELS[model].probabilistic or not method.probabilistic)
            and (rate == 0 or method is not CLEAN_ALONE)
            for parameter in method.parameters
        ]


def run(settings: SegmentSettings, run_folder: RunFolder, listen: Listener) -> Page:
    torch.manual_seed(settings.seed)
    data = problem(settings.data)
    classes = len(data.classes)
    known = {
        tuple(row["key"]): Cell(**{**row["cell"], "clean": tuple(row["cell"]["clean"])})
        for row in run_folder.metrics("cell")
    }

    @cache
    def labels(noise: str, rate: float, seed: int) -> tuple[Tensor, float]:
        """Labels for training, and the fraction of the foreground that is wrong."""
        if rate == 0:
            return data.train.labels, 0.0
        found = data.corrupted(noise, rate, settings.seed + seed)
        return found.labels, found.foreground_rate

    @cache
    def seen(model: str, part: str) -> Labelled:
        slices: Part = getattr(data, part)
        return Labelled(slices.images, MODELS[model].seen(slices.images), slices.labels)

    @lru_cache(maxsize=4)
    def task(model: str, noise: str, rate: float, seed: int) -> Task:
        given = seen(model, "train")._replace(labels=labels(noise, rate, seed)[0])
        return Task(MODELS[model], given, seen(model, "clean"), classes, settings.steps, settings.seed + seed)

    plans = [
        (model, noise, rate, method, parameter, seed)
        for model in settings.models.split(",")
        for noise, rate in settings.conditions
        for seed in range(settings.seeds)
        for method, parameter in settings.trainings(model, rate)
    ]
    cells: list[Cell] = []
    for done, (model, noise, rate, method, parameter, seed) in enumerate(plans):
        what = f"{model}, {noise} {100 * rate:.0f} %, {method.name}"
        listen("work", {"name": what, "done": done, "total": len(plans)})
        key = (model, noise, rate, method.name, parameter, seed)
        if key not in known:
            here = task(model, noise, rate, seed)
            clean, test, laws = measured(here, seen(model, "test"), trained(here, method, parameter))
            brier = None
            if MODELS[model].probabilistic:
                brier = float((laws - data.test.probabilities).square().sum(1).mean())
            known[key] = Cell(*key, tuple(clean), test, brier, labels(noise, rate, seed)[1])
            run_folder.log("cell", key=key, cell=known[key]._asdict())
        cells.append(known[key])
    listen("work", {"name": "training", "done": len(plans), "total": len(plans)})
    return page(settings, data, cells, task, run_folder, listen)


def told(settings: SegmentSettings) -> str:
    wrong = ", ".join(f"{100 * rate:.0f}" for rate in settings.rates)
    return f"{settings.models} on {settings.data} with {wrong} % of the labels wrong by {settings.noises}"


STUDY = Study(
    "segment",
    "Segmentation from wrong labels",
    {
        "smoke": SegmentSettings(
            models="logistic-TV", noises="regions", methods="cleaned labels", steps=20, certify_seconds=1.0
        ),
        "default": SegmentSettings(),
        "full": SegmentSettings(methods=",".join(METHODS), seeds=5, steps=300),
    },
    told,
    run,
)  # fmt: skip
