"""What a claim returns, and the files written from it: JSON for programs, Markdown and SVG for the documentation."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of equal keys; a cell None was not measured, and the note says why."""

    title: str
    rows: list[dict[str, Cell]]
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A promise, what was measured, and whether it was kept (None: could not be measured)."""

    text: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Picture:
    """A drawing, what it shows in words, and the name of its file after that of the claim."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Result:
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A result with where it comes from; the first line of `description` is its title."""

    claim: str
    description: str
    command: str
    machine: dict[str, str | int | float]
    seconds: float
    result: Result


def write(run: Run, folder: Path) -> list[Path]:
    """Write CLAIM.json, CLAIM.md and CLAIM-NAME.svg for every picture into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = asdict(run)
    facts.pop("description")
    facts["result"].pop("pictures")
    contents = {f"{run.claim}.json": json.dumps(facts, indent=1) + "\n", f"{run.claim}.md": markdown(run)}
    contents |= {f"{run.claim}-{picture.name}.svg": picture.svg for picture in run.result.pictures}
    paths = []
    for name, content in contents.items():
        path = folder / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(content)
        os.replace(temporary, path)
        paths.append(path)
    return paths


def markdown(run: Run) -> str:
    """The page of a run."""
    title, _, text = run.description.strip().partition("\n")
    parts = [f"## {title.rstrip('.')}", text.strip()]
    if run.result.targets:
        verdict = {True: "yes", False: "**no**", None: "not measured"}
        parts.append(
            grid([{"target": t.text, "measured": t.measured, "met": verdict[t.met]} for t in run.result.targets])
        )
    if run.result.pictures:
        parts.append("\n".join(f"![{p.caption}]({run.claim}-{p.name}.svg)" for p in run.result.pictures))
    for table in run.result.tables:
        parts += [f"**{table.title}**", grid(table.rows), table.note]
    facts = ", ".join(f"{key} {value}" for key, value in run.machine.items())
    parts.append(f"Measured with `{run.command}` in {run.seconds:.0f} s: {facts}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(rows: list[dict[str, Cell]]) -> str:
    """A Markdown table; numbers to the right."""
    names = list(rows[0])
    numeric = [any(isinstance(row[name], int | float) for row in rows) for name in names]
    lines = [names, ["--:" if right else "---" for right in numeric]]
    lines += [[shown(name, row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(column: str, cell: Cell) -> str:
    """Three digits of what is timed or counted in bytes, five of what is proved."""
    if cell is None:
        return "–"
    if not isinstance(cell, float):
        return str(cell)
    if column.startswith(("seconds", "ms", "MiB", "ratio")):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return f"{cell:.5g}"
