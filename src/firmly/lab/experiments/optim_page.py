"""The report on optimisers: a section for every task, one rate for all tasks, and where ours lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from firmly.lab.charts import Line
from firmly.lab.experiments.bregman_pictures import Band
from firmly.lab.experiments.optim_data import Chunks, Stream
from firmly.lab.experiments.optim_pictures import curves_picture
from firmly.lab.experiments.optim_runs import Compared, Record
from firmly.lab.experiments.optim_scores import area, kappa_temporal, reached, width
from firmly.lab.flows import Interval, interval
from firmly.lab.page import Chart, Pictures, Section, Table
from firmly.lab.run_folder import RunFolder

DECADES = 3.0  # of learning rates that one configuration has to stand
POINTS = 0.005  # of accuracy that it may lose to Adam tuned on the task

Found = Mapping[str, Sequence[Compared]]  # task -> methods


def preferred(found: Sequence[Compared]) -> Compared:
    """The one of ours that its choosing samples prefer, which are not those that are reported."""
    among = [c for c in found if c.method.role == "ours"]
    return max(among, key=lambda c: (c.chosen.chosen_by[0], -c.chosen.chosen_by[1]))


def strongest(found: Sequence[Compared]) -> Compared:
    """The peer of the best reported score: chosen in hindsight, in favour of the peers."""
    return max((c for c in found if c.method.role == "other"), key=lambda c: mean(scores(c)))


def named(found: Sequence[Compared], name: str) -> Compared:
    return next(c for c in found if c.method.name == name)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """In percent, mean and half of the 95% interval."""
    mean, half = interval([100 * v for v in values])
    return f"{mean:.{digits}f}" + ("" if math.isinf(half) else f" ± {half:.{digits}f}")


def gain(ours: Compared, other: Compared) -> Interval:
    """Points of accuracy, seed by seed."""
    return interval([100 * (a.score - b.score) for a, b in zip(ours.runs, other.runs)])


def scores(found: Compared) -> list[float]:
    return [r.score for r in found.runs]


# -- one task --------------------------------------------------------------------------------------------------------


def task_section(
    task: str, data: Chunks | Stream, found: Sequence[Compared], first: float, run: RunFolder
) -> Section:  # fmt: skip
    """`first` is the share of a stream that chose the rates."""
    drawn = pick(found)
    axis = "samples seen" if isinstance(data, Stream) else "samples learnt from"
    name = "accuracy of a window, before it is learnt" if isinstance(data, Stream) else "test accuracy"
    halves = {f"curves-{task}": drawn[:3], f"more-{task}": [drawn[0], *drawn[3:]]}
    for picture, those in halves.items():
        run.write(f"pictures/{picture}.png", curves_picture([band(c) for c in those], axis, name))
    items = [(picture, ", ".join(c.method.name for c in those)) for picture, those in halves.items()]
    curves = Pictures(items, "Tuned methods: mean and 95% interval over the seeds.", 2)
    lines = [
        Line(c.method.name, [(r.rate, 100 * r.score) for r in c.grid], "ours" if c.method.role == "ours" else "other")
        for c in drawn
    ]
    caption = "The seed on which rates were chosen, but samples that chose nothing."
    chart = Chart(lines, "learning rate", "accuracy in percent", caption, log_x=True, dots=True)
    table = stream_table(data, found, first) if isinstance(data, Stream) else chunk_table(data, found)
    blocks = (curves, table, chart, cost_table(found))
    return Section(f"{task[0].upper()}{task[1:]}".replace("-", " "), told(data, found, first), blocks)


def told(data: Chunks | Stream, found: Sequence[Compared], first: float) -> str:
    if isinstance(data, Stream):
        text = (
            f"{len(data.x)} samples. Data: {data.told}. Every batch is predicted, scored, then learnt from, once. "
            "Rates were chosen by the accuracy of the first part; all numbers are of the rest. Repeating the last "
            f"label is right {100 * data.no_change(first):.1f}% of the time; it sees every label at once, the networks "
            "see those of a batch together."
        )
    else:
        text = (
            f"Data: {data.told}; {data.samples} samples to learn, {len(data.validation.x)} to choose the rate, "
            f"{len(data.tests[-1].x)} for the test."
        )
        if len(data.chunks) > 1:
            text += (
                " There are several passes over a chunk, each followed by a test; then it never comes back. Rates were "
                "chosen by the validation samples after the first chunk."
            )
        if data.incremental:
            text += (
                " Validation samples are of the first two classes, and every test is of the classes so far. The score "
                "is the mean over all passes (AAA). Nothing here keeps old classes in mind: who learns the new ones "
                "forgets the others, and a score can be high where little is learnt."
            )
    return f"{text} {verdict(found)} {recovers(data, found)}".rstrip()


def verdict(found: Sequence[Compared]) -> str:
    ours, peer = preferred(found), strongest(found)
    gained = gain(ours, peer)
    said = "better" if gained.mean > gained.half else "worse" if gained.mean < -gained.half else "not told apart"
    return (
        f"Of ours the choosing samples prefer {ours.method.name}; of the others {peer.method.name} is best in "
        f"hindsight, which favours it. Ours is {said} ({signed(gained)} points)."
    )


def recovers(data: Chunks | Stream, found: Sequence[Compared]) -> str:
    """How fast, where there are drifts: the preferred of ours, the strongest peer, Adam and SGD with a cosine."""
    if not isinstance(data, Stream) or not found[0].runs[0].recovery:
        return ""
    peer = strongest(found)
    methods = [preferred(found), peer, named(found, "Adam"), named(found, "SGD, cosine")]
    times = {c.method.name: f"{c.method.name} {mean(to_peer(data, found, c.runs)):.0f}" for c in methods}
    return (
        f"Samples from a drift to 95% of what {peer.method.name} knew before it: {', '.join(times.values())}. All are "
        "tuned on the first part, before any drift: a rate that is best there may be a bad one later."
    )


def pick(found: Sequence[Compared]) -> list[Compared]:
    """Up to five methods to draw: the preferred of ours, Adam, the strongest of the others, momentum, SGD."""
    names = [
        preferred(found).method.name,
        "Adam",
        strongest(found).method.name,
        "momentum 0.9",
        "SGD, cosine",
        "SGD",
    ]
    return [named(found, name) for name in dict.fromkeys(names)][:5]


def band(found: Compared) -> Band:
    """Over the seeds; a curve ends where the first seed that diverged ends."""
    points = list(zip(*(r.curve for r in found.runs)))
    at = [interval([p[1] for p in point]) for point in points]
    halves = [0.0 if math.isinf(i.half) else i.half for i in at]
    low = [max(0.0, i.mean - h) for i, h in zip(at, halves)]
    high = [min(1.0, i.mean + h) for i, h in zip(at, halves)]
    return Band(found.method.name, [point[0][0] for point in points], [i.mean for i in at], low, high)


def chunk_table(data: Chunks, found: Sequence[Compared]) -> Table:
    if len(data.chunks) == 1:
        return Table(("method", "rate", "accuracy, %"), [(c.method.name, rate_of(c), shown(scores(c))) for c in found],
                     NOTES, ours_of(found))  # fmt: skip
    rows = [
        (c.method.name, rate_of(c), shown([r.final or 0.0 for r in c.runs]), shown([r.mean or 0.0 for r in c.runs]))
        for c in found
    ]
    columns = ("method", "rate", "accuracy in the end, %", "mean over passes, %")
    return Table(columns, rows, NOTES, ours_of(found))


def stream_table(stream: Stream, found: Sequence[Compared], first: float) -> Table:
    drifts = bool(found[0].runs[0].recovery)
    repeated = stream.no_change(first)
    rows: list[tuple] = [
        ("repeat the last label", None, f"{100 * repeated:.2f}", "0.00", None, *([None, None] if drifts else []))
    ]
    for c in found:
        row = [
            c.method.name, rate_of(c), shown(scores(c)), f"{kappa_temporal(mean(scores(c)), repeated):.2f}",
            shown([r.near_future or 0.0 for r in c.runs]),
        ]  # fmt: skip
        if drifts:
            row += [f"{mean([r.recovery or 0.0 for r in c.runs]):.0f}", f"{mean(to_peer(stream, found, c.runs)):.0f}"]
        rows.append(tuple(row))
    recovery = ("to own level", "to the peer’s level") if drifts else ()
    columns = ("method", "rate", "accuracy, %", "kappa", "ahead, %", *recovery)
    note = (
        " Kappa: 0 for repeating the last label. Ahead: accuracy some batches later, which cannot be won by repeating "
        "labels."
    )
    if drifts:
        note += (
            " To a level: samples after a drift until 95% of the accuracy before it, its own (a method that knew "
            f"little has little to recover) or that of {strongest(found).method.name}; all samples up to the next "
            "drift where that never happens."
        )
    return Table(columns, rows, NOTES + note, [i + 1 for i in ours_of(found)])


def cost_table(found: Sequence[Compared]) -> Table:
    """How sensitive and how dear."""
    rows = []
    for c in found:
        rates, values = [r.rate for r in c.grid], [r.score for r in c.grid]
        seconds = mean([r.seconds for r in c.runs])
        passes = [f"{mean([float(getattr(r, name)) for r in c.runs]):.0f}" for name in ("forward", "backward")]
        rows.append((
            c.method.name, f"{area_of(c):.1f}", f"{width(rates, values):.1f}", f"{seconds:.2f}", *passes,
            f"{100 * mean([r.missed for r in c.runs]):.1f}",
        ))  # fmt: skip
    caption = (
        "Area: mean accuracy over the logarithm of all rates tried; decades: width of the rates within a point of the "
        "best. Seconds and passes of learning, tuned, and the batches of a stream that came while it was learning; "
        "means over the seeds."
    )
    return Table(
        ("method", "area", "decades", "seconds", "forward", "backward", "missed, %"), rows, caption, ours_of(found)
    )


NOTES = (
    "Accuracy: mean over seeds with 95% interval (Student). * marks a rate at an end of those tried: a better one may "
    "lie beyond."
)


def to_peer(stream: Stream, found: Sequence[Compared], runs: Sequence[Record]) -> list[float]:
    """For every seed, the mean time from a drift to the level that the strongest peer had in the window before it."""
    times = []
    for peer, run in zip(strongest(found).runs, runs):
        levels = [next(value for end, value in reversed(peer.curve) if end <= drift) for drift in stream.drifts]
        times.append(mean(reached(run.curve, stream.drifts, levels, len(stream.x))))
    return times


def rate_of(found: Compared) -> str:
    rates = [r.rate for r in found.grid]
    at_end = len(rates) > 1 and found.chosen.rate in (rates[0], rates[-1])
    return f"{found.chosen.rate:.2g}{'*' if at_end else ''}"


def area_of(found: Compared) -> float:
    return 100 * area([r.rate for r in found.grid], [r.score for r in found.grid])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ours_of(found: Sequence[Compared]) -> list[int]:
    return [i for i, c in enumerate(found) if c.method.role == "ours"]


# -- one configuration for all tasks -----------------------------------------------------------------------------------


def losses(found: Found, method: str, rate: int, chosen_by: bool = False) -> dict[str, float]:
    """Accuracy of a method at the rate of this index less that of Adam at its best rate for the task, in hindsight."""

    def of(record: Record) -> float:
        return record.chosen_by[0] if chosen_by else record.score

    return {task: of(named(c, method).grid[rate]) - max(map(of, named(c, "Adam").grid)) for task, c in found.items()}


class Shared:
    """One method at one rate on all tasks: the rate whose worst loss to Adam is least on the choosing samples;
    and over a window of `DECADES`, chosen alike."""

    def __init__(self, found: Found, method: str, ours: bool):
        self.method, self.ours = method, ours
        grid = named(next(iter(found.values())), method).grid
        rates = [r.rate for r in grid]
        known = [min(losses(found, method, i, True).values()) for i in range(len(rates))]
        at = max(range(len(rates)), key=lambda i: known[i])
        self.rate, self.gaps = rates[at], losses(found, method, at)
        per_decade = (len(rates) - 1) / math.log10(rates[-1] / rates[0]) if len(rates) > 1 else 0.0
        count = min(len(rates), 1 + math.ceil(DECADES * per_decade - 1e-9))
        start = max(range(len(rates) - count + 1), key=lambda i: min(known[i : i + count]))
        self.low, self.high = rates[start], rates[start + count - 1]
        self.worst = min(min(losses(found, method, i).values()) for i in range(start, start + count))


def shared_configurations(found: Found) -> list[Shared]:
    """Of every method that takes part in all tasks."""
    names = [{c.method.name for c in compared} for compared in found.values()]
    return [
        Shared(found, c.method.name, c.method.role == "ours")
        for c in next(iter(found.values()))
        if all(c.method.name in known for known in names)
    ]


def shared_section(found: Found, shared: Sequence[Shared]) -> Section:
    rows = [
        (s.method, f"{s.rate:.2g}", *(f"{100 * gap:+.1f}" for gap in s.gaps.values()),
         f"{100 * min(s.gaps.values()):+.1f}", f"{100 * s.worst:+.1f}", f"{s.low:.2g} to {s.high:.2g}")
        for s in shared
    ]  # fmt: skip
    caption = (
        "Points of accuracy, less those of Adam at the rate that was best for each task in hindsight. One rate for all "
        "tasks, chosen by the worst loss on the choosing samples; one seed."
    )
    columns = ("method", "rate", *found, "worst", "worst over three decades", "decades")
    table = Table(columns, rows, caption, [i for i, s in enumerate(shared) if s.ours])
    return Section("One configuration, never retuned", goal(shared), (table,))


def goal(shared: Sequence[Shared]) -> str:
    ours = max((s for s in shared if s.ours), key=lambda s: s.worst)
    peer = max((s for s in shared if not s.ours), key=lambda s: s.worst)
    met = "met" if ours.worst >= -POINTS else "not met"
    return (
        f"The goal is to lose at most {100 * POINTS:.1f} points to Adam at its best rate for every task, at every rate "
        f"of three decades. It is {met}: the best of ours in this respect, {ours.method}, loses "
        f"{-100 * ours.worst:.1f} points at its worst; of the others {peer.method} is best, with "
        f"{-100 * peer.worst:.1f}."
    )


# -- where ours lose -------------------------------------------------------------------------------------------------


def lost_section(found: Found, shared: Sequence[Shared]) -> Section:
    """Every one of ours beside the strongest peer, task by task."""
    names = [s.method for s in shared if s.ours]
    peers = {task: strongest(compared) for task, compared in found.items()}
    gained = {(n, task): gain(named(c, n), peers[task]) for n in names for task, c in found.items()}
    lost = {key for key, by in gained.items() if by.mean < -by.half}
    rows = [(n, *(signed(gained[n, task]) + (", worse" if (n, task) in lost else "") for task in found)) for n in names]
    areas = []
    for task, compared in found.items():
        ours, peer = (max((c for c in compared if c.method.role == role), key=area_of) for role in ("ours", "other"))
        if area_of(ours) < area_of(peer):
            areas.append(
                f"on {task}, {ours.method.name} with {area_of(ours):.1f} to {area_of(peer):.1f} of {peer.method.name}"
            )
    text = (
        f"{len(lost)} of {len(gained)} differences are certain, at 95% over the seeds, and against ours. Less area "
        f"over the rates than the best peer: {'; '.join(areas) or 'nowhere'}. {goal(shared)}"
    )
    caption = (
        "Points of accuracy, less those of " + ", ".join(f"{c.method.name} on {t}" for t, c in peers.items()) + "."
    )
    return Section("Where ours lose", text, (Table(("method", *found), rows, caption),))


def signed(value: Interval) -> str:
    return f"{value.mean:+.2f}" + ("" if math.isinf(value.half) else f" ± {value.half:.2f}")


# -- the answer ------------------------------------------------------------------------------------------------------


def headline(found: Found) -> str:
    won, lost, open_ = [], [], []
    for task, compared in found.items():
        gained = gain(preferred(compared), strongest(compared))
        (won if gained.mean > gained.half else lost if gained.mean < -gained.half else open_).append(task)
    said = (("better on", won), ("worse on", lost), ("not told apart on", open_))
    parts = [f"{name} {', '.join(those)}" for name, those in said if those]
    return f"Ours beside the best peer in hindsight: {'; '.join(parts)}"


def facts(found: Found) -> dict[str, float | str]:
    return {f"{task}, ours and best peer, %": f"{100 * mean(scores(preferred(c))):.1f} / "
            f"{100 * mean(scores(strongest(c))):.1f}" for task, c in list(found.items())[:4]}  # fmt: skip
