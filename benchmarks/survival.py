"""Trainings that are killed, a disk that fills up, what a checkpoint costs, and two hundred runs in a folder.

    python benchmarks/survival.py               # about twenty minutes; writes benchmarks/results/survival.json
    python benchmarks/survival.py --quick --out /some/file.json
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine import checkpoint, store                                                   # noqa: E402
from ncp_vae.engine.data import Binarized                                                      # noqa: E402
from ncp_vae.engine.processes import this_process                                              # noqa: E402
from ncp_vae.engine.train import Machine, fit, fit_ncp, fit_vae                                # noqa: E402
from ncp_vae.models.hierarchical import DenseHierarchy                                         # noqa: E402
from ncp_vae.models.nvae import NVAE, preset                                                   # noqa: E402

WAYS = [("vae", 1), ("ncp", 1), ("vae", 2), ("ncp", 2), ("groups", 2)]
FULL = {"ways": WAYS, "kills": 20, "steps": 6000, "after": 1.5, "calls": 60, "every": 0.1, "free_kb": range(0, 600, 4),
        "models": ["fashion_mnist8-5", "celeba64-30"], "saves": 3, "runs": 200}
QUICK = {"ways": [("groups", 2)], "kills": 1, "steps": 100, "after": 0.1, "calls": 8, "every": 0.02,
         "free_kb": range(0, 600, 120), "models": ["digits"], "saves": 1, "runs": 3}


# Forked from a server that has imported everything and computed nothing: a fork of this process could not run autograd.
FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ncp_vae.engine.train", "ncp_vae.engine.store", "ncp_vae.models.nvae", "torch._dynamo"])


# ---- killed ---------------------------------------------------------------------------------------------------------

def dies(calls, seconds):
    "From now on this process may die: before this call of those that write and place a file, or after so many seconds."
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    if seconds is not None:
        threading.Timer(seconds, die).start()
        return
    left = iter(range(calls, 0, -1))
    def watched(call):
        def watch(*arguments, **more):
            if next(left, 0) == 1:
                die()
            return call(*arguments, **more)
        return watch
    for place, name in ((os, "fsync"), (os, "link"), (os, "replace"), (checkpoint._Summed, "write")):
        setattr(place, name, watched(getattr(place, name)))


def trained(kind, folder, steps, every):
    "The weights after a training whose checkpoint and history are in a folder."
    torch.manual_seed(0)
    vae = DenseHierarchy((1, 8, 8), 2, 4, 32, 16)
    data = Binarized(torch.rand(500, 1, 8, 8))
    how = {"steps": steps, "batch_size": 32, "lr": 1e-3, "seed": 0, "machine": Machine(split_groups=kind == "groups"),
           "history": folder / "history.jsonl", "checkpoint": folder / "state.ckpt", "save_every": every}
    return (fit_vae if kind == "vae" else fit_ncp)(vae, data, **how).state_dict()


def attempt(kind, folder, steps, every, rank, calls, seconds):
    "What each process does: train; the process of this rank dies on the way, and none where it is -1."
    here = this_process()
    os.dup2(os.open(folder / f"{here.process_index}.err", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    if here.process_index == rank:
        dies(calls, seconds)
    weights = trained(kind, folder, steps, every)
    if here.is_main_process:
        checkpoint.save(folder / "weights.pt", weights)


def one_of(count, rank, port, arguments):
    "A process of gloo that makes the attempt."
    os.environ.update(common.rank_environment(count, rank, port))
    torch.set_num_threads(1)
    attempt(*arguments)


def run_once(count, arguments, seed):
    "One attempt on so many processes; the ones left when the first has died are killed within a second. Their exit codes."
    port = common.free_port()
    started = [FORKS.Process(target=one_of, args=(count, rank, port, arguments)) for rank in range(count)]
    for process in started:
        process.start()
    wait([process.sentinel for process in started])
    if any(process.exitcode for process in started):
        time.sleep(random.Random(seed).uniform(0, 1))
        for process in started:
            process.kill()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def equal(one, other):
    "To the bit; what nobody has computed is NaN in both."
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def ended(folder):
    "The weights, and the history without its clock."
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return checkpoint.load(folder / "weights.pt"), [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def killed(settings, kind, count, place):
    "A training that is killed again and again, half of the times inside a save, beside one that is left alone."
    alone, folder = place / f"{kind}{count}-alone", place / f"{kind}{count}-killed"
    began = []
    for each in (alone, folder):
        each.mkdir()
    how = [settings["steps"], settings["every"]]
    failed = any(run_once(count, [kind, alone, *how, -1, 0, None], 0))
    for number in range(settings["kills"]):
        seed = f"{kind} {count} {number}"
        draw, inside = random.Random(seed), number % 2 == 0
        rank = 0 if inside else draw.randrange(count)
        calls, seconds = draw.randint(1, settings["calls"]), None if inside else draw.uniform(0, settings["after"])
        codes = run_once(count, [kind, folder, *how, rank, calls, seconds], seed)
        if codes[rank] != -signal.SIGKILL:
            raise SystemExit(f"{kind}, {count} processes, attempt {number}: {codes}; see {folder}")
        began.append(checkpoint.load(folder / "state.ckpt")["step"] if (folder / "state.ckpt").exists() else 0)
    failed = any(run_once(count, [kind, folder, *how, -1, 0, None], 0)) or failed
    (weights, rows), (others, other_rows) = ended(alone), ended(folder)
    same = not failed and all(equal(weights[key], others[key]) for key in weights)
    return {"killed": len(began), "steps": settings["steps"], "kept_at": began, "same_weights": same, "same_history": rows == other_rows}


# ---- a full disk ----------------------------------------------------------------------------------------------------

class Squares(torch.nn.Module):
    "A loss of some 30 kB of weights."
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(8000))

    def forward(self, x, step):
        return {"loss": ((x.sum() - self.w) ** 2).mean()}


def squares(place):
    loss = Squares()
    fit(loss, torch.ones(16, 2), steps=6, batch_size=8, lr=1e-2, seed=0, name="squares", save_every=0.0,
        **({"checkpoint": place / "a.ckpt", "history": place / "a.jsonl"} if place else {}))
    return loss.w.detach()


def stored(model, place):
    store.save(model, place / "model")
    return torch.cat([value.flatten() for value in store.load(place / "model").state_dict().values()])


def full(place, free_kb):
    "On a small file system with so much room at first: each kind of write fails, loses nothing, and goes on once there is room."
    model = NVAE(preset("digits").config)
    whole = torch.cat([value.flatten() for value in model.state_dict().values()])
    works = {"training": (partial(squares, place), squares(None)), "store": (partial(stored, model, place), whole)}
    found = {}
    for name, (work, expected) in works.items():
        failed = went_on = 0
        for kb in free_kb:
            ballast = place / "ballast"
            room = shutil.disk_usage(place).free - 1024 * kb
            ballast.write_bytes(b"\0" * max(0, room))
            try:
                same = torch.equal(work(), expected)
            except OSError as error:
                failed += error.errno == 28
                ballast.unlink()
                same = torch.equal(work(), expected)
            went_on += same
            for left in place.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        found[name] = {"rooms": len(free_kb), "failed_for_want_of_room": failed, "ended_the_same": went_on}
    return found


def on_a_small_disk(free_kb):
    "`full` on a tmpfs of 8 MB in a name space of its own; why not, where the system does not allow it."
    with tempfile.TemporaryDirectory() as place:
        command = f"mount -t tmpfs -o size=8m tmpfs '{place}' && exec '{sys.executable}' '{__file__}' --full '{place}' '{json.dumps(list(free_kb))}'"
        done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", command], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"not run": done.stderr.strip().split("\n")[-1]}
    return json.loads(done.stdout.strip().split("\n")[-1])


# ---- what it costs --------------------------------------------------------------------------------------------------

def saving(name, saves, place):
    "Seconds to keep weights and Adam's two moments, and their share of the time at the default interval."
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in NVAE(preset(name).config).parameters())
    state = {key: torch.randn(numbers) for key in ("weights", "first", "second")}
    took = []
    for _ in range(saves):
        began = time.perf_counter()
        checkpoint.save(place / "cost.ckpt", state, keep=True)
        took.append(time.perf_counter() - began)
    seconds = median(took)
    return {"parameters": numbers, "gb": 12e-9 * numbers, "seconds": seconds, "share": seconds / (seconds + max(60.0, 40 * seconds))}


COMMAND = "import sys; from ncp_vae.engine.cli import main; sys.exit(main())"


def many_runs(number, place):
    "CPU seconds of the commands over so many runs: copies of the records in results/."
    records = sorted(common.RESULTS.parents[1].glob("results/*/status.json"))
    for n in range(number):
        shutil.copytree(records[n % len(records)].parent, place / "many" / f"run{n}", ignore=shutil.ignore_patterns("figures", "*.ipynb"))
    took = {}
    for command in (["list"], ["report", place / "many"], ["status", place / "many"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", COMMAND, *map(str, command)], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took[command[0]] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took


def main():
    args = common.arguments("survival", __doc__.split("\n")[0]).parse_args()
    settings = QUICK if args.quick else FULL
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as place:
        place = Path(place)
        costs = {name: saving(name, settings["saves"], place) for name in settings["models"]}
        runs = many_runs(settings["runs"], place)
        disk = on_a_small_disk(settings["free_kb"])
        kills = {f"{kind}, {count}": killed(settings, kind, count, place) for kind, count in settings["ways"]}
    same = sum(way["same_weights"] and way["same_history"] for way in kills.values())
    targets = {"trainings that end the same": common.target(same, at_least=len(kills)),
               "share of the time that saving takes": common.target(max(cost["share"] for cost in costs.values()), at_most=0.03),
               "CPU seconds of a command over the runs": common.target(max(runs.values()), at_most=1.0)}
    if "not run" not in disk:
        targets["rooms after which the work ended the same"] = common.target(
            min(work["ended_the_same"] for work in disk.values()), at_least=len(settings["free_kb"]))
    common.write_json(args.out, {"benchmark": "survival", "quick": args.quick, "machine": common.machine(),
                                 "settings": {**settings, "free_kb": list(settings["free_kb"])}, "killed": kills, "full_disk": disk,
                                 "saving": costs, "runs_cpu_s": runs, "targets": targets})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--full"]:
        print(json.dumps(full(Path(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
