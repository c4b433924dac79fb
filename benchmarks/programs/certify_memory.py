"""Peak memory of a certificate, in MiB: python -m benchmarks.programs.certify_memory SIZE DEPTH."""

from __future__ import annotations

import json
import sys

from benchmarks.certify_image import certified, random_steps
from benchmarks.runner.machine import peak_memory

if __name__ == "__main__":
    size, depth = map(int, sys.argv[1:])
    certified(random_steps(16, 2, seed=0))
    imported = peak_memory()
    certified(random_steps(size, depth, seed=0))
    print(json.dumps(peak_memory() - imported))
