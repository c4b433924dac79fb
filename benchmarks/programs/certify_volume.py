"""A row of the table of volumes: python -m benchmarks.programs.certify_volume NETWORK SIDE DEPTH."""

from __future__ import annotations

import json
import sys
import time

import firmly as fm
from benchmarks.certify_volume import ATTAINED, network, upper
from benchmarks.runner.machine import peak_memory

if __name__ == "__main__":
    name, side, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    upper(network(name, 8, 2))  # imports
    imported, started = peak_memory(), time.process_time()
    net = network(name, side, depth)
    built = time.process_time()
    basis, method, value = upper(net)
    found = {
        "basis": basis,
        "method": method,
        "upper": value,
        "gap": None,
        "seconds norm": built - started,
        "seconds upper": time.process_time() - built,
        "seconds certify": None,
        "MiB": peak_memory() - imported,
    }
    if side <= ATTAINED:
        started = time.process_time()
        found["gap"] = fm.certify(net, budget_s=300.0).gap
        found["seconds certify"] = time.process_time() - started
    print(json.dumps(found))
