"""Dictionary learning where the truth is known: recovery, gradients, and several operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.lab.charts import Line
from firmly.linear import Dense
from firmly.priors import Alternating, Learned, Operators, SparseModel, Unrolled, lasso, learn_dictionary, recovery
from firmly.priors.learning import Status, normalised

WEIGHT = 0.1
VARIANTS = {"none": 0, "all steps": None, "last 50": 50, "last 20": 20}  # that the gradient goes through
Tell = Callable[[str, int, int], None]


def whole(learned: Learned) -> Learned:
    """The result, unless Ctrl-C cut learning short: then the study ends as well."""
    if learned.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    return learned


class Toy(NamedTuple):
    """Signals (count, m), the dictionary that made them, and one to start from."""

    signals: Tensor
    truth: Tensor
    start: Tensor


def gradient_toy(seed: int, count: int) -> Toy:
    """50 atoms of length 30, 30 % of them in every signal, noise 0.1; the start is half a standard deviation away.

    Drawn by NumPy, so that the published protocol gives these very numbers.
    Source: Malezieux, Moreau and Kowalski, 2022.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    truth = random.normal(size=(30, 50)) / 30
    truth /= np.linalg.norm(truth, axis=0)
    codes = (random.random((50, count)) > 0.7) * random.normal(size=(50, count))
    signals = truth @ codes + 0.1 * random.normal(size=(30, count))
    start = truth + 0.5 * truth.std() * random.normal(size=truth.shape)
    return Toy(torch.from_numpy(signals.T.copy()), torch.from_numpy(truth), torch.from_numpy(start))


def gradient_errors(toy: Toy, depths: Sequence[int], tell: Tell) -> list[Line]:
    """|g_T - g*| / |g*| after T steps of ISTA for every variant; g* from codes with a duality gap of 1e-12."""
    model = SparseModel(WEIGHT)
    exact = lasso(toy.start, toy.signals, WEIGHT, tol=1e-12)
    _, target = model.gradient(toy.start, toy.signals, 0, start=exact.code)
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    parts = toy.signals.split(100)  # the graph of a long backpropagation is kept for one part at a time
    for done, depth in enumerate(depths):
        for name, through in VARIANTS.items():
            sums = [
                len(part) * model.gradient(toy.start, part, depth, momentum=False, through=through)[1] for part in parts
            ]
            gradient = torch.stack(sums).sum(0) / len(toy.signals)
            errors[name].append((depth, float((gradient - target).norm() / target.norm())))
        tell("gradients of unrolled codes", done + 1, len(depths))
    roles = ["twin", "ours", "other", "other"]
    return [Line(name, points, role) for (name, points), role in zip(errors.items(), roles)]


class Recovered(NamedTuple):
    """The recovery score after every round, and the objective at the end."""

    name: str
    scores: list[tuple[float, float]]
    objective: float


def recoveries(toy: Toy, rounds: int, tell: Tell) -> list[Recovered]:
    """Alternating and unrolled learning from the start of the toy, atoms of unit norm."""
    model, start = SparseModel(WEIGHT), normalised(toy.start)
    methods = {
        "alternating, 20 steps": Alternating(model, 20),
        "unrolled, 20 steps": Unrolled(model, 20),
        "unrolled, 50 steps, through the last 20": Unrolled(model, 50, through=20),
    }
    found = []
    for name, method in methods.items():
        scores = [(0.0, recovery(start, toy.truth))]

        def keep(k: int, dictionary: Tensor, objective: float, scores=scores, name=name) -> None:
            scores.append((k, recovery(dictionary, toy.truth)))
            tell(f"recovery, {name}", k, rounds)

        learned = whole(learn_dictionary(toy.signals, method, start=start, iterations=rounds, callback=keep))
        found.append(Recovered(name, scores, learned.objectives[-1]))
    return found


class Seen(NamedTuple):
    """What is learned through so many operators, on all of the space and on the null space of the first operator."""

    operators: int
    blind: int
    recovery: float
    hidden: float
    hidden_start: float


def operators_toy(
    counts: Sequence[int], dimension: int, rows: int, signals: int, rounds: int, seed: int, tell: Tell
) -> list[Seen]:
    """Gaussian operators with `rows` rows; signals of `dimension` entries from as many atoms, 5 % of them in each.

    The atoms start right where the first operator sees them and at random on its null space. `hidden` is the mean |cos|
    between true and learned atoms on this null space.
    """
    found = []
    for index, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator=generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        truth = normalised(draw(dimension, dimension))
        used = torch.rand(signals, dimension, generator=generator) < 0.05
        maps = [Dense(draw(rows, dimension) / dimension**0.5) for _ in range(count)]
        model = SparseModel(0.02, observation=Operators(maps, torch.arange(signals) % count))
        data = model.data(truth, used * draw(signals, dimension))
        hidden = Operators(maps[:1], torch.zeros(1, dtype=torch.long)).identifiability().null_space
        seen = torch.linalg.qr(maps[0].matrix().mT)[0]
        start = normalised(seen @ (seen.mT @ truth) + hidden @ (hidden.mT @ normalised(draw(dimension, dimension))))
        blind = model.observation.identifiability().blind if model.observation else 0

        def say(k: int, dictionary: Tensor, objective: float, index=index) -> None:
            tell("several operators", index * rounds + k, len(counts) * rounds)

        method = Alternating(model, blind=blind > 0)
        learned = whole(learn_dictionary(data, method, start=start, iterations=rounds, callback=say)).dictionary
        found.append(
            Seen(count, blind, recovery(learned, truth), _cosine(hidden, learned, truth), _cosine(hidden, start, truth))
        )
    return found


def _cosine(basis: Tensor, one: Tensor, other: Tensor) -> float:
    """The mean |cos| between equal columns, seen on a subspace."""
    return float((normalised(basis.mT @ one) * normalised(basis.mT @ other)).sum(0).abs().mean())
