"""A run on the screen: one line for every stage, a bar for every training."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

STAGES = {
    "baseline": "tuning {name}",
    "certify": "certifying {name}",
    "attack": "attacking {name}",
    "repair": "bringing {name} inside its budget, from a bound of {bound:.4g}",
    "report": "report written",
    "note": "{text}",
}


class Progress:
    """Shows what a running experiment tells its listener; call it with (stage, event) inside a `with` block."""

    def __init__(self, out: Console):
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self.bars = Bars(*columns, console=out)
        self.tasks: dict[str, TaskID] = {}
        self.stage = ""
        self.loss = float("nan")

    def __enter__(self) -> Progress:
        self.bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.__exit__(kind, error, trace)

    def __call__(self, stage: str, event: dict[str, Any]) -> None:
        if stage == "training":
            self.train(event)
        elif stage == "work":
            self.work(event)
        else:
            if stage != "repair" and self.bars.live.is_started:  # training is over: the bars stay above what follows
                self.bars.stop()
            line = STAGES[stage].format(**event)
            if stage != self.stage or stage != "repair":
                self.bars.console.print(line, style="dim")
            self.stage = stage

    def work(self, event: dict[str, Any]) -> None:
        name = event["name"]
        if name not in self.tasks:
            self.bars.start()
            self.tasks[name] = self.bars.add_task(name, total=event["total"], note="")
        self.bars.update(self.tasks[name], completed=event["done"], total=event["total"])

    def train(self, event: dict[str, Any]) -> None:
        name = event["name"]
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(f"training {name}", total=event["total"], note="")
            self.loss = event["loss"]
        self.loss = 0.98 * self.loss + 0.02 * event["loss"]
        self.bars.update(self.tasks[name], completed=event["step"], note=f"loss {self.loss:.2e}")
