"""Methods at an equal DC gain, and what is proved of their filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import SGD

from firmly.lab.charts import Line, number
from firmly.lab.experiments.optim_data import Chunks, Stream
from firmly.lab.experiments.optim_methods import PID, POSITIVE_REAL, TUSTIN, Method
from firmly.lab.experiments.optim_page import mean, named, shown
from firmly.lab.experiments.optim_runs import Compared, Kept, Size
from firmly.lab.page import Chart, Section, Table
from firmly.optim import presets
from firmly.optim.presets import Preset

HEAVY = presets.heavy_ball(0.9)
FILTERS: dict[str, Preset] = {
    "SGD": presets.gradient(),
    "momentum 0.9": HEAVY,
    "Nesterov 0.9": presets.nesterov(0.9),
    "PID (3, 100, 0.9)": PID,
    "Dag, heavy ball 1/3": POSITIVE_REAL,
    "Dag, Tustin 0.9": TUSTIN,
}


def dc_gain(preset: Preset) -> float:
    """How much farther than its learning rate a constant gradient moves the parameters."""
    return preset.scale * preset.gain.dc_gain()


def equal_gain_section(
    task: str, data: Chunks | Stream, found: Sequence[Compared], rate: float, seeds: Sequence[int], size: Size,
    kept: Kept,
) -> Section:  # fmt: skip
    """Scores over rate times DC gain; and the published comparison of PID with momentum beside its fair one."""
    lines = [
        Line(name, [(r.rate * dc_gain(preset), 100 * r.score) for r in named(found, name).grid],
             "ours" if name.startswith("Dag") else "other")
        for name, preset in FILTERS.items()
    ]  # fmt: skip
    chart = Chart(
        lines,
        "learning rate × DC gain",
        "accuracy in percent",
        f"{task}, the seed of the choice",
        log_x=True,
        dots=True,
    )
    effective = rate * dc_gain(PID)
    heavy = Method("momentum 0.9", lambda p, lr: SGD(p, lr, momentum=0.9))
    rows, means = [], {}
    compared = (
        ("momentum, same rate", heavy, rate, HEAVY),
        ("PID", Method("PID (3, 100, 0.9)", PID), rate, PID),
        ("momentum, same DC gain", heavy, effective / dc_gain(HEAVY), HEAVY),
        ("SGD, same DC gain", Method("SGD", SGD), effective, presets.gradient()),
    )
    for name, method, lr, preset in compared:
        runs = [kept.run(data, method, lr, seed, size) for seed in seeds]
        early, final = [r.curve[0][1] for r in runs], [r.score for r in runs]
        means[name] = mean(early), mean(final)
        rows.append((name, f"{lr:.3g}", number(lr * dc_gain(preset)), shown(early), shown(final)))
    columns = ("method", "rate", "rate × DC gain", "first point of the curve, %", "accuracy, %")
    published, fair = (
        [100 * (a - b) for a, b in zip(means["PID"], means[f"momentum, same {what}"])] for what in ("rate", "DC gain")
    )
    text = (
        "A constant gradient sees the learning rate times the DC gain of the method’s filter: 10 for momentum 0.9, "
        f"{dc_gain(PID):.0f} for the published PID. At one learning rate, PID less momentum is {published[0]:+.1f} "
        f"points at the first point of the curve and {published[1]:+.1f} in the end; at one DC gain, {fair[0]:+.1f} "
        f"and {fair[1]:+.1f}. In the chart, methods lie near one curve while rates are small, and part where the first "
        "becomes unstable."
    )
    return Section("At equal DC gain", text, (chart, Table(columns, rows, f"{task}, {len(seeds)} seeds.")))


def proof_section() -> Section:
    """Closed forms for every filter, and what they do not say about networks."""
    rows = []
    for name, preset in FILTERS.items():
        gain, scale = preset.gain, preset.scale
        rows.append((
            name, number(dc_gain(preset)), f"{gain.spr_margin():.3f}", f"{gain.pr_margin():.3f}",
            _below(gain.sector_limit() / scale), _below(gain.quadratic_limit() / scale),
        ))  # fmt: skip
    columns = ("method", "DC gain", "SPR margin", "PR margin", "rate × L, any change", "rate × L, fixed quadratic")
    text = (
        "What is proved is about the filter between gradients and updates. SPR margin > 0: slow adaptation is stable, "
        "by averaging. PR margin ≥ 0: the a-posteriori step of a linear regression is stable at every rate. The last "
        "two columns are rates below which explicit steps are stable: for gradients with slopes in [0, L] that change "
        "as they like, and on one fixed quadratic. A network’s loss is neither convex nor of known smoothness: no "
        "number here bounds a rate for the networks above, and of Adam, RMSprop, Feedback and the packages nothing is "
        "proved."
    )
    return Section("What is proved", text, (Table(columns, rows, ours=(4, 5)),))


def _below(limit: float) -> str:
    """A limit in three digits, rounded down."""
    digits = 2 - math.floor(math.log10(limit))
    return f"{math.floor(limit * 10**digits) / 10**digits:.{max(0, digits)}f}"
