"""Charts of the report as inline SVG, in colours that the page's style sheet sets.

Every chart is drawn for a given width in CSS pixels, so that its text keeps one size: the page shows a wide and a
narrow drawing by turns. Classes name the roles: `ours`, `twin`, `other` colour marks, `muted` and `strong` texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape


class Mark(NamedTuple):
    """One value of a chart: its label, where it lies, and the role that colours it."""

    label: str
    value: float
    role: str = "other"
    note: str = ""


class Line(NamedTuple):
    """One curve of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    role: str = "other"


class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        if self.high <= self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale: 1, 2, 5 times powers of ten."""
        if self.log:
            span = self.high - self.low
            steps = (1, 2, 5) if span < 1.6 else (1, 3) if span < 3 else (1,)
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            stride = max(1, math.ceil(len(powers) / 7))
            values = [m * 10.0**p for p in powers if p % stride == 0 for m in steps]
            return [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
        raw = (self.high - self.low) / count
        size = 10 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def bracket_chart(
    lower: float, upper: float, marks: Sequence[Mark], width: int, beyond: Sequence[Mark] = (), label: str = ""
) -> Markup:
    """The certified bracket lower..upper and every method's bound, one row each, on one logarithmic axis."""
    rows = [*marks, *beyond]
    names = 118 if width < 500 else 190
    left, right = names + 6, width - (82 if width < 500 else 92)
    values = [v for v in (lower, upper, *(m.value for m in rows)) if math.isfinite(v) and v > 0]
    low, high = min(values) / 1.25, max(values) * 1.25
    scale = Scale(low, high, left, right, log=True)
    top, step = 34, 30
    height = top + step * len(rows) + 34
    parts = [
        f'<rect class="band" x="{scale(lower):.1f}" y="{top - 14}" '
        f'width="{max(2.0, scale(upper) - scale(lower)):.1f}" height="{step * len(rows) + 8}"/>'
    ]
    anchor, at = ("start", scale(lower)) if scale(lower) < (left + right) / 2 else ("end", scale(upper))
    parts.append(text(at, 12, f"the truth: {at_least(lower)} to {at_most(upper)}", "strong", anchor))
    for tick in thinned(scale.ticks(), scale, 48):
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top - 10}" x2="{x:.1f}" y2="{height - 30}"/>')
        parts.append(text(x, height - 14, number(tick), "muted", "middle"))
    for index, mark in enumerate(rows):
        y = top + step * index + 6
        parts.append(text(names, y + 4, mark.label, "", "end"))
        if math.isfinite(mark.value) and mark.value > 0:
            parts.append(f'<line class="stem {mark.role}" x1="{left}" y1="{y}" x2="{scale(mark.value):.1f}" y2="{y}"/>')
            parts.append(f'<circle class="{mark.role}" cx="{scale(mark.value):.1f}" cy="{y}" r="5"/>')
        parts.append(text(width - 2, y + 4, mark.note or number(mark.value), "strong", "end"))
    return svg(parts, width, height, label)


def line_chart(
    lines: Sequence[Line], width: int, height: int, x_name: str, y_name: str, log_x: bool = False, dots: bool = False,
    label: str = "", log_y: bool = False,
) -> Markup:  # fmt: skip
    """Curves with their names at their ends, or in a legend above where there is no room for that."""
    points = [p for line in lines for p in line.points]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    names = max((len(line.label) for line in lines), default=0)
    at_ends = len(lines) == 1 or 12 + 7 * names <= width / 3
    above, top = ([], 26.0) if at_ends else legend(lines, width)
    top = top if at_ends else top + 46
    height = height + round(top - 26)
    left, right, bottom = 48, width - (min(170, 12 + 7 * names) if at_ends else 14), height - 40
    pad = 1.15 if log_x else 1
    x = Scale(min(xs) / pad, max(xs) * pad, left, right, log_x)
    if log_y:
        y = Scale(min(ys) / 1.3, max(ys) * 1.3, bottom, top, log=True)
    else:
        margin = (max(ys) - min(ys)) * 0.08 or 0.5
        y = Scale(min(ys) - margin, max(ys) + margin, bottom, top)
    parts = [*above, text(0, top - 14, y_name, "muted", "start"), text(right, height - 4, x_name, "muted", "end")]
    for tick in thinned(y.ticks(4), y, 18):
        parts.append(f'<line class="grid" x1="{left}" y1="{y(tick):.1f}" x2="{right}" y2="{y(tick):.1f}"/>')
        parts.append(text(left - 6, y(tick) + 4, number(tick), "muted", "end"))
    whole = all(float(a).is_integer() for a in xs)
    for tick in thinned([t for t in x.ticks(5) if not whole or float(t).is_integer()], x, 30):
        parts.append(text(x(tick), bottom + 18, number(tick), "muted", "middle"))
    heights = spread([y(line.points[-1][1]) for line in lines], 16)
    for line, end in zip(lines, heights):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="{line.role}" points="{path}"/>')
        if dots:
            parts += [f'<circle class="{line.role}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4"/>' for a, b in line.points]
        if at_ends:
            parts.append(text(right + 8, end + 4, line.label, line.role, "start"))
    return svg(parts, width, height, label)


