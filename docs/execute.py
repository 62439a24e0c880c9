"""Run notebooks in place, each from a fresh kernel, in its own folder.  Run it: python docs/execute.py nbs/theory/01_walk.ipynb

What a cell prints becomes one output however slowly it came, and progress bars are off, so that the page does not depend on the
machine's speed (nbconvert and jupyter-execute do not pass `coalesce_streams` on)."""
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ["TQDM_DISABLE"] = "1"

for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)
