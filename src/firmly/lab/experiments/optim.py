"""Optimisers compared by one protocol on data sets, chunks and streams: equal search budgets, several seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from firmly.lab.experiments import optim_page as page
from firmly.lab.experiments.optim_data import (
    Chunks,
    Fixed,
    Pictures,
    Stream,
    chunked,
    electricity,
    fixed,
    forest,
    incremental,
    permuted,
    rotating,
    whole,
)
from firmly.lab.experiments.optim_gains import equal_gain_section, proof_section
from firmly.lab.experiments.optim_goal import goal_section
from firmly.lab.experiments.optim_linear import linear_section
from firmly.lab.experiments.optim_methods import Method, kalman, methods, missing
from firmly.lab.experiments.optim_runs import THOROUGH, Compared, Delay, Kept, Size, compare
from firmly.lab.flows import STUDENT
from firmly.lab.page import Page, Section
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study

Task = Literal["digits", "spirals", "mnist", "fashion", "cifar10", "cifar100", "chunked-digits", "chunked-mnist",
    "chunked-fashion", "chunked-cifar10", "incremental-digits", "incremental-mnist", "incremental-fashion",
    "incremental-cifar10", "rotating", "permuted", "elec2", "covtype", "stream",
]  # fmt: skip
TWINS = (  # of other methods, which are the better known or the better ones, or the less dear
    "momentum 0.9, plateau", "Nesterov 0.9", "RMSprop", "AdamW", "Adam, cosine", "Armijo search", "schedule-free SGD",
    "D-Adaptation, SGD", "Dag, heavy ball 1/3", "a posteriori, Tustin 0.9", "Feedback, held, SGD",
)  # fmt: skip
MANY = 20  # features, above which Kalman filters are too dear here
STREAMS: tuple[Task, ...] = ("rotating", "permuted", "elec2", "covtype")


@dataclass(frozen=True)
class OptimSettings:
    """Every method learns every `task` with `rates` learning rates from `lowest` to `highest`, evenly spaced by their
    logarithm; with the one that is best on choosing samples it learns again with `seeds` other seeds.

    Sets: `train` samples at most, in `epochs` passes; chunked ones come in `parts` chunks, incremental ones two classes
    at a time, with as many passes over each. Streams: `length` samples (permuted and rotating ones of `pictures`),
    once; the `first` part chooses; permuted ones change `parts` - 1 times. "stream" stands for all streams. `delay`:
    what slow steps cost on streams. "few" `methods`: without `TWINS` on every task but the first. Networks have two
    layers of `hidden` units. `published` is the rate at which PID and momentum are compared.
    """

    task: tuple[Task, ...] = ("digits", "permuted", "elec2")
    methods: Literal["all", "few"] = "few"
    rates: int = 6
    lowest: float = 1e-4
    highest: float = 10.0
    seeds: int = 3
    hidden: int = 32
    batch: int = 16
    epochs: int = 5
    train: int = 1000
    test: int = 2000
    pictures: Pictures = "digits"
    length: int = 5000
    parts: int = 5
    first: float = 0.2
    window: int = 8
    ahead: int = 4
    delay: Delay = "passes"
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


def read(task: Task, settings: OptimSettings) -> Chunks | Stream:
    if task == "rotating":
        return rotating(settings.pictures, settings.length, settings.seed)
    if task == "permuted":
        return permuted(settings.pictures, settings.length, settings.parts, settings.seed)
    if task == "elec2":
        return electricity(settings.length, settings.first)
    if task == "covtype":
        return forest(settings.length, settings.first)
    way, _, name = task.rpartition("-")
    assert name in get_args(Fixed)
    split = fixed(name, settings.train, settings.test, settings.seed)
    return {"": whole, "chunked": lambda s: chunked(s, settings.parts), "incremental": incremental}[way](split)


def run(settings: OptimSettings, run_folder: RunFolder, listen: Listener) -> Page:
    s = settings
    size = Size(s.hidden, s.batch, s.epochs, s.first, s.window, s.ahead, s.delay)
    rates, seeds = grid(settings), range(settings.seed, settings.seed + settings.seeds + 1)
    data = {task: read(task, settings) for task in tasks(settings)}
    first = next(iter(data))
    few = [m for m in methods() if s.methods == "all" or m.name not in TWINS]
    allowed = {task: [m for m in (methods() if task == first else few) if takes_part(m, d)] for task, d in data.items()}
    trained = [(len(rates) if m.name in THOROUGH else 1) * settings.seeds for some in allowed.values() for m in some]
    done, total = 0, sum(trained) + len(trained) * len(rates) + 4 * settings.seeds

    def one_more() -> None:
        nonlocal done
        done += 1
        listen("work", {"name": "training", "done": done, "total": total})

    kept = {task: Kept(run_folder, task, one_more) for task in data}
    found: dict[str, list[Compared]] = {
        task: compare(data[task], allowed[task], rates, seeds, size, kept[task]) for task in data
    }
    shared = page.shared_configurations(found)
    sections: list[Section] = [goal_section(data, found, shared), page.shared_section(found, shared)]
    sections += [page.task_section(task, data[task], found[task], settings.first, run_folder) for task in data]
    sections.append(
        equal_gain_section(first, data[first], found[first], settings.published, seeds[1:], size, kept[first])
    )
    if isinstance(stream := data.get("elec2"), Stream):
        sections.append(linear_section(stream, listen))
    sections += [proof_section(), page.lost_section(found, shared)]
    return Page(page.headline(found), summary(settings, missing()), tuple(sections), page.facts(found))


def takes_part(method: Method, data: Chunks | Stream) -> bool:
    """Where there are no changes at known times nobody can be told of them; matrices of gains are for few features."""
    known = bool(data.drifts) if isinstance(data, Stream) else len(data.chunks) > 1
    x = data.x if isinstance(data, Stream) else data.chunks[0].x
    return (known or not method.drifts) and (x[0].numel() <= MANY or method.make is not kalman)


def summary(settings: OptimSettings, absent: list[str]) -> str:
    text = (
        f"Every method tries the same {settings.rates} learning rates from {settings.lowest:g} to {settings.highest:g} "
        f"with one seed; the best by samples that are not reported runs again with {settings.seeds} other seeds. "
        "Nothing else is tuned. Seconds are those of learning, on this machine; passes are counted."
    )
    if settings.delay != "none":
        counted = {"passes": "passes, a backward one for two forward ones", "seconds": "seconds, on this machine"}
        text += (
            " Streams do not wait: a step that costs more than one of SGD misses batches, which it predicts only; cost "
            f"is counted in {counted[settings.delay]}."
        )
    if absent:
        text += f" Not compared, because not installed: {', '.join(absent)} (pip install 'firmly[optim]')."
    return text


SMOKE = OptimSettings(
    rates=2, seeds=1, hidden=8, epochs=1, train=100, test=50, length=320, parts=3, first=0.3, window=2, lowest=1e-2
)
FULL = OptimSettings(
    ("mnist", "fashion", "chunked-fashion", "incremental-mnist", "rotating", "permuted", "elec2", "covtype"), "all", 11,
    seeds=5, hidden=128, batch=64, epochs=8, train=20_000, test=10_000, pictures="mnist", length=40_000, parts=8,
    first=0.1,
)  # fmt: skip
STUDY = Study(
    "optim", "Optimisers", {"smoke": SMOKE, "default": OptimSettings(), "full": FULL},
    lambda settings: f"optimisers compared on {', '.join(tasks(settings))}", run,
)  # fmt: skip
