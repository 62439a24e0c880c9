"""The committed results: whole records of runs that succeeded, and the same numbers in the README."""
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from ncp_vae.engine.parameters import find_experiment
from ncp_vae.measured import KINDS

ROOT = Path(__file__).parents[1]
RUNS = sorted(path.parent for path in (ROOT / "results").glob("*/params.json"))


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_committed_run_is_whole(folder):
    assert json.loads((folder / "status.json").read_text())["state"] == "succeeded"
    record = json.loads((folder / "metrics.json").read_text())
    experiment = find_experiment(record["experiment"])
    assert experiment.check(record["params"]) == record["params"]          # its parameters are still the experiment's
    later = set(experiment.parameters) - {"run_dir"} - set(record["params"])           # what it could not be asked yet
    assert not any(experiment.parameters[name].default for name in later)              # is off where nobody asks
    assert record["commit"] and not record["commit"].endswith("-dirty")
    assert all(metric["kind"] in KINDS for metric in record["metrics"].values())
    assert list((folder / "figures").glob("*.png"))


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_kept_notebook_is_small_and_has_no_traces(folder):
    path = folder / "notebook.ipynb"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < 500_000 and "run_dir = \\\"" not in text and str(ROOT) not in text
        assert not any(output.get("name") == "stderr" for cell in nbformat.reads(text, 4).cells for output in cell.get("outputs", []))


def a_run(folder, pixels):
    "A run as the command leaves it, whose notebook has one picture of random pixels."
    import base64
    import io

    import numpy
    import PIL.Image
    folder.joinpath("figures").mkdir(parents=True)
    for name in ("params", "environment", "status", "metrics"):
        folder.joinpath(f"{name}.json").write_text(json.dumps({"of": name, "experiment": "images"}))
    folder.joinpath("figures", "headline.png").touch()
    file = io.BytesIO()
    noise = numpy.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=numpy.uint8)
    PIL.Image.fromarray(noise).save(file, "png")
    v4 = nbformat.v4
    picture = v4.new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode()})
    cells = [v4.new_markdown_cell("# Images\n\n> The page", metadata={"papermill": {"duration": 1.0}}),
             v4.new_code_cell(f'# Parameters\nseed = 0\nrun_dir = "{folder}"', metadata={"tags": ["injected-parameters"]}),
             v4.new_code_cell("run = 1", execution_count=3,
                              outputs=[v4.new_output("stream", name="stderr", text="50%"), v4.new_output("stream", text=f"4.0 nats, in {folder}/vae.ckpt"), picture])]
    nbformat.write(v4.new_notebook(cells=cells, metadata={"papermill": {"input_path": str(folder)}}), folder / "notebook.ipynb")
    return folder


@pytest.fixture
def docs(monkeypatch):
    "The scripts of docs/."
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield
    for name in ("build", "keep"):
        sys.modules.pop(name, None)


def test_keeping_a_run_copies_what_is_a_result(docs, tmp_path):
    import keep
    folder = a_run(tmp_path / "run", pixels=500)      # 750 kB in true colours
    keep.keep(folder, tmp_path / "kept")
    kept = (tmp_path / "kept" / "notebook.ipynb").read_text(encoding="utf-8")
    assert len(kept.encode()) < 500_000 < (folder / "notebook.ipynb").stat().st_size
    assert "4.0 nats, in vae.ckpt" in kept and "seed = 0" in kept and "50%" not in kept and str(folder) not in kept
    for name in ("params.json", "status.json", "metrics.json", "environment.json", "figures/headline.png"):
        assert (tmp_path / "kept" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(FileExistsError):
        keep.keep(folder, tmp_path / "kept")


def test_a_notebook_that_stays_too_large_is_not_kept(docs, tmp_path):
    import keep
    with pytest.raises(ValueError, match="bytes with its pictures in 16 colours; 500,000 are allowed"):
        keep.keep(a_run(tmp_path / "run", pixels=1500), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_site_shows_kept_notebooks_instead_of_the_smallest_ones(docs, tmp_path, monkeypatch):
    import build
    for name in ("b", "a"):
        a_run(tmp_path / "results" / name, pixels=8)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    kept = build.executed()
    assert kept == {"runs/images.ipynb": tmp_path / "results/a/notebook.ipynb", "runs/b.ipynb": tmp_path / "results/b/notebook.ipynb"}
    target = build.site_target("results.ipynb", kept)
    assert target("results/b/notebook.ipynb") == "runs/b.ipynb" and target("nbs/runs/images.ipynb") == "runs/images.ipynb"
    assert target("results/a/figures/headline.png") == "../results/a/figures/headline.png"
    assert target("results/README.md").startswith("https://")


def test_the_readme_says_what_the_runs_found():
    """At most eight rows, each with the mean over its runs, the error of one of them, the deviation between them, and the law that it is
    about; the rest is in RESULTS.md (test_report.py)."""
    rows = re.findall(r"^\| (\w+(?:, \w+)*) \| (\w+) \| ([^|]+) \| (\S+) ± (\S+) \| (?:± (\S+) over \d )?\|", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert 4 <= len(rows) <= 8 and {name for names, *_ in rows for name in names.split(", ")} <= {run.name for run in RUNS}
    for names, key, law, *shown in rows:
        found = [json.loads((ROOT / "results" / name / "metrics.json").read_text())["metrics"][key] for name in names.split(", ")]
        values, errors = np.array([(metric["value"], metric["std_error"]) for metric in found]).T
        expected = [values.mean(), np.sqrt((errors**2).mean()), *([values.std(ddof=1)] if found[1:] else [])]
        assert [float(number) for number in shown if number] == pytest.approx(expected, abs=5.1e-4), (names, key)
        assert law in ("base prior", "p_NCP", "SIR"), (names, key)


def test_what_the_readme_claims():
    """The toy's NCP beats the paper's value and its own base; on images the gain is at least three of its standard errors."""
    def metrics(name):
        return json.loads((ROOT / "results" / name / "metrics.json").read_text())["metrics"]
    toy = metrics("gaussians25")
    assert toy["ll_ncp"]["value"] > -0.6 and toy["modes_ncp"]["value"] == 25 and toy["good_fraction_ncp"]["value"] > 0.88
    for name in ("fashion_mnist", "mnist5k"):
        gain = metrics(name)["nll_gain"]
        assert gain["value"] > 3 * gain["std_error"] > 0
    for name in ("hierarchical", "hierarchical_k1", "hierarchical_k2", "hierarchical_k4", "hierarchical_k10"):
        gain = metrics(name)["nll_gain"]
        assert gain["value"] > 5 * gain["std_error"] > 0
    for name in ("images", "images_seed1"):                # the paper's own share, on CelebA-64, is 0.34
        left = metrics(name)["excess_left"]
        assert left["value"] + 3 * left["std_error"] < 0.34 and left["n"] == 10_000
        assert metrics(name)["nll_gain_bound"]["value"] > 3 * metrics(name)["nll_gain_bound"]["std_error"]
    deep = metrics("hierarchical")
    assert deep["nll_base"]["value"] < 229.5 and deep["log_z"]["std_error"] < 0.23
    assert deep["budget_fraction"]["value"] < 0.2      # and no worse, by more than two of its errors, than all the proposals
    for name in ("frechet", "mmd2"):
        few, many = deep[f"{name}_budgets"], deep[f"{name}_most"]
        assert few["value"] - many["value"] < 2 * (few["std_error"] ** 2 + many["std_error"] ** 2) ** 0.5
