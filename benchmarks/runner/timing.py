"""Time functions and programs, in turn, so that a change of the machine's load hits all of them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def medians(actions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median wall-clock seconds of every action, run in turn `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(timed(action)[1])
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(action: Callable[[], T], repeats: int = 1, enough_s: float = 5.0) -> tuple[T, float]:
    """What an action returns, and its median seconds over `repeats` runs, or over fewer once they took `enough_s`."""
    seconds: list[float] = []
    while True:
        started = time.perf_counter()
        value = action()
        seconds.append(time.perf_counter() - started)
        if len(seconds) == repeats or sum(seconds) > enough_s:
            return value, statistics.median(seconds)


class ProgramFailed(Exception):
    """A program did not give its result; the text says why."""


class TimeIsUp(ProgramFailed):
    """A program was stopped at its limit."""


def program(module: str, arguments: Sequence[str] = (), limit_s: float = 600.0, python: str | None = None) -> Any:
    """What `python -m module` prints last, read as JSON; raises `ProgramFailed` after `limit_s` seconds or an error."""
    command = [python or sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TimeIsUp(f"no answer in {limit_s:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ProgramFailed(f"exit code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
