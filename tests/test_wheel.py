"""The wheel, built here without a network: the command works from an empty folder, where there is no clone."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The folder of the unpacked wheel. It is built from a copy: setuptools leaves folders in the source."
    source, out, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "out", "unpacked"))
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ncp_vae", "nbs/runs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source],
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    zipfile.ZipFile(path).extractall(unpacked)
    return unpacked


@pytest.fixture
def ask(wheel, tmp_path):
    "Run a line of Python against the unpacked wheel, in an empty folder: exit code, stdout, stderr."
    def ask(code):
        env = {**os.environ, "PYTHONPATH": str(wheel)}
        env.pop("NCP_VAE_HOME", None)
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True)
        return done.returncode, done.stdout, done.stderr
    return ask


def command(*words):
    return f"import sys; from ncp_vae.engine.cli import main; sys.exit(main({list(words)}))"


def test_it_brings_every_run_notebook_its_presets_and_the_papers_numbers(wheel):
    there = {path.name for path in (wheel / "ncp_vae" / "runs").iterdir()}
    assert there == {path.name for path in (ROOT / "nbs" / "runs").iterdir() if path.suffix in (".ipynb", ".yaml")}
    for name in ("paper", "realnvp", "joint_ebm"):
        assert json.loads((wheel / "ncp_vae" / "engine" / f"{name}.json").read_text(encoding="utf-8"))["items"]


def test_the_experiments_are_listed_from_an_empty_folder(ask):
    code, out, err = ask("import ncp_vae; print(ncp_vae.__file__)\n" + command("list"))
    assert code == 0, err
    assert "unpacked" in out.splitlines()[0]
    assert {line.split()[0] for line in out.splitlines()[1:]} == {path.stem for path in (ROOT / "nbs" / "runs").glob("*.ipynb")}


def test_a_wrong_parameter_is_refused_there_and_nothing_is_made(ask, tmp_path):
    code, _, err = ask(command("run", "digits", "-p", "steps=abc"))
    assert code == 2 and "no parameter of digits is called 'steps'" in err and "Traceback" not in err
    code, _, err = ask(command("run", "digits", "-p", "seed=abc"))
    assert code == 2 and "seed = 'abc': expected a whole number" in err
    assert not list(tmp_path.iterdir())


def test_results_and_data_go_to_the_current_folder_and_the_commit_is_the_wheels(ask, tmp_path):
    code, out, err = ask("import json; from ncp_vae.engine.experiment import data_folder, environment, home, new_run\n"
                         "print(json.dumps([str(home()), str(data_folder()), environment()['commit'], str(new_run(None, 'toy', 'smoke', {}))]))")
    assert code == 0, err
    place, data, commit, folder = json.loads(out)
    assert Path(place) == tmp_path and Path(data) == tmp_path / "data" and Path(folder).parent == tmp_path / "runs" / "toy"
    assert commit.startswith("wheel ")
