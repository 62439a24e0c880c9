"""Each run's preset full through the installed command, on a tiny data set in the true format: it starts and takes its first steps.

The preset's model, data set, precision, learning rates and widths of the VAE are kept. Given by hand, in each test: the numbers of
steps, images, draws and proposals; compile=false, since compiling takes minutes on a CPU; and a random stub of the FID network's
weight file with its own hash, so that the distances are no FID."""
import json
import signal
import subprocess
import time

import pytest
from conftest import BIN
from tiny import write_celeba, write_fashion_mnist, write_inception

STEPS = dict(vae_steps=2, ncp_steps=2)
FEW = dict(num_samples=2, log_z_samples=100, proposals=16)


def full(name, folder, **given):
    "The words of the command line that follow `ncp-vae`."
    return ["run", name, "--preset", "full", "--out", folder, *(word for pair in given.items() for word in ("-p", "{}={}".format(*pair)))]


def result(folder, name):
    "The parameters and metrics of a run that succeeded."
    assert json.loads((folder / "status.json").read_text())["state"] == "succeeded"
    record = json.loads((folder / "metrics.json").read_text())
    assert record["experiment"] == name and record["preset"] == "full"
    return record["params"], record["metrics"]


def stages(folder):
    "The last step of each stage that a run logged."
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {row["stage"]: row["step"] for row in rows}


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_fashion_mnist(root, 40)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "What the runs are told of the FID network."
    path = tmp_path_factory.mktemp("weights") / "stub.pth"
    return dict(inception=path, inception_sha256=write_inception(path))


def test_gaussians25(command, tmp_path):
    "The 200,000 points are made, not read. One seed of the five."
    command("ncp-vae", *full("gaussians25", tmp_path / "run", **STEPS, **FEW, seeds=1, test_points=100, draws=100))
    params, metrics = result(tmp_path / "run", "gaussians25")
    assert params["batch_size"] == 1024 and metrics["ll_base"]["paper"] == -2.753
    assert metrics["ll_base"]["unit"] == "nats" and metrics["ll_base"]["n"] == 100


def test_digits(command, fashion_mnist, tmp_path):
    command("ncp-vae", *full("digits", tmp_path / "run", data_root=fashion_mnist, **STEPS, **FEW, batch_size=20, draws=100))
    params, metrics = result(tmp_path / "run", "digits")
    assert params["dataset"] == "fashion_mnist" and params["latent_dim"] == 50
    assert metrics["nll_base"]["n"] == 40 and metrics["nll_base"]["unit"] == "nats"
    assert stages(tmp_path / "run") == {"vae": 2, "ncp": 2}


def test_hierarchical(command, fashion_mnist, tmp_path):
    "NVAE's 15 groups in bf16. Its own batch of 400 is more than there is: all 40 images are one."
    command("ncp-vae", *full("hierarchical", tmp_path / "run", data_root=fashion_mnist, **STEPS, **FEW, compile=False, batch_size=8,
                             ncp_width=4, test_images=32, held_out_images=32, binarisations=1, bound_images=1, draws=200,
                             feature_steps=2, most_proposals=64, target_ess=1))
    params, metrics = result(tmp_path / "run", "hierarchical")
    assert params["model"] == "nvae:fashion_mnist" and params["bf16"] is True
    assert "loss_15" in metrics and "loss_16" not in metrics
    assert metrics["frechet_base"]["unit"] == "feature distance" and metrics["nll_base"]["n"] == 32


def test_rae(command, weights, tmp_path):
    "To the end, with the FID network's 2,048 features of 20 images. A mixture of one Gaussian, which 128 images are enough for."
    write_celeba(tmp_path / "data", 130, 20)
    command("ncp-vae", *full("rae", tmp_path / "run", data_root=tmp_path / "data", **weights, **STEPS, batch_size=2, components=1,
                             proposals=16, draws=20))
    params, metrics = result(tmp_path / "run", "rae")
    assert params["dataset"] == "celeba64_rae" and params["width"] == 128 and metrics["vae_parameters"]["value"] > 1e6
    for name in ("reconstruction", "base", "gmm", "ncp", "ncp_gmm"):
        metric = metrics[f"frechet_{name}"]
        assert metric["unit"] == "feature distance" and metric["n"] == 20 and not metric.get("paper") and not metric.get("std_error")
    notebook = (tmp_path / "run" / "notebook.ipynb").read_text()
    assert "rae-10k-test (20 of 10,000 generated, 20 of 10,000 real)" in notebook
    assert f"Inception-v3 with the file {weights['inception_sha256'][:8]}" in notebook


def test_images_until_they_are_stopped(command, weights, tmp_path):
    """Table 1's NVAE of 30 groups: one step of each stage, the ratios seen once on test images; then Ctrl-C, since sampling takes
    a minute. Its checkpoint, whole, takes 1.5 GB."""
    write_celeba(tmp_path / "data", 20, 2)
    folder = tmp_path / "run"
    words = full("images", folder, data_root=tmp_path / "data", **weights, vae_steps=1, vae_batch=2, ncp_steps=1, ncp_batch=2, ncp_width=4,
                 limit=20, proposals=2, sample_batch=10, pool=16, bn_batches=1, compile=False)
    with subprocess.Popen([BIN / "ncp-vae", *map(str, words)], cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 300
            while not (folder / "figures" / "training.png").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 130, said[-3000:]
    assert stages(folder) == {"vae": 1, "ncp": 1, "ncp held-out": 1}
    (folder / "vae.ckpt").unlink()
    held_out = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()][-2:]
    assert any("loss_29" in row and "loss_30" not in row for row in held_out)
    assert f"Inception-v3 with the file {weights['inception_sha256'][:8]}" in (folder / "notebook.ipynb").read_text()
    assert "interrupted" in command("ncp-vae", "report", folder) and "vae_parameters" not in command("ncp-vae", "report", folder)


@pytest.mark.parametrize("name, missing", [("images", "list_eval_partition.txt"), ("digits", "train-images-idx3-ubyte")])
def test_without_its_data_a_full_run_fails_before_training(name, missing, command, tmp_path):
    "Nothing is overridden but the place to look in. The Debian package of Fashion-MNIST may be installed: then MNIST is asked for."
    folder, more = tmp_path / "run", {"dataset": "mnist"} if name == "digits" else {}
    words = full(name, folder, data_root=tmp_path / "nothing", **more)
    done = subprocess.run([BIN / "ncp-vae", *map(str, words)], cwd=tmp_path, text=True, timeout=120, capture_output=True)
    assert done.returncode == 1 and not list(folder.glob("*.ckpt")) and not (folder / "history.jsonl").exists()
    assert "is not on this disk" in done.stderr and missing in done.stderr and "root=FOLDER" in done.stderr
    listed = command("ncp-vae", "report", folder)
    assert listed.startswith("no succeeded run") and "failed" in listed
