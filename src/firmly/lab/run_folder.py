"""A run is a folder: settings, environment, metrics, weights, certificate, results and report, each a plain file."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from firmly.errors import SettingsError, StorageError
from firmly.lab.settings import to_toml
from firmly.storage import explain, write_atomically


class RunFolder:
    """The files of one run; every file is written atomically, metrics are appended line by line.

    =========================  =================================================================
    `settings.toml`            what was run
    `environment.json`         experiment, preset, command, versions, machine, git commit, start
    `metrics.jsonl`            one JSON object per event of the training
    `weights/NAME.*`           learned weights (safetensors) and their description (JSON)
    `checkpoints/NAME.*`       the state of an unfinished training, for resuming
    `certificate.safetensors`  the certificate of the run's network
    `results.json`             the numbers of the report
    `report.html`              the report
    =========================  =================================================================
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, experiment: str, preset: str, settings: Any) -> None:
        """Create the folder, or check that the one that exists holds the same experiment and settings."""
        text = to_toml(settings)
        if (self / "settings.toml").exists():
            if self.environment()["experiment"] != experiment or (self / "settings.toml").read_text() != text:
                raise SettingsError(
                    f"{self.path} holds a run with other settings: use another folder, or those of its settings.toml"
                )
            return
        self.write_json("environment.json", {"experiment": experiment, "preset": preset, **environment()})
        self.write("settings.toml", text)

    def write(self, name: str, content: bytes | str) -> Path:
        return write_atomically(self / name, content)

    def write_json(self, name: str, value: Any) -> Path:
        return self.write(name, json.dumps(value, indent=2, default=_plain) + "\n")

    def log(self, event: str, **values: Any) -> None:
        """Append one line to `metrics.jsonl`."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, default=_plain) + "\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise StorageError(explain(error, self / "metrics.jsonl")) from error

    # -- reading -----------------------------------------------------------------------------------------------

    def metrics(self, event: str | None = None, **match: Any) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, of one event and with the given values if any are given.

        A line that a kill cut short is left out: it can only be an unfinished one.
        """
        path = self / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if (event is None or row["event"] == event) and all(row.get(k) == v for k, v in match.items()):
                rows.append(row)
        return rows

    def environment(self) -> dict[str, Any]:
        return self.read_json("environment.json")

    def results(self) -> dict[str, Any] | None:
        return self.read_json("results.json") if (self / "results.json").exists() else None

    def settings_text(self) -> str:
        try:
            return (self / "settings.toml").read_text(encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{self.path} is not a run folder: it has no readable settings.toml") from error

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{self.path} is not a complete run folder: it has no readable {name}") from error
        except ValueError as error:
            raise StorageError(f"{self / name} is damaged: {error}") from error


def new_folder(parent: Path, experiment: str) -> RunFolder:
    """A run folder with a fresh name, `parent/EXPERIMENT-DATE-TIME`; its place on the disk is claimed at once."""
    stem = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        try:
            (parent / (stem + suffix)).mkdir(parents=True)
            return RunFolder(parent / (stem + suffix))
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(explain(error, parent / stem)) from error
    raise StorageError(f"{parent} holds a thousand runs of this second: give the folder a name")


def find_runs(parent: Path) -> list[RunFolder]:
    """The runs in a folder, oldest first."""
    found = [RunFolder(p.parent) for p in sorted(parent.glob("*/environment.json"))]
    return sorted(found, key=lambda run: run.environment().get("started", ""))


def environment() -> dict[str, Any]:
    """What a reader needs in order to repeat a run elsewhere."""
    from importlib.metadata import version

    import torch

    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in ("numpy", "scipy", "clarabel", "safetensors")},
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _plain(value: Any) -> Any:
    """What JSON does not know: dataclasses, paths, numbers of other libraries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, (Mapping, Iterable)):
        return dict(value) if isinstance(value, Mapping) else list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
