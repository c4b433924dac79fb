"""The three presets that every imaging experiment offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from firmly.lab.reconstruction import ReconstructionSettings

S = TypeVar("S", bound=ReconstructionSettings)


def presets(default: S) -> Mapping[str, S]:
    """`smoke` shows in seconds that everything runs, `default` is the demo, `full` trains long."""
    smoke = replace(
        default, depth=3, filters=8, filter_size=5, crop=32, epochs=2, steps=10, budget_epochs=1, size=64, images=2,
        tv_weights=default.tv_weights[1:3], wiener_weights=default.wiener_weights[1:3], certify_seconds=5.0,
    )  # fmt: skip
    full = replace(default, depth=10, filters=32, batch=8, crop=96, epochs=40, steps=250)
    return {"smoke": smoke, "default": default, "full": full}
