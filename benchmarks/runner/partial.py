"""What a claim has measured so far, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import firmly
from benchmarks.runner.timing import ROOT

ROOMS = ("certificates", "networks", "algorithms", "prox", "linear")


class Partial:
    """Results by key, a line of a file each; void as soon as the file of the claim or one of `sources` changes.

    `sources` are paths in the package with stars; by default the rooms that certificates of networks rest on.
    """

    def __init__(self, claim: Path, sources: Sequence[str] = tuple(f"{room}/*.py" for room in ROOMS)):
        package = Path(firmly.__file__).parent
        files = [path for source in sources for path in sorted(package.glob(source))]
        version = hashlib.sha256(b"".join(path.read_bytes() for path in [*files, claim])).hexdigest()[:12]
        self.path = ROOT / ".benchmarks" / f"{claim.stem}-{version}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known: dict[str, Any] = dict(map(json.loads, lines))

    def keep(self, key: str, value: Any) -> None:
        self.known[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")

    def finish(self) -> None:
        """Forget all of it: a claim that is asked for again is measured again."""
        self.path.unlink(missing_ok=True)
