"""Each run's preset full through the installed command, on a tiny data set in the true format: it starts and takes its first steps.

The preset's model, data set, precision, learning rates and widths of the VAE are kept. Given by hand, in each test: the numbers of
steps, images, draws and proposals; compile=false, since compiling takes minutes on a CPU; and a random stub of the FID network's
weight file with its own hash, so that the distances are no FID. `studies` gets a small trained model. The five large ones are
stopped after their first steps, since sampling from them takes minutes on a CPU."""
import json
import os
import signal
import subprocess
import time

import pytest
from conftest import BIN
from tiny import write_celeba, write_fashion_mnist, write_folder, write_inception

from ncp_vae.engine.cost import forget_peak

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


def written(folder, file):
    "Whether a run has written a file of this name. What goes away while one looks, a checkpoint's first folder, is no error to os.walk."
    return any(file in files for _, _, files in os.walk(folder))


def stopped(command, tmp_path, file, name, **given):
    "Ctrl-C once a full run has written this file: it ends as interrupted and is no result. The rows of its history."
    folder, deadline = tmp_path / "run", time.monotonic() + 1200
    with subprocess.Popen([BIN / "ncp-vae", *map(str, full(name, folder, **given))], cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            while not written(folder, file) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=1200)[0]
        finally:
            process.kill()
    assert process.returncode == 130, said[-3000:]
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    listed = command("ncp-vae", "report", folder)
    assert listed.startswith("no succeeded run") and "interrupted" in listed
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) if path.name != "metrics.jsonl"
            for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_fashion_mnist(root, 20)
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
    command("ncp-vae", *full("digits", tmp_path / "run", data_root=fashion_mnist, **STEPS, **FEW, batch_size=18, draws=100))
    params, metrics = result(tmp_path / "run", "digits")
    assert params["dataset"] == "fashion_mnist" and params["latent_dim"] == 50
    assert metrics["nll_base"]["n"] == 20 and metrics["nll_base"]["unit"] == "nats"


def test_hierarchical(command, fashion_mnist, tmp_path):
    "NVAE's 15 groups in bf16. Its own batch of 400 is more than there is: all 20 images are one."
    rows = stopped(command, tmp_path, "training.png", "hierarchical", data_root=fashion_mnist, **STEPS, **FEW, compile=False, batch_size=8,
                   ncp_width=4)
    assert {(row["stage"], row["step"]) for row in rows} == {("vae", 2), ("ncp", 2), ("ncp held-out", 1), ("ncp held-out", 2)}
    assert "loss_14" in rows[-1] and "loss_15" not in rows[-1]


def test_frozen(command, tmp_path):
    "All its priors, in a batch of 128 and 64 latents. Mixtures of one Gaussian, for which 128 images are enough."
    write_fashion_mnist(tmp_path / "data", 300)
    command("ncp-vae", *full("frozen", tmp_path / "run", data_root=tmp_path / "data", epochs=2, earlier="1", flow_steps=2, matching_steps=2, ncp_steps=2,
                             few=1, many=1, hidden=16, blocks=2, validation_images=32, num_samples=2, binarisations=2, solver_images=20, solver_samples=1,
                             log_z_samples=20, proposals=4, draws=20, feature_steps=2))
    params, metrics = result(tmp_path / "run", "frozen")
    assert params["latent_dim"] == 64 and params["ncp_width"] == 256
    assert {"nll_base", "gain_realnvp", "gain_matching", "over_own_ncp_joint", "distance_staged", "train_seconds_gmm1", "nll_base_at_1",
            "over_own_ncp_at_1"} <= metrics.keys()


def test_priors(command, tmp_path):
    "All priors, with the networks of the LARS/SNIS comparison, on MNIST's files. A mixture of one Gaussian, for which 128 images are enough."
    files = write_fashion_mnist(tmp_path / "data", 300)
    command("ncp-vae", *full("priors", tmp_path / "run", data_root=files, vae_steps=2, steps=2, ebm_steps=1, chain_steps=2, components=1,
                             pseudo_inputs=8, blocks=2, hidden=16, proposals=8, truncation=3, validation_images=32, num_samples=2, solver_images=20,
                             solver_samples=1, log_z_samples=20, draws=20, feature_steps=2))
    params, metrics = result(tmp_path / "run", "priors")
    assert (params["latent_dim"], params["width"], params["ratio_width"], params["ratio_layers"]) == (50, 300, 100, 2)
    assert metrics["parameters_snis"]["value"] == 50 * 100 + 100 + 100 * 100 + 100 + 100 + 1 + 2       # and log Z with its error
    assert {"gain_matching", "nll_bound_snis_joint", "nll_lars_joint", "distance_two_stage", "train_flops_ebm"} <= metrics.keys()


def test_flows(command, tmp_path):
    "Every variant of the dense net, and every measure of them."
    write_fashion_mnist(tmp_path / "data", 300)
    command("ncp-vae", *full("flows", tmp_path / "run", data_root=tmp_path / "data", epochs=1, flow_epochs=2, iterations=2, hidden=16, blocks=2,
                             validation_images=32, test_images=32, num_samples=2))
    params, metrics = result(tmp_path / "run", "flows")
    assert params["latent_dim"] == 0 and metrics["nll_joint"]["paper"] is None and metrics["nll_joint"]["n"] == 32
    assert {"gain_posterior", "gain_both", "gain_posthoc", "gain_iterative", "kl_z|x_joint", "au_standard", "std_iterative", "middle_posthoc",
            "low_elbo_joint", "kl_above_joint_8", "kl_below_standard_1", "train_seconds_both"} <= metrics.keys()
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} >= {"pairs", "between", "low_posterior", "samples"}


