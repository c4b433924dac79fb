"""Equations as MathML, which browsers draw themselves: no script, no network, no LaTeX.

docutils converts the LaTeX of a formula; Sphinx asks a registered math renderer for the HTML of each one.
"""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml, pick_math_environment
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

ACCENT = re.compile(r"(\\(?:tilde|hat|bar|widehat)\{[^{}]*\})(?=[_^])")
DELIMITER = re.compile(r"<mo(?: [^>]*>([|])|[^>]*>([‖⟨⟩]))</mo>")


def mathml(latex: str, block: bool) -> str:
    """The MathML element of a formula."""
    if block:
        environment = pick_math_environment(latex)
        wrapped = "aligned" if "align" in environment and "\\begin" not in latex else None
        latex = f"\\begin{{{wrapped}}}{latex}\\end{{{wrapped}}}" if wrapped else latex
    latex = ACCENT.sub(r"\1{}", latex)  # else an index would be set below the letter, as a limit
    try:
        element = latex2mathml.tex2mathml(latex, as_block=block)
    except (MathError, IndexError) as error:
        raise ExtensionError(f"cannot convert the formula {latex!r} to MathML: {error}") from error
    # bars and angles stand close and keep the size of the line, unless \left and \right ask for more
    return DELIMITER.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1\2</mo>', element)


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    translator.body.append(mathml(node.astext(), block=True))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})</span>')
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
