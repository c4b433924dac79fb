"""The report of a study as plain values: sections of text, tables, charts and pictures, and their HTML page.

The values are kept in `results.json`, so that `firmly report RUN` can draw the page again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from firmly.errors import SettingsError
from firmly.lab.charts import Line, line_chart, number

HEIGHT = 280
COLOURS = ("other", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers (None: an empty cell); `ours` are the indices of the rows that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    ours: Sequence[int] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise SettingsError(f"the table has {len(self.columns)} columns; given a row of {len(row)}: {row}")


@dataclass(frozen=True)
class Chart:
    """Curves over one axis; those of the role "other" get a colour each. Points that have no place are left out."""

    lines: Sequence[Line]
    x: str
    y: str
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    dots: bool = False

    def __post_init__(self) -> None:
        if not any(self.drawn()):
            raise SettingsError(f"the chart of {self.y!r} over {self.x!r} has no finite point to draw")

    def drawn(self) -> list[Line]:
        """The lines with the points that the axes can show, in colours that differ."""
        shown, others = [], iter(COLOURS * len(self.lines))
        for label, points, role in self.lines:
            kept = [(float(a), float(b)) for a, b in points if self._fits(a, self.log_x) and self._fits(b, self.log_y)]
            if kept:
                shown.append(Line(label, kept, next(others) if role == "other" else role))
        return shown

    def svg(self, width: int) -> Markup:
        label = self.caption or f"{self.y} over {self.x}"
        return line_chart(self.drawn(), width, HEIGHT, self.x, self.y, self.log_x, self.dots, label, self.log_y)

    @staticmethod
    def _fits(value: float | str, log: bool) -> bool:
        # a value that JSON could not hold has become its name
        return not isinstance(value, str) and math.isfinite(value) and (not log or value > 0)


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side: the name of a PNG under `pictures/` in the run folder, and what it shows."""

    items: Sequence[tuple[str, str]]
    caption: str = ""
    columns: Literal[2, 3] = 3


Block = Table | Chart | Pictures


@dataclass(frozen=True)
class Section:
    """One heading with its text and what is drawn below it."""

    title: str
    text: str
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """What a study found: a sentence, a paragraph, sections, and up to four numbers to show first."""

    headline: str
    summary: str
    sections: Sequence[Section]
    facts: Mapping[str, float | str] = field(default_factory=dict)


def to_values(page: Page) -> dict[str, Any]:
    """The page as JSON can hold it."""
    sections = [
        {"title": s.title, "text": s.text, "blocks": [{"kind": type(b).__name__, **_values(vars(b))} for b in s.blocks]}
        for s in page.sections
    ]
    return {**_values(vars(page)), "sections": sections}


def from_values(values: Mapping[str, Any]) -> Page:
    """The page that `to_values` wrote."""
    kinds = {kind.__name__: kind for kind in (Table, Chart, Pictures)}
    sections = []
    for section in values["sections"]:
        blocks = [dict(block) for block in section["blocks"]]
        for block in blocks:
            if block["kind"] == "Chart":
                block["lines"] = [Line(*line) for line in block["lines"]]
        made = tuple(kinds[block.pop("kind")](**block) for block in blocks)
        sections.append(Section(section["title"], section["text"], made))
    return Page(values["headline"], values["summary"], tuple(sections), values["facts"])


def cell(value: Any) -> str:
    """A cell of a table or a fact, as text."""
    if value is None:
        return ""
    return number(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _values(value: Any) -> Any:
    """Plain lists, dicts, texts and numbers; numbers that JSON cannot hold become their names."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return number(value)
    if isinstance(value, Mapping):
        return {str(k): _values(v) for k, v in value.items() if k != "sections"}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_values(v) for v in value]
    return value
