"""How Sphinx makes the pages of docs/: `sphinx-build -W docs build/docs` (`pip install '.[docs]'`)."""

project = "lars-train"
author = "The lars-train maintainers"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "lars-train"
# A heading can be linked to as on a page of a repository.
myst_heading_anchors = 4
exclude_patterns = ["results"]
