"""Studies: their page survives JSON, their report draws all blocks, and the command line runs them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from firmly.cli import app
from firmly.errors import SettingsError
from firmly.lab import experiments
from firmly.lab.charts import Line
from firmly.lab.page import Chart, Page, Pictures, Section, Table, from_values, to_values
from firmly.lab.pictures import png
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Study, run_study, write_page


@dataclass(frozen=True)
class Settings:
    count: int = 3
    seed: int = 0


def answer(settings, run, listen):
    for done in range(settings.count):
        listen("work", {"name": "counting", "done": done + 1, "total": settings.count})
    listen("note", {"text": "counted"})
    run.write("pictures/ramp.png", png(torch.linspace(0, 1, 64).reshape(1, 8, 8)))
    lines = [
        Line("ours", [(1, 1e-1), (2, 1e-3), (3, 0.0)], "ours"),
        Line("a", [(1, 2.0), (2, 1.0)]),
        Line("b", [(1, 3)]),
    ]
    table = Table(
        ("method", "error", "bound"), [("ours", 1.5, None), ("theirs", torch.tensor(2.0), math.inf)], ours=(0,)
    )
    sections = (
        Section("Numbers", "First.\n\nSecond <b>.", (table, Chart(lines, "depth", "gap", log_y=True, dots=True))),
        Section("Pictures", "A ramp.", (Pictures([("ramp", "from black to white")]),)),
    )
    return Page("Counting works", f"It counted to {settings.count}.", sections, {"count": settings.count})


STUDY = Study("counting", "Counting", {"smoke": Settings(2), "default": Settings()}, lambda s: "numbers", answer)


def test_a_page_survives_json(tmp_path):
    page = answer(Settings(), RunFolder(tmp_path), lambda stage, event: None)
    back = from_values(to_values(page))
    assert to_values(back) == to_values(page)
    assert back.sections[0].blocks[0].rows[1][2] == "no finite bound"


def test_a_study_writes_its_report(tmp_path):
    run = RunFolder(tmp_path)
    heard = []
    results = run_study(STUDY, Settings(2), "smoke", run, lambda stage, event: heard.append(stage))
    html = (run / "report.html").read_text()
    assert results["page"]["headline"] in html and "Second &lt;b&gt;." in html
    assert html.count("<svg") == 2 and "data:image/png" in html
    assert heard == ["work", "work", "note", "report"]
    (run / "report.html").unlink()
    write_page(run)
    assert (run / "report.html").read_text() == html


def test_lines_of_a_chart_differ_and_points_without_a_place_are_left_out():
    chart = Chart([Line("a", [(1, 0.0), (2, 1.0)]), Line("b", [(1, math.nan), (1, 2.0)])], "x", "y", log_y=True)
    a, b = chart.drawn()
    assert a.points == [(2.0, 1.0)] and b.points == [(1.0, 2.0)] and a.role != b.role
    with pytest.raises(SettingsError, match="no finite point"):
        Chart([Line("a", [(1, 0.0)])], "x", "y", log_y=True)


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(SettingsError, match="2 columns; given a row of 1"):
        Table(("a", "b"), [("only",)])


def test_the_command_line_runs_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "EXPERIMENTS", (*experiments.EXPERIMENTS, STUDY))
    call = CliRunner().invoke(app, ["run", "counting", "count=1", "--folder", str(tmp_path / "r")])
    assert call.exit_code == 0, call.output
    assert "Counting works" in call.output and f"wrote {tmp_path / 'r' / 'report.html'}" in call.output
    call = CliRunner().invoke(app, ["report", str(tmp_path / "r")])
    assert call.exit_code == 0, call.output
    call = CliRunner().invoke(app, ["runs", "--runs", str(tmp_path)])
    assert call.exit_code == 0, call.output
    call = CliRunner().invoke(app, ["certify", str(tmp_path / "r")])
    assert call.exit_code != 0
