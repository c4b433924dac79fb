"""The arrows between the rooms: the contracts stand in pyproject.toml, under [tool.importlinter]."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "firmly").rglob("*.py"))


def test_arrows_go_downwards(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert outcome == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_rooms_are_small_and_documented(path):
    source = path.read_text()
    assert path.stem not in {"utils", "helpers", "common", "misc", "base"}, "name the file after the thing in it"
    assert len(source.splitlines()) <= 420, "a file that passes about 400 lines is two ideas"
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "the first line says what the file is for"


def test_nothing_is_unpickled():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert "pickle" not in imported, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                raise AssertionError(f"{path}: weights are safetensors; torch.load unpickles")
