"""A point of a curve: python -m benchmarks.programs.certify_curve depth|channels SIZE NUMBER SEED."""

from __future__ import annotations

import json
import sys
import time

import firmly as fm
from benchmarks.certify_image_curves import network

# seconds, several times what is needed on a core without other work
BUDGET_S = {"depth": lambda layers: 60.0 + 5.0 * layers, "channels": lambda channels: 60.0 + 20.0 * channels}

if __name__ == "__main__":
    kind, size, number, seed = sys.argv[1], *map(int, sys.argv[2:])
    fm.certify(network(kind, 16, 2, seed))
    net = network(kind, size, number, seed)
    started, used = time.perf_counter(), time.process_time()
    certificate = fm.certify(net, budget_s=BUDGET_S[kind](number))
    share = (time.process_time() - used) / (time.perf_counter() - started)
    spectral = next(bound for bound in certificate.bounds if bound.method == "spectral")
    count, rows = int(spectral.note.split()[0]), int(spectral.note.split()[4].rstrip(","))
    seconds = share * sum(bound.seconds for bound in certificate.bounds)
    facts = {"lower": certificate.lower, "upper": certificate.upper, "gap": certificate.gap, "seconds": seconds}
    print(json.dumps({**facts, "blocks": count, "rows": rows}))