def test_rae(command, weights, tmp_path):
    "Until the reconstructions were scored with 2,048 features of 20 images. A mixture of one Gaussian, for which 128 images are enough."
    write_celeba(tmp_path / "data", 130, 20)
    rows = stopped(command, tmp_path, "base-0of1-0000.pt", "rae", data_root=tmp_path / "data", **weights, **STEPS, batch_size=2,
                   components=1, proposals=16, draws=20)
    assert sorted((row["stage"], row.get("step")) for row in rows) == [("mixture", None), ("ncp", 2), ("ncp", 2), ("vae", 2)]
    assert f"Inception-v3 with the file {weights['inception_sha256'][:8]}" in (tmp_path / "run" / "notebook.ipynb").read_text()


def test_images(command, weights, tmp_path):
    "Table 1's NVAE of 30 groups in bf16: one step of each stage. Its checkpoint takes 1.5 GB."
    write_celeba(tmp_path / "data", 20, 2)
    rows = stopped(command, tmp_path, "training.png", "images", data_root=tmp_path / "data", **weights, vae_steps=1, vae_batch=2,
                   validation_images=4, ncp_steps=1, ncp_batch=2, ncp_width=4, limit=20, proposals=2, sample_batch=10, compile=False)
    assert {(row["stage"], row["step"]) for row in rows} == {("vae", 1), ("ncp", 1), ("ncp held-out", 1)}
    assert "loss_29" in rows[-1] and "loss_30" not in rows[-1]
    assert f"Inception-v3 with the file {weights['inception_sha256'][:8]}" in (tmp_path / "run" / "notebook.ipynb").read_text()


def test_joint_ebm(command, weights, tmp_path):
    """On images of a folder, since torchvision takes only CIFAR-10's own files, and with the smallest NVAE of their shape, since the
    preset's takes a batch of hundreds: until both energies are trained."""
    write_folder(tmp_path / "data", 30, (32, 32))
    rows = stopped(command, tmp_path, "ebm_longer.ckpt", "joint_ebm", data_root=tmp_path / "data", dataset="folder", side=32, **weights,
                   model="nvae:photos32", vae_steps=1, validation_images=4, ncp_steps=1, ratio_batch=2, ratio_width=4, chain_steps=1,
                   limit=20, proposals=2, sample_batch=2, likelihood_images=2)
    assert {("vae", 1), ("ncp", 1), ("ebm", 1)} <= {(row["stage"], row["step"]) for row in rows}
    assert all("log_r_model" in row for row in rows if row["stage"] == "ebm")


def test_ood(command, tmp_path):
    """On two photographs and the same upside down: torchvision takes only CIFAR-10's and SVHN's own files. With the smallest NVAE of
    their shape, since the preset's takes a batch of hundreds."""
    rows = stopped(command, tmp_path, "ebm.ckpt", "ood", dataset="photos32", outside="", model="nvae:photos32", vae_steps=1, ncp_steps=1,
                   ebm_steps=1, chain=1, batch_size=2, ratio_width=4, validation_images=32, test_images=32)
    assert {("vae", 1), ("ncp", 1), ("ebm", 1)} <= {(row["stage"], row["step"]) for row in rows}


def test_studies(command, tmp_path):
    "On a finished NVAE of the digits: the one that the preset names takes a day to train."
    small = dict(model="nvae:digits", vae_steps=4, ncp_steps=4, ncp_width=4, held_out_images=64, test_images=64, num_samples=2,
                 log_z_samples=100, proposals=8, bound_images=20, draws=200, feature_steps=4, most_proposals=64, target_ess=4)
    command("ncp-vae", "run", "hierarchical", "--out", tmp_path / "trained", *(f"-p{key}={value}" for key, value in small.items()))
    command("ncp-vae", *full("studies", tmp_path / "run", trained=tmp_path / "trained", proposals="2,4", iterations="2,4", draws=200,
                             at_once=50, repeats=2, ess_proposals=16, held_out_images=64, feature_steps=4))
    params, metrics = result(tmp_path / "run", "studies")
    assert ("sir_4_memory" in metrics) == forget_peak()            # on some systems memory cannot be measured
    assert {"sir_2_frechet", "budget_4_frechet", "smc_2_frechet", "pld_2_frechet", "jm_4_frechet"} <= set(metrics)
    assert {"sir_2_frechet", "ld_2_seconds_1", "ld_4_seconds_10", "rank_correlation", "loss_2", "ess_1"} <= set(metrics)
    assert metrics["sir_2_frechet"]["unit"] == "raw feature distance" and metrics["sir_2_frechet"]["paper"] is None


@pytest.mark.parametrize("name, missing", [("images", "list_eval_partition.txt"), ("digits", "train-images-idx3-ubyte")])
def test_without_its_data_a_full_run_fails_before_training(name, missing, command, tmp_path, weights):
    "Nothing else is overridden. The Debian package of Fashion-MNIST may be installed: then MNIST is asked for."
    folder, more = tmp_path / "run", {"dataset": "mnist"} if name == "digits" else weights
    words = full(name, folder, data_root=tmp_path / "nothing", **more)
    done = subprocess.run([BIN / "ncp-vae", *map(str, words)], cwd=tmp_path, text=True, timeout=1200, capture_output=True)
    assert done.returncode == 1 and not list(folder.glob("*.ckpt")) and not (folder / "history.jsonl").exists()
    assert "is not on this disk" in done.stderr and missing in done.stderr and "root=FOLDER" in done.stderr
    listed = command("ncp-vae", "report", folder)
    assert listed.startswith("no succeeded run") and "failed" in listed
