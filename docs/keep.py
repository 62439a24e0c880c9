"""Keep a run that succeeded in results/.  Run it: python docs/keep.py runs/images/FOLDER NAME

Its records and figures go whole and unchanged. Its executed notebook goes without what is no result, stderr, times and the folder that it
ran in, and with its pictures in so few colours that it stays below 500 kB."""
import base64
import shutil
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import PIL.Image

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 500_000      # bytes, as of every committed notebook


def without_traces(notebook):
    "The notebook without stderr, times, counters and the run's folder."
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata = {"tags": tags} if (tags := cell.metadata.get("tags")) else {}
        cell.source = "\n".join(line for line in cell.source.split("\n") if not line.startswith('run_dir = "'))
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.update({"execution_count": None} if output.output_type == "execute_result" else {})
    return notebook


def in_colours(notebook, colours):
    "The notebook, its pictures in so many colours each."
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture, small = PIL.Image.open(BytesIO(base64.b64decode(output.data["image/png"]))), BytesIO()
            picture.convert("RGB").quantize(colours).save(small, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return notebook


def kept(path):
    "The text of an executed notebook as it is kept; ValueError where it cannot be made small enough."
    for colours in (256, 128, 64, 32, 16):
        text = nbformat.writes(in_colours(without_traces(nbformat.read(path, as_version=4)), colours)) + "\n"
        text = text.replace(f"{path.resolve().parent}/", "")                 # in what a cell has printed
        if len(text.encode()) < LIMIT:
            return text
    raise ValueError(f"{path} has {len(text.encode()):,} bytes with its pictures in {colours} colours; {LIMIT:,} are allowed")


def keep(folder, target):
    "Copy a run's records, figures and executed notebook to a new folder."
    text = kept(folder / "notebook.ipynb")
    target.mkdir()
    for name in ("params", "environment", "status", "metrics"):
        shutil.copy(folder / f"{name}.json", target)
    shutil.copytree(folder / "figures", target / "figures")
    (target / "notebook.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    keep(Path(sys.argv[1]), ROOT / "results" / sys.argv[2])
