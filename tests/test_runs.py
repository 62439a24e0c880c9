"""Every experiment, at its smoke preset, through the installed command: this proves its parameters, cells and record."""
import json
from pathlib import Path

import pytest
import torch

from ncp_vae.engine import store
from ncp_vae.measured import KINDS

RUNS = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "nbs" / "runs").glob("[!_.]*.ipynb"))


@pytest.mark.parametrize("name", RUNS)
def test_run_at_smoke_preset(name, command, tmp_path):
    folder = tmp_path / "run"
    command("ncp-vae", "run", name, "--preset", "smoke", "--out", folder, cwd=tmp_path)
    assert json.loads((folder / "status.json").read_text())["state"] == "succeeded"
    record = json.loads((folder / "metrics.json").read_text())
    assert record["experiment"] == name and record["preset"] == "smoke" and record["seconds"] >= 0
    assert record["params"] == json.loads((folder / "params.json").read_text())["params"]
    assert {"commit", "environment"} <= set(record) and record["metrics"]
    for metric in record["metrics"].values():
        assert isinstance(metric["value"], (int, float)) and metric["kind"] in KINDS and metric["unit"]


def test_the_hierarchical_run_takes_an_nvae(command, tmp_path):
    "The same page with convolutional groups and ratios, on the smallest preset and for a few steps."
    small = dict(model="nvae:digits", vae_steps=30, ncp_steps=20, ncp_width=8, held_out_images=64, test_images=64, num_samples=2,
                 log_z_samples=100, proposals=8, bound_images=20, draws=200, feature_steps=20, most_proposals=64, target_ess=4)
    given = [part for name, value in small.items() for part in ("-p", f"{name}={value}")]
    command("ncp-vae", "run", "hierarchical", *given, "--out", tmp_path / "run", cwd=tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert {"loss_1", "loss_2", "nll_gain", "mmd2_budgets", "frechet_most"} <= set(metrics) and "loss_3" not in metrics


def test_the_ood_run_takes_colour_images_and_refuses_another_shape(command, tmp_path):
    "An NVAE with a Normal likelihood, whose images are not binarised. One metric for each score of 3 groups under 3 priors."
    small = dict(dataset="photos32", model="nvae:photos32", vae_steps=3, ratio_width=4, ncp_steps=2, ebm_steps=2, chain=1, batch_size=16,
                 validation_images=32, test_images=32, num_samples=1, repeats=3)
    def run(out, **given):
        command("ncp-vae", "run", "ood", *(f"-p{name}={value}" for name, value in {**small, **given}.items()), "--out", tmp_path / out, cwd=tmp_path)
    run("run")
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = ["L>0", "L>1", "L>2", "LLR>1", "LLR>2"]
    expected = {f"{what}_{score}_{name}" for what in ("auroc", "auprc", "fpr80") for name in ("base", "ncp", "ebm") for score in scores}
    expected |= {f"{what}_log_r_{name}" for what in ("auroc", "auprc", "fpr80") for name in ("ncp", "ebm")}
    expected |= {f"gain_{score}_{name}" for name in ("ncp", "ebm") for score in scores}
    assert set(record["metrics"]) == expected and record["data"] == "photos32 / turned"
    assert all(metric["n"] == 64 and metric["paper"] is None for metric in record["metrics"].values())
    with pytest.raises(pytest.fail.Exception, match=r"shape of photos32, \(3, 32, 32\); those of digits have \(1, 8, 8\)"):
        run("refused", outside="digits")


def test_the_images_run_takes_the_vae_of_another(command, tmp_path):
    "Other ratios on the same VAE, which the first run has stored; and a run on other data is refused."
    small = dict(dataset="digits", model="nvae:digits", vae_steps=4, vae_batch=32, ncp_steps=3, ncp_batch=32, ncp_width=4, validation_images=32,
                 held_out_images=32, limit=80, feature_steps=3, likelihood_images=0, pool=8, bn_batches=1)
    def run(out, **given):
        command("ncp-vae", "run", "images", *(f"-p{name}={value}" for name, value in {**small, **given}.items()), "--out", tmp_path / out, cwd=tmp_path)
        return json.loads((tmp_path / out / "metrics.json").read_text())["metrics"]
    first, second = run("first"), run("second", base=tmp_path / "first", ncp_steps=6, seed=1)
    assert first["vae_parameters"] == second["vae_parameters"] and first["loss_1"]["value"] != second["loss_1"]["value"]
    one, other = (store.load(tmp_path / name / "model") for name in ("first", "second"))
    assert all(torch.equal(value, other.vae.state_dict()[name]) for name, value in one.vae.state_dict().items())
    rows = [json.loads(line)["stage"] for line in (tmp_path / "second" / "history.jsonl").read_text().splitlines()]
    assert "ncp" in rows and "vae" not in rows
    with pytest.raises(pytest.fail.Exception, match="another validation_images"):
        run("third", base=tmp_path / "first", validation_images=33)
