"""Every experiment, at its smoke preset, through the installed command: this proves its parameters, cells and record."""
import json
from pathlib import Path

import pytest

from ncp_vae.engine.experiment import KINDS

RUNS = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "nbs" / "runs").glob("[!_.]*.ipynb"))


@pytest.mark.parametrize("name", RUNS)
def test_run_at_smoke_preset(name, command, tmp_path):
    folder = tmp_path / "run"
    command("ncp-vae", "run", name, "--preset", "smoke", "--out", folder, cwd=tmp_path, timeout=300)
    assert json.loads((folder / "status.json").read_text())["state"] == "succeeded"
    record = json.loads((folder / "metrics.json").read_text())
    assert record["experiment"] == name and record["preset"] == "smoke" and record["seconds"] > 0
    assert record["params"] == json.loads((folder / "params.json").read_text())["params"]
    assert {"commit", "environment"} <= set(record) and record["metrics"]
    for metric in record["metrics"].values():
        assert isinstance(metric["value"], (int, float)) and metric["kind"] in KINDS and metric["unit"]
