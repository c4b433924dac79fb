"""Training by every method with every rate, then again with the chosen one; what is done is kept in the run folder."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from firmly.lab.experiments.bregman_data import Samples
from firmly.lab.experiments.optim_data import Chunks, Stream
from firmly.lab.experiments.optim_methods import Horizon, Learner, Method
from firmly.lab.experiments.optim_scores import recovery, windowed
from firmly.lab.run_folder import RunFolder

Delay = Literal["none", "passes", "seconds"]

THOROUGH = ("Adam", "hybrid")  # tried with every rate and every seed: the goal is about them
LOST = 1e9  # stands for a loss that is not finite: JSON has no word for it


class Size(NamedTuple):
    """Of a run: units of the hidden layers, samples of a batch, passes over a chunk; of a stream, the first part on
    which the rate is chosen, the batches of a window, those to look ahead, and whether slow steps miss batches."""

    hidden: int
    batch: int
    epochs: int
    first: float
    window: int
    ahead: int
    delay: Delay = "none"


@dataclass(frozen=True)
class Record:
    """One run. `chosen_by`: accuracy and loss of what rates are chosen by; `score`: accuracy of what is reported.

    `curve`: (samples seen, accuracy); on streams `near_future` is the accuracy some batches ahead, `recovery` the mean
    time to recover from known drifts, in samples, and `missed` the share of batches that came while it was still
    learning from those before. In chunks: `final` and `mean` are the accuracies after the last pass and over all.
    """

    rate: float
    chosen_by: tuple[float, float]
    score: float
    curve: list[tuple[float, float]]
    seconds: float
    forward: int
    backward: int
    diverged: bool
    near_future: float | None = None
    recovery: float | None = None
    final: float | None = None
    mean: float | None = None
    missed: float = 0.0


@dataclass(frozen=True)
class Compared:
    """A method on one task: a run with every rate, on the seed of the choice, and runs with the chosen one.

    `everywhere`: for the methods of the goal, runs of the other seeds with every rate.
    """

    method: Method
    grid: list[Record]
    runs: list[Record]
    everywhere: list[list[Record]] | None = None

    @property
    def chosen(self) -> Record:
        return choice(self.grid)


def choice(grid: Sequence[Record]) -> Record:
    """The greatest accuracy, of equal ones the least loss."""
    return max(grid, key=lambda r: (r.chosen_by[0], -r.chosen_by[1]))


def compare(
    data: Chunks | Stream, methods: Sequence[Method], rates: Sequence[float], seeds: Sequence[int], size: Size,
    kept: Kept,
) -> list[Compared]:  # fmt: skip
    """Rates are chosen on the first seed, and reported is what the others find."""
    found = []
    for method in methods:
        grid = [kept.run(data, method, rate, seeds[0], size) for rate in rates]
        best = choice(grid).rate
        runs = {
            rate: [kept.run(data, method, rate, seed, size) for seed in seeds[1:]]
            for rate in (rates if method.name in THOROUGH else [best])
        }
        found.append(Compared(method, grid, runs[best], list(runs.values()) if method.name in THOROUGH else None))
    return found


class Kept:
    """Runs that are read from the run folder where an interrupted run has left them."""

    def __init__(self, folder: RunFolder, task: str, one_more: Callable[[], None]):
        self.folder, self.task, self.one_more = folder, task, one_more
        self.known = {(r["method"], r["rate"], r["seed"]): r["record"] for r in folder.metrics("optim", task=task)}

    def run(self, data: Chunks | Stream, method: Method, rate: float, seed: int, size: Size) -> Record:
        key = (method.name, rate, seed)
        if key in self.known:
            record = _from_json(self.known[key])
        else:
            train = _on_stream if isinstance(data, Stream) else _on_chunks
            record = train(data, method, rate, seed, size)  # type: ignore[arg-type]
            values = {"task": self.task, "method": method.name, "rate": rate, "seed": seed}
            self.folder.log("optim", **values, record=asdict(record))
            self.known[key] = asdict(record)
        self.one_more()
        return record


def _from_json(values: dict) -> Record:
    record = Record(**values)
    curve = [(float(a), float(b)) for a, b in record.curve]
    return replace(record, chosen_by=tuple(record.chosen_by), curve=curve)


def network(x: Tensor, classes: int, hidden: int, seed: int) -> nn.Sequential:
    """Two hidden layers; for pictures in colour, two convolutions before them. Without normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if x.ndim == 4:
            return nn.Sequential(
                nn.Conv2d(x.shape[1], 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(64 * (x.shape[2] // 4) * (x.shape[3] // 4), hidden), nn.ReLU(), nn.Linear(hidden, classes),
            )  # fmt: skip
        width = x.shape[1]
        return nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )


def _on_chunks(data: Chunks, method: Method, rate: float, seed: int, size: Size) -> Record:
    """Several passes over every chunk in turn, each followed by a test."""
    net = network(data.chunks[0].x, data.classes, size.hidden, seed)
    steps = math.ceil(len(data.chunks[0].x) / size.batch)
    chunk = size.epochs * steps if len(data.chunks) > 1 else None
    learner = method.start(net, rate, Horizon(len(data.chunks) * size.epochs * steps, steps, chunk))
    generator = torch.Generator().manual_seed(seed)
    curve, chosen_by, seconds, diverged, seen = [], (0.0, LOST), 0.0, False, 0
    for k, ((x, labels), test) in enumerate(zip(data.chunks, data.tests)):
        for _ in range(size.epochs):
            began = time.perf_counter()
            order = torch.randperm(len(x), generator=generator)
            if not diverged:
                losses = [learner.learn(x[i], labels[i])[1] for i in order.split(size.batch)]
                diverged = not _told(learner, losses)
            seconds += time.perf_counter() - began
            seen += len(order)
            with learner.predicting():
                curve.append((float(seen), _judged(net, test)[0]))
        if k == 0:
            with learner.predicting():
                chosen_by = _judged(net, data.validation)
    final, mean = curve[-1][1], sum(value for _, value in curve) / len(curve)
    return Record(
        rate, chosen_by, mean if data.incremental else final, curve, seconds, learner.forward, learner.backward,
        diverged, final=final, mean=mean,
    )  # fmt: skip


def _told(learner: Learner, losses: Sequence[float]) -> bool:
    """Tells the learner the mean loss; false where it is not finite."""
    if not losses:
        return True
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        return False
    learner.end_window(mean)
    return True


def _judged(net: nn.Module, samples: Samples) -> tuple[float, float]:
    """Accuracy and mean loss."""
    outputs = torch.cat([net(part) for part in samples.x.split(2000)])
    loss = float(cross_entropy(outputs, samples.labels))
    accuracy = float((outputs.argmax(1) == samples.labels).double().mean())
    return accuracy, loss if math.isfinite(loss) else LOST


def _on_stream(stream: Stream, method: Method, rate: float, seed: int, size: Size) -> Record:
    """Every batch is predicted, scored, then learnt from, once, if the learner has kept up (`Clock`).

    Rates are chosen by the first part; scores, near-future accuracy and recovery times are of the rest. A network that
    has diverged answers class 0.
    """
    net = network(stream.x, stream.classes, size.hidden, seed)
    pieces = list(zip(stream.x.split(size.batch), stream.labels.split(size.batch)))
    chunk = math.ceil(stream.drifts[0] / size.batch) if stream.drifts else None
    clock = Clock(size.delay, net, *pieces[0])
    learner = method.start(net, rate, Horizon(len(pieces), size.window, chunk))
    first = int(size.first * len(pieces))
    hits, losses, future, diverged = [], [], [], False
    for begin in range(0, len(pieces), size.window):
        here: list[float] = []
        for t in range(begin, min(begin + size.window, len(pieces))):
            x, labels = pieces[t]
            if diverged:
                hits.append(labels == 0)
                losses.append(LOST)
            else:
                late = clock.late()
                if late:
                    with learner.predicting():
                        outputs = net(x)
                        loss = float(cross_entropy(outputs, labels))
                else:
                    with clock.running(learner):
                        outputs, loss = learner.learn(x, labels)
                    here.append(loss)
                hits.append(outputs.argmax(1) == labels)
                losses.append(loss if math.isfinite(loss) else LOST)
                diverged = not math.isfinite(loss)
            if t >= first and t % size.ahead == 0 and t + size.ahead < len(pieces):
                later, answers = pieces[t + size.ahead]
                with learner.predicting():
                    guessed = torch.zeros_like(answers) if diverged else net(later).argmax(1)
                future.append(float((guessed == answers).double().mean()))
        diverged = diverged or not _told(learner, here)
    correct, start = torch.cat(hits), first * size.batch
    chosen_by = (float(correct[:start].double().mean()), sum(losses[:first]) / first)
    drifts = [d for d in stream.drifts if d >= start]
    times = recovery(correct, drifts, size.batch * size.window)
    return Record(
        rate, chosen_by, float(correct[start:].double().mean()), windowed(correct, size.batch * size.window),
        clock.seconds, learner.forward, learner.backward, diverged, sum(future) / len(future) if future else None,
        sum(times) / len(times) if times else None, missed=clock.missed / len(pieces),
    )  # fmt: skip


class Clock:
    """A stream does not wait: batches come as fast as SGD learns, and a slower learner misses some.

    By "passes" a step costs its forward passes and twice its backward ones, over the three of SGD; by "seconds" its
    time over the median of SGD's, measured on a copy beforehand. Time that is left over is not saved.
    Source: Ghunaim, Bibi, Alhamoud, Alfarra, Hammoud, Prabhu, Torr, Ghanem, arXiv 2302.01047.
    """

    def __init__(self, delay: Delay, net: nn.Module, x: Tensor, labels: Tensor):
        self.delay, self.seconds, self.behind, self.missed = delay, 0.0, 0.0, 0
        self.unit = _seconds_of_a_step(copy.deepcopy(net), x, labels) if delay == "seconds" else 3.0

    def late(self) -> bool:
        """Does the learner miss this batch?"""
        late = self.behind >= 1 - 1e-9
        self.behind -= late
        self.missed += late
        return late

    @contextmanager
    def running(self, learner: Learner) -> Iterator[None]:
        """A step of the learner."""
        passes, began = learner.forward + 2 * learner.backward, time.perf_counter()
        yield
        taken = time.perf_counter() - began
        self.seconds += taken
        spent = {"none": self.unit, "seconds": taken, "passes": learner.forward + 2 * learner.backward - passes}
        self.behind = max(0.0, self.behind + spent[self.delay] / self.unit - 1)


def _seconds_of_a_step(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    optimizer, times = torch.optim.SGD(net.parameters(), 1e-6), []
    for _ in range(31):
        began = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
