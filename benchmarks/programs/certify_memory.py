"""Peak memory of a certificate, in MiB: python -m benchmarks.programs.certify_memory SIZE DEPTH."""

from __future__ import annotations

import json
import resource
import sys

from benchmarks.certify_image import certified, random_steps


def peak() -> float:
    """The largest resident memory so far, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    size, depth = map(int, sys.argv[1:])
    certified(random_steps(16, 2, seed=0))
    imported = peak()
    certified(random_steps(size, depth, seed=0))
    print(json.dumps(peak() - imported))
