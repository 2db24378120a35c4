"""Sphinx configuration."""

from importlib.metadata import version as _version

project = "force_plugin"
author = "The force_plugin authors"
copyright = "2026, " + author
release = version = _version("force-plugin")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "*-table.md"]

nb_execution_mode = "force"  # the tutorials, each time
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
add_module_names = False

html_theme = "furo"
html_title = f"force_plugin {release}"
