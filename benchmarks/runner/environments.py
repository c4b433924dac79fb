"""Environments for peers whose requirements do not fit into ours: a folder of their own on top of this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner.timing import ROOT, ProgramFailed

FOLDER = ROOT / ".benchmarks" / "environments"


@dataclass(frozen=True)
class Environment:
    """The packages of this interpreter, so that both sides run on one torch, and `requirements` before them."""

    name: str
    requirements: tuple[str, ...]

    def python(self, install: bool) -> str:
        """Its interpreter, made at the first call if `install`; raises `ProgramFailed` if it is not to be had."""
        folder = FOLDER / self.name
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        ready = folder / "requirements.txt"
        wanted = "\n".join(self.requirements)
        if ready.exists() and ready.read_text() == wanted:
            return str(python)
        if not install:
            raise ProgramFailed("not installed")
        venv.create(folder, clear=True, with_pip=True)
        self._packages(python).joinpath("ours.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
        command = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *self.requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise ProgramFailed(f"could not be installed: {(errors or ['pip failed'])[0]}")
        ready.write_text(wanted)
        return str(python)

    def _packages(self, python: Path) -> Path:
        found = subprocess.run(
            [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
        )
        return Path(found.stdout.strip())
