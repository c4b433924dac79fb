"""The goal: one configuration, over three decades of rates, beside Adam tuned for every task; with all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from firmly.lab.charts import Line
from firmly.lab.experiments.optim_data import Chunks, Stream
from firmly.lab.experiments.optim_page import (
    DECADES,
    POINTS,
    Found,
    Shared,
    mean,
    named,
    rate_of,
    scores,
    shown,
    signed,
    to_peer,
)
from firmly.lab.experiments.optim_runs import Compared, Record
from firmly.lab.flows import Interval, interval
from firmly.lab.page import Chart, Section, Table

OURS, PEER, COSINE = "hybrid", "Adam", "SGD, cosine"


class Beside(NamedTuple):
    """One task: ours at the rate of the window that is worst for it, in hindsight, beside Adam."""

    adam: Compared
    hindsight: list[Record]  # of Adam, at the rate whose mean is best
    ours: list[Record]
    to_adam: Interval
    to_hindsight: Interval


def beside(found: Sequence[Compared], low: float, high: float) -> Beside:
    """With rates of ours from `low` to `high`."""
    adam, ours = named(found, PEER), named(found, OURS)
    assert adam.everywhere is not None and ours.everywhere is not None
    inside = [runs for runs in ours.everywhere if low <= runs[0].rate <= high]
    worst = min(inside, key=_mean)
    best = max(adam.everywhere, key=_mean)
    return Beside(adam, best, worst, _gain(worst, adam.runs), _gain(worst, best))


def goal_section(data: Mapping[str, Chunks | Stream], found: Found, shared: Sequence[Shared]) -> Section:
    """Tables of what is lost at the worst rate and of the time after a drift, and what every rate loses."""
    window = next(s for s in shared if s.method == OURS)
    at = {task: beside(compared, window.low, window.high) for task, compared in found.items()}
    rows = [
        (task, rate_of(b.adam), shown(scores(b.adam)), f"{b.ours[0].rate:.2g}", shown([r.score for r in b.ours]),
         signed(b.to_adam), f"{b.hindsight[0].rate:.2g}", signed(b.to_hindsight))
        for task, b in at.items()
    ]  # fmt: skip
    columns = (
        "task", "rate of Adam", "Adam, tuned, %", "worst rate of ours", "ours there, %", "less tuned Adam",
        "Adam’s best rate in hindsight", "less Adam there",
    )  # fmt: skip
    caption = (
        f"Ours: {OURS}, at rates from {window.low:.2g} to {window.high:.2g}, a window that choosing samples chose for "
        "all tasks together. Differences in points, seed by seed."
    )
    charts = [
        Chart(
            [Line(task, _losses(named(c, name), named(c, PEER)), "other") for task, c in found.items()],
            "learning rate", "points", f"{name}, less tuned Adam; mean over the seeds", log_x=True, dots=True,
        )
        for name in (OURS, PEER)
    ]  # fmt: skip
    blocks = [Table(columns, rows, caption), *charts]
    drifting = {task: d for task, d in data.items() if isinstance(d, Stream) and d.drifts}
    text = verdict(at)
    if drifting:
        table, faster = recovery_table(drifting, found, window)
        blocks.append(table)
        text += (
            f" After a drift ours, at its worst rate, {'recovers' if faster else 'does not recover'} faster than tuned "
            "Adam and tuned SGD with a cosine."
        )
    return Section("The goal", text, tuple(blocks))


def recovery_table(data: Mapping[str, Stream], found: Found, window: Shared) -> tuple[Table, bool]:
    """And is ours, at its worst rate, faster than both on every task?"""
    rows, faster = [], True
    for task, stream in data.items():
        ours = named(found[task], OURS)
        assert ours.everywhere is not None
        every = {runs[0].rate: mean(to_peer(stream, found[task], runs)) for runs in ours.everywhere}
        worst = max(time for rate, time in every.items() if window.low <= rate <= window.high)
        peers = [mean(to_peer(stream, found[task], named(found[task], name).runs)) for name in (PEER, COSINE)]
        faster &= worst < min(peers)
        rows.append((task, *(f"{time:.0f}" for time in (every[window.rate], worst, *peers))))
    columns = ("task", f"ours at {window.rate:.2g}", "ours at its worst rate", f"{PEER}, tuned", f"{COSINE}, tuned")
    caption = (
        "Samples from a drift to 95% of what the best peer knew before it; all up to the next where that is never."
    )
    return Table(columns, rows, caption), faster


def verdict(at: Mapping[str, Beside]) -> str:
    missed = [task for task, b in at.items() if b.to_adam.mean < -100 * POINTS]
    strictly = [task for task, b in at.items() if b.to_hindsight.mean < -100 * POINTS]
    worst = min(b.to_adam.mean for b in at.values())
    said = f"It is missed on {', '.join(missed)}, by {-worst:.1f} points at most" if missed else "It is met"
    return (
        f"The goal: one configuration that at every rate of {DECADES:g} decades loses at most {100 * POINTS:.1f} "
        f"points to Adam tuned for the task. {said}. Beside Adam at a rate chosen in hindsight, which nobody has "
        f"beforehand, it is {'missed on ' + ', '.join(strictly) if strictly else 'met, too'}."
    )


def _losses(method: Compared, adam: Compared) -> list[tuple[float, float]]:
    assert method.everywhere is not None
    return [(runs[0].rate, _gain(runs, adam.runs).mean) for runs in method.everywhere]


def _gain(ours: Sequence[Record], other: Sequence[Record]) -> Interval:
    return interval([100 * (a.score - b.score) for a, b in zip(ours, other)])


def _mean(runs: Sequence[Record]) -> float:
    return mean([r.score for r in runs])
