"""How Sphinx makes the pages of docs/: `sphinx-build -W docs build/docs` (`pip install '.[docs]'`)."""

project = "lars-train"
author = project_copyright = "The lars-train maintainers"
# docs/python_api.md shows the docstrings; napoleon reads their sections "Args:" and "Raises:".
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
html_theme = "furo"
html_title = "lars-train"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
# A heading can be linked to as on a page of a repository.
myst_heading_anchors = 4
exclude_patterns = ["results"]


def shorten(app, what, name, obj, options, signature, returns):
    """Leave out of signatures the parameters that LARS takes only to reject them with a helpful message."""
    return (signature or "").replace("*extra, ", "*, ").replace(", **unknown", "") or None, returns


def setup(app):
    """Register the function above with autodoc."""
    app.connect("autodoc-process-signature", shorten)
