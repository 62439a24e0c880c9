"""The benchmarks' own logic, on the tiny shapes of --quick: what they compare is equal, and what is measured is kept."""
import copy
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ncp_vae.engine import checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name):
    "A script of the folder as a module."
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_measures_both_ways(tmp_path, monkeypatch):
    """Figures of tiny shapes say nothing; that they are there, positive by a clock that ticks whenever it is read, and that the two
    ways train the same weights, does."""
    out, ticks = tmp_path / "training.json", itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(sys, "argv", ["training.py", "--quick", "--out", str(out)])
    script("training").main()
    found = json.loads(out.read_text())
    assert set(found["time"]) == {"dense, K = 2", "nvae, K = 2"}
    assert all(value > 0 for times in found["time"].values() for value in times.values())
    assert len(found["losses"]["dense, K = 2"]["one_pass"]) == 2
    assert found["weights_apart"] == {"dense, K = 2": 0.0}


def test_a_walk_that_leaves_early_has_other_random_numbers():
    "The broken twin of weights_apart: it is above zero where the draws differ, so zero says something."
    training = script("training")
    images = training.load("digits", "train").images
    vae, ratios = training.built("dense", 2, training.QUICK)
    start, same = copy.deepcopy(ratios.state_dict()), {"steps": 2, "batch_size": 16, "lr": 1e-3, "seed": 0}
    trained = []
    for leave in (False, True):
        ratios.load_state_dict(start)
        training.fit_alone(vae, ratios, training.Binarized(images), leave, **same)
        trained.append(copy.deepcopy(ratios.state_dict()))
    assert any(not torch.equal(a, b) for a, b in zip(trained[0].values(), trained[1].values()))
    assert any(not torch.equal(a, b) for a, b in zip(trained[0].values(), start.values()))


@pytest.mark.parametrize("arguments, words", [
    (["sample"], "no CUDA GPU"), (["train"], "no CUDA GPU"), (["sample", "--device", "cpu"], "--quick"),
    (["sample", "--device", "cpu", "--quick"], "--out")])
def test_gpu_refuses_what_would_say_nothing(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=words):
        script("gpu").main(arguments)


def test_gpu_sampling_in_pieces(tmp_path, capsys):
    "No time: no piece. Time: all. Then nothing is measured again, except a piece that is gone or of other settings."
    gpu = script("gpu")
    quick = ["sample", "--device", "cpu", "--quick", "--out", str(tmp_path), "--minutes"]
    gpu.main([*quick, "-1"])
    assert "11 pieces left" in capsys.readouterr().out
    gpu.main([*quick, "9999"])
    parts = {path.stem: path.read_text() for path in tmp_path.glob("*.json")}
    assert set(parts) == {*gpu.pieces(gpu.QUICK), "sample"}
    gone, other = "rate-float32", "memory-bfloat16-channels_last"
    (tmp_path / f"{gone}.json").unlink()
    (tmp_path / f"{other}.json").write_text(parts[other].replace('"proposals": 128', '"proposals": 64'))
    gpu.main([*quick, "9999"])
    now = {path.stem: path.read_text() for path in tmp_path.glob("*.json")}
    assert {name for name in parts if now[name] != parts[name]} <= {gone, other, "sample"}
    assert '"proposals": 128' in now[other] and json.loads(now["sample"])["left"] == []
    assert set(json.loads(now[other])["found"]) == {"64", "128", "128, in the chunks of the runs"}


