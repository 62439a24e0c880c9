"""What a run asks for and keeps: the parts that need processes, time or a real `__main__`."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from ncp_vae.engine import cli
from ncp_vae.engine import experiment as ex
from ncp_vae.engine import parameters as pa
from ncp_vae.measured import Measured

CELL = 'run_dir: str = ""\nseed: int = 0  # [0, inf)\nsteps: int = 3  # [1, 100] how many\n'


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A temporary clone with one experiment, `toy`."
    monkeypatch.setenv("NCP_VAE_HOME", str(tmp_path))
    folder = tmp_path / "nbs" / "runs"
    folder.mkdir(parents=True)
    cell = dict(cell_type="code", source=CELL, metadata=dict(tags=["parameters"]))
    (folder / "toy.ipynb").write_text(json.dumps(dict(cells=[cell])))
    return tmp_path


def python(code):
    "Run code in a process of its own, as a notebook's kernel would; what it prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- parameters -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, type_, value", [
    ("7", "int", 7), ("-7", "int", -7), ("1_000", "int", 1000), ("1e3", "int", 1000), ("9007199254740993", "int", 2**53 + 1),
    ("1e-3", "float", 0.001), ("3", "float", 3.0), ("TRUE", "bool", True), ("false", "bool", False), ("", "str", ""),
])
def test_text_becomes_the_type(text, type_, value):
    found = pa.Parameter("p", type_, "").check(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value, type_", [
    ("2.5", "int"), (2.5, "int"), ("none", "int"), (None, "int"), (True, "int"), (False, "float"), ("nan", "float"),
    ("-inf", "float"), ("1e999", "float"), ("1", "bool"), (0, "bool"), ("yes", "bool"), (3, "str"), (None, "str"), ([], "float"),
])
def test_nothing_is_guessed(value, type_):
    with pytest.raises(ValueError, match="expected"):
        pa.Parameter("p", type_, "").check(value)


@pytest.mark.parametrize("range_, good, bad", [
    ("[1, 3]", [1, 2, 3], [0, 4]), ("(1, 3)", [2], [1, 3]), ("[0, inf)", [0, 1e300], [-1e-300]), ("(-inf, 0)", [-5.0], [0.0]),
    ("(0, 1]", [1e-300, 1], [0, 1.0000001]), ("{2, 4}", [2, 4], [3]), ("{a, b c}", ["a", "b c"], ["b", "c", ""]),
])
def test_ranges(range_, good, bad):
    assert all(pa._inside(value, range_) for value in good) and not any(pa._inside(value, range_) for value in bad)


def test_comments_and_strings_are_told_apart():
    found = pa._parameters('# first\nname: str = "#1"  # {#1, #2} which one # really\n\n# the end')
    assert found["name"] == pa.Parameter("name", "str", "#1", "{#1, #2}", "which one # really")


@pytest.mark.parametrize("cell, words", [
    ("a = 1", "not `name: type = literal`"), ("a: int", "not `name"), ("a: int = 2 * 3", "next cell"), ("a: int = -b", "not `name"),
    ("a: list = []", "not `name"), ("import os", "not `name"), ("a.b: int = 1", "not `name"), ("a: int = 1.5", "whole number"),
    ("a: int = 0  # [1, 2]", "must lie in"), ("a: int = 0  # (0 to 1) words", "begins like a range"),
    ("a: int = 0  # [low, high]", "'low'"), ("a: str = ''  # [0, 1]", "must lie in"), ("a: int = 1\na: int = 1", "a is there twice"),
    ("%time", "line 1"), ("seed: int = 0", "run_dir: str"), ('run_dir: str = ""', "seed: int"), ('seed: str = ""', "seed: int"),
])
def test_cells_that_could_mislead_are_refused(clone, cell, words):
    path = clone / "nbs" / "runs" / "toy.ipynb"
    path.write_text(json.dumps(dict(cells=[dict(cell_type="code", source=cell, metadata=dict(tags=["parameters"]))])))
    with pytest.raises(ValueError, match="toy.ipynb is not a run notebook.*" + words):
        pa.find_experiment("toy")


@pytest.mark.parametrize("content, words", [
    ('{"cells": []}', "0 cells are tagged"), ("{", "Expecting"), ("[]", "indices"),
    (json.dumps(dict(cells=2 * [dict(cell_type="code", source=CELL, metadata=dict(tags=["parameters"]))])), "2 cells are tagged")])
def test_files_that_are_no_run_notebooks_are_refused(clone, content, words):
    (clone / "nbs" / "runs" / "toy.ipynb").write_text(content)
    with pytest.raises(ValueError, match=words):
        pa.find_experiment("toy")


def test_presets_are_as_strict_as_the_command_line(clone):
    toy, preset = pa.find_experiment("toy"), clone / "nbs" / "runs" / "toy.yaml"
    preset.write_text("cpu: {steps: 1e1}\nfull: {steps: 100, seed: 4}\n")      # YAML reads 1e1 as text
    assert pa.params_for(toy, "cpu") == dict(seed=0, steps=10)
    assert pa.params_for(toy, "full", {"steps": "50"}) == dict(seed=4, steps=50)
    for text in ["smoke: {steps: 3}", "a: ]", "full: {steps: 101}", "full: {stepz: 1}", "fulll: {}", "full:", "- full", "full: {run_dir: x}", "full: {steps: true}", "full: 5",
                 "full: {params: 5}", "full: {steps: 3, steps: 4}", "full: {steps: 3}\nfull: {steps: 4}"]:
        preset.write_text(text)
        with pytest.raises(ValueError, match="toy.yaml"):
            pa.params_for(toy, "smoke")


def test_a_seed_that_torch_does_not_take_is_refused(clone):
    "Whole numbers of any size pass as other parameters; a seed of 2e20 failed in the fourth cell of a run."
    toy = pa.find_experiment("toy")
    assert pa.params_for(toy, overrides={"seed": "2e10"})["seed"] == 20_000_000_000
    assert pa.params_for(toy, overrides={"seed": 2**63 - 1})["seed"] == 2**63 - 1
    for seed in ("2e20", 2**63):
        with pytest.raises(ValueError, match=r"seed = .*: must be below 2\^63"):
            pa.params_for(toy, overrides={"seed": seed})


def test_without_a_clone_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NCP_VAE_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="NCP_VAE_HOME must name a clone"):
        pa.find_experiment("toy")


# ---- the folder -----------------------------------------------------------------------------------------------------

def test_of_many_that_want_one_folder_one_gets_it(tmp_path):
    def claim(number):
        try:
            return ex.new_run(tmp_path / "run", "toy", "smoke", {"seed": number})
        except ValueError as error:
            assert "never overwrites" in str(error) or "File exists" in str(error)
    with ThreadPoolExecutor(8) as pool:
        assert sum(folder is not None for folder in pool.map(claim, range(8))) == 1


def test_runs_of_the_same_second_have_folders_of_their_own(clone):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: ex.new_run(None, "toy", "smoke", {}), range(4)))
    assert len(set(folders)) == 4


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to .*--out"):
            ex.new_run(folder, "toy", "smoke", {})


def test_states_of_processes(tmp_path):
    folder = ex.new_run(tmp_path / "run", "toy", "smoke", {})
    status = ex.read_json(folder / "status.json")
    def state(**changes):
        ex.write_json(folder / "status.json", {**status, **changes})
        return ex.state_of(folder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert state() == "running"
    assert state(pid=gone.pid) == "killed"
    assert state(created=status["created"] - 3600) == "killed"         # the number belongs to another process by now
    assert state(host="elsewhere", pid=gone.pid) == "running"
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)           # until it has ended; it stays a zombie
    assert state(pid=zombie.pid, created=psutil.Process(zombie.pid).create_time()) == "killed"
    zombie.wait()
    (folder / "status.json").write_text('{"state": "succ')
    assert ex.state_of(folder) == "killed"


def test_only_one_resumes(clone):
    toy = pa.find_experiment("toy")
    folder = ex.new_run(None, "toy", "smoke", pa.params_for(toy))
    (folder / "notebook.ipynb").write_text("first")
    ex.write_json(folder / "metrics.json", {"of": "an attempt that failed in a later cell"})
    ex.end(folder, "failed", "why")
    def resume(_):
        try:
            return ex.resume_run(folder, toy)
        except ValueError as error:
            assert "being run" in str(error)
    with ThreadPoolExecutor(4) as pool:
        assert sum(params is not None for params in pool.map(resume, range(4))) == 1
    assert not (folder / "metrics.json").exists() and (folder / "notebook.1.ipynb").read_text() == "first"
    (folder / "notebook.ipynb").write_text("second")
    (folder / "status.json").unlink()                                  # as the message for another machine advises
    ex.resume_run(folder, toy)
    (folder / "notebook.ipynb").write_text("third")
    (folder / "status.json").unlink()
    ex.resume_run(folder, toy)
    assert [(folder / f"notebook.{k}.ipynb").read_text() for k in (1, 2, 3)] == ["first", "second", "third"]


@pytest.mark.parametrize("params", [5, None, [1], {"seed": 0, "steps": "many"}])
def test_resume_refuses_parameters_that_are_none(clone, params):
    folder = ex.new_run(None, "toy", "smoke", params)
    ex.end(folder, "failed")
    with pytest.raises(ValueError, match="expected"):
        ex.resume_run(folder, pa.find_experiment("toy"))


def test_resume_refuses_what_has_changed(clone):
    toy = pa.find_experiment("toy")
    folder = ex.new_run(None, "toy", "smoke", {"seed": 0})             # of a time when there were no steps
    ex.end(folder, "interrupted")
    with pytest.raises(ValueError, match="other parameters now"):
        ex.resume_run(folder, toy)
    other = ex.new_run(None, "other", "smoke", {})
    with pytest.raises(ValueError, match="a run of other, not of toy"):
        ex.resume_run(other, toy)
    assert ex.state_of(folder) == "interrupted" and not list(folder.glob("*.1.*"))


def attempts(folder, monkeypatch, *commits):
    "Attempts at a run that were made with these commits and did not succeed; then the code is at the last of them."
    for commit in commits[:-1]:
        if (folder / "environment.json").exists():
            ex.resume_run(folder, pa.find_experiment("toy"))
        monkeypatch.setattr(ex, "_commit", lambda: commit)
        ex.Run(folder)
        ex.end(folder, "interrupted")
    monkeypatch.setattr(ex, "_commit", lambda: commits[-1])


@pytest.mark.parametrize("commits, words", [
    (["a" * 40, "b" * 40], "the code has changed since the last attempt: commit aaaaaaa -> bbbbbbb"),
    (["a" * 40, "a" * 40 + "-dirty"], "the code has changed since the last attempt: commit aaaaaaa -> aaaaaaa-dirty"),
    (["a" * 40, "b" * 40, "a" * 40], "the code has changed since the last attempt: commit bbbbbbb -> aaaaaaa"),
    (["wheel 1.0", "wheel 1.1"], "the code has changed since the last attempt: commit wheel 1.0 -> wheel 1.1"),
    (["a" * 40 + "-dirty"] * 2, "the code may have changed since the last attempt: both had uncommitted changes, aaaaaaa-dirty -> aaaaaaa-dirty"),
    (["b" * 40, "a" * 40, "a" * 40], ""), (["a" * 40], "")])
def test_other_code_is_named_before_it_goes_on(clone, monkeypatch, capsys, commits, words):
    "By the command, in a line before all others; in silence where the code is the same."
    folder = ex.new_run(None, "toy", "smoke", pa.params_for(pa.find_experiment("toy")))
    attempts(folder, monkeypatch, *commits)
    if len(commits) == 1:
        ex.end(folder, "failed", "before its first cell")
    monkeypatch.setattr(cli, "_Watch", lambda *_: None)
    monkeypatch.setattr(cli, "_attempt", lambda *_: 0)
    assert cli.main(["run", "toy", "--resume", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (words or "toy with seed=0 steps=3") and sum(line.startswith("the code") for line in said) == bool(words)


def test_every_commit_is_in_the_record(clone, monkeypatch):
    "Of eleven attempts, of which the tenth comes after the second."
    commits = [f"{k:040d}" for k in range(11)]
    folder = ex.new_run(None, "toy", "smoke", pa.params_for(pa.find_experiment("toy")))
    attempts(folder, monkeypatch, *commits)
    ex.resume_run(folder, pa.find_experiment("toy"))
    run = ex.Run(folder)
    run.metric("a", 1)
    run.finish()
    record = ex.read_record(folder)
    assert [*record["earlier_commits"], record["commit"]] == commits


def test_write_json_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    ex.write_json(path, {"a": 1})
    for value in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            ex.write_json(path, value)
    assert ex.read_json(path) == {"a": 1}


# ---- in a notebook --------------------------------------------------------------------------------------------------

def test_a_run_by_hand_records_the_variables_of_the_notebook(clone):
    python("run_dir, seed, steps = '', 3, 7\nfrom ncp_vae.engine.experiment import Run\n"
           "run = Run.open(run_dir, 'toy')\nrun.metric('a', 1, paper=2)\nrun.finish()")
    (folder,) = (clone / "runs" / "toy").iterdir()
    record = ex.read_record(folder)
    assert ex.state_of(folder) == "succeeded" and record["preset"] == "by hand"
    assert record["params"] == dict(seed=3, steps=7) and record["metrics"] == {"a": Measured(1.0, paper=2.0)}


def test_a_kernel_that_ends_without_finish_leaves_its_metrics_and_no_record(clone):
    python("from ncp_vae.engine.experiment import Run\nrun = Run.open('', 'toy')\nrun.metric('a', 1)\nimport os; os._exit(0)")
    (folder,) = (clone / "runs" / "toy").iterdir()
    assert ex.state_of(folder) == "killed" and json.loads((folder / "metrics.jsonl").read_text())["value"] == 1.0
    with pytest.raises(ValueError, match="cannot read"):
        ex.read_record(folder)


def test_nobody_else_writes_into_a_run(clone, capsys):
    "The executed notebook of a run names its folder: run again by hand, it must not touch what is there."
    folder = ex.new_run(None, "toy", "smoke", {})                      # by this process, which is no kernel's parent
    with pytest.raises(ValueError, match='run_dir = ""'):
        ex.Run.open(folder, "toy")
    ex.end(folder, "succeeded")
    with pytest.raises(ValueError, match="never overwrites"):
        ex.Run.open(folder, "toy")


def test_metric_takes_tensors_and_refuses_the_rest(clone):
    "And of an estimate of log Z what every record has: it is read again as a `Measured`."
    import torch
    from ncp_vae.prior import Estimate
    run = ex.Run(ex.new_run(None, "toy", "smoke", {}))
    assert run.metric("a", torch.tensor(2.5), std_error=torch.tensor([0.5])) == Measured(2.5, 0.5)
    for value in (torch.ones(2), torch.tensor(torch.nan), "high", None):
        with pytest.raises(ValueError, match="value must be"):
            run.metric("b", value)
    with pytest.raises(ValueError, match="no metric"):
        ex.Run(run.dir).finish()
    assert len((run.dir / "metrics.jsonl").read_text().splitlines()) == 1
    run.metric("log_z", Estimate(0.5, 0.1, n=10, bias=-0.005, ess=8.0, k_hat=0.2), kind="exact")
    run.finish()
    assert ex.read_record(run.dir)["metrics"]["log_z"] == Measured(0.5, 0.1, "exact", 10)


def test_the_record_says_its_data_model_and_parts(clone):
    "By its parameters, or as the notebook tells finish."
    first = ex.Run(ex.new_run(None, "toy", "smoke", {"dataset": "digits", "model": "nvae:digits"}))
    first.metric("a", 1)
    raw = ex.read_json(first.finish())
    assert (raw["data"], raw["model"], raw["parts"]) == ("digits", "nvae:digits", [])
    second = ex.Run(ex.new_run(None, "toy", "smoke", {"pattern": "nobody*"}))
    second.metric("a", 1)
    raw = ex.read_json(second.finish(data="mnist", parts=["b", "c"]))
    assert (raw["data"], raw["model"], raw["parts"]) == ("mnist", "", ["b", "c"])
    assert {key: raw[key] for key in ("data", "parts")} == {key: ex.read_record(second.dir)[key] for key in ("data", "parts")}


def test_an_error_that_says_nothing_is_recorded_as_unknown(clone):
    run = ex.Run(ex.new_run(None, "toy", "smoke", {}))
    assert run.metric("a", Measured(1.0, std_error=float("inf"))).std_error is None
    run.finish()
    assert ex.read_record(run.dir)["metrics"]["a"].std_error is None


def test_once_survives_an_attempt(clone):
    import torch
    run = ex.Run(ex.new_run(None, "toy", "smoke", {}))
    run.once("slow", lambda: dict(x=torch.arange(3), note="kept"))
    again = ex.Run(run.dir).once("slow", lambda: pytest.fail("computed again"))
    assert torch.equal(again["x"], torch.arange(3)) and again["note"] == "kept"


@pytest.mark.parametrize("damage", [
    {"commit": ...}, {"data": ...}, {"model": ...}, {"parts": ...}, {"metrics": {}}, {"metrics": {"a": {"value": 1.0, "kind": "guess"}}}, {"metrics": {"a": {"valeu": 1.0}}},
    {"metrics": {"a": 3}}, {"metrics": None}, {"params": {"seed": 1}}, {"preset": "full"},
])
def test_damaged_records_are_not_read(clone, damage):
    run = ex.Run(ex.new_run(None, "toy", "smoke", {"seed": 0}))
    run.metric("a", 1)
    whole = ex.read_json(run.finish())
    assert ex.read_record(run.dir)["metrics"]["a"].value == 1.0
    ex.write_json(run.dir / "metrics.json", {k: v for k, v in {**whole, **damage}.items() if v is not ...})
    with pytest.raises(ValueError, match="is not its record"):
        ex.read_record(run.dir)


def test_environment_describes_without_importing_torch():
    code = "import json, sys; from ncp_vae.engine.experiment import environment; e = environment(); "
    e = json.loads(python(code + "assert 'torch' not in sys.modules; print(json.dumps(e))"))
    assert e["packages"]["torch"] and e["threads"] is None and e["cpus"] == os.cpu_count()
