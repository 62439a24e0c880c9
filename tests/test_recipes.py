"""Recipes: what a name stands for, and a finished run that is built again. Nothing here is statistical: equalities and refusals."""
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ncp_vae.engine import cost, store
from ncp_vae.engine.data import Binarized, load
from ncp_vae.engine.experiment import RunFolder, find_experiment
from ncp_vae.engine.recipes import AsSeen, as_seen, build_vae, is_binary, keep_model, network, ratios_for, trained
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.models.nvae import PRESETS, NVAE
from ncp_vae.models.ratios import ConvRatio, MLPRatio

SHAPE = (1, 8, 8)
DENSE = dict(groups=3, latents=6, state=8, parameters=5000)
CPU = torch.device("cpu")


def write_papers(folder, experiment, params):
    (folder / "params.json").write_text(json.dumps(dict(experiment=experiment, preset="smoke", params=params)))
    (folder / "status.json").write_text(json.dumps(dict(state="succeeded", pid=os.getpid(), host="elsewhere")))


def make_run(folder, model="dense"):
    "A run of a few steps with its papers and its model; the NCP that it trained."
    images = load("digits").images
    vae, settings = build_vae(model, SHAPE, len(images), steps=3, mean=images.mean(0), **DENSE)
    data = Binarized(images)
    fit_vae(vae, data, seed=0, **settings)
    ncp = fit_ncp(vae, data, ratios=ratios_for(vae, 8), steps=3, batch_size=64, lr=1e-2, seed=0, machine=settings["machine"])
    keep_model(RunFolder(folder), ncp)
    write_papers(folder, "hierarchical", dict(model=model, dataset="digits"))
    return ncp


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run of the dense model, to be copied or read, not changed; its folder and its NCP."
    folder = tmp_path_factory.mktemp("run")
    return folder, make_run(folder)


@pytest.fixture
def copied(finished, tmp_path):
    "A copy of it, to be broken."
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---- what a name stands for -----------------------------------------------------------------------------------------

def test_dense_model_has_the_asked_groups_and_mean():
    mean = torch.rand(SHAPE)
    vae, settings = build_vae("dense", SHAPE, 1000, steps=100, mean=mean, batch_size=32, lr=1e-3, **DENSE)
    assert [tuple(shape) for shape in vae.latent_shapes] == [(2,)] * 3 and torch.equal(vae.mean, mean)
    assert sum(parameter.numel() for parameter in vae.parameters()) <= DENSE["parameters"]
    assert (settings["steps"], settings["batch_size"], settings["lr"], settings["kl_warmup"]) == (100, 32, 1e-3, 10)


def test_preset_counts_its_epochs_in_steps():
    vae, settings = build_vae("nvae:digits", SHAPE, 640)
    preset = PRESETS["digits"]
    assert isinstance(vae, NVAE) and settings["steps"] == preset.epochs * 10 and settings["batch_size"] == 64
    assert settings["kl_balance"] and settings["spectral"] == preset.spectral
    assert settings["recipe"].optimizer == "adamax" and settings["recipe"].lr_warm_up == 10 * preset.warm_up_epochs


def test_asked_steps_shorten_a_preset():
    "Its warm-up too, to a tenth of them."
    settings = build_vae("nvae:digits", SHAPE, 640, steps=20)[1]
    assert settings["steps"] == 20 and settings["recipe"].lr_warm_up == 2 and settings["kl_warmup"] == 6


@pytest.mark.parametrize("name", ["fashion_mnist", "celeba64-6"])
def test_presets_of_grey_and_colour_are_models_with_ratios(name):
    config = PRESETS[name].config
    vae, settings = build_vae(f"nvae:{name}", config.image_shape, 100000)
    assert len(ratios_for(vae, 8)) == len(vae.latent_shapes) == len(config.groups)
    assert settings["steps"] > settings["kl_warmup"] > 0 and is_binary(vae) == (config.likelihood == "bernoulli")


def test_ratios_fit_their_latents():
    assert {type(ratio) for ratio in ratios_for(network("dense", SHAPE, **DENSE), 8)} == {MLPRatio}
    assert {type(ratio) for ratio in ratios_for(network("nvae:digits", SHAPE), 8)} == {ConvRatio}


@pytest.mark.parametrize("model, shape, what", [
    ("vae", SHAPE, "model must be 'dense' or 'nvae:PRESET', got 'vae'"), ("nvae:moon", SHAPE, "unknown preset 'moon'"),
    ("nvae:cifar10", (3, 64, 64), r"nvae:cifar10 is for images of shape \(3, 32, 32\), got \(3, 64, 64\)")])
def test_other_models_are_refused(model, shape, what):
    with pytest.raises(ValueError, match=what):
        build_vae(model, shape, 1000)


@pytest.mark.parametrize("groups", [0, 7])
def test_more_groups_than_latents_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups must lie between 1 and its 6 latents, got {groups}"):
        network("dense", SHAPE, groups=groups, latents=6)


# ---- what images a model wants ---------------------------------------------------------------------------------------

def test_a_bernoulli_model_sees_zeros_and_ones_drawn_anew():
    data = AsSeen(network("nvae:digits", SHAPE), load("digits"))
    first, second = data[:100], data[:100]
    assert len(data) == len(load("digits")) and set(first.unique().tolist()) == {0, 1} and not torch.equal(first, second)


