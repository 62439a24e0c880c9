"""The committed results: whole records of runs that succeeded, and the same numbers in the README."""
import json
import re
from pathlib import Path

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


def test_the_readme_says_what_the_runs_found():
    "At most eight rows, each with the run's own number and the law that it is about; the rest is in RESULTS.md (test_report.py)."
    names = "|".join(run.name for run in RUNS)
    rows = re.findall(rf"^\| ({names}) \| (\w+) \| ([^|]+) \| ([^|]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert 4 <= len(rows) <= 8
    for name, key, law, number in rows:
        metric = json.loads((ROOT / "results" / name / "metrics.json").read_text())["metrics"][key]
        assert number == f"{metric['value']:.3f} ± {metric['std_error']:.3f}", (name, key)
        assert law in ("base prior", "p_NCP", "SIR"), (name, key)


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