def dot_chart(names: Sequence[str], series: Sequence[Line], width: int, unit: str, label: str = "") -> Markup:
    """One row per name with a dot for each series; the points of a series are (row, value)."""
    left, right, step = 96, width - 14, 24
    values = [value for s in series for _, value in s.points]
    margin = (max(values) - min(values)) * 0.05 or 0.5
    scale = Scale(min(values) - margin, max(values) + margin, left, right)
    parts, top = legend(series, width)
    top += 34
    height = top + step * len(names) + 30
    ticks = thinned(scale.ticks(5), scale, 34)
    for tick in ticks:
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top - 12}" x2="{x:.1f}" y2="{height - 26}"/>')
        parts.append(text(x, height - 8, number(tick) + (f" {unit}" if tick == ticks[0] else ""), "muted"))
    for row, name in enumerate(names):
        y = top + step * row
        found = [scale(value) for s in series for r, value in s.points if r == row]
        parts.append(text(left - 12, y + 4, name, "", "end"))
        parts.append(f'<line class="stem" x1="{min(found):.1f}" y1="{y}" x2="{max(found):.1f}" y2="{y}"/>')
        for s in series:
            shown = [scale(value) for r, value in s.points if r == row]
            parts += [f'<circle class="{s.role}" cx="{x:.1f}" cy="{y}" r="4.5"/>' for x in shown]
    return svg(parts, width, height, label)


def legend(series: Sequence[Line], width: int) -> tuple[list[str], float]:
    """Dots with the names of the series, in as many lines as they need, and the height of the last line."""
    parts, x, y = [], 0.0, 10.0
    for s in series:
        size = 32 + 6.9 * len(s.label)
        if x > 0 and x + size > width:
            x, y = 0.0, y + 20
        parts.append(f'<circle class="{s.role}" cx="{x + 5:.0f}" cy="{y:.0f}" r="4.5"/>')
        parts.append(text(x + 15, y + 4, s.label, "", "start"))
        x += size
    return parts, y


def svg(parts: Sequence[str], width: int, height: float, label: str) -> Markup:
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, content: str, role: str = "", anchor: str = "middle") -> str:
    return f'<text class="{role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def thinned(ticks: Sequence[float], scale: Scale, distance: float) -> list[float]:
    """The ticks whose labels do not run into each other."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(scale(tick) - scale(kept[-1])) >= distance:
            kept.append(tick)
    return kept


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """The same positions, moved apart to at least `distance` in their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + distance)
    return moved


def at_most(value: float, digits: int = 3) -> str:
    """An upper bound for a reader: rounded up, so that the sentence stays true."""
    return number(_outward(value, digits, math.ceil), digits)


def at_least(value: float, digits: int = 3) -> str:
    """A lower bound for a reader: rounded down."""
    return number(_outward(value, digits, math.floor), digits)


def _outward(value: float, digits: int, rounding: Callable[[float], int]) -> float:
    if not math.isfinite(value) or value == 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return rounding(value / unit) * unit


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: three digits, thousands set apart, no needless exponent."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "no finite bound"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)) + 1e-12)
    if size >= 6 or size < -4:
        mantissa = value / 10.0**size
        power = str(size).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{power}" if abs(mantissa - 1) < 1e-9 else f"{mantissa:.{digits - 1}f}·10{power}"
    shown = f"{value:,.{max(0, digits - 1 - size)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown
