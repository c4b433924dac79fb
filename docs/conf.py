"""The documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

import firmly

project = "firmly"
author = "the firmly developers"
copyright = "2026, the firmly developers"
version = release = firmly.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "plain_docstrings",
]
exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]
suppress_warnings = ["myst.strikethrough"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

numfig = True  # equations are numbered by section, and keep their number on other pages
math_numfig = True
numfig_secnum_depth = 1

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}

html_theme = "pydata_sphinx_theme"
html_title = "firmly"
html_static_path = ["_static"]
html_css_files = ["firmly.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {
    "logo": {"text": "firmly"},
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "default",
    "pygments_dark_style": "github-dark",
}
single_pages = (
    "first_certificate",
    "how_to_choose",
    "architecture",
    "command_line",
    "experiments",
    "benchmarks",
    "changelog",
)
html_sidebars = {page: [] for page in single_pages}
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
