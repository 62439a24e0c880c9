"""The rules of CONTRIBUTING.md that a machine can check. A test names every offender, not just the first one."""
import ast
import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.relative_to(ROOT / "nbs").as_posix(): nbformat.read(path, as_version=4)
             for path in sorted((ROOT / "nbs").rglob("[!_.]*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
MODULES = sorted(path for path in (ROOT / "ncp_vae").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
DOTTED = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
FLOORS = {"theory": 0, "models": 1, "engine": 2, "runs": 3, ".": 3}     # a notebook imports from its floor or below

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]


def none(offenders):
    "Fail with one line for each offender."
    offenders = list(offenders)
    if offenders:
        pytest.fail(f"{len(offenders)} offender(s):\n" + "\n".join(offenders), pytrace=False)


def cells(kind, part=None):
    "(where, cell) of every cell of a kind, in all notebooks or in those of one folder."
    for name, notebook in NOTEBOOKS.items():
        if part is None or name.startswith(part + "/"):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type == kind:
                    yield f"nbs/{name} cell {index}", cell


def code_lines(cell):
    "The lines of a code cell that are neither blank nor an nbdev directive."
    return [line for line in cell.source.split("\n") if line.strip() and not line.startswith("#|")]


def directives(cell):
    return {line[2:].split()[0] for line in cell.source.split("\n") if line.startswith("#| ")}


def tree(cell):
    "The syntax tree of a code cell; lines that are for the shell or for IPython are left out."
    return ast.parse("\n".join(line for line in cell.source.split("\n") if not line.startswith(("%", "!"))))


def imported(node):
    "The modules that an import statement names."
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]


def imports(node):
    return [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]


def python(code):
    "Run code in a fresh interpreter; what it prints."
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


# ---- the exported library -------------------------------------------------------------------------------------------

def test_library_is_what_the_notebooks_export(tmp_path, command):
    "Also finds a module whose notebook is gone: nbdev_export never deletes one."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "ncp_vae").mkdir()
    command("nbdev_export", cwd=tmp_path)
    here, fresh = ({path.relative_to(root).as_posix(): path.read_text() for path in (root / "ncp_vae").rglob("*.py")}
                   for root in (ROOT, tmp_path))
    none([f"{name}: not exported yet" for name in fresh.keys() - here.keys()]
         + [f"{name}: no notebook exports it" for name in here.keys() - fresh.keys()]
         + [f"{name}: differs from its notebook's export" for name in here.keys() & fresh.keys() if here[name] != fresh[name]])


def test_public_names_have_docstrings():
    def undocumented(module):
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):     # a dataclass makes one up
                yield f"{module.__name__}.{name}"
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(member) and not attribute.startswith("_") and not inspect.getdoc(getattr(value, attribute)):
                    yield f"{module.__name__}.{name}.{attribute}"
    none(line for name in DOTTED for line in undocumented(importlib.import_module(name)))


def test_import_loads_nothing_beyond_torch():
    """`import ncp_vae` adds itself to the modules that torch loads, and no other; theory and models add the standard library's at
    most. So an import takes little longer than torch's; how long, benchmarks/process.py measures. Training is the broken twin."""
    def beyond(names):
        return set(python(f"import sys, torch\nbefore = set(sys.modules)\nfor name in {names}: __import__(name)\n"
                          "print(*set(sys.modules) - before)").split())
    light = [name for name in DOTTED if not name.startswith("ncp_vae.engine.")]
    assert beyond(["ncp_vae"]) == {"ncp_vae"}
    assert {name.partition(".")[0] for name in beyond(light)} - sys.stdlib_module_names == {"ncp_vae"}
    assert "accelerate" in beyond(["ncp_vae.engine.train"])


