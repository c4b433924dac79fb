"""Rates set by feedback.

Fashion-MNIST in five chunks of 12,000 pictures, ten passes over each in turn: a perceptron 784-256-128-10 with batch
normalisation, batches of 128, no augmentation; accuracy on the test set after the last pass, and its mean over the 50
passes. `Feedback` on SGD gets the rate as the place to start from; the cosine knows the length of a chunk. "Events"
spends the same 50 passes where the loss still falls: chunks 2 to 5 are visited again in turn. Then one pass over all
60,000 pictures, in batches of 16, by a perceptron 784-64-10, with names of the classes that are permuted anew after
every 12,000: accuracy of predictions before learning, batches until 95 % of the accuracy before a drift are back, and
backward passes saved. Last, Elec2 with linear predictors. Ranges are over seeds, seconds are of the processor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.programs import elec2_linear, feedback_runs, feedback_streams
from benchmarks.runner.partial import Partial
from benchmarks.runner.results import Result, Table, Target

NAMES = {
    "feedback": "Feedback", "feedback_hold": "Feedback, hold", "feedback_events": "Feedback, events",
    "feedback_hold_events": "Feedback, hold, events", "sgd": "SGD", "sgd_cosine": "SGD, cosine per chunk",
    "adam": "Adam", "adam_cosine": "Adam, cosine per chunk", "hybrid": "hybrid", "hybrid_events": "hybrid, events",
    "sgd_feedback": "SGD, Feedback",
}  # fmt: skip
CHUNKED = [
    *[(name, rate, range(3)) for name in ("feedback", "sgd", "feedback_hold") for rate in (1e-3, 1e-2, 1e-1)],
    *[("sgd_cosine", rate, range(3)) for rate in (0.1, 0.3)],
    *[(name, 1e-3, range(3)) for name in ("adam", "adam_cosine")],
    *[(name, 1e-2, range(3)) for name in ("feedback_events", "feedback_hold_events")],
]
STREAM = [
    *[("hybrid", rate, range(5)) for rate in (1e-3, 1e-2, 1e-1)],
    ("hybrid_events", 1e-2, range(5)),
    ("sgd_feedback", 1e-2, range(5)),
    *[("sgd", rate, range(5)) for rate in (1e-3, 1e-2, 1e-1)],
    *[("adam", rate, range(5)) for rate in (1e-4, 1e-3, 1e-2)],
]


def measure(quick: bool) -> Result:
    if quick:
        sets = feedback_runs.noise(20_000), feedback_runs.noise(100)
        (name, rate, _), (learner, at, _) = CHUNKED[0], STREAM[0]
        runs = [feedback_runs.main(name, rate, 0, 1, 1000, *sets)]
        return assembled(runs, [feedback_streams.main(learner, at, 0, sets[0])], elec2_linear.main(2000))
    runs, chunks = rows(feedback_runs, CHUNKED, ("optim/feedback.py", "optim/events.py", "optim/loss_value.py"))
    streams, drifts = rows(feedback_streams, STREAM, ("optim/*.py",))
    result = assembled(runs, streams, elec2_linear.main())
    for partial in (chunks, drifts):
        partial.finish()
    return result


def rows(program: Any, wanted: list[tuple[str, float, range]], sources: tuple[str, ...]) -> tuple[list[dict], Partial]:
    """A row for every method, rate and seed; those that an interrupted run has left are not measured again."""
    partial, found = Partial(Path(program.__file__), sources), []
    for name, rate, seeds in wanted:
        for seed in seeds:
            key = f"{name} {rate:g} {seed}"
            if key not in partial.known:
                partial.keep(key, program.main(name, rate, seed))
            found.append(partial.known[key])
    return found, partial


def assembled(runs: list[dict], streams: list[dict], elec2: list[dict]) -> Result:
    """The tables from the rows of the three programs."""
    tables = [
        Table("Chunks of Fashion-MNIST", grouped(runs, chunked_cells)),
        Table("A stream of Fashion-MNIST with four drifts", grouped(streams, stream_cells)),
        Table("Elec2, linear prediction, standardised online", elec2),
    ]
    return Result(tables, targets(runs) + stream_targets(streams, elec2))


def grouped(rows: list[dict], cells: Callable[[list[dict]], dict[str, Any]]) -> list[dict]:
    found: dict[tuple[str, float], list[dict]] = {}
    for row in rows:
        found.setdefault((row["method"], row["rate"]), []).append(row)
    return [
        {"method": NAMES[name], "rate": f"{rate:g}", "seeds": len(g)} | cells(g) for (name, rate), g in found.items()
    ]


def chunked_cells(group: list[dict]) -> dict[str, Any]:
    final = [row["final"] for row in group]
    flags = [flag for row in group for flag in row["flags"] if flag is not None]
    return {
        "final %": round(statistics.mean(final), 2), "range": spread(final),
        "mean %": round(statistics.mean(row["mean"] for row in group), 2),
        "flagged unstable %": round(100 * flags.count(False) / len(flags), 1) if flags else None,
        "seconds": statistics.mean(row["seconds"] for row in group),
    }  # fmt: skip


def stream_cells(group: list[dict]) -> dict[str, Any]:
    right = [row["prequential"] for row in group]
    return {
        "before learning %": round(statistics.mean(right), 2), "range": spread(right),
        "recovery, batches": round(statistics.mean(t for row in group for t in row["recovery"])),
        "alarms": round(statistics.mean(len(row["alarms"]) for row in group), 1),
        "saved %": round(100 * statistics.mean(row["skipped"] for row in group), 1),
        "seconds": statistics.mean(row["seconds"] for row in group),
    }  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def mean_of(rows: list[dict], name: str, rate: float, key: str) -> float | None:
    found = [row[key] for row in rows if (row["method"], row["rate"]) == (name, rate)]
    return statistics.mean(found) if found else None


def targets(runs: list[dict]) -> list[Target]:
    base, low, high = (mean_of(runs, "feedback", rate, "final") for rate in (1e-2, 1e-3, 1e-1))
    cosine = [v for rate in (0.1, 0.3) if (v := mean_of(runs, "sgd_cosine", rate, "final")) is not None]
    hold = mean_of(runs, "feedback_hold", 1e-2, "final")
    if base is None or low is None or high is None or not cosine or hold is None:
        return []
    width = max(base, low, high) - min(base, low, high)
    return [
        Target("Feedback at base rate 0.01 ends at 88.5 % or more", f"{base:.2f} %", base >= 88.5),
        Target("its ends at base rates 0.001, 0.01 and 0.1 are within 0.6 points", f"{width:.2f}", width <= 0.6),
        Target(
            "it ends at most 0.3 points below the better cosine", f"{base - max(cosine):+.2f}", base > max(cosine) - 0.3
        ),
        Target("published: the event-based rate (hold) is better", f"{hold - base:+.2f} points", hold > base),
    ]


def stream_targets(streams: list[dict], elec2: list[dict]) -> list[Target]:
    found = {rate: mean_of(streams, "hybrid", rate, "prequential") for rate in (1e-3, 1e-2, 1e-1)}
    values = [v for v in found.values() if v is not None]
    peers = {
        (name, rate): v
        for name, rates in (("sgd", (1e-3, 1e-2, 1e-1)), ("adam", (1e-4, 1e-3, 1e-2)))
        for rate in rates
        if (v := mean_of(streams, name, rate, "prequential")) is not None
    }
    if len(values) < 3 or not peers:
        return []
    (name, rate), best = max(peers.items(), key=lambda item: item[1])
    implicit, logistic = (
        [row["accuracy"] for row in elec2 if row["method"] == name]
        for name in ("ImplicitStep, integral", "logistic SGD")
    )
    return [
        Target(
            "the hybrid at any base rate from 0.001 to 0.1 is within 0.5 points of the best constant rate",
            f"{min(values):.2f} to {max(values):.2f}; {NAMES[name]} {rate:g}: {best:.2f}", min(values) >= best - 0.5,
        ),
        Target(
            "Elec2: implicit steps lose at most 11 points over rates from 0.001 to 10",
            f"{max(implicit) - min(implicit):.1f}", max(implicit) - min(implicit) <= 11,
        ),
        Target(
            "and logistic steps more than that over rates from 0.001 to 1",
            f"{max(logistic) - min(logistic):.1f}", max(logistic) - min(logistic) > max(implicit) - min(implicit),
        ),
    ]  # fmt: skip
