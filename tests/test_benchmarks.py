"""Every claim runs from end to end in its quick preset, and its two files say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLAIMS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if not p.stem.startswith("_"))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all claims, in one process."""
    folder = tmp_path_factory.mktemp("results")
    done = bench("quick=true", f"results={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_runs(claim, folder):
    facts = json.loads((folder / f"{claim}.json").read_text())
    page = (folder / f"{claim}.md").read_text()
    assert facts["command"] == f"firmly bench {claim} quick=true" and facts["command"] in page
    assert facts["result"]["tables"] and all(table["rows"] for table in facts["result"]["tables"])
    assert all(target["text"] in page for target in facts["result"]["targets"])
    assert str(ROOT) not in page + json.dumps(facts), "published files hold no paths of a machine"


@pytest.mark.parametrize("claim", CLAIMS)
def test_published_result_is_there_and_on_the_page(claim):
    facts = json.loads((ROOT / "benchmarks" / "results" / f"{claim}.json").read_text())
    assert facts["command"] == f"firmly bench {claim}"
    assert f"benchmarks/results/{claim}.md" in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("argument", ["nothing", "slow=true", "quick=maybe"])
def test_an_unknown_claim_or_setting_is_refused(argument):
    done = bench(argument)
    assert done.returncode == 2 and argument.partition("=")[0] in done.stderr
