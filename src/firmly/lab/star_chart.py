"""The star of sensitivities: one ray for every group of inputs, as long as the network is sensitive to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from firmly.lab.charts import Mark, at_least, at_most, svg, text


def star_chart(marks: Sequence[Mark], width: int, lower: Sequence[float] = (), label: str = "") -> Markup:
    """A star plot (Gupta et al., Front. Signal Process. 2022) of bounds of the sensitivity per group.

    `marks` are the upper bounds, one ray each, drawn as a polygon; `lower` the values attained, dots on the same rays.
    Three groups or more make a star; with fewer the rays alone are drawn.
    """
    room = 92 if width < 500 else 120  # for the names
    radius = width / 2 - room
    centre = (width / 2, radius + 42)
    top = max((m.value for m in marks if math.isfinite(m.value)), default=1.0) or 1.0

    def place(index: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(marks) - math.pi / 2
        length = radius * min(value, top) / top
        return centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)

    parts = []
    for share in (0.25, 0.5, 0.75, 1.0):
        corners = " ".join("{:.1f},{:.1f}".format(*place(i, share * top)) for i in range(len(marks)))
        parts.append(f'<polygon class="grid" fill="none" points="{corners}"/>')
    for index, mark in enumerate(marks):
        x, y = place(index, top)
        parts.append(f'<line class="grid" x1="{centre[0]:.1f}" y1="{centre[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
        dx, dy = x - centre[0], y - centre[1]
        anchor = "middle" if abs(dx) < 0.2 * radius else "start" if dx > 0 else "end"
        at = (x + 10 * dx / radius, y + 14 * dy / radius + (4 if anchor != "middle" else 0 if dy < 0 else 8))
        shown = at_most(mark.value) if not lower else f"{at_least(lower[index])} to {at_most(mark.value)}"
        parts.append(text(*at, mark.label, "strong", anchor))
        parts.append(text(at[0], at[1] + (-14 if anchor == "middle" and dy < 0 else 14), shown, "muted", anchor))
    corners = " ".join("{:.1f},{:.1f}".format(*place(i, m.value)) for i, m in enumerate(marks))
    parts.append(f'<polygon class="band" points="{corners}"/>')
    for index, mark in enumerate(marks):
        x, y = place(index, mark.value)
        parts.append(f'<circle class="{mark.role}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
    for index, value in enumerate(lower):
        x, y = place(index, value)
        parts.append(f'<circle class="other" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return svg(parts, width, 2 * radius + 84, label)
