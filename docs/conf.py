"""How the documentation site is built: `make docs` writes it to `build/docs`; every warning is an error."""

from __future__ import annotations

import pgp

project = "prompt-gradient-projection"
author = "the prompt-gradient-projection maintainers"
copyright = "2026, the prompt-gradient-projection maintainers"
release = version = pgp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["results/**"]
nitpicky = False
default_role = "code"  # docstrings set code in single backticks

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the slow tests run the notebooks
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

linkcheck_ignore = [r"https?://.*"]  # `make docs` works offline; only links inside the site are checked

html_theme = "furo"
html_title = "prompt-gradient-projection"
html_static_path = ["_static"]
html_theme_options = {"sidebar_hide_name": False}
