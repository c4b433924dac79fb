"""An experiment that is not one image reconstruction: it runs as it likes and answers with a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from firmly import __version__
from firmly.lab.page import Chart, Page, Pictures, Table, cell, from_values, to_values
from firmly.lab.report import both, pictures_of, style
from firmly.lab.run_folder import RunFolder

Listener = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Study:
    """A question, its settings, and how it is answered.

    `told(settings)` says in one clause what is studied. `run(settings, run_folder, listen)` does the work, keeps in
    the folder what an interrupted run needs to go on, and returns the report. It tells its progress by
    `listen("work", {"name", "done", "total"})`, `listen("training", {"name", "step", "total", "loss"})` and
    `listen("note", {"text"})`.
    """

    name: str
    title: str
    presets: Mapping[str, Any]
    told: Callable[[Any], str]
    run: Callable[[Any, RunFolder, Listener], Page]


def run_study(study: Study, settings: Any, preset: str, run: RunFolder, listen: Listener) -> dict[str, Any]:
    """Run a study in a folder and write `results.json` and `report.html`; returns the results."""
    if getattr(settings, "threads", 0):
        torch.set_num_threads(settings.threads)
    torch.manual_seed(getattr(settings, "seed", 0))
    run.begin(study.name, preset, settings)
    began = time.monotonic()
    page = study.run(settings, run, listen)
    results = {
        "study": study.name,
        "title": study.title,
        "version": __version__,
        "seconds": round(time.monotonic() - began, 1),
        "page": to_values(page),
    }
    run.write_json("results.json", results)
    listen("report", {"path": write_page(run)})
    return results


def write_page(run: RunFolder) -> Path:
    """Write `report.html` of a study from its `results.json` and its pictures."""
    from jinja2 import Environment, StrictUndefined

    results = run.read_json("results.json")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = cell
    environment.tests |= {
        "table": lambda b: isinstance(b, Table),
        "chart": lambda b: isinstance(b, Chart),
        "gallery": lambda b: isinstance(b, Pictures),
    }
    template = environment.from_string((files("firmly.lab") / "study.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        r=results,
        page=from_values(results["page"]),
        draw=lambda chart: both(chart.svg),
        pictures=pictures_of(run),
        style=style(),
        environment=run.environment(),
        settings=run.settings_text(),
        folder=run.path.name,
    )
    return run.write("report.html", page)
