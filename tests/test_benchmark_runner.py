"""What the claims of `benchmarks` share: results with pictures, and runs that go on where they were stopped."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from firmly.lab.charts import Line


@pytest.fixture(autouse=True)
def _with_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


def test_a_stopped_run_goes_on_and_a_changed_claim_starts_again(tmp_path, monkeypatch):
    from benchmarks.runner import partial

    monkeypatch.setattr(partial, "ROOT", tmp_path)
    claim = tmp_path / "claim.py"
    claim.write_text("first")
    begun = partial.Partial(claim)
    assert begun.known == {}
    begun.keep("a", {"gap": 1.5})
    begun.keep("b", [1, 2])
    again = partial.Partial(claim)
    assert again.known == {"a": {"gap": 1.5}, "b": [1, 2]}
    claim.write_text("second")
    assert partial.Partial(claim).known == {}
    claim.write_text("first")
    again.finish()
    assert partial.Partial(claim).known == {}


def test_pictures_stand_alone_and_are_on_the_page(tmp_path):
    from benchmarks.runner.curves import curves
    from benchmarks.runner.results import Result, Run, Table, write

    lines = [Line("ours", [(1, 2.0), (10, 3.0)], "ours"), Line("other", [(1, 4.0), (10, 400.0)], "twin")]
    picture = curves("speed", lines, "pixels", "seconds", "Time & size")
    result = Result([Table("t", [{"n": 1}])], pictures=[picture])
    paths = write(Run("claim", "Title.", "firmly bench claim", {"cores": 2}, 1.0, result), tmp_path)
    assert sorted(Path(p).name for p in paths) == ["claim-speed.svg", "claim.json", "claim.md"]
    assert "![Time & size](claim-speed.svg)" in (tmp_path / "claim.md").read_text()
    assert "svg" not in (tmp_path / "claim.json").read_text()
    root = ElementTree.parse(tmp_path / "claim-speed.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["aria-label"] == "Time & size"
    assert root[0].tag.rpartition("}")[2] == "style"
