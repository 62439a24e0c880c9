"""The store: the same function in another process, and a byte or a class that is not what was written is refused."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ncp_vae.engine import store
from ncp_vae.models.flat import ConvVAE, DenseVAE, RaeVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.nvae import NVAE, NVAEConfig
from ncp_vae.models.priors import GaussianMixture
from ncp_vae.models.ratios import ConvRatio, MLPRatio
from ncp_vae.nce import StagedRatio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.resampling import SIR
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal

CONFIG = NVAEConfig((1, 8, 8), (1, 1), channels=2, blocks=0, cells_per_block=1, latent_channels=2, cells_per_group=1, mixtures=2)


def mixture(dim=2):
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.randn(2, dim), torch.eye(dim).repeat(2, 1, 1))


def ratios(vae, kind=MLPRatio, **how):
    return [kind(z, c, **how) for z, c in zip(vae.latent_shapes, vae.context_shapes)]


def staged(vae):
    return [StagedRatio(pair) for pair in zip(ratios(vae, hidden=(4,)), ratios(vae, hidden=(4,)))]


def models():
    torch.manual_seed(0)
    flat = DenseVAE((1, 4, 4), 2, (8,), activation=nn.ReLU, mean=torch.rand(1, 4, 4))
    deep = DenseHierarchy((1, 4, 4), groups=2, latent_dim=2, hidden=8, width=8)
    grid = NVAE(CONFIG)
    return {"flat": NoiseContrastivePrior(flat, ratios(flat, hidden=(8,), activation=nn.Tanh)),
            "hierarchical": NoiseContrastivePrior(deep, ratios(deep, hidden=(8,))),
            "nvae": NoiseContrastivePrior(grid, ratios(grid, ConvRatio, width=2)),
            "with priors": NoiseContrastivePrior(WithPriors(deep, [mixture(), None]), ratios(deep, hidden=(8,))),
            "staged": NoiseContrastivePrior(flat, staged(flat)),
            "conv": NoiseContrastivePrior(ConvVAE((1, 8, 8), 2, 2), [MLPRatio(2, hidden=(4,))]),
            "rae": NoiseContrastivePrior(RaeVAE((1, 8, 8), 2, 2), [MLPRatio(2, hidden=(4,))])}


def answers(ncp):
    "log r at walks of the prior, and their images: what a stored model must say again."
    walk = ncp.vae.sample(3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ncp.log_ratio(walk), walk.likelihood.mean


ELSEWHERE = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_store import answers, store
torch.save([answers(store.load(folder)) for folder in sys.argv[2:]], sys.argv[1])
"""


def test_another_process_reads_the_same_functions_to_the_bit(tmp_path):
    kept = models()
    folders = [store.save(model.eval(), tmp_path / name) for name, model in kept.items()]
    script = ELSEWHERE.format(tests=str(Path(__file__).parent))
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}      # sums are rounded by their number
    subprocess.run([sys.executable, "-c", script, tmp_path / "found.pt", *folders], check=True, env=threads)
    for name, model, found in zip(kept, kept.values(), torch.load(tmp_path / "found.pt", weights_only=True)):
        assert all(torch.equal(a, b) for a, b in zip(answers(model), found)), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return store.save(MLPRatio(1, hidden=(1,)), tmp_path_factory.mktemp("store") / "ratio", about=dict(steps=3))


