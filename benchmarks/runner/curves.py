"""Curves as SVG files that stand alone, in colours that can be read on white and on black."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.runner.results import Picture
from firmly.lab.charts import Line, line_chart

WIDTH, HEIGHT = 350, 230
STYLE = """
svg { font: 12.5px system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
text, .other { fill: #7b8289; }
.grid { stroke: #7b828955; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: #7b8289; }
polyline.ours { stroke: #12908c; } circle.ours, text.ours { fill: #12908c; }
polyline.twin { stroke: #c9692f; } circle.twin, text.twin { fill: #c9692f; }
"""


def curves(
    name: str, lines: Sequence[Line], x: str, y: str, caption: str, log_x: bool = True, log_y: bool = True
) -> Picture:
    """The picture of some lines; `x` and `y` name the axes, the caption says what it shows."""
    inline = str(line_chart(lines, WIDTH, HEIGHT, x, y, log_x, True, caption, log_y))
    opening, _, rest = inline.partition(">")
    return Picture(name, caption, f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n')
