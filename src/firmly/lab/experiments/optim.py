"""Optimisers compared by one protocol: a fixed data set or a stream, equal search budgets, several seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from firmly.lab.experiments import optim_page as page
from firmly.lab.experiments.bregman_data import Split
from firmly.lab.experiments.optim_data import Fixed, Pictures, Stream, electricity, fixed, permuted, rotating
from firmly.lab.experiments.optim_gains import equal_gain_section, proof_section
from firmly.lab.experiments.optim_linear import linear_section
from firmly.lab.experiments.optim_methods import methods, missing
from firmly.lab.experiments.optim_runs import Compared, Kept, Size, compare
from firmly.lab.flows import STUDENT
from firmly.lab.page import Page, Section
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study

Task = Literal["digits", "spirals", "mnist", "fashion", "cifar10", "cifar100", "rotating", "permuted", "elec2",
    "stream",
]  # fmt: skip
STREAMS: tuple[Task, ...] = ("rotating", "permuted", "elec2")


@dataclass(frozen=True)
class OptimSettings:
    """Every method learns every `task` with `rates` learning rates from `lowest` to `highest`, evenly spaced by their
    logarithm; with the one that is best on choosing samples it learns again with `seeds` other seeds.

    Fixed sets: `train` samples at most, in `epochs` epochs. Streams: `length` samples of `pictures`, once; the `first`
    part chooses; permuted ones change `parts` - 1 times. "stream" stands for all streams. Networks have two layers of
    `hidden` units. `published` is the rate at which PID and momentum are compared.
    """

    task: tuple[Task, ...] = ("digits", "permuted", "elec2")
    rates: int = 9
    lowest: float = 1e-4
    highest: float = 10.0
    seeds: int = 5
    hidden: int = 32
    batch: int = 16
    epochs: int = 8
    train: int = 1000
    test: int = 2000
    pictures: Pictures = "digits"
    length: int = 8000
    parts: int = 5
    first: float = 0.2
    window: int = 8
    ahead: int = 4
    published: float = 0.01
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        require(bool(self.task), f"task is at least one of {', '.join(get_args(Task))}")
        require(self.rates >= 1, f"rates is at least 1; given {self.rates}")
        require(0 < self.lowest < self.highest, f"0 < lowest < highest; given {self.lowest} and {self.highest}")
        require(1 <= self.seeds <= len(STUDENT), f"seeds is from 1 to {len(STUDENT)}; given {self.seeds}")
        require(min(self.hidden, self.batch, self.epochs, self.window, self.ahead) >= 1, "sizes are at least 1")
        require(self.train >= 20 and self.test >= 10, "at least 20 samples to train and 10 for the test")
        require(self.parts >= 2, f"parts is at least 2; given {self.parts}")
        require(0 < self.first <= 1 / self.parts, f"first is at most 1/parts, before any drift; given {self.first}")
        steps = self.first * self.length / self.batch
        require(steps >= self.window, f"first holds {steps:.0f} batches; at least one window, {self.window}, is needed")
        require(self.published > 0, f"published is positive; given {self.published}")


def grid(settings: OptimSettings) -> list[float]:
    """The learning rates that every method tries."""
    low, high, count = math.log10(settings.lowest), math.log10(settings.highest), settings.rates
    return [10 ** (low + (high - low) * k / max(1, count - 1)) for k in range(count)]


def tasks(settings: OptimSettings) -> list[Task]:
    """The tasks one by one, each once."""
    named: list[Task] = [t for task in settings.task for t in (STREAMS if task == "stream" else (task,))]
    return list(dict.fromkeys(named))


def read(task: Task, settings: OptimSettings) -> Split | Stream:
    if task == "rotating":
        return rotating(settings.pictures, settings.length, settings.seed)
    if task == "permuted":
        return permuted(settings.pictures, settings.length, settings.parts, settings.seed)
    if task == "elec2":
        return electricity(settings.length, settings.first)
    assert task in get_args(Fixed)
    return fixed(task, settings.train, settings.test, settings.seed)


def run(settings: OptimSettings, run_folder: RunFolder, listen: Listener) -> Page:
    size = Size(settings.hidden, settings.batch, settings.epochs, settings.first, settings.window, settings.ahead)
    rates, seeds = grid(settings), range(settings.seed, settings.seed + settings.seeds + 1)
    data = {task: read(task, settings) for task in tasks(settings)}
    allowed = {
        task: [m for m in methods() if not m.drifts or (isinstance(d, Stream) and d.drifts)] for task, d in data.items()
    }
    done, total = 0, sum(map(len, allowed.values())) * (len(rates) + settings.seeds) + 4 * settings.seeds

    def one_more() -> None:
        nonlocal done
        done += 1
        listen("work", {"name": "training", "done": done, "total": total})

    kept = {task: Kept(run_folder, task, one_more) for task in data}
    found: dict[str, list[Compared]] = {
        task: compare(data[task], allowed[task], rates, seeds, size, kept[task]) for task in data
    }
    shared = page.shared_configurations(found)
    first = next(iter(data))
    sections: list[Section] = [page.shared_section(found, shared)]
    sections += [page.task_section(task, data[task], found[task], run_folder) for task in data]
    sections.append(
        equal_gain_section(first, data[first], found[first], settings.published, seeds[1:], size, kept[first])
    )
    if isinstance(stream := data.get("elec2"), Stream):
        sections.append(linear_section(stream, listen))
    sections += [proof_section(), page.lost_section(found, shared)]
    return Page(page.headline(found), summary(settings, missing()), tuple(sections), page.facts(found))


def summary(settings: OptimSettings, absent: list[str]) -> str:
    text = (
        f"Every method tries the same {settings.rates} learning rates from {settings.lowest:g} to {settings.highest:g} "
        f"with one seed; the best by samples that are not reported runs again with {settings.seeds} other seeds. "
        "Nothing else is tuned. Seconds are those of learning, on this machine; passes are counted."
    )
    if absent:
        text += f" Not compared, because not installed: {', '.join(absent)} (pip install 'firmly[optim]')."
    return text


SMOKE = OptimSettings(
    rates=2, seeds=1, hidden=8, epochs=1, train=100, test=50, length=320, parts=3, first=0.3, window=2, lowest=1e-2
)
FULL = OptimSettings(
    ("mnist", "fashion", "rotating", "permuted", "elec2"), 11, hidden=128, batch=64, train=20_000,
    test=10_000, pictures="mnist", length=40_000, parts=8, first=0.1,
)  # fmt: skip
STUDY = Study(
    "optim", "Optimisers", {"smoke": SMOKE, "default": OptimSettings(), "full": FULL},
    lambda settings: f"optimisers compared on {', '.join(tasks(settings))}", run,
)  # fmt: skip
