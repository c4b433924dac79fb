"""`import firmly` is light, and every public name exists."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys

import pytest

import firmly

LIGHT_ROOMS = ("linear", "prox", "algorithms", "fixedpoint", "networks", "certificates")


@functools.cache
def modules_after(statement: str) -> frozenset[str]:
    """Top-level modules in a fresh interpreter after the statement."""
    program = f"{statement}\nimport sys, json; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


def foreign(modules: frozenset[str]) -> frozenset[str]:
    return modules - set(sys.stdlib_module_names) - {"firmly"}


def test_import_firmly_adds_nothing_to_torch():
    assert foreign(modules_after("import firmly")) <= foreign(modules_after("import torch"))


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_a_room_imports_torch_and_the_standard_library_only(room):
    loaded = foreign(modules_after(f"import firmly.{room}"))
    assert loaded <= foreign(modules_after("import torch")), "import heavy packages inside the functions that use them"


def test_the_command_line_does_not_load_torch_before_it_is_needed():
    assert "torch" not in modules_after("import firmly.cli")


@pytest.mark.parametrize("name", firmly.__all__)
def test_every_public_name_exists(name):
    assert getattr(firmly, name) is not None
    assert name in dir(firmly)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no 'certifie'.*certify"):
        firmly.certifie  # noqa: B018


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_every_name_that_a_room_promises_exists(room):
    module = importlib.import_module(f"firmly.{room}")
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
