"""The one loop of dictionary learning: code, update, replace what is unused, report."""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.priors.omp import refuse_dictionary, refuse_signals

Callback = Callable[[int, Tensor, float], object]


class Status(Enum):
    """How learning ended; the value is the sentence for the user."""

    CONVERGED = "converged: one more round lowers the objective by less than the tolerance"
    LIMIT = "stopped after the rounds it was given; raise iterations or tol if it should go on"
    INTERRUPTED = "interrupted: the dictionary is that of the last whole round"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Learned:
    """What learning returns: the dictionary, how it ended, and the mean objective per signal after every round.

    `replaced` counts the atoms that no signal used and that were replaced; `memory` is what the method went on with
    (codes, statistics).
    """

    dictionary: Tensor
    status: Status
    objectives: list[float]
    replaced: int
    seconds: float
    memory: Any = field(repr=False)

    @property
    def iterations(self) -> int:
        return len(self.objectives)


class Method(ABC):
    """A way to learn: a code step and a dictionary step. `memory` is what it keeps between them, and between rounds.

    Dictionaries are (m, n) with atoms of unit norm as columns; signals are (batch, m) unless the method says otherwise.
    """

    streams = False  # whether a round may see a new batch: nothing in the memory belongs to the signals of the last one

    def refuse(self, dictionary: Tensor, data: Tensor) -> None:
        """Raise unless the dictionary and the signals fit this method."""
        refuse_dictionary(dictionary)
        refuse_signals(data, dictionary.shape[:1])

    def initial(self, data: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
        """A dictionary to start from: distinct signals, and random directions where they do not suffice."""
        return normalised(directions(data, atoms, generator).mT)

    def rounds(self, data: Tensor, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The batch of every round: here all data each time."""
        for _ in range(iterations):
            yield data

    @abstractmethod
    def code(self, dictionary: Tensor, data: Tensor, memory: Any) -> Any:
        """The memory after coding the signals; `memory` is None in the first round."""

    @abstractmethod
    def update(self, dictionary: Tensor, data: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """A better dictionary for these codes, and the memory; neither argument is changed."""

    @abstractmethod
    def objective(self, dictionary: Tensor, data: Tensor, memory: Any) -> float:
        """The mean objective per signal."""

    def unused(self, memory: Any, atoms: int) -> Tensor | None:
        """Which atoms no signal used: (n,); None for methods whose atoms cannot die."""
        return None

    def candidates(self, dictionary: Tensor, data: Tensor, memory: Any) -> Tensor:
        """Replacements for unused atoms, (count, m), of any norm: the larger, the worse it is represented so far."""
        return data


def learn_dictionary(
    data: Tensor,
    method: Method,
    atoms: int | None = None,
    start: Tensor | None = None,
    iterations: int = 30,
    tol: float = 0.0,
    seed: int = 0,
    callback: Callback | None = None,
) -> Learned:
    """Alternate the two steps of `method` on signals (batch, m), from `start` or from `atoms` of the signals.

    A round codes and updates once. Atoms that no signal uses are replaced by what is represented worst, and counted.
    Learning ends after `iterations` (rounds; passes over the data for `Online`), or when a round on all data lowers the
    objective by at most `tol` times its value. `callback(round, dictionary, objective)` follows each round. Ctrl-C ends
    learning with the dictionary of the last whole round. All randomness comes from `seed`.

    Raises `ShapeError` and `DataError` for misfit, non-finite or integer data and for an objective that overflows, and
    `SettingsError` for senseless settings.
    """
    if iterations < 1 or not 0 <= tol < 1:
        raise SettingsError(f"iterations is at least 1 and tol in [0, 1), given {iterations} and {tol}")
    generator = torch.Generator().manual_seed(seed)
    start = _start(data, method, atoms, start, generator)
    return _alternate(start, method.rounds(data, iterations, generator), method, generator, None, tol, callback)


def learn_from_stream(
    batches: Iterable[Tensor],
    method: Method,
    atoms: int | None = None,
    start: Tensor | None = None,
    memory: Any = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> Learned:
    """One round for every batch of a stream, which is read once: memory does not grow with the number of signals.

    `method` has to be one that learns from single batches (`Online`). To go on later pass the `dictionary` and `memory`
    of the result as `start` and `memory`. The rest, errors included, is as in `learn_dictionary`; an empty stream
    raises `DataError`.
    """
    if not method.streams:
        raise SettingsError(f"{type(method).__name__} needs all signals in every round; use Online for a stream")
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError("the stream has no batch")
    generator = torch.Generator().manual_seed(seed)
    start = _start(first, method, atoms, start, generator)

    def checked() -> Iterator[Tensor]:
        for batch in itertools.chain([first], stream):
            refuse_signals(batch, tuple(first.shape[1:]))
            yield batch.to(first)

    return _alternate(start, checked(), method, generator, memory, 0.0, callback)


def _start(data: Tensor, method: Method, atoms: int | None, start: Tensor | None, generator: torch.Generator) -> Tensor:
    if (atoms is None) == (start is None):
        raise SettingsError("give either a number of atoms or a dictionary to start from")
    if start is None:
        if atoms is None or atoms < 1:
            raise SettingsError(f"a dictionary has at least one atom, given {atoms}")
        refuse_signals(data, data.shape[1:])
        start = method.initial(data, atoms, generator)
    method.refuse(start, data)
    if start.dtype != data.dtype or start.device != data.device:
        raise DataError(f"the dictionary is {start.dtype} on {start.device}, the signals are {data.dtype} on "
                        f"{data.device}; convert one of them")  # fmt: skip
    return start


def _alternate(
    dictionary: Tensor,
    batches: Iterable[Tensor],
    method: Method,
    generator: torch.Generator,
    memory: Any,
    tol: float,
    callback: Callback | None,
) -> Learned:
    began, objectives, replaced = time.perf_counter(), [], 0
    status, last = Status.LIMIT, None
    try:
        for batch in batches:
            after = method.code(dictionary, batch, memory)
            better, after = method.update(dictionary, batch, after)
            better, count = _replace_unused(better, batch, method, after, generator)
            objective = method.objective(better, batch, after)
            if not math.isfinite(objective):
                raise DataError(
                    f"the objective of round {len(objectives) + 1} is {objective}: the signals have entries up to "
                    f"{float(batch.abs().max()):.2g}; scale them, or use float64"
                )
            dictionary, memory, replaced = better, after, replaced + count
            objectives.append(objective)
            if callback is not None:
                callback(len(objectives), dictionary, objective)
            same, last = batch is last, batch
            if tol > 0 and same and not count and objectives[-2] - objective <= tol * abs(objectives[-2]):
                status = Status.CONVERGED
                break
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    return Learned(dictionary, status, objectives, replaced, time.perf_counter() - began, memory)


def _replace_unused(
    dictionary: Tensor, data: Tensor, method: Method, memory: Any, generator: torch.Generator
) -> tuple[Tensor, int]:
    unused = method.unused(memory, dictionary.shape[-1])
    if unused is None or not bool(unused.any()):
        return dictionary, 0
    count = int(unused.sum())
    candidates = method.candidates(dictionary, data, memory)
    sizes = torch.linalg.vector_norm(candidates, dim=1)
    worst = torch.argsort(sizes, descending=True, stable=True)[:count]
    fresh = directions(candidates[worst[sizes[worst] > 0]], count, generator)
    dictionary = dictionary.clone()
    dictionary[:, unused] = normalised(fresh.mT)
    return dictionary, count


def mini_batches(data: Tensor, size: int, passes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """All signals in batches of at most `size`, all about as large, in a new random order in every pass."""
    for _ in range(passes):
        for rows in torch.randperm(len(data), generator=generator).tensor_split(-(-len(data) // size)):
            yield data[rows.to(data.device)]


def normalised(dictionary: Tensor) -> Tensor:
    """The same directions with columns of unit norm."""
    return dictionary / torch.linalg.vector_norm(dictionary, dim=0)


def directions(signals: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the signals that do not vanish, drawn without replacement, then Gaussian ones: (count, m)."""
    sizes = torch.linalg.vector_norm(signals, dim=1)
    usable = (sizes > 1e-6 * sizes.max()).nonzero()[:, 0] if len(signals) else sizes.nonzero()[:, 0]
    drawn = usable[torch.randperm(len(usable), generator=generator).to(usable.device)[:count]]
    missing = count - len(drawn)
    random = torch.randn(missing, signals.shape[1], generator=generator, dtype=torch.float64)
    return torch.cat([signals[drawn], random.to(signals)])
