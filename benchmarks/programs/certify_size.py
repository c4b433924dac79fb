"""Seconds and peak memory of a certificate: python -m benchmarks.programs.certify_size SIZE DEPTH."""

from __future__ import annotations

import json
import sys

from benchmarks.certify_image import certified, random_steps, row
from benchmarks.runner.machine import peak_memory

if __name__ == "__main__":
    size, depth = map(int, sys.argv[1:])
    certified(random_steps(16, 2, seed=0))
    imported = peak_memory()
    found = row("", "", depth, random_steps(size, depth, seed=0))
    kept = {name: found[name] for name in ("blocks", "upper", "gap")}
    print(json.dumps({**kept, "seconds": found["seconds processor"], "MiB": peak_memory() - imported}))
