"""What is proved of optimisers as filters.

Limits are learning rates times the greatest slope L of the gradient, for a leading coefficient of one: the rate of
Nesterov's method in torch, say, is the one here divided by 1 + momentum. "positive real" is the margin of the filter
with the integrator, "strictly" the one without. "any slopes" is the circle criterion, for gradients that change in
every step; "quadratic" is Jury's test, for one fixed quadratic. Rates are for functions with m = 1 / kappa, L = 1 and
methods tuned as in their papers; "theory" is the published rate.
"""

from __future__ import annotations

import math

from benchmarks.runner.curves import HEIGHT, STYLE, WIDTH
from benchmarks.runner.results import Picture, Result, Table, Target
from benchmarks.runner.timing import timed
from firmly.errors import NotCertifiable
from firmly.lab.charts import Line, line_chart
from firmly.optim import AdaptationGain, certified_rate, nearest_gain, presets, verified

FILTERS = {
    "gradient": AdaptationGain(),
    "heavy ball 1/3": presets.heavy_ball(1 / 3 - 1e-12).gain,
    "heavy ball 0.9": presets.heavy_ball(0.9).gain,
    "Nesterov 0.5": presets.nesterov(0.5 - 1e-12).gain,
    "Nesterov 0.9": presets.nesterov(0.9).gain,
    "integral and proportional": AdaptationGain((-0.5,)),
    "Tustin 0.9": presets.tustin(0.9).gain,
    "second order": AdaptationGain((0.5, 0.2), (0.5, 0.25)),
    "nearest to heavy ball 0.9": nearest_gain(presets.heavy_ball(0.9).gain, "pr"),
    "nearest to Nesterov 0.9": nearest_gain(presets.nesterov(0.9).gain, "pr"),
}
LINES = "polyline.other { fill: none; }\n"
DRAWN = {"heavy ball 0.9": "other", "Nesterov 0.9": "twin", "nearest to Nesterov 0.9": "ours"}


def measure(quick: bool) -> Result:
    filters = [
        {
            "filter": name,
            "zeros and poles": ", ".join(f"{v:.3g}" for v in (gain.zeros[0], gain.zeros[1], *gain.poles)),
            "strictly": gain.spr_margin(),
            "positive real": gain.pr_margin(),
            "DC gain": gain.dc_gain(),
            "any slopes": gain.sector_limit(),
            "quadratic": gain.quadratic_limit(),
        }
        for name, gain in FILTERS.items()
    ]
    rates, errors = [], []
    for kappa in (10.0, 100.0) if quick else (10.0, 100.0, 1e4):
        for name, (preset, lr, theory) in tuned(kappa).items():
            proved, seconds = timed(lambda p=preset, t=lr, k=kappa: prove(p, t, 1 / k))
            rates.append({"kappa": kappa, "method": name, "proved": proved, "theory": theory, "seconds": seconds})
            if theory is not None and name != "Nesterov" and proved is not None:
                errors.append(proved - theory)
    slowest = max(float(row["seconds"]) for row in rates)
    refused = next(row["proved"] is None for row in rates if row["method"] == "heavy ball" and row["kappa"] == 100)
    targets = [
        Target("proved rates at most 0.002 above theory, never below", f"{min(errors):.1e} to {max(errors):.1e}",
               0 <= min(errors) and max(errors) <= 2e-3),
        Target("heavy ball refused at kappa = 100", "refused" if refused else "a rate", refused),
        Target("each within 2 s", f"{slowest:.2f} s", slowest < 2),
    ]  # fmt: skip
    note = (
        "No rate is proved where there is none: heavy ball with Polyak's tuning cycles on some function of kappa 100."
    )
    return Result([Table("Filters", filters), Table("Rates", rates, note)], targets, pictures())


def prove(preset: presets.Preset, lr: float, m: float) -> float | None:
    """The certified rate, verified; None where it is refused."""
    try:
        rate = certified_rate(preset.gain, lr * preset.scale, m, 1.0)
    except NotCertifiable:
        return None
    assert verified(rate, preset.gain, lr * preset.scale, m, 1.0)
    return rate.rho


def tuned(kappa: float) -> dict[str, tuple[presets.Preset, float, float | None]]:
    """(method, learning rate, published rate) for m = 1 / kappa and L = 1."""
    s, m = math.sqrt(kappa), 1 / kappa
    r = 1 - 1 / s
    return {
        "gradient, 1 / L": (presets.gradient(), 1.0, 1 - m),
        "gradient, 2 / (L + m)": (presets.gradient(), 2 / (1 + m), (1 - m) / (1 + m)),
        "Nesterov": (presets.nesterov((s - 1) / (s + 1)), 1.0, math.sqrt(r)),
        "triple momentum": (presets.triple_momentum(r * r / (2 - r), r * r / ((1 + r) * (2 - r))), 1 + r, r),
        "heavy ball": (presets.heavy_ball(((s - 1) / (s + 1)) ** 2), 4 / (1 + math.sqrt(m)) ** 2, None),
    }


def pictures() -> list[Picture]:
    frequency = [math.pi * 10 ** (-2.5 * (1 - k / 149)) for k in range(150)]
    magnitudes, phases = [], []
    for name, role in DRAWN.items():
        plain, summed = (FILTERS[name].response(frequency, integrator) for integrator in (False, True))
        magnitudes.append(Line(name, list(zip(frequency, plain.magnitude, strict=True)), role))
        degrees = [math.degrees(angle) for angle in summed.phase]
        phases.append(Line(name, list(zip(frequency, degrees, strict=True)), role))
    phases[0] = Line("-90 degrees", [(frequency[0], -90.0), (math.pi, -90.0)], "other")
    slow = "What filters do to slow (left) and fast changes of the gradient"
    above = "Positive real filters stay above -90 degrees"
    return [
        picture("magnitude", magnitudes, "|H|", slow, True),
        picture("phase", phases, "phase with the integrator, degrees", above, False),
    ]


def picture(name: str, lines: list[Line], y: str, caption: str, log_y: bool) -> Picture:
    drawn = str(line_chart(lines, WIDTH, HEIGHT, "frequency, radians per step", y, True, False, caption, log_y))
    opening, _, rest = drawn.partition(">")
    return Picture(name, caption, f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}{LINES}</style>{rest}\n')
