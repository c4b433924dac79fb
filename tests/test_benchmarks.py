"""Every claim runs from end to end in its quick preset, and its two files say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLAIMS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_runs(claim, tmp_path):
    command = [sys.executable, "-m", "benchmarks", claim, "quick=true", f"results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / f"{claim}.json").read_text())
    page = (tmp_path / f"{claim}.md").read_text()
    assert facts["command"] == f"firmly bench {claim} quick=true" and facts["command"] in page
    assert facts["result"]["tables"] and all(table["rows"] for table in facts["result"]["tables"])
    assert all(target["text"] in page for target in facts["result"]["targets"])
    assert str(ROOT) not in page + json.dumps(facts), "published files hold no paths of a machine"


@pytest.mark.parametrize("claim", CLAIMS)
def test_published_result_is_there(claim):
    facts = json.loads((ROOT / "benchmarks" / "results" / f"{claim}.json").read_text())
    assert facts["command"] == f"firmly bench {claim}"


def test_an_unknown_claim_or_setting_is_refused():
    for argument in ("nothing", "slow=true", "quick=maybe"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", argument], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and argument.partition("=")[0] in done.stderr
