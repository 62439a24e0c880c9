"""Run notebooks in place, each from a fresh kernel, in its own folder.  Run it: python docs/execute.py nbs/theory/01_walk.ipynb

What a cell prints becomes one output, however slowly it came (nbconvert and jupyter-execute do not pass `coalesce_streams` on). What
differs from run to run is not kept: counts, times, and what a cell writes to stderr, progress bars and warnings, which is shown here.
Where a cell fails, this fails, and the file stays as it was. `ncp-vae report` executes nbs/results.ipynb by this script."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def kept(output):
    "An output as it is committed: without its count, and a picture without the line's end that some write."
    if "execution_count" in output:
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = output.data["image/png"].rstrip()
    return output


for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, coalesce_streams=True, record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            print(*(output.text for output in cell.outputs if output.get("name") == "stderr"), end="", file=sys.stderr)
            cell.execution_count = None
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(notebook, path)
