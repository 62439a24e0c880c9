"""How far runs are, as `ncp-vae status` and TensorBoard show it: on folders that are written by hand, and on a training's own."""
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ncp_vae.engine import cli
from ncp_vae.engine import experiment as ex
from ncp_vae.engine import progress
from ncp_vae.engine.progress import Pace, pace_of, read_history, status_table, to_tensorboard
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio


def row(step, seconds, stage="ncp", steps=1000):
    return dict(stage=stage, step=step, steps=steps, seconds=seconds, loss=1.0)


LOOK = dict(stage="ncp held-out", step=300, loss=1.0)


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    "A function that makes a run in a clone of its own: its rows, the age of the last one in seconds, its state."
    monkeypatch.setenv("NCP_VAE_HOME", str(tmp_path))
    monkeypatch.setattr(progress.time, "time", lambda: NOW)
    def make(name, rows=(), age=0.0, state="running", **status):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        ex.begin(folder, attempt=status.pop("attempt", 1))
        ex.note(folder, **status)
        if rows:
            (folder / "history.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
            os.utime(folder / "history.jsonl", (NOW - age,) * 2)
        if state != "running":
            ex.end(folder, state)
        return folder
    return make


NOW = time.time()


def table(*folders):
    "The lines below the head, as lists of columns."
    return [line.split("  ") for line in status_table([str(folder) for folder in folders])[0].splitlines()[1:]]


def words(line):
    return [word.strip() for word in line if word.strip()]


# ---- a history ------------------------------------------------------------------------------------------------------

def test_a_last_row_that_is_torn_is_left_out_and_one_in_the_middle_is_not(tmp_path):
    path = tmp_path / "history.jsonl"
    for text in ('{"a": 1}\n{"a": 2}\n', '{"a": 1}\n{"a": 2}', '{"a": 1}\n{"a": 2}\n{"a', '{"a": 1}\n{"a": 2}\n{'):
        path.write_text(text)
        assert read_history(path) == [{"a": 1}, {"a": 2}]
    path.write_text("")
    assert read_history(path) == []
    path.write_text('{"a": 1}\n{"a\n{"a": 3}\n')
    with pytest.raises(ValueError):
        read_history(path)


@pytest.mark.parametrize("rows, expected, left", [
    ([], None, None),
    ([LOOK], None, None),
    ([row(50, 2.0)], Pace("ncp", 50, 1000, None), None),
    ([row(100, 2.0), row(300, 6.0), LOOK], Pace("ncp", 300, 1000, 50.0), 14.0),
    ([row(900, 1.0, "vae"), row(100, 2.0), row(300, 6.0)], Pace("ncp", 300, 1000, 50.0), 14.0),            # another stage
    ([row(900, 1.0, "vae"), row(100, 2.0)], Pace("ncp", 100, 1000, None), None),
    ([row(200, 40.0), row(250, 1.0), row(300, 2.0)], Pace("ncp", 300, 1000, 50.0), 14.0),                 # another attempt
    ([row(400, 1.0), row(250, 2.0), row(300, 3.0)], Pace("ncp", 300, 1000, 50.0), 14.0),                  # of an attempt further on
    ([row(100, 2.0), row(150, 2.0)], Pace("ncp", 150, 1000, None), None),                               # a clock too coarse
    ([row(100, 2.0, steps=None), row(300, 6.0, steps=None)], Pace("ncp", 300, None, 50.0), None),
    ([row(900, 2.0), row(1000, 6.0)], Pace("ncp", 1000, 1000, 25.0), 0.0),
    ([row(k, 100.0 * k) for k in range(1, 30)] + [row(29 + 10 * k, 2900.0 + k) for k in range(1, 10)],
     Pace("ncp", 119, 1000, 10.0), 88.1)])                                                               # the last ten rows alone
def test_the_pace_by_hand(rows, expected, left):
    found = pace_of(rows)
    assert found == expected and (found is None or found.left == (left if left is None else pytest.approx(left)))


def test_the_rows_of_both_trainings_say_how_many_steps_there_will_be(tmp_path):
    vae, x, how = DenseVAE((2,), 2, hidden=(4,), sigma=0.5), torch.rand(8, 2), dict(batch_size=8, lr=1e-3, seed=0)
    history = tmp_path / "history.jsonl"
    fit_vae(vae, x, steps=60, history=history, **how)
    assert pace_of(read_history(history)).steps == 60
    fit_ncp(vae, x, ratios=[MLPRatio(2, hidden=(4,))], steps=100, history=history, **how)
    found = pace_of(read_history(history))
    assert (found.stage, found.step, found.steps, found.left) == ("ncp", 100, 100, 0.0)


# ---- the table ------------------------------------------------------------------------------------------------------

def test_live_runs_with_their_pace(run_in):
    first = run_in("digits/a", [row(100, 2.0), row(300, 6.0)], age=4.0, cell="In [4] of 9  Stage two")
    run_in("digits/b", state="failed")
    run_in("images/c", attempt=3)
    found = [words(line) for line in table()]
    assert found == [["digits/a", "running", "In [4] of 9", "Stage two", "ncp", "300 of 1000", "50", "0:00:10", "0:00:04 ago"],
                     ["images/c", "running, attempt 3", *["-"] * 6]]
    assert status_table([])[1]
    ex.end(first, "stopped")
    assert [words(line)[0] for line in table()] == ["images/c"]


def test_named_runs_are_shown_whatever_became_of_them(run_in):
    folder = run_in("toy/a", [row(100, 2.0), row(300, 6.0)], age=7200.0, state="interrupted", cell="In [2] of 3")
    expected = ["interrupted", "In [2] of 3", "ncp", "300 of 1000", "50", "-", "2:00:00 ago"]
    assert words(table(folder)[0]) == ["a", *expected] and words(table(folder.parent.parent)[0]) == ["toy/a", *expected]
    assert not status_table([str(folder)])[1] and status_table([]) == (f"no run is live in {folder.parents[1]}", False)


def test_a_run_that_hangs_has_no_time_left_and_an_old_row(run_in):
    folder = run_in("toy/a", [row(100, 2.0), row(300, 6.0)], age=3600.0)
    assert words(table(folder)[0])[-2:] == ["0:00:00", "1:00:00 ago"]


def test_a_run_of_several_commits_says_so(run_in):
    folder = run_in("toy/a", attempt=4)
    for name, commit in {"1.": "a", "2.": "b", "3.": "a", "": "b"}.items():
        ex.write_json(folder / f"environment.{name}json", dict(commit=commit))
    assert words(table(folder)[0])[1] == "running, attempt 4, 2 commits"


def test_the_history_that_was_written_last_counts_and_metrics_are_none(run_in):
    folder = run_in("toy/a", [row(100, 2.0)], age=60.0)
    (folder / "ncp.jsonl").write_text(json.dumps(row(7, 1.0)) + '\n{"st')
    for name in ("metrics.jsonl", "metrics.1.jsonl"):
        (folder / name).write_text('{"name": "a"}\n')
    os.utime(folder / "ncp.jsonl", (NOW - 2,) * 2)
    assert "7 of 1000" in words(table(folder)[0]) and words(table(folder)[0])[-1] == "0:00:02 ago"
    (folder / "ncp.jsonl").write_text('{"st\n{"st\n')
    (folder / "status.json").write_text('{"sta')
    assert words(table(folder)[0]) == ["a", "killed", *["-"] * 6]


# ---- the command ----------------------------------------------------------------------------------------------------

def test_in_a_pipe_once_and_on_a_terminal_until_no_run_is_live(run_in, monkeypatch, capsys):
    folder = run_in("toy/a", [row(100, 2.0), row(300, 6.0)])
    assert cli.main(["status"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2 and "\x1b" not in said
    looks = []
    def later(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            ex.end(folder, "succeeded")
    monkeypatch.setattr(cli.time, "sleep", later)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["status", str(folder)]) == 0
    screens = capsys.readouterr().out.split("\x1b[2J\x1b[H")
    assert len(looks) == 3 and looks[0] == 3.0 and len(screens) == 5
    assert ["running" in screen for screen in screens] == [False, True, True, True, False] and "succeeded" in screens[-1]
    def interrupt(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(cli.time, "sleep", interrupt)
    run_in("toy/b")
    assert cli.main(["status"]) == 130


def test_a_folder_without_a_run_is_refused(run_in, tmp_path, capsys):
    run_in("toy/a")
    for folder in (tmp_path / "nowhere", tmp_path / "runs" / "toy" / "a" / "figures"):
        assert cli.main(["status", str(folder)]) == 2
        assert f"there is no run in {folder}" in capsys.readouterr().err


# ---- TensorBoard ----------------------------------------------------------------------------------------------------

def test_without_the_package_it_is_one_line(run_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["tensorboard", str(run_in("toy/a", [row(100, 2.0)]))]) == 2
    said = capsys.readouterr().err
    assert "TensorBoard is not installed" in said and "pip install tensorboard" in said and len(said.splitlines()) == 1


def test_histories_become_scalars_and_twice_is_once(run_in, monkeypatch, capsys):
    scalars = {}
    class Writer:
        def __init__(self, folder):
            self.name = folder
            os.makedirs(folder)
            scalars[folder] = []
        def __enter__(self):
            return self
        def __exit__(self, *_):
            scalars[self.name].append("closed")
        def add_scalar(self, *scalar):
            scalars[self.name].append(scalar)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    folder = run_in("toy/a b", [row(100, 2.0), LOOK])
    (folder / "vae.jsonl").write_text(json.dumps(row(1, 1.0, "vae")) + "\n")
    (folder / "mixture.jsonl").write_text(json.dumps({"stage": "mixture", "seconds": 3.0}) + "\n")     # fitted, and not in steps
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "of an earlier look").touch()
    assert cli.main(["tensorboard", str(folder)]) == 0
    assert f"tensorboard --logdir '{folder / 'tensorboard'}'" in capsys.readouterr().out
    target = folder / "tensorboard"
    assert {name: set(each) for name, each in scalars.items()} == {
        str(target / "history"): {("ncp/seconds", 2.0, 100), ("ncp/loss", 1.0, 100), ("ncp held-out/loss", 1.0, 300), "closed"},
        str(target / "vae"): {("vae/seconds", 1.0, 1), ("vae/loss", 1.0, 1), "closed"},
        str(target / "mixture"): {("mixture/seconds", 3.0, 0), "closed"}}
    assert to_tensorboard(folder) == target and sorted(path.name for path in target.iterdir()) == ["history", "mixture", "vae"]
    with pytest.raises(ValueError, match="there is no history in"):
        to_tensorboard(run_in("toy/c"))
