"""Sphinx settings of the site. docs/build.py makes the pages; see docs/decisions.md for why it is done this way."""
import re
import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent))
from build import SETTINGS

project = SETTINGS["title"]
author = SETTINGS["author"]
copyright = SETTINGS["copyright"]
release = version = SETTINGS["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx-mathjax-offline", "sphinx_copybutton"]
exclude_patterns = ["jupyter_execute"]

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

autodoc_default_options = {"member-order": "bysource", "show-inheritance": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True


def plain_docstring(app, what, name, obj, options, lines):
    "Our docstrings are plain text: nothing in them is reStructuredText markup, except that `name` is a link."
    if "torch.nn" in getattr(obj, "__module__", "") or lines[:1] == ["Define the computation performed at every call."]:
        lines[:] = []      # inherited from torch, with its own markup
    lines[:] = [re.sub(r"`([^`]+)`|([*|_\\])", lambda m: f":py:obj:`{m[1]}`" if m[1] else "\\" + m[2], line) for line in lines]


def raw_display_math(app, doctree):
    "Hand display formulas to MathJax as they are: Sphinx would wrap those with a line break so that \\tag fails."
    for block in doctree.findall(nodes.math_block):
        block["no-wrap"] = block["nowrap"] = True
        block.children = [nodes.Text(f"\\[{block.astext()}\\]")]


def setup(app):
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("doctree-read", raw_display_math)
