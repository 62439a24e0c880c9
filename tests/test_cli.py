"""The command `ncp-vae`, driven as its users drive it: in processes, with signals, on small notebooks in a temporary clone."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ncp_vae.engine import cli, experiment
from ncp_vae.engine.experiment import read_record, state_of
from ncp_vae.engine.parameters import find_experiment

COMMAND = [str(Path(sys.executable).parent / "ncp-vae")]
PATIENT = [sys.executable, "-c",      # the command with an hour, not a minute, before it ends a cell that was interrupted
           "import sys; from ncp_vae.engine import cli; cli._GRACE = 3600.0; sys.exit(cli.main())"]
GUARD = 600                           # seconds, against a test that hangs; nothing is concluded from them
PARAMETERS = 'run_dir: str = ""\nseed: int = 0  # [0, inf)\nsteps: int = 3  # [1, inf) how many\nname: str = "a"  # {a, "b"}\n'
OPEN = "from ncp_vae.engine.experiment import Run\nrun = Run.open(run_dir, NAME)\nrun.metric('before', 0.25)"
FINISH = "run.metric('steps', steps, std_error=0.5, unit='1', n=steps, paper=4)\nrun.finish()"
SLEEP = "import time\nrun.path('began').touch()\n"
TRAIN = """import time, torch
from ncp_vae.engine.train import fit_vae
from ncp_vae.models.flat import DenseVAE
torch.set_num_threads(1)
class Slow(torch.utils.data.Dataset):
    images = torch.rand(64, 2, 2, generator=torch.Generator().manual_seed(0))
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if run.environment["attempt"] == 1 and run.path("history.jsonl").is_file():
            time.sleep(0.1)      # minutes to its end: an interrupt finds it at work, however late it comes
        return self.images[index]
