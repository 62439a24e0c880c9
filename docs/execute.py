"""Run notebooks in place, each from a fresh kernel, in its own folder.  Run it: python docs/execute.py nbs/theory/01_walk.ipynb

What a cell prints becomes one output, however slowly it came (nbconvert and jupyter-execute do not pass `coalesce_streams` on). What it
writes to stderr, progress bars and warnings, is shown here and not kept: it differs from run to run."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        print(*(output.text for output in outputs if output.get("name") == "stderr"), end="", file=sys.stderr)
        if outputs:
            cell.outputs = [output for output in outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)
