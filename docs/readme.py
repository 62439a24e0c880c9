"""README.md from nbs/index.ipynb; its figures go to docs/images/.  Run it: python docs/readme.py"""
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

sys.path.insert(0, str(Path(__file__).parent))
from build import ROOT, relink, visible

PLAIN = {"NbConvertBase": {"display_data_priority": ["text/markdown", "image/png", "text/plain"]},      # no HTML tables
         "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"remove-input"}}}


def readme():
    "{path in the repository: content} of README.md and of its figures."
    notebook = visible(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    notebook.metadata["language_info"] = {"name": "python"}        # so that code blocks are marked as Python
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, "nbs", str)
    text, resources = MarkdownExporter(config=PLAIN).from_notebook_node(notebook)
    files = {}
    for name, content in resources["outputs"].items():
        path = f"docs/images/{name}"
        text = text.replace(f"]({name})", f"]({path})")
        files[path] = content
    note = "<!-- Made from nbs/index.ipynb by `make readme`: change it there. -->\n\n"
    return {"README.md": (note + text.strip() + "\n").encode(), **files}


if __name__ == "__main__":
    shutil.rmtree(ROOT / "docs" / "images", ignore_errors=True)
    for path, content in readme().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(content)