@pytest.mark.parametrize("name", [*store._FILES, "SHA256SUMS"])
def test_every_byte_that_is_flipped_is_found(folder, name, tmp_path):
    "One bit of each byte in turn, and each file one byte shorter or longer, empty, or missing."
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = (copy / name).read_bytes()
    spoilt = [bytes([*whole[:i], whole[i] ^ (1 << i % 8), *whole[i + 1:]]) for i in range(len(whole))]
    for content in [*spoilt, whole[:-1], whole + b"\n", b""]:
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            store.load(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        store.load(copy)
    (copy / name).write_bytes(whole)
    store.load(copy)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a stranger ran')",)


@pytest.mark.parametrize("name", store._FILES)
def test_a_pickle_in_any_slot_is_not_run(folder, name, tmp_path):
    "With sums that agree, as an attacker would write them."
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_bytes(pickle.dumps(Bomb()))
    (copy / "SHA256SUMS").write_text("".join(line + "\n" for line in store._sums_of(copy)))
    with pytest.raises(ValueError, match=f"{name}"):
        store.load(copy)


class Stranger(FlatVAE):
    def __init__(self, scale=0.1):
        super().__init__(2)
        self.scale = scale

    def posterior(self, x):
        return diagonal_normal(x, torch.full_like(x, self.scale))

    def likelihood(self, z):
        return diagonal_normal(z, torch.full_like(z, self.scale))


def test_a_strangers_class_is_taken_from_the_caller_only(tmp_path):
    path = store.save(NoiseContrastivePrior(Stranger(0.2), [MLPRatio(2, hidden=(4,))]), tmp_path / "model")
    with pytest.raises(ValueError, match=r"a Stranger of .*test_store, which is not a class of this library: pass it, classes=\[Stranger\]"):
        store.load(path)
    assert store.load(path, classes=[Stranger]).vae.scale == 0.2
    manifest = json.loads((path / "manifest.json").read_text())
    for place in ("os:system", "ncp_vae.engine.store:shutil", "torch.nn.modules.module:torch", "ncp_vae.walk:draw"):
        with pytest.raises(ValueError, match="not a class of this library"):
            store._built({**manifest["model"], "module": place}, [], [])


def test_what_cannot_be_built_again_is_refused_before_anything_is_written(tmp_path):
    class Forgetful(Stranger):
        def __init__(self, width):
            super().__init__()
    with pytest.raises(ValueError, match="does not keep its argument 'width'"):
        store.save(Forgetful(3), tmp_path / "model")
    with pytest.raises(ValueError, match="argument of type function"):
        store.save(Stranger(scale=lambda: 0.1), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    store.save(Stranger(), tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        store.save(Stranger(), tmp_path / "model")


def test_a_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    "A disk that fails leaves nothing; what a killed process left (no system gives out this number) is cleared away by the next."
    left = tmp_path / f"model.{2**30}.0a1b2c3d.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    def fail(number):
        raise OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            store.save(MLPRatio(1, hidden=(1,)), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in store.save(MLPRatio(1, hidden=(1,)), tmp_path / "model").iterdir()) == [
        "SHA256SUMS", "manifest.json", "model.safetensors"] and len(list(tmp_path.iterdir())) == 1


def test_the_manifest_says_where_the_model_comes_from(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["about"] == dict(steps=3) and manifest["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(manifest) == {"model", "about", "commit", "python", "packages"}


def test_the_hub_gets_and_gives_a_stored_folder(folder, tmp_path, monkeypatch):
    "Without a network: the hub is a folder here."
    import huggingface_hub
    hub = tmp_path / "hub"
    class Api:
        def create_repo(self, repo, exist_ok):
            (hub / repo).mkdir(parents=True, exist_ok=exist_ok)
        def upload_folder(self, repo_id, folder_path):
            for path in Path(folder_path).iterdir():
                (hub / repo_id / path.name).write_bytes(path.read_bytes())
            return f"https://hub/{repo_id}"
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, revision: str(hub / repo))
    ratio = store.from_pretrained(folder)                              # a folder needs no hub
    assert store.push_to_hub(ratio, "me/ratio") == "https://hub/me/ratio"
    again, z = store.from_pretrained("me/ratio"), torch.randn(4, 1)
    assert torch.equal(again(z), ratio(z))


def test_nothing_in_the_library_unpickles():
    for path in (Path(store.__file__).parents[1]).rglob("*.py"):
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, (path.name, call)


# ---- the model in the repository ------------------------------------------------------------------------------------

def test_the_committed_model_is_whole_small_and_samples():
    "Within 2 MB; read, walked and drawn from without the class being handed over or a data set at hand."
    folder = Path(__file__).resolve().parents[1] / "pretrained" / "fashion_mnist"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    ncp = store.load(folder)
    images = ncp.sample(3, SIR(20), generator=torch.Generator().manual_seed(0)).likelihood.mean
    assert images.shape == (3, 1, 28, 28) and not ncp.training
    assert not torch.equal(images, ncp.vae.sample(3, generator=torch.Generator().manual_seed(0)).likelihood.mean)
