"""Any user's images: each run that takes a `folder`, through the installed command, on small PNG files of several sizes and modes."""
import io
import json
import subprocess
import sys
import tarfile

import nbformat
import numpy as np
import pytest
from conftest import BIN, ROOT
from PIL import Image
from tiny import picture

STEPS = dict(vae_steps=3, ncp_steps=3)
SETTINGS = {        # the smallest that each run accepts, or nearly so; the name of a run -> its parameters
    "digits": dict(STEPS, kl_warmup=1, latent_dim=2, width=8, ncp_width=8, batch_size=32, test_images=32, num_samples=2,
                   log_z_samples=100, proposals=8, draws=100),
    "rae": dict(STEPS, latent_dim=2, width=2, components=1, ncp_width=8, batch_size=32, proposals=8, draws=80, feature_steps=3),
    "hierarchical": dict(STEPS, groups=2, latents=4, state=8, parameters=20_000, ncp_width=8, batch_size=32, held_out_images=32,
                         test_images=32, num_samples=2, log_z_samples=100, proposals=8, bound_images=20, draws=200, feature_steps=3,
                         most_proposals=64, target_ess=4),
    "images": dict(vae_steps=2, ncp_steps=2, model="nvae:colour32", side=32, vae_batch=8, ncp_batch=8, ncp_width=4, validation_images=10,
                   held_out_images=32, limit=70, protocol="rae-10k-test", feature_steps=3, proposals=4, target_ess=2.0, likelihood_images=4,
                   num_samples=2, log_z_particles=20, sample_batch=35, bn_batches=1, stages=2, stage_proposals=2),
    "flows": dict(kind="maps", side=16, width=0.05, latent_dim=2, variants="standard joint posthoc", epochs=1, flow_epochs=1, batch_size=16,
                  validation_images=32, test_images=32, num_samples=2, pair_images=32),
}
SIZES = {"digits": "72 training, 8 validation and 32", "rae": "80 training images, 70", "hierarchical": "72 training, 8 validation and 32",
         "images": "70 training, 10 validation and 70", "flows": "48 training, 32 validation and 32"}
FOUND = {"digits": {"nll_base", "mmd2_ncp"}, "rae": {"frechet_base", "frechet_ncp_gmm", "turns_told"},
         "hierarchical": {"nll_gain", "frechet_most", "turns_told"},
         "images": {"frechet_base", "frechet_stage_1", "frechet_ncp", "bpd_ncp_bound", "turns_told"},
         "flows": {"bpd_joint", "middle_posthoc", "low_log_p_joint", "kl_below_joint_1"}}


def write_images(folder, n, seed=0):
    "n pictures in colour, of three sizes; every fifth is a drawing with an alpha channel, every seventh is grey."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        image = picture(rng, *[(16, 16), (20, 17), (9, 30)][i % 3])
        if i % 5 == 0:
            image.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], dtype=np.uint8)))
        (image.convert("L") if i % 7 == 3 else image).save(folder / f"{i:05d}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 80)
    write_images(root / "test", 70, seed=1)
    return root


def arguments(name, out, **given):
    "The words that follow `ncp-vae`."
    pairs = {"dataset": "folder", **SETTINGS[name], **given}
    return ["run", name, "--out", out, *(word for pair in pairs.items() for word in ("-p", "{}={}".format(*pair)))]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_takes_a_folder(name, images, command, tmp_path):
    side = SETTINGS[name].get("side", 16)
    command("ncp-vae", *arguments(name, tmp_path / "run", data_root=images, side=side), cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "succeeded"
    assert record["params"]["dataset"] == "folder" and record["params"]["side"] == side and FOUND[name] <= set(record["metrics"])
    page = nbformat.read(tmp_path / "run" / "notebook.ipynb", as_version=4)
    said = "".join(out.get("text", "") for cell in page.cells if cell.cell_type == "code" for out in cell.outputs)
    assert f"folder: {SIZES[name]} test images" in said
    if name not in ("digits", "flows"):
        assert f"64 features of a net trained without labels, to tell quarter turns of 3 x {side} x {side} images apart" in said


@pytest.mark.parametrize("name, given, words", [
    ("hierarchical", dict(data_root="EMPTY"), "0 images found under root="),
    ("rae", dict(data_root="IMAGES"), "give side=PIXELS"),
    ("digits", dict(data_root="IMAGES", side=-1), "side"),
    ("digits", dict(dataset="digits", side=16), "side=16 for digits: side is for the data set 'folder'"),
])
def test_a_folder_that_will_not_do(name, given, words, images, tmp_path):
    "An empty one, one of many sizes as it is, a side that is no number of pixels, a side for another data set: said in one go."
    (tmp_path / "empty").mkdir()
    places = dict(EMPTY=tmp_path / "empty", IMAGES=images)
    given = {key: places.get(value, value) for key, value in given.items()}
    done = subprocess.run([BIN / "ncp-vae", *map(str, arguments(name, tmp_path / "run", **given))], cwd=tmp_path, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200)
    assert done.returncode and words in done.stdout
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_emoji_package_is_split_by_base_picture(tmp_path):
    "Eleven base pictures, of which every tenth is held out, skin tones and all; neither a package without pictures nor a full folder will do."
    names = [f"1f6{i:02x}.png" for i in range(10)] + ["1f44b.png", *(f"1f44b-1f3f{tone}.png" for tone in "bcdef")]
    def package(path, inside):
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                entry = tarfile.TarInfo(f"{inside}/{name}")
                entry.size = len(name)
                archive.addfile(entry, io.BytesIO(name.encode()))
        return path
    def emoji(*words):
        return subprocess.run([sys.executable, ROOT / "docs" / "emoji.py", *map(str, words)], text=True, capture_output=True, timeout=120)
    right = package(tmp_path / "right.tgz", "package/img/google/64")
    done = emoji(right, tmp_path / "out")
    held = {path.name for path in (tmp_path / "out" / "test").iterdir()}
    assert done.returncode == 0 and held == {"1f44b.png", *(f"1f44b-1f3f{tone}.png" for tone in "bcdef"), "1f609.png"}
    assert {path.name for path in (tmp_path / "out" / "train").iterdir()} == set(names) - held
    for words, said in [((right, tmp_path / "out"), "not an empty folder"), ((tmp_path / "no.tgz", tmp_path / "new"), "cannot be read"),
                        ((package(tmp_path / "wrong.tgz", "package/img/apple/64"), tmp_path / "new"), "holds no package/img/google/64")]:
        done = emoji(*words)
        assert done.returncode and said in done.stderr and not (tmp_path / "new").exists()
