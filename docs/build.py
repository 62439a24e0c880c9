"""The site: notebooks and the API pages are staged in _site_src/, from which Sphinx writes _docs/.  Run it: python docs/build.py

Nothing is executed here: a page shows the outputs that its notebook was committed with."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
WORK, SITE = ROOT / "_site_src", ROOT / "_docs"
SOURCE = WORK / "pages"
PARTS = {"theory": "Theory", "models": "Models", "engine": "Engine", "runs": "Experiments"}
FLOORS = {"theory": ".", "models": "models", "engine": "engine"}      # part -> folder of ncp_vae/ that it exports to
TEXTS = {"CONTRIBUTING.md": "about/contributing.md", "docs/decisions.md": "about/decisions.md"}

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]


def visible(notebook):
    "The notebook as a reader sees it: directive lines and hidden cells are gone, glue code is tagged to be folded."
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.split("\n")
            directives = {line[2:].strip() for line in lines if line.startswith("#|")}
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
            if "hide" in directives or not cell.source:
                continue
            glue = any(directive.split()[0] == "export" for directive in directives)      # also "export MODULE"
            tag = "remove-input" if "echo: false" in directives else "hide-input" if glue else None
            cell.metadata["tags"] = cell.metadata.get("tags", []) + ([tag] if tag else [])
        shown.append(cell)
    notebook.cells = shown
    return notebook


def relink(text, folder, target):
    "Rewrite each relative link of Markdown `text` from repository folder `folder` with `target(repository path)`."
    def rewrite(match):
        link = match[1]
        return match[0] if re.match(r"[a-z]+:|#", link) else f"]({target(os.path.normpath(os.path.join(folder, link)))}"
    return re.sub(r"\]\(([^)#\s]+)", rewrite, text)


def executed():
    """Site page -> the notebook of a kept run. The first of an experiment, by name, stands in the place of its page in nbs/runs,
    which was executed at the smallest size; the others stand beside it."""
    pages = {}
    for path in sorted((ROOT / "results").glob("*/notebook.ipynb")):
        page = f"runs/{json.loads((path.parent / 'params.json').read_text(encoding='utf-8'))['experiment']}.ipynb"
        pages[f"runs/{path.parent.name}.ipynb" if page in pages else page] = path
    return pages


def site_target(page, kept):
    "Where a link from site page `page` leads: another page, a file of results/, or the file in the repository's web view."
    homes = {path.relative_to(ROOT).as_posix(): place for place, path in kept.items()}
    def target(path):
        if path.startswith("nbs/") or path in TEXTS or path in homes:
            return os.path.relpath(homes.get(path, TEXTS.get(path, path[4:])), Path(page).parent)
        if path.startswith("results/") and not path.endswith(".md"):      # a figure or a record: see stage()
            return os.path.relpath(f"../{path}", Path(page).parent)
        return f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/{path}"
    return target


def modules(floor):
    "(dotted name, notebook path below nbs/, public names) of each exported module of a floor, in the notebooks' order."
    found = []
    for path in (ROOT / "ncp_vae" / FLOORS[floor]).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        origin = re.search(r"File to edit: (?:\.\./)+nbs/(\S+\.ipynb)", source)
        if origin:
            names = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((dotted, origin[1], ast.literal_eval(names[1])))
    return sorted(found, key=lambda module: module[1])


def link_names(text, homes):
    "Backticked public names become links into the API pages; code blocks and names with two homes are left alone."
    def link(match):
        found = homes.get(match[1], [])
        return f"{{py:obj}}`{match[1]} <{found[0]}.{match[1]}>`" if len(found) == 1 else match[0]
    pieces = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else re.sub(r"(?<![`\[}])`([A-Za-z_]\w+)`(?!`)", link, p) for p in pieces)


def toctree(caption, pages):
    entries = "\n".join(pages)
    return f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{entries}\n```\n"


def write(name, text):
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def stage():
    "Write every page of the site."
    homes = {}
    for floor in FLOORS:
        for module, _, names in modules(floor):
            for name in names:
                homes.setdefault(name, []).append(module)
    chapters = {part: sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs" / part).glob("*.ipynb"))
                for part in PARTS}
    chapters["engine"].insert(0, "your_own.ipynb")
    kept = executed()
    chapters["runs"] = ["results.ipynb", *sorted({*chapters["runs"], *kept})]
    trees = [toctree(PARTS[part], pages) for part, pages in chapters.items() if pages]
    trees += [toctree("Reference", [f"api/{floor}" for floor in FLOORS]), toctree("About", TEXTS.values())]

    (WORK / "results").symlink_to(ROOT / "results")        # beside the pages, so that they find the figures and records

    for page in ["index.ipynb", *sum(chapters.values(), [])]:
        notebook = visible(nbformat.read(kept.get(page, ROOT / "nbs" / page), as_version=4))
        if page in kept:
            title, _, rest = notebook.cells[0].source.partition("\n")
            notebook.cells[0].source = f"{title}: the run `{kept[page].parent.name}`\n{rest}"
        for cell in notebook.cells:
            target, folder = site_target(page, kept), Path("nbs", page).parent
            if cell.cell_type == "markdown":
                cell.source = relink(link_names(cell.source, homes), folder, target)
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                data.update({kind: relink(text, folder, target) for kind, text in data.items() if kind == "text/markdown"})
        if page == "index.ipynb":
            notebook.cells.append(nbformat.v4.new_markdown_cell("\n".join(trees)))
        write(page, nbformat.writes(notebook))
    for path, page in TEXTS.items():
        write(page, relink((ROOT / path).read_text(encoding="utf-8"), Path(path).parent, site_target(page, kept)))
    for floor in FLOORS:
        found = modules(floor)
        title = ".".join(["ncp_vae", *Path(FLOORS[floor]).parts])
        entries = "\n".join(f"   {module}" for module, _, _ in found)
        write(f"api/{floor}.rst", f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 2\n\n{entries}\n")
        for module, origin, _ in found:
            write(f"api/{module}.rst", f"{module}\n{'=' * len(module)}\n\n.. automodule:: {module}\n   :members:\n\n"
                                       f"   Derived and tested in :doc:`/{origin[:-6]}`.\n")


def build():
    "Stage, run Sphinx, and put the site in its place; a warning is an error."
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    stage()
    code = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", ROOT / "docs",
                           "-d", WORK / "doctrees", SOURCE, WORK / "html"]).returncode
    if code == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(WORK / "html", SITE)
        print(f"The site is ready: open {(SITE / 'index.html').as_uri()}")
    return code


if __name__ == "__main__":
    sys.exit(build())
