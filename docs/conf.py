"""The documentation site: `make docs`."""

import logging
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fedrag_jax  # noqa: E402

logging.getLogger("faiss").setLevel(logging.WARNING)

project = "fedrag_jax"
author = "The fedrag_jax authors"
copyright = author
version = release = fedrag_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "data/*/**"]
# Links to headings work as they do on the pages of a code host.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.header"]  # a page may have two titles

# Docstrings mark code with single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fedrag_jax"
html_theme_options = {"navigation_with_keys": True}


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", formulas, priority=0)


def formulas(app, what, name, thing, options, lines: list[str]) -> None:
    """An indented paragraph of a docstring is a formula or code, and is shown as it stands."""
    told, shown = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not before.strip() and not shown and _outside_sections(told):
            told += ["::", ""]
            shown = True
        elif line.strip() and not indented:
            shown = False
        told.append(line)
    lines[:] = told


def _outside_sections(told: list[str]) -> bool:
    """Whether the last line at the margin is a sentence, and not the title of a section."""
    margin = [line for line in told if line.strip() and not line.startswith(" ")]
    return bool(margin) and margin[-1] not in (
        "Args:",
        "Attributes:",
        "Raises:",
        "Returns:",
        "Yields:",
    )