def test_library_imports_nothing_that_only_notebooks_and_runs_need():
    heavy = {"nbdev", "fastcore", "execnb", "torchvision", "matplotlib", "seaborn", "sklearn", "mlxtend", "papermill", "IPython", "pythae", "diffusers"}
    names = [name for name in DOTTED if name != "ncp_vae.engine.plots"]
    loaded = set(python(f"import sys\nfor name in {names}: __import__(name)\nprint(*sys.modules)").split())
    assert not heavy & loaded


# ---- the form of a notebook -----------------------------------------------------------------------------------------

def test_clean_changes_nothing(tmp_path, command):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    command("nbdev_clean", cwd=tmp_path)
    none(f"nbs/{name}" for name in NOTEBOOKS
         if (ROOT / "nbs" / name).read_bytes() != (tmp_path / "nbs" / name).read_bytes())


def test_no_line_of_code_is_longer_than_110_characters():
    none(f"{where}, line {number}: {len(line)} characters" for where, cell in cells("code")
         for number, line in enumerate(cell.source.split("\n"), 1) if len(line) > 110)


def test_first_page_has_title_and_subtitle():
    def wrong(notebook):
        first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
        return not re.match(r"# [^\n]+\n\n> \S", first)
    none(f"nbs/{name}" for name, notebook in NOTEBOOKS.items() if wrong(notebook))


def test_notebook_format():
    none(f"nbs/{name}: kernelspec" for name, notebook in NOTEBOOKS.items()
         if notebook.metadata.get("kernelspec", {}).get("name") != "python3")
    none(f"nbs/{name}: {size} bytes" for name in NOTEBOOKS
         if (size := (ROOT / "nbs" / name).stat().st_size) > 500_000)


def test_notebooks_are_committed_with_outputs_and_without_errors():
    def wrong(notebook):
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        if not outputs:
            yield "no outputs"
        if any(output.output_type == "error" for output in outputs):
            yield "an error"
        if any(output.get("name") == "stderr" for output in outputs):
            yield "stderr: a warning or a progress bar, which differ from run to run"
    none(f"nbs/{name}: {problem}" for name, notebook in NOTEBOOKS.items() for problem in wrong(notebook))


def test_cells_are_short():
    def limit(cell):
        is_class = any(isinstance(node, ast.ClassDef) for node in tree(cell).body)
        return 25 if directives(cell) & {"export", "exporti", "exports"} and not is_class else 40
    none(f"{where}: {length} lines, {limit(cell)} allowed" for where, cell in cells("code")
         if (length := len(code_lines(cell))) > limit(cell))
    none(f"{where}: {length} lines with blank ones and directives, 40 allowed" for where, cell in cells("code")
         if (length := len(cell.source.split("\n"))) > 40)


def test_imports_stand_in_cells_of_their_own():
    def mixed(cell):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom))
                 or isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" for node in tree(cell).body}
        return kinds == {True, False}
    none(where for where, cell in cells("code") if mixed(cell))


def test_there_is_more_prose_than_code():
    def ratio(notebook):
        words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
        return words / max(1, sum(len(code_lines(cell)) for cell in notebook.cells if cell.cell_type == "code"))
    none(f"nbs/{name}: {ratio(notebook):.1f} words a line of code, {wanted} wanted" for name, notebook in NOTEBOOKS.items()
         if ratio(notebook) < (wanted := 3 if name.startswith("theory/") else 1))


def test_equation_tags_are_unique():
    homes = {}
    for where, cell in cells("markdown"):
        for tag in re.findall(r"\\tag\{([^}]*)\}", cell.source):
            homes.setdefault(tag, []).append(where)
    none(f"({tag}): {', '.join(places)}" for tag, places in homes.items() if len(places) > 1)


def test_imports_only_go_down():
    def floor(module):
        parts = module.split(".")
        return FLOORS.get(parts[1], 0) if parts[0] == "ncp_vae" and len(parts) > 1 else 0
    none(f"{where}: imports {module}" for where, cell in cells("code") for node in imports(tree(cell)) for module in imported(node)
         if floor(module) > FLOORS[Path(where.split()[0]).relative_to("nbs").parent.as_posix()])


