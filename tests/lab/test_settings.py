"""KEY=VALUE overrides, presets and TOML."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from firmly.errors import SettingsError
from firmly.lab.settings import from_toml, override, preset, require, to_toml


@dataclass(frozen=True)
class Example:
    depth: int = 6
    learning_rate: float = 1e-3
    cap: float | None = 1.99
    budget: tuple[float, ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    flip: bool = True
    note: str = ""

    def __post_init__(self):
        require(self.depth > 0, f"depth is positive; given {self.depth}")


def test_every_type_is_parsed_by_its_declaration():
    given = ["depth=8", "learning_rate=2e-4", "cap=none", "budget=4,8,16,32", "device=cpu", "flip=false", "note=a=b, c"]
    expected = Example(8, 2e-4, None, (4.0, 8.0, 16.0, 32.0), "cpu", False, "a=b, c")
    assert override(Example(), given) == expected
    assert override(Example(), ["budget=8"]).budget == (8.0,)
    assert override(expected, ["budget="]).budget == ()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("dept=8", "there is no setting 'dept'; did you mean depth"),
        ("depth", "written KEY=VALUE"),
        ("depth=8.5", "depth is a whole number; given '8.5'"),
        ("depth=0", "depth is positive; given 0"),
        ("learning_rate=fast", "learning_rate is a number"),
        ("learning_rate=nan", "learning_rate is finite"),
        ("budget=4,big", "budget is a number"),
        ("device=gpu", "device is one of auto, cpu"),
        ("flip=1", "flip is true or false"),
    ],
)
def test_bad_assignments_are_refused(assignment, message):
    with pytest.raises(SettingsError, match=message):
        override(Example(), [assignment])


def test_presets():
    presets = {"default": Example(), "smoke": replace(Example(), depth=2)}
    assert preset(presets, ["preset=smoke", "cap=1.5"]) == ("smoke", Example(depth=2, cap=1.5))
    assert preset(presets, []) == ("default", Example())
    with pytest.raises(SettingsError, match="no preset 'smok'; did you mean smoke"):
        preset(presets, ["preset=smok"])


def test_toml_round_trip():
    for settings in (Example(), Example(8, 2e-4, None, (4.0, 8.0), "cpu", False, 'a "quoted" \\ note')):
        assert from_toml(Example, to_toml(settings)) == settings


def test_foreign_toml_is_refused():
    with pytest.raises(SettingsError, match="no setting 'depht'"):
        from_toml(Example, "depht = 3")
    with pytest.raises(SettingsError, match="lack learning_rate"):
        from_toml(Example, "depth = 3")
    with pytest.raises(SettingsError, match="not valid TOML"):
        from_toml(Example, "depth = = 3")