torch.manual_seed(seed)
vae = DenseVAE((2, 2), 2, hidden=(8,), sigma=0.1)
fit_vae(vae, Slow(), steps=steps, batch_size=8, lr=1e-3, seed=seed, history=run.path("history.jsonl"),
        checkpoint=run.path("vae.pt"))"""
NOTEBOOKS = {
    "counts": ["import torch\nrun.path('threads').write_text(str(torch.get_num_threads()))", FINISH],
    "raises": ["1 / 0", FINISH],
    "vanishes": ["import os; os._exit(0)", FINISH],
    "leaves": ["import sys; sys.exit(0)", FINISH],
    "forgets": ["pass"],
    "early": ["run.metric('steps', 1)\nrun.finish()", "assert False, 'after\\nthe record'"],
    "sleeps": [SLEEP + "time.sleep(3600)", FINISH],
    "stubborn": [SLEEP + "while True:\n    try:\n        time.sleep(3600)\n    except KeyboardInterrupt:\n        run.path('no').touch()",
                 FINISH],
    "trains": [TRAIN, FINISH],
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone with the notebooks above. Its name has characters that a shell and a formatter would trip over."
    root = tmp_path_factory.mktemp("a {clone} of ours")
    folder = root / "nbs" / "runs"
    folder.mkdir(parents=True)
    kernel = dict(name="python3", language="python", display_name="python3")
    for name, cells in NOTEBOOKS.items():
        cells = [(PARAMETERS, ["parameters"]), (OPEN.replace("NAME", repr(name)), []), *((cell, []) for cell in cells)]
        pages = [dict(cell_type="markdown", id="title", metadata={}, source=f"# {name}\n\n> It {name}")]
        pages += [dict(cell_type="code", id=f"cell{k}", metadata=dict(tags=tags), source=source, outputs=[], execution_count=None)
                  for k, (source, tags) in enumerate(cells)]
        (folder / f"{name}.ipynb").write_text(json.dumps(
            dict(cells=pages, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    (folder / "counts.yaml").write_text("full: {steps: 1_000}\n")
    return root


@pytest.fixture(scope="module")
def start(clone):
    "Start the command; whatever still runs at the end of the tests is ended."
    begun, env = [], {**os.environ, "NCP_VAE_HOME": str(clone)}
    env.pop("OMP_NUM_THREADS", None)                                  # the command chooses
    def start(*arguments, command=COMMAND):
        begun.append(subprocess.Popen([*command, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE))
        return begun[-1]
    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def ask(start):
    "Run the command to its end: exit code, stdout, stderr."
    def ask(*arguments):
        process = start(*arguments)
        out, err = process.communicate(timeout=GUARD)
        return process.returncode, out, err
    return ask


@pytest.fixture(scope="module")
def ended(start, clone):
    "The runs that end by themselves, side by side: name -> exit code, stdout, stderr, folder."
    names = ["counts", "raises", "vanishes", "leaves", "forgets", "early"]
    processes = {name: start("run", name, "--out", clone / "ended" / name, "-p", 'name="b"') for name in names}
    outputs = {name: process.communicate(timeout=GUARD) for name, process in processes.items()}
    return {name: (processes[name].returncode, *outputs[name], clone / "ended" / name) for name in names}


def wait_for(condition, what):
    deadline = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < deadline, f"waited {GUARD} s for {what}"
        time.sleep(0.05)


def has_left(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:                                      # between the two questions
        return True


def status(folder):
    return json.loads((folder / "status.json").read_text())


# ---- without a kernel -----------------------------------------------------------------------------------------------

def test_help_names_the_exit_codes_and_loads_nothing_slow(ask):
    "How many seconds that makes, benchmarks/process.py measures."
    code, out, _ = ask("--help")
    assert code == 0 and all(word in out for word in ("list", "params", "run", "status", "tensorboard", "report", "124", "130", "138", "143"))
    code = "import sys\nfrom ncp_vae.engine.cli import main\ntry:\n    main(['--help'])\nfinally:\n    print('loaded', *sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    loaded = set(said[said.rindex("loaded"):].split())
    assert "ncp_vae.engine.cli" in loaded and not {"torch", "papermill", "nbformat", "yaml", "IPython"} & loaded


def test_list_and_params(ask, clone):
    broken, dangling = (clone / "nbs" / "runs" / f"{name}.ipynb" for name in ("broken", "dangling"))
    broken.write_text("{")
    dangling.symlink_to("nowhere")
    code, out, _ = ask("list")
    broken.unlink()
    dangling.unlink()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and lines["counts"] == "It counts" and len(lines) == len(NOTEBOOKS) + 2
    assert all("cannot be run" in lines[name] for name in ("broken", "dangling"))
    code, out, _ = ask("params", "counts")
    assert code == 0 and "run_dir" not in out
    assert [line.split() for line in out.splitlines()[2:5]] == [
        ["name", "type", "smoke", "full", "range", "meaning"], ["seed", "int", "0", "[0,", "inf)"],
        ["steps", "int", "3", "1000", "[1,", "inf)", "how", "many"]]


@pytest.mark.parametrize("arguments, words", [
    (["run", "count"], "did you mean 'counts'?"),
    (["params", "count"], "did you mean 'counts'?"),
    (["run", "counts", "-p", "stpes=3"], "did you mean 'steps'?"),
    (["run", "counts", "-p", "steps=three"], "steps = 'three': expected a whole number"),
    (["run", "counts", "-p", "steps=2.5"], "expected a whole number"),
    (["run", "counts", "-p", "steps=0"], "steps = '0': must lie in [1, inf)"),
    (["run", "counts", "-p", "name=c"], "must lie in {a, \"b\"}"),
    (["run", "counts", "-p", "steps"], "expected NAME=VALUE"),
    (["run", "counts", "-p", "steps=1", "-p", "steps=2"], "given twice"),
    (["run", "counts", "-p", "run_dir=/x"], "--out"),
    (["run", "counts", "-p", "seed=2e20"], "seed = '2e20': must be below 2^63"),
    (["run", "counts", "--time-limit", "-1"], "expected a number of seconds"),
    (["run", "counts", "--time-limit", "nan"], "expected a number of seconds"),
    (["run", "counts", "--time-limit", "8h"], "invalid float value"),
    (["run", "counts", "--preset", "cpu"], "there are: smoke, full"),
    (["run", "counts", "--resume", "nowhere"], "params.json"),
    (["run", "counts", "--resume", "nowhere", "--preset", "full"], "leave out"),
    (["run", "counts", "--resume", "nowhere", "--dry-run"], "leave out"),
    (["run", "counts", "--preset", ""], "one of them is empty"),
    (["run", "counts", "--out", ""], "one of them is empty"),
    (["run", "counts", "--resume", ""], "one of them is empty"),
    (["run", "counts", "--out", "FILE/below"], "cannot write to"),
    (["run", "counts", "--out", "FILE"], "cannot write to"),
    (["run", "counts", "--out", "USED"], "never overwrites"),
    (["report", "nowhere"], "no folder nowhere"),
    (["report"], "results: copy the runs to report on into it"),
    (["sing"], "invalid choice"),
    ([], "required"),
])
def test_bad_input_is_refused_before_anything_is_made(ask, clone, arguments, words):
    (clone / "file").write_text("")
    (clone / "used").mkdir(exist_ok=True)
    (clone / "used" / "something").write_text("")
    before = sorted(clone.rglob("*"))
    code, out, err = ask(*(word.replace("FILE", str(clone / "file")).replace("USED", str(clone / "used")) for word in arguments))
    assert code == 2 and words in err and "Traceback" not in err
    assert sorted(clone.rglob("*")) == before


def test_a_dry_run_prints_what_it_would_take_and_makes_nothing(ask, clone):
    "This one takes nothing; tests/test_predict.py has those that do."
    before = sorted(clone.rglob("*"))
    code, out, err = ask("run", "counts", "--preset", "full", "--dry-run")
    assert code == 0 and out.strip() == "counts trains no network: it takes the model of a finished run." and not err
    assert sorted(clone.rglob("*")) == before
    assert ask("run", "counts", "--dry-run", "-p", "steps=0")[0] == 2


# ---- runs that end by themselves ------------------------------------------------------------------------------------

def test_a_run_that_succeeds(ended):
    code, out, err, folder = ended["counts"]
    assert code == 0 and state_of(folder) == "succeeded" and "3.00 +- 0.50 1 (estimate, n = 3)" in out, err
    raw = json.loads((folder / "metrics.json").read_text())
    assert set(raw) == {"experiment", "preset", "params", "data", "model", "parts", "earlier_commits", "commit",
                        "environment", "seconds", "metrics"}
    assert raw["earlier_commits"] == []
    assert (raw["data"], raw["model"], raw["parts"]) == ("counts", "", [])      # no parameter says more
    assert raw["params"] == {"seed": 0, "steps": 3, "name": '"b"'} and raw["preset"] == "smoke"
    assert status(folder)["cell"] == "In [5] of 5  counts"           # the last one that it began
    assert (folder / "threads").read_text() == "1"                   # the command's own choice
    assert raw["metrics"]["steps"] == dict(value=3.0, std_error=0.5, unit="1", kind="estimate", n=3, paper=4.0)
    assert {"notebook.ipynb", "params.json", "environment.json", "log.txt"} <= {path.name for path in folder.iterdir()}
    assert not any(path.suffix == ".part" for path in folder.iterdir())


@pytest.mark.parametrize("name, why", [
    ("raises", "cell In [4]: ZeroDivisionError: division by zero"),
    ("vanishes", "cell In [4]: the kernel died"),
    ("leaves", "In [4]"),
    ("forgets", "it ended without its record"),
    ("early", "cell In [5]: AssertionError: after\nthe record"),
])
def test_runs_that_fail(ended, name, why):
    code, out, err, folder = ended[name]
    assert code == 1 and state_of(folder) == "failed" and why in err and "Traceback" not in err
    assert f"--resume '{folder}'" in err and "metrics.jsonl" in err and why in status(folder)["error"]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["value"] == 0.25


def test_the_report_shows_results_only(ended, ask, clone):
    code, out, _ = ask("report", clone / "ended")
    results, _, others = out.partition("no results:")
    assert code == 0 and [line.split()[2:] for line in results.splitlines()[1:] if line] == [
        ["before", "0.25", "nats", "(estimate)", "-", "counts"],
        ["steps", "3.00", "+-", "0.50", "1", "(estimate,", "n", "=", "3)", "4.0", "counts"]]
    assert [line.split() for line in others.split("\n")[1:-1]] == [[name, "failed"] for name in
                                                               ("early", "forgets", "leaves", "raises", "vanishes")]


def test_the_report_does_not_show_a_damaged_record(ended, ask, clone):
    path = ended["counts"][3] / "metrics.json"
    whole = path.read_text()
    try:
        path.write_text(whole[:-20])
        code, out, _ = ask("report", path.parent)
    finally:
        path.write_text(whole)
    assert code == 0 and "no succeeded run" in out and "without a sound record" in out and "3.00" not in out


@pytest.fixture
def results(ended, clone):
    "A clone with results, of which one failed, and with the notebook that shows them."
    for name in ("counts", "early"):
        shutil.copytree(ended[name][3], clone / "results" / name)
    cell = dict(cell_type="code", id="cell", metadata={}, outputs=[], execution_count=None,
                source="import sys, time\nprint(2 + 3, file=sys.stderr)\nprint(2 + 2)\n'shown'")
    (clone / "docs").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parents[1] / "docs" / "execute.py", clone / "docs")
    notebook = clone / "nbs" / "results.ipynb"
    notebook.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    yield notebook
    shutil.rmtree(clone / "results")
    (clone / "RESULTS.md").unlink(missing_ok=True)
    notebook.unlink()


def test_the_report_writes_the_results_page(results, ask, clone):
    code, out, err = ask("report")
    page = (clone / "RESULTS.md").read_text()
    assert code == 0 and "from 1 runs; 1 without a result" in out, err
    assert "ncp-vae run counts -p 'name=\"b\"'\n" in page and "| `early` | failed |" in page


def test_the_report_executes_the_results_notebook_in_place_and_twice_is_once(results, ask):
    assert ask("report")[0] == 0
    first = results.read_bytes()
    (cell,) = json.loads(first)["cells"]
    assert [out.get("text", out.get("data")) for out in cell["outputs"]] == [["4\n"], {"text/plain": ["'shown'"]}]
    assert cell["execution_count"] is None and cell["metadata"] == {}
    assert ask("report")[0] == 0 and results.read_bytes() == first


def test_a_results_notebook_that_fails_stays_as_it_was(results, ask):
    broken = results.read_text().replace("2 + 2", "1 / 0")
    results.write_text(broken)
    code, _, err = ask("report")
    assert code == 2 and "ZeroDivisionError" in err and "Traceback" not in err and results.read_text() == broken


def test_a_run_never_overwrites_another(ended, ask):
    folder = ended["counts"][3]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ask("run", "counts", "--out", folder)[0] == 2
    code, _, err = ask("run", "counts", "--resume", folder)
    assert code == 2 and "succeeded already" in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# ---- runs that are stopped ------------------------------------------------------------------------------------------

def test_ctrl_c_keeps_the_training_and_resume_goes_on(start, ask, clone):
    folder = clone / "stopped" / "train"
    process = start("run", "trains", "-p", "steps=300", "--out", folder)
    wait_for(lambda: (folder / "history.jsonl").is_file(), "the first line of history")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 130 and state_of(folder) == "interrupted" and "cell In [4]: SIGINT" in err
    assert "vae.pt" in err and "jupyter lab" in err and "--resume" in err
    assert (folder / "vae.pt").is_file() and not (folder / "metrics.json").exists()
    assert "train  interrupted" in ask("report", clone / "stopped")[1]

    code, out, err = ask("run", "trains", "--resume", folder)
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert steps == list(range(50, 301, 50))                          # nothing done twice, nothing left out
    assert read_record(folder)["params"]["steps"] == 300 and state_of(folder) == "succeeded"
    assert (folder / "notebook.1.ipynb").is_file() and status(folder)["attempt"] == 2
    assert read_record(folder)["earlier_commits"] == [json.loads((folder / "environment.1.json").read_text())["commit"]]


def test_a_scheduler_stops_a_run(start, clone):
    folder = clone / "stopped" / "sleep"
    process = start("run", "sleeps", "--out", folder, command=PATIENT)
    wait_for((folder / "began").exists, "the cell")
    process.terminate()
    process.communicate(timeout=GUARD)
    assert process.returncode == 143 and state_of(folder) == "interrupted"


@pytest.mark.parametrize("room", [True, False])
def test_a_full_disk_is_one_line_and_the_state_says_so(room, clone, monkeypatch, capsys):
    "Without the room for a new status.json the old one is written over; where that fails too, the run is found killed."
    monkeypatch.setenv("NCP_VAE_HOME", str(clone))
    folder = experiment.new_run(clone / "full" / str(room), "counts", "smoke", {})
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cli, "_execute", full)
    monkeypatch.setattr(experiment, "write_json", full)
    if not room:
        monkeypatch.setattr(experiment, "end", full)
        monkeypatch.setattr(cli, "end", full)
    assert cli._attempt(find_experiment("counts"), folder, {}, SimpleNamespace(at=4, received=[])) == 1
    said = capsys.readouterr().err
    assert "cell In [4]: OSError: [Errno 28] No space left on device" in said and f"--resume '{folder}'" in said
    assert status(folder)["state"] == ("failed" if room else "running")
    assert "No space left" in str(status(folder).get("error")) or not room


def test_a_run_stops_at_its_time_limit(ask, clone):
    "In its first cell or before it: what it says, and what a job script can act on, is the same."
    folder = clone / "stopped" / "limit"
    code, out, err = ask("run", "sleeps", "--out", folder, "--time-limit", "0.5")
    assert code == 124 and state_of(folder) == "stopped" and "its time limit" in err and f"--resume '{folder}'" in err
    assert status(folder)["error"].endswith("its time limit") and "limit  stopped" in ask("report", clone / "stopped")[1]


def test_a_warning_by_the_scheduler_is_a_signal_too(start, clone):
    folder = clone / "stopped" / "warned"
    process = start("run", "sleeps", "--out", folder, command=PATIENT)
    wait_for((folder / "began").exists, "the cell")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=GUARD)
    assert process.returncode == 138 and state_of(folder) == "interrupted"


def test_a_second_signal_ends_a_cell_that_does_not_stop(start, ask, clone):
    folder = clone / "stopped" / "stubborn"
    process = start("run", "stubborn", "--out", folder, command=PATIENT)
    wait_for((folder / "began").exists, "the cell")
    process.send_signal(signal.SIGINT)
    wait_for((folder / "no").exists, "the cell to refuse")
    assert state_of(folder) == "running"
    code, _, err = ask("run", "stubborn", "--resume", folder)
    assert code == 2 and "is being run" in err
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=GUARD)
    assert process.returncode == 130 and state_of(folder) == "interrupted"


def test_a_run_that_is_killed_is_no_result_and_leaves_no_kernel(start, ask, clone):
    folder = clone / "stopped" / "killed"
    process = start("run", "sleeps", "--out", folder)
    wait_for((folder / "began").exists, "the cell")
    (kernel,) = psutil.Process(process.pid).children()
    assert "running" in ask("report", folder)[1]
    process.kill()
    process.communicate()
    assert status(folder)["state"] == "running" and state_of(folder) == "killed"
    out = ask("report", folder)[1]
    assert "killed" in out and "0.25" not in out
    wait_for(lambda: has_left(kernel), "the kernel to leave")
