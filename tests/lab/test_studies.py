"""Every study runs in its smallest preset and writes its report."""

from __future__ import annotations

import pytest

from firmly.lab.experiments import EXPERIMENTS
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Study, run_study

STUDIES = [e for e in EXPERIMENTS if isinstance(e, Study)]


@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_the_smoke_preset_runs(study, tmp_path):
    run = RunFolder(tmp_path)
    settings = study.presets["smoke"]
    results = run_study(study, settings, "smoke", run, lambda stage, event: None)
    assert results["page"]["sections"] and study.told(settings)
    html = (run / "report.html").read_text()
    assert results["page"]["headline"].split("’")[0][:20] in html
    assert set(study.presets) == {"smoke", "default", "full"}
