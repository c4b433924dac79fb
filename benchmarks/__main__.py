"""Measure claims and write what was found: python -m benchmarks [CLAIM ...] [quick=true] [results=FOLDER].

A claim is a file of this folder with a function `measure(quick)`. The quick preset only shows that a claim runs: it is
small, installs no peer, and leaves the published results alone.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.runner.machine import machine
from benchmarks.runner.results import Result, Run, write

HERE = Path(__file__).parent


def claims() -> list[str]:
    """The names of all claims."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key not in ("quick", "results"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a claim ({', '.join(claims())}) nor a setting: "
                                         "quick=true, results=FOLDER")  # fmt: skip
    if key == "quick" and value not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"quick is true or false, given {value!r}")
    return key, value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("arguments", nargs="*", metavar="CLAIM|KEY=VALUE",
                        type=lambda text: text if text in claims() else setting(text))  # fmt: skip
    arguments = parser.parse_args().arguments
    settings = dict(a for a in arguments if isinstance(a, tuple))
    quick = settings.get("quick") == "true"
    folder = Path(settings.get("results", ".benchmarks/quick" if quick else HERE / "results"))
    for claim in [a for a in arguments if isinstance(a, str)] or claims():
        module = importlib.import_module(f"benchmarks.{claim}")
        facts, started = machine(), time.perf_counter()
        result: Result = module.measure(quick)
        command = f"firmly bench {claim}" + (" quick=true" if quick else "")
        run = Run(claim, module.__doc__ or "", command, facts, time.perf_counter() - started, result)
        print(*write(run, folder), sep="\n")


if __name__ == "__main__":
    main()
