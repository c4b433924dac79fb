"""A linear model of a stream, sample by sample: a-posteriori steps beside logistic gradient steps, over their rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.lab.charts import Line
from firmly.lab.experiments.optim_data import Stream
from firmly.lab.experiments.optim_scores import kappa_temporal
from firmly.lab.page import Chart, Section, Table
from firmly.lab.study import Listener
from firmly.optim import AdaptationGain, ImplicitStep, presets

GAINS: dict[str, AdaptationGain] = {
    "a posteriori": presets.gradient().gain,
    "a posteriori, Tustin 0.9": presets.tustin(0.9).gain,
    "a posteriori, heavy ball 1/3": presets.heavy_ball(1 / 3).gain,
    "a posteriori, heavy ball 0.9": presets.heavy_ball(0.9).gain,
}
LOGISTIC = "logistic SGD"
DIVERGED = 1e290  # a parameter, soon not finite


class Swept(NamedTuple):
    """Prequential accuracies over rates."""

    rates: list[float]
    accuracies: list[float]

    @property
    def spread(self) -> float:
        return max(self.accuracies) - min(self.accuracies)


def regressors(x: Tensor) -> Tensor:
    """Features less their mean so far, over their deviation so far, and a one: (time, features + 1), float64."""
    x = x.double()
    count = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
    mean = x.cumsum(0) / count
    variance = ((x * x).cumsum(0) / count - mean * mean).clamp(min=0)
    scaled = (x - mean) / variance.sqrt().clamp(min=1e-6)
    return torch.cat([scaled, torch.ones_like(count)], 1)


def a_posteriori(phi: Tensor, signs: Tensor, gain: AdaptationGain, rates: Sequence[float]) -> Swept:
    """Regression of labels -1 and 1 by `ImplicitStep`, all rates at once.

    Where parameters pass `DIVERGED`, everything counts as an error from then on.
    """
    n = phi.shape[1]
    F = torch.tensor(list(rates), dtype=phi.dtype)[:, None, None] * torch.eye(n, dtype=phi.dtype)
    model = ImplicitStep(phi.new_zeros(len(rates), n), gain)
    right, lost = torch.zeros(len(rates), dtype=torch.int64), torch.zeros(len(rates), dtype=torch.bool)
    targets = signs.to(phi.dtype)[:, None].expand(-1, len(rates))
    for row, y in zip(phi.unbind(), targets.unbind()):
        wide = row.expand(len(rates), n)
        right += ((model.predict(wide) * y) > 0) & ~lost
        model.update(wide, y, F)
        if bool((gone := model.theta.abs().amax(-1) > DIVERGED).any()):
            lost |= gone
            for state in (model.theta, model.filtered, model.filtered_before):
                state[gone] = 0.0
    return Swept(list(rates), (right.double() / len(phi)).tolist())


def logistic(phi: Tensor, signs: Tensor, rates: Sequence[float]) -> Swept:
    """theta += rate (1 - sigmoid(s phi' theta)) s phi for labels s = -1, 1, all rates at once."""
    rate = torch.tensor(list(rates), dtype=phi.dtype)[:, None]
    theta = phi.new_zeros(len(rates), phi.shape[1])
    right = torch.zeros(len(rates), dtype=torch.int64)
    for row in (phi * signs.to(phi.dtype)[:, None]).unbind():
        margin = theta @ row
        right += margin > 0
        theta += rate * torch.sigmoid(-margin)[:, None] * row
    return Swept(list(rates), (right.double() / len(phi)).tolist())


def linear_section(stream: Stream, listen: Listener) -> Section:
    """Accuracy over rates that span four decades for the a-posteriori step, and three for logistic regression."""
    if stream.classes != 2:
        raise SettingsError(f"the linear model tells two classes apart, given {stream.classes}")
    phi, signs = regressors(stream.x), 2 * stream.labels - 1
    wide = [10 ** (k / 2) for k in range(-6, 3)]
    found: dict[str, Swept] = {}
    for k, (name, gain) in enumerate(GAINS.items()):
        listen("work", {"name": "linear models", "done": k, "total": len(GAINS) + 1})
        found[name] = a_posteriori(phi, signs, gain, wide)
    found[LOGISTIC] = logistic(phi, signs, wide)
    lines = [
        Line(name, [(rate, 100 * a) for rate, a in zip(*swept)], "ours" if name == "a posteriori" else "other")
        for name, swept in found.items()
    ]
    chart = Chart(lines, "rate", "prequential accuracy in percent", log_x=True, dots=True)
    rows = []
    for name, swept in found.items():
        gain = GAINS.get(name)
        best = max(swept.accuracies)
        rows.append((
            name, f"{100 * best:.1f}", f"{100 * min(swept.accuracies):.1f}", f"{100 * swept.spread:.1f}",
            f"{kappa_temporal(best, stream.no_change()):.2f}", None if gain is None else f"{gain.pr_margin():.3f}",
            None if gain is None else "every rate" if gain.pr() else limit(gain, phi),
        ))  # fmt: skip
    columns = ("method", "best, %", "worst, %", "spread", "kappa of the best", "PR margin", "proved stable")
    text = (
        f"{len(phi)} rows, six features standardised as they come, one bias; each row is predicted, then learnt from. "
        "Nothing is chosen: every rate is shown. Stable is meant for regression without noise: the sum of squared "
        "errors after the steps is bounded, whatever the regressors do. It is no statement about accuracy. Repeating "
        f"the last label reaches {100 * stream.no_change():.1f}%, and high rates come near to doing just that."
    )
    return Section("A linear model, sample by sample", text, (chart, Table(columns, rows, ours=(0, 1, 2))))


def limit(gain: AdaptationGain, phi: Tensor) -> str:
    """rate max|phi|^2 shortage < 1, rounded down to two digits."""
    bound = 1 / (float((phi * phi).sum(1).max()) * gain.shortage() * (1 + 1e-9))
    scale = 10 ** (1 - math.floor(math.log10(bound)))
    return f"rate < {math.floor(bound * scale) / scale:.2g}"
