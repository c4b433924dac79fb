"""Settings: frozen dataclasses, changed by KEY=VALUE, kept as TOML.

A setting is an int, a float, a bool, a string, a `Literal` choice, a tuple of numbers, or one of these or `None`
(written `none`). Values are parsed by the declared type, so that a typing error is found before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from firmly.errors import SettingsError

S = TypeVar("S")


def override(settings: S, assignments: Iterable[str]) -> S:
    """The same settings with every KEY=VALUE applied; unknown keys are refused with the nearest names."""
    values: dict[str, Any] = {}
    hints = get_type_hints(type(settings))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise SettingsError(f"a setting is written KEY=VALUE; given {assignment!r}")
        _known(key, hints)
        values[key] = _parse(key, hints[key], text.strip())
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


def preset(presets: Mapping[str, S], assignments: Sequence[str], default: str = "default") -> tuple[str, S]:
    """The settings of `preset=NAME` (or of the default) with the other assignments applied, and the preset's name."""
    names = [a.partition("=")[2].strip() for a in assignments if a.partition("=")[0].strip() == "preset"]
    name = names[-1] if names else default
    if name not in presets:
        hint = nearest(name, presets)
        raise SettingsError(f"there is no preset {name!r}{hint}; the presets are {', '.join(presets)}")
    return name, override(presets[name], [a for a in assignments if a.partition("=")[0].strip() != "preset"])


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as '; did you mean depth or width?', empty when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def to_toml(settings: Any) -> str:
    """The settings as TOML, one line each; `None` is written as the string "none"."""
    return "".join(f"{f.name} = {_toml(getattr(settings, f.name))}\n" for f in dataclasses.fields(settings))


def from_toml(kind: type[S], text: str) -> S:
    """Settings of the given dataclass from TOML text; unknown or missing keys and wrong types are refused."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings are not valid TOML: {error}") from error
    hints = get_type_hints(kind)
    for key in table:
        _known(key, hints)
    missing = [key for key in hints if key not in table]
    if missing:
        raise SettingsError(f"the settings lack {', '.join(missing)}: another version of the experiment wrote them")
    return kind(**{key: _parse(key, hints[key], _plain(table[key])) for key in hints})


def require(condition: bool, sentence: str) -> None:
    """Raise `SettingsError` with the sentence unless the condition holds; for `__post_init__` of settings."""
    if not condition:
        raise SettingsError(sentence)


def _known(key: str, hints: Mapping[str, Any]) -> None:
    if key not in hints:
        raise SettingsError(f"there is no setting {key!r}{nearest(key, hints)}; the settings are {', '.join(hints)}")


def _parse(key: str, kind: Any, text: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _parse(key, next(a for a in arguments if a is not type(None)), text)
    if origin is tuple:
        return tuple(_parse(key, arguments[0], part.strip()) for part in text.split(",") if part.strip())
    if origin is Literal:
        if text not in arguments:
            raise SettingsError(f"{key} is one of {', '.join(arguments)}; given {text!r}{nearest(text, arguments)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"{key} is true or false; given {text!r}")
        return text.lower() == "true"
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[kind]
        raise SettingsError(f"{key} is {name}; given {text!r}") from None
    if not math.isfinite(value):
        raise SettingsError(f"{key} is finite; given {text!r}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if value is None or isinstance(value, str):
        text = "none" if value is None else value
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _plain(value: Any) -> str:
    """A TOML value as the text that KEY=VALUE would have."""
    return ",".join(_plain(v) for v in value) if isinstance(value, list) else str(value)