def test_modules_import_each_other_in_no_circle():
    "Imports inside functions and for type checking count too."
    paths = [path for path in (ROOT / "ncp_vae").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")]
    needs = {".".join(path.relative_to(ROOT).with_suffix("").parts): set() for path in paths}
    for path, (name, needed) in zip(paths, needs.items()):
        for node in (node for node in imports(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), name.rpartition(".")[0])
            needed.update({module, *(f"{module}.{alias.name}" for alias in node.names)} & needs.keys())
    assert sum(map(len, needs.values())) > 200                      # they were found
    list(TopologicalSorter(needs).static_order())                   # CycleError names a circle


# ---- run notebooks --------------------------------------------------------------------------------------------------

def test_run_notebooks_have_one_cell_of_literal_parameters():
    def wrong(notebook):
        tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        if len(tagged) != 1:
            yield f"{len(tagged)} parameters cells"
        for node in (node for cell in tagged for node in tree(cell).body):
            try:
                ast.literal_eval(node.value if isinstance(node, ast.AnnAssign) else node)
            except (ValueError, TypeError):
                yield f"not an annotated literal: {ast.unparse(node)}"
    none(f"nbs/{name}: {problem}" for name, notebook in NOTEBOOKS.items() if name.startswith("runs/") for problem in wrong(notebook))


def test_run_notebooks_are_strangers_to_the_repository():
    "They import ncp_vae, the standard library and what settings.ini lists, and nothing else; they export nothing."
    listed = f"{SETTINGS['requirements']} {SETTINGS['run_requirements']} {SETTINGS['pythae_requirements']}".split()
    names = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    known = {"ncp_vae", *sys.stdlib_module_names, *(names.get(n, n) for n in (re.match(r"[\w-]+", text)[0] for text in listed))}
    none(f"{where}: imports {module}" for where, cell in cells("code", "runs")
         for node in imports(tree(cell)) for module in imported(node) if module.split(".")[0] not in known)
    none(where for where, cell in cells("code", "runs") if directives(cell) & {"export", "exporti", "exports", "default_exp"})


# ---- the repository -------------------------------------------------------------------------------------------------

def texts():
    "(where, text) of all that a person wrote or reads: text files whole, notebooks by cell and without their pictures."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in sorted(listed.stdout.split("\n")):
        path = ROOT / name
        if path.suffix == ".ipynb" and path.is_file():
            for index, cell in enumerate(nbformat.read(path, as_version=4).cells):
                outputs = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) + str(output.get("traceback", ""))
                           for output in cell.get("outputs", [])]
                yield f"{name} cell {index}", cell.source + "\n" + "\n".join(outputs)
        elif path.suffix in {"", ".py", ".md", ".ini", ".yml", ".yaml", ".json", ".css", ".sh"} and path.is_file():
            yield name, path.read_text(encoding="utf-8")


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.~/)}-])/(?:root|home|Users|work|tmp|mnt|opt)/[\w.-]+|\b[A-Z]:\\\\?Users")
    none(f"{where}: {match[0]}" for where, text in texts() for match in pattern.finditer(text))


def test_relative_links_lead_somewhere():
    def broken(where, text):
        for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$", "", text, flags=re.S)):
            if not re.match(r"[a-z]+:", link) and not (ROOT / where.split()[0]).parent.joinpath(link).exists():
                yield link
    pages = [(where, cell.source) for where, cell in cells("markdown")] + [item for item in texts() if item[0].endswith(".md")]
    none(f"{where}: {link}" for where, text in pages for link in broken(where, text))


def test_readme_is_made_from_the_index():
    if "index.ipynb" not in NOTEBOOKS:
        pytest.fail("nbs/index.ipynb is missing", pytrace=False)
    wanted = runpy.run_path(str(ROOT / "docs" / "readme.py"))["readme"]()
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "images").glob("*")} | {"README.md"}
    none(f"{name}: run make readme" for name in wanted.keys() | found
         if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != wanted.get(name))
