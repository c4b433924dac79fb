"""The pages are true: every block of Python in them runs, and prints what the page says; doctests and examples, too."""

from __future__ import annotations

import contextlib
import doctest
import io
import pkgutil
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

import firmly

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOKEN = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?P<seconds> s\b)?|(?P<any>\.\.\.)|(?P<space>\s+)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of every fenced block."""
    source = page.read_text()
    return [(m[1], m[2], source.count("\n", 0, m.start()) + 2) for m in BLOCK.finditer(source)]


def agrees(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: numbers to five percent, seconds and `...` free, spaces alike."""
    pattern, numbers, end = "", [], 0
    for token in TOKEN.finditer(shown.strip()):
        pattern += re.escape(shown.strip()[end : token.start()])
        end = token.end()
        if token["number"]:
            pattern += r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)" + (token["seconds"] or "")
            numbers.append(None if token["seconds"] else float(token["number"]))
        else:
            pattern += ".*?" if token["any"] else r"\s+"
    match = re.fullmatch(pattern + re.escape(shown.strip()[end:]), printed.strip(), re.DOTALL)
    return match is not None and all(
        expected is None or float(found) == pytest.approx(expected, rel=0.05)
        for expected, found in zip(numbers, match.groups())
    )


def test_agreement_is_not_blind():
    assert agrees("bound 2.00 after 1.5 s ...", "bound   2.03 after 7 s and more")
    assert not agrees("bound 2.00 after 1.5 s", "bound 2.30 after 1.5 s")
    assert not agrees("bound 2.00 after 1.5 s", "value 2.00 after 1.5 s")


PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "_build" not in p.parts]
RUNNABLE = [p for p in PAGES if any(language == "python" for language, _, _ in blocks(p))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages(firmly.__path__, "firmly.") if not m.name.endswith("__main__"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "page"}
    printed = None
    for language, text, line in blocks(page):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True), scope)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            assert agrees(text, printed), f"{page}, line {line}: the page shows\n{text}\nthe code prints\n{printed}"
            printed = None


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_command_is_described():
    from firmly.cli import app

    page = (ROOT / "docs" / "command_line.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert names
    assert [name for name in names if f"| `firmly {name}" not in page] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example says what it found"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
