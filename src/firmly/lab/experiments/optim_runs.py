"""Training by every method with every rate, then again with the chosen one; what is done is kept in the run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from firmly.lab.experiments.bregman_data import Samples, Split
from firmly.lab.experiments.optim_data import Stream
from firmly.lab.experiments.optim_methods import Horizon, Learner, Method
from firmly.lab.experiments.optim_scores import recovery, windowed
from firmly.lab.run_folder import RunFolder

LOST = 1e9  # stands for a loss that is not finite: JSON has no word for it


class Size(NamedTuple):
    """Of a run: units of the hidden layers, samples of a batch, epochs over a fixed set; of a stream, the first part
    on which the rate is chosen, the batches of a window, and those to look ahead."""

    hidden: int
    batch: int
    epochs: int
    first: float
    window: int
    ahead: int


@dataclass(frozen=True)
class Record:
    """One run. `chosen_by`: accuracy and loss of what rates are chosen by; `score`: accuracy of what is reported.

    `curve`: (samples seen, accuracy); on streams `near_future` is the accuracy some batches ahead, `recovery` the mean
    time to recover from known drifts, in samples.
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


@dataclass(frozen=True)
class Compared:
    """A method on one task: a run with every rate, on the seed of the choice, and runs with the chosen one."""

    method: Method
    grid: list[Record]
    runs: list[Record]

    @property
    def chosen(self) -> Record:
        return choice(self.grid)


def choice(grid: Sequence[Record]) -> Record:
    """The greatest accuracy, of equal ones the least loss."""
    return max(grid, key=lambda r: (r.chosen_by[0], -r.chosen_by[1]))


def compare(
    data: Split | Stream, methods: Sequence[Method], rates: Sequence[float], seeds: Sequence[int], size: Size,
    kept: Kept,
) -> list[Compared]:  # fmt: skip
    """Rates are chosen on the first seed, and reported is what the others find."""
    found = []
    for method in methods:
        grid = [kept.run(data, method, rate, seeds[0], size) for rate in rates]
        best = choice(grid).rate
        found.append(Compared(method, grid, [kept.run(data, method, best, seed, size) for seed in seeds[1:]]))
    return found


class Kept:
    """Runs that are read from the run folder where an interrupted run has left them."""

    def __init__(self, folder: RunFolder, task: str, one_more: Callable[[], None]):
        self.folder, self.task, self.one_more = folder, task, one_more
        self.known = {(r["method"], r["rate"], r["seed"]): r["record"] for r in folder.metrics("optim", task=task)}

    def run(self, data: Split | Stream, method: Method, rate: float, seed: int, size: Size) -> Record:
        key = (method.name, rate, seed)
        if key in self.known:
            record = _from_json(self.known[key])
        else:
            train = _on_stream if isinstance(data, Stream) else _on_fixed
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


def _on_fixed(split: Split, method: Method, rate: float, seed: int, size: Size) -> Record:
    net = network(split.train.x, split.classes, size.hidden, seed)
    steps = math.ceil(len(split.train.x) / size.batch)
    learner = method.start(net, rate, Horizon(size.epochs * steps, steps))
    generator = torch.Generator().manual_seed(seed)
    curve, seconds, diverged = [], 0.0, False
    for epoch in range(size.epochs):
        began = time.perf_counter()
        order = torch.randperm(len(split.train.x), generator=generator)
        if not diverged:
            losses = [learner.learn(split.train.x[i], split.train.labels[i])[1] for i in order.split(size.batch)]
            diverged = not _told(learner, losses)
        seconds += time.perf_counter() - began
        with learner.predicting():
            curve.append(((epoch + 1.0) * len(order), _judged(net, split.test)[0]))
    with learner.predicting():
        validation, test = _judged(net, split.validation), _judged(net, split.test)
    return Record(rate, validation, test[0], curve, seconds, learner.forward, learner.backward, diverged)


def _told(learner: Learner, losses: Sequence[float]) -> bool:
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
    """Every batch is predicted, scored, then learnt from, once.

    Rates are chosen by the first part; scores, near-future accuracy and recovery times are of the rest. A network that
    has diverged answers class 0.
    """
    net = network(stream.x, stream.classes, size.hidden, seed)
    pieces = list(zip(stream.x.split(size.batch), stream.labels.split(size.batch)))
    chunk = math.ceil(stream.drifts[0] / size.batch) if stream.drifts else None
    learner = method.start(net, rate, Horizon(len(pieces), size.window, chunk))
    first = int(size.first * len(pieces))
    hits, losses, future, diverged, seconds = [], [], [], False, 0.0
    for begin in range(0, len(pieces), size.window):
        here: list[float] = []
        for t in range(begin, min(begin + size.window, len(pieces))):
            x, labels = pieces[t]
            if diverged:
                hits.append(labels == 0)
                losses.append(LOST)
            else:
                began = time.perf_counter()
                outputs, loss = learner.learn(x, labels)
                seconds += time.perf_counter() - began
                hits.append(outputs.argmax(1) == labels)
                losses.append(loss if math.isfinite(loss) else LOST)
                here.append(loss)
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
        rate, chosen_by, float(correct[start:].double().mean()), windowed(correct, size.batch * size.window), seconds,
        learner.forward, learner.backward, diverged, sum(future) / len(future) if future else None,
        sum(times) / len(times) if times else None,
    )  # fmt: skip