def test_a_piece_that_fails_is_left_and_the_others_measured(tmp_path, capsys, monkeypatch):
    gpu = script("gpu")
    def too_large(settings, ncp, device):
        raise torch.OutOfMemoryError("no memory left")
    monkeypatch.setattr(gpu, "pieces", lambda settings: {"large": ("float32", too_large), "sweep": ("float32", gpu.sweep)})
    gpu.main(["sample", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "large: failed" in printed.out and "1 pieces left" in printed.out and "no memory left" in printed.err
    assert {path.stem for path in tmp_path.glob("*.json")} == {"sweep", "sample"}


def test_process_measures_what_tests_may_not_assert(tmp_path, monkeypatch):
    "Its figures depend on the machine; that they are there, does not, except where a system keeps its peak to itself."
    out = tmp_path / "process.json"
    monkeypatch.setattr(sys, "argv", ["process.py", "--quick", "--out", str(out)])
    process = script("process")
    process.main()
    found = json.loads(out.read_text())
    assert found["quick"] and set(found["time"]) == {"import", "ncp-vae --help", "naps over what was asked for"}
    assert {"torch", "ncp_vae"} < set(found["time"]["import"]) and found["time"]["ncp-vae --help"]["repeats"] == 1
    assert {"first call over its tensors", "later calls over their tensors", "small tensors, not handed back"} < set(found["memory"])
    assert len(found["targets"]) == (6 if process.cost.forget_peak() else 3)
    assert {"cpu", "cpus", "memory_gb", "packages", "load_average_1_min"} <= set(found["machine"])


def test_survival_ends_the_same(tmp_path):
    "A training of two processes killed once inside a save, and work on a disk without room; the other ways and the many kills are for the script."
    out = tmp_path / "survival.json"
    subprocess.run([sys.executable, FOLDER / "survival.py", "--quick", "--out", out], check=True)
    found = json.loads(out.read_text())
    assert all(way["killed"] == 1 and way["same_weights"] and way["same_history"] for way in found["killed"].values())
    for work in () if "not run" in found["full_disk"] else found["full_disk"].values():
        assert work["failed_for_want_of_room"] > 0 and work["ended_the_same"] == work["rooms"]
    assert set(found["runs_cpu_s"]) == {"list", "report", "status"} and not list(tmp_path.glob("tmp*"))


def test_two_processes_beside_what_is_foreseen_for_them(tmp_path, monkeypatch):
    "Its figures want idle cores; that each way was measured on one and two processes, and foreseen, does not."
    out = tmp_path / "processes.json"
    monkeypatch.setattr(sys, "argv", ["processes.py", "--quick", "--out", str(out)])
    script("processes").main()
    found = json.loads(out.read_text())
    batch, = found["batches"].values()
    assert set(batch["median_s"]) == {"1", "2"} and set(batch["median_s"]["2"]) == {"vae", "ncp", "groups", "samples", "exchange"}
    assert set(batch["foreseen"]) == {"vae", "ncp", "groups"} and len(found["targets"]) == 2


def test_gpu_budgets_are_counted():
    "One group in ten, the first among them, keeps all proposals; the operations follow the evaluations."
    gpu = script("gpu")
    ncp = gpu.built(gpu.QUICK, {}, torch.device("cpu"))
    times = gpu.measure_time(gpu.QUICK, ncp, torch.device("cpu"), 1)
    assert (times["all"]["evaluations_an_image"], times["budgets"]["evaluations_an_image"]) == (2 * 128, 128 + 64)
    assert times["budgets"]["tflop_an_image"] == pytest.approx(0.75 * times["all"]["tflop_an_image"])   # both of one shape


SAVES = """import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (Path(sys.argv[1]).with_name("saved").touch(), sys.exit(130)))
Path(sys.argv[1]).touch()
time.sleep(600)"""


def test_a_call_is_interrupted_when_its_time_is_up(tmp_path, monkeypatch):
    """As Ctrl-C does, not killed; a command that ends by itself keeps its exit code, and the handler of SIGTERM is put back. The
    three seconds are up when the command says that it listens, on a machine of any speed."""
    gpu, handler, ready, limits = script("gpu"), signal.getsignal(signal.SIGTERM), tmp_path / "ready", []

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            limits.append(timeout)
            while not ready.exists() and self.poll() is None:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Process)
        assert gpu.call_for(3.0, [sys.executable, "-c", SAVES, ready]) == 130
    assert limits == [3.0] and (tmp_path / "saved").exists()
    assert gpu.call_for(600.0, [sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert signal.getsignal(signal.SIGTERM) == handler


def test_progress_of_a_run(tmp_path):
    "The step of the checkpoint, and the speed of the history, in which a resumed run counts its seconds from zero again."
    gpu = script("gpu")
    rows = [("vae", 50, 5.0), ("vae", 100, 10.0), ("vae held-out", 100, None), ("vae", 150, 2.0), ("vae", 200, 7.0), ("ncp", 50, 1.0)]
    lines = [json.dumps({"stage": stage, "step": step, **({"seconds": s} if s else {})}) for stage, step, s in rows]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    checkpoint.save(tmp_path / "vae.ckpt", {"step": 210, "settings": {"steps": 400}})
    assert gpu.progress(tmp_path) == {"vae": {"step": 210, "of": 400, "steps_a_second": 10.0}}


def test_predicted_measures_both_trainings(tmp_path, monkeypatch):
    "That figures are there, and positive by a clock that ticks whenever it is read. What they say depends on the machine."
    out, ticks = tmp_path / "predicted.json", itertools.count()
    predicted = script("predicted")
    monkeypatch.setattr(predicted.predict, "LAUNCH", predicted.predict.LAUNCH)
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(sys, "argv", ["predicted.py", "--quick", "--out", str(out)])
    predicted.main()
    found = json.loads(out.read_text())["found"]["digits"]
    assert set(found) == {"VAE", "ratios"} and all(row["found_s"] > 0 and row["foreseen_s"] > 0 for row in found.values())
