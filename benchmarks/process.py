"""What a process takes: seconds to import and to start, resident memory of a call and of a stored image set.

    python benchmarks/process.py             # some minutes; writes benchmarks/results/process.json
    python benchmarks/process.py --quick --out /some/file.json
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine import cost                                                                # noqa: E402
from ncp_vae.engine.stored import Stored                                                       # noqa: E402

CPU = torch.device("cpu")
FULL = {"processes": 10, "nap_s": 0.02, "naps": 50, "floats": 10_000_000, "tensors": [1, 1, 2, 1], "small": 1_000, "stored": 2**33}
QUICK = {"processes": 1, "nap_s": 0.001, "naps": 2, "floats": 100_000, "tensors": [1, 1, 2, 1], "small": 10, "stored": 2**20}
IMPORT = """import json, time
found, last = {}, time.perf_counter()
for name in ("torch", "ncp_vae", "ncp_vae.prior", "ncp_vae.models.nvae", "ncp_vae.engine.train"):
    __import__(name)
    now = time.perf_counter()
    found[name], last = now - last, now
print(json.dumps(found))"""


def spread(values, unit):
    "Median and extremes, with the unit in their names; None where the system could not tell."
    if None in values:
        return None
    return {f"median_{unit}": median(values), f"min_{unit}": min(values), f"max_{unit}": max(values), "repeats": len(values)}


# ---- time -----------------------------------------------------------------------------------------------------------

def imports(settings):
    "Seconds of each import on top of those before it, each time in a process of its own."
    rows = [common.in_new_process("-c", IMPORT) for _ in range(settings["processes"])]
    return {name: spread([row[name] for row in rows], "s") for name in rows[0]}


def command(settings):
    "Seconds from the start of `ncp-vae --help` to its end."
    words = [Path(sys.executable).parent / "ncp-vae", "--help"]
    return spread(cost.seconds(lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=True), settings["processes"], CPU), "s")


def naps(settings):
    "What `cost.seconds` finds for calls that sleep, over what they were to sleep."
    found = cost.seconds(lambda: time.sleep(settings["nap_s"]), settings["naps"], CPU)
    return spread([value / settings["nap_s"] for value in found], "ratio")


# ---- memory: one measurement in a process of its own ------------------------------------------------------------------

def measure_calls(floats, tensors):
    "Of calls that hold some tensors at once: what `cost.peak_growth` finds over what they need; and pages of files that stay, MB."
    rows = []
    for count in tensors:
        files = cost.resident("RssFile") if cost.forget_peak() else 0
        grown = cost.peak_growth(lambda: sum(float(x[0]) for x in [torch.ones(floats) for _ in range(count)]), CPU)
        rows.append({"ratio": grown and grown / (4 * floats * count), "files_mb": grown and (cost.resident("RssFile") - files) / 1e6})
    return rows


def measure_reuse(small):
    "Many small tensors, made again where the last call's were: with free memory handed back before, as `peak_growth` does, or not."
    kept, found = [], {}
    def call():
        held = [torch.ones(10_000) for _ in range(small)]
        kept.append(torch.ones(10_000))       # above the others: what they leave stays with the C library
        del held
    call()
    for name in ("handed back", "not handed back"):
        if name == "not handed back":
            cost.ctypes.CDLL = lambda _: None            # so that there is no malloc_trim
        grown = cost.peak_growth(call, CPU)
        found[name] = grown and grown / (40_000 * small)
    return found


def measure_stored(path):
    "MB that opening a set takes, and reading its first, middle and last image."
    def call():
        rows = Stored(path)
        rows[[0, len(rows) // 2, len(rows) - 1]]
    grown = cost.peak_growth(call, CPU)
    return {"first call": grown and grown / 1e6}


MEASURES = {"calls": measure_calls, "reuse": measure_reuse, "stored": measure_stored}


# ---- memory: of several processes ---------------------------------------------------------------------------------------

def several(settings, *what):
    "What so many new processes find of one measure."
    return [common.in_new_process(__file__, "--measure", json.dumps(what)) for _ in range(settings["processes"])]


def memory(settings):
    "Growth of resident memory at the peak, by `cost.peak_growth`."
    rows = several(settings, "calls", settings["floats"], settings["tensors"])
    first, later = [row[0] for row in rows], [call for row in rows for call in row[1:]]
    reuse = several(settings, "reuse", settings["small"])
    return {"first call over its tensors": spread([call["ratio"] for call in first], "ratio"),
            "first call, pages of files that stay": spread([call["files_mb"] for call in first], "mb"),
            "later calls over their tensors": spread([call["ratio"] for call in later], "ratio"),
            "later calls, pages of files that stay": spread([call["files_mb"] for call in later], "mb"),
            **{f"small tensors, {name}": spread([row[name] for row in reuse], "ratio") for name in ("handed back", "not handed back")}}


def stored(settings):
    "The same of a stored set whose file is sparse: it takes no room on the disk."
    with tempfile.TemporaryDirectory() as folder:
        path, shape = Path(folder) / "big-train.npy", (settings["stored"] // (3 * 64 * 64), 3, 64, 64)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + int(np.prod(shape)))
        path.with_suffix(".json").write_text(json.dumps({"shape": shape}))
        rows = several(settings, "stored", str(path))
    return {"gb": settings["stored"] / 1e9, "growth": spread([row["first call"] for row in rows], "mb")}


def targets(results):
    "What was asked of these figures; nothing of memory where it was not measured."
    times = results["time"]
    found = {"seconds of `import ncp_vae` after torch, shortest": common.target(times["import"]["ncp_vae"]["min_s"], at_most=0.5),
             "seconds of `ncp-vae --help`, shortest": common.target(times["ncp-vae --help"]["min_s"], at_most=5.0),
             "naps, shortest over what was asked for": common.target(times["naps over what was asked for"]["min_ratio"], at_least=1.0)}
    for name in ("later calls over their tensors", "small tensors, handed back"):
        if row := results["memory"][name]:
            found[f"memory of {name}, largest distance from 1"] = common.target(
                max(row["max_ratio"] - 1, 1 - row["min_ratio"]), at_most=0.1)
    if row := results["stored"]["growth"]:
        found["memory of a stored set, largest, MB"] = common.target(row["max_mb"], at_most=100)
    return found


def main():
    parser = common.arguments("process", __doc__.split("\n")[0])
    parser.add_argument("--measure", type=json.loads, metavar="JSON", help="one measurement in a process of its own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        name, *given = args.measure
        return print(json.dumps(MEASURES[name](*given)))
    settings = QUICK if args.quick else FULL
    results = {"benchmark": "process", "quick": args.quick, "machine": common.machine(), "settings": settings,
               "time": {"import": imports(settings), "ncp-vae --help": command(settings),
                        "naps over what was asked for": naps(settings)},
               "memory": memory(settings), "stored": stored(settings)}
    common.write_json(args.out, {**results, "targets": targets(results)})


if __name__ == "__main__":
    main()
