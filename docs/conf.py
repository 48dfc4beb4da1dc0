"""How the documentation is built: Markdown and notebooks through MyST, the API from the docstrings."""

from __future__ import annotations

import re
from typing import Any

import lmcompress

project = "lmcompress"
author = "the lmcompress authors"
release = version = lmcompress.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "lmcompress"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests execute the notebooks; a build of the pages needs no model and no minutes

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field that its class documents is no second entry

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


_plain: dict[str, list[str]] = {}


def _literal(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  """Docstrings are Markdown in spirit: a single backtick is code."""
  lines[:] = _CODE.sub(lambda found: f"``{found[1]}``", "\n".join(lines)).split("\n")
  if what in ("attribute", "data", "property"):
    _plain[name] = list(lines)


def _keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  """A value's text stays whole, where napoleon would take the words before a colon for a type."""
  if name in _plain and what in ("attribute", "data", "property"):
    lines[:] = _plain[name]


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
  """The fields of a named tuple are described by its class."""
  return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
  app.connect("autodoc-process-docstring", _literal, priority=400)  # napoleon's is 500
  app.connect("autodoc-process-docstring", _keep, priority=600)
  app.connect("autodoc-skip-member", _skip)