@pytest.mark.parametrize("bits, levels", [(8, 256), (5, 32)])
def test_a_normal_model_sees_images_of_its_bits(bits, levels):
    vae = network("nvae:photos32", (3, 32, 32))
    vae.config = replace(vae.config, bits=bits)
    shades = (torch.arange(256) / 255).view(1, 1, 16, 16)
    seen = as_seen(vae, shades)
    assert len(seen.unique()) == levels and (seen - shades).abs().max() < 1 / levels


# ---- a finished run, built again ------------------------------------------------------------------------------------

def same_ratios(a, b):
    latents = a.sample(16).latents
    with torch.no_grad():
        return torch.equal(a.log_ratio(latents), b.log_ratio(latents))


def test_a_dense_run_is_built_again(finished):
    folder, before = finished
    after, params = trained(folder)
    assert same_ratios(before, after) and params["dataset"] == "digits"
    assert not after.training and torch.equal(after.vae.mean, before.vae.mean)


def test_an_nvae_run_is_built_again(tmp_path):
    before = make_run(tmp_path, "nvae:digits")
    assert same_ratios(before, trained(tmp_path)[0])


def test_a_model_is_kept_once(finished):
    "A resumed run comes by again; what is there stays."
    folder, before = finished
    sums = (folder / "model" / "SHA256SUMS").read_bytes()
    with torch.no_grad():
        keep_model(RunFolder(folder), before)
    assert (folder / "model" / "SHA256SUMS").read_bytes() == sums


def test_runs_of_images_say_all_that_is_needed():
    assert {"model", "dataset", "data_root", "seed"} <= set(find_experiment("images").parameters)


def test_a_run_below_the_repository_is_found(finished, monkeypatch):
    folder, before = finished
    monkeypatch.setenv("NCP_VAE_HOME", str(folder.parent))
    assert same_ratios(before, trained(folder.name)[0])


def test_building_again_leaves_the_random_numbers(finished):
    before = torch.get_rng_state()
    trained(finished[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_runs_of_hierarchical_say_all_that_is_needed():
    "Also by whoever studies the model: its data and the seed of its held-out images."
    parameters = find_experiment("hierarchical").parameters
    assert {"model", "dataset", "data_root", "seed"} <= set(parameters)


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run at .*nowhere: train one"):
        trained(tmp_path / "nowhere")


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_an_unfinished_run_is_refused(copied, state):
    status = json.loads((copied / "status.json").read_text())
    (copied / "status.json").write_text(json.dumps({**status, "state": state}))
    with pytest.raises(ValueError, match=f"is not a finished run: it is {state}"):
        trained(copied)


def test_a_run_without_its_model_is_refused(copied):
    shutil.rmtree(copied / "model")
    with pytest.raises(ValueError, match="holds no folder model"):
        trained(copied)


@pytest.mark.parametrize("name", store._FILES)
def test_a_damaged_model_is_refused(copied, name):
    path = copied / "model" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not what was written"):
        trained(copied)


# ---- what a call costs ----------------------------------------------------------------------------------------------

def test_the_first_call_is_not_timed(monkeypatch):
    "By a clock that only the calls move: seconds to the last bit, of all calls but the first."
    now, takes = 0.0, iter([64.0, 1.0, 0.5])
    def call():
        nonlocal now
        now += next(takes)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now))
    assert cost.seconds(call, 2, CPU) == [1.0, 0.5] and next(takes, None) is None


def test_no_timed_call_is_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        cost.seconds(lambda: None, 0, CPU)


class System:
    """A process of known memory, in kB, in place of the files in /proc/self. What a real one says is benchmarks/process.py's."""
    def __init__(self, forgets=True):
        self.now, self.most, self.forgets, self.calls = 500, 900, forgets, 0

    def __call__(self, path):
        self.path = path
        return self

    def read_text(self):
        assert self.path == "/proc/self/status"
        return f"Name:\tpython\nVmPeak:\t9999 kB\nVmHWM:\t{self.most:8d} kB\nVmRSS:\t{self.now:8d} kB\nRssFile:\t    100 kB\n"

    def write_text(self, text):
        if not self.forgets or (self.path, text) != ("/proc/self/clear_refs", "5"):
            raise PermissionError(self.path)
        self.most = self.now

    def call(self, most, keeps=0):
        "A call that has so much more at its worst moment, and leaves some of it behind."
        self.most, self.now, self.calls = max(self.most, self.now + most), self.now + keeps, self.calls + 1


def test_memory_is_that_of_this_call_at_its_worst_moment(monkeypatch):
    "To the byte, after a call that needed more, and what an earlier one left does not count. Each is made once."
    system = System()
    monkeypatch.setattr(cost, "Path", system)
    needs = [(300, 0), (40, 0), (40, 30), (40, 0), (0, 0), (0, -200)]
    assert [cost.peak_growth(lambda: system.call(*need), CPU) for need in needs] == [1024 * most for most, _ in needs]
    assert system.calls == len(needs)
    monkeypatch.setattr(cost, "forget_peak", lambda: True)             # the broken twin: an earlier call's peak is taken for this one's
    assert cost.peak_growth(lambda: system.call(40), CPU) != 1024 * 40


def test_memory_is_not_measured_where_the_system_keeps_its_peak(monkeypatch):
    system = System(forgets=False)
    monkeypatch.setattr(cost, "Path", system)
    assert cost.peak_growth(lambda: system.call(40), CPU) is None and system.calls == 0
