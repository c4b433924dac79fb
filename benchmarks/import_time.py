"""Import time.

A fresh interpreter each time, the statements in turn. `import firmly` loads its rooms when they are first used; the
last row loads all of the core.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.runner.results import Result, Table, Target
from benchmarks.runner.timing import medians

ROOMS = ("linear", "prox", "algorithms", "fixedpoint", "networks", "certificates")
CORE = "import " + ", ".join(f"firmly.{room}" for room in ROOMS)
STATEMENTS = {"import torch": "import torch", "import firmly": "import firmly", "all core rooms": CORE}


def measure(quick: bool) -> Result:
    subprocess.run([sys.executable, "-c", CORE], check=True)  # writes the byte code, fills the cache of the disk
    repeats = 1 if quick else 7
    seconds = medians({name: importing(code) for name, code in STATEMENTS.items()}, repeats)
    ratios = {name: value / seconds["import torch"] for name, value in seconds.items()}
    rows = [{"statement": name, "seconds": seconds[name], "ratio to torch": ratios[name]} for name in seconds]
    table = Table(f"Medians of {repeats}", rows)
    core = ratios["all core rooms"]
    return Result([table], [Target("all core rooms below 1.3 times `import torch`", f"{core:.2f}", core < 1.3)])


def importing(code: str):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)
