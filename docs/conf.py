"""Sphinx settings of the site. docs/build.py makes the pages; see docs/decisions.md for why it is done this way."""
import inspect
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

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"      # tables in outputs
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

autodoc_default_options = {"member-order": "bysource", "show-inheritance": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False


def plain(text):
    "Our docstrings are plain text: nothing in them is reStructuredText markup, except that `name` is a link."
    return re.sub(r"`([^`]+)`|([*|_\\`])", lambda m: f"\\ :py:obj:`{m[1]}`\\ " if m[1] else "\\" + m[2], text)


def plain_docstring(app, what, name, obj, options, lines):
    if lines[:1] == ["Define the computation performed at every call."]:
        lines[:] = []      # what torch says of every forward
    lines[:] = [plain(line) for line in lines]
    if what == "class":    # the comments beside the fields say their shapes and units
        fields = re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(obj), re.M)
        lines += ["", *(f":ivar {field}: {plain(comment)}" for field, comment in fields), ""]


def tidy(app, doctree):
    "Drop empty 'Bases: object' lines; hand display formulas to MathJax as they are, because Sphinx's wrapping breaks \\tag."
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() in ("Bases: object", "Bases: NamedTuple"):
            paragraph.parent.remove(paragraph)
    for block in doctree.findall(nodes.math_block):
        block["no-wrap"] = block["nowrap"] = True
        block.children = [nodes.Text(f"\\[{block.astext()}\\]")]


def setup(app):
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("doctree-read", tidy)
