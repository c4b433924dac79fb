"""Docstrings as they are read in an editor: formulas like |A|^2 and A*, `code` in single backquotes.

Sphinx would take the bars and stars for markup. Here they are escaped, and `code` becomes literal text; lists,
doctests and indented blocks stay what they are.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)|``([^`]+)``")
MARKUP = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def escape(text: str) -> str:
    return MARKUP.sub(r"\\\g<0>", text)


def convert(line: str) -> str:
    """One line of a docstring as reStructuredText."""
    parts, end = [], 0
    for code in CODE.finditer(line):
        parts += [escape(line[end : code.start()]), f"``{code[1] or code[2]}``"]
        end = code.end()
    return "".join([*parts, escape(line[end:])])


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    verbatim = False
    for index, line in enumerate(lines):
        if line.lstrip().startswith(">>>"):
            verbatim = True
        elif not line.strip():
            verbatim = False
        if not verbatim:
            lines[index] = convert(line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
