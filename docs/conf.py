"""How the documentation site is built: `make docs` writes it to `build/docs`; every warning is an error."""

from __future__ import annotations

from typing import Any

import pgp

project = "prompt-gradient-projection"
author = "the prompt-gradient-projection maintainers"
copyright = "2026, the prompt-gradient-projection maintainers"
release = version = pgp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns: list[str] = []
nitpicky = False
default_role = "code"  # docstrings set code in single backticks

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the slow tests run the notebooks
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]  # many classes have a nested Config

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autosummary_generate = False  # the pages of api/ are written by hand
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

linkcheck_ignore = [r"https?://.*"]  # `make docs` works offline; only links inside the site are checked

html_theme = "furo"
html_title = "prompt-gradient-projection"
html_theme_options = {"sidebar_hide_name": False}


def setup(app: Any) -> None:
    """Give the raw tables below results/, which programs write, a title; other pages link to them."""
    app.connect("source-read", _add_title)


def _add_title(app: Any, name: str, source: list[str]) -> None:
    if name.startswith("results/"):
        title = "" if source[0].startswith("# ") else f"# Raw results: {name.removeprefix('results/')}\n\n"
        source[0] = f"---\norphan: true\n---\n\n{title}{source[0]}"
