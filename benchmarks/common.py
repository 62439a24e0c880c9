"""What every benchmark script shares: times, peak memory, the machine's description, results as JSON."""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(name, description):
    "The command line of a benchmark: --out, --quick, --threads; more may be added to the parser that is returned."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; its figures mean nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    return parser


def synchronize():
    "Wait until a GPU, where there is one in use, has done what it was asked."
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(call):
    "Seconds of one call: on the clock, and of this process on its CPUs."
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(calls, repeats):
    """Times of several calls, measured in turns, so that whatever else the machine does falls on all of them alike.

    calls: {name: call}. Each is called once before, unmeasured. Returns {name: {median_s, min_s, max_s, cpu_s, repeats}}: times
    on the clock, and the median of the time on the CPU. Where one thread works and cpu_s is well below median_s, the
    machine was busy with something else, or waited for a GPU."""
    for call in calls.values():
        call()
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    found = {}
    for name in calls:
        wall, cpu = zip(*(row[name] for row in rounds))
        found[name] = {"median_s": statistics.median(wall), "min_s": min(wall), "max_s": max(wall),
                       "cpu_s": statistics.median(cpu), "repeats": repeats}
    return found


def ratio(times, name, other):
    "Median time of `name` over that of `other`."
    return times[name]["median_s"] / times[other]["median_s"]


def peak_mb():
    "The largest resident memory of this process so far, in MB (10^6 bytes)."
    status = Path("/proc/self/status")
    if status.exists():          # not ru_maxrss there: it survives exec, and so holds the parent's peak as well
        return next(int(line.split()[1]) for line in status.read_text().split("\n") if line.startswith("VmHWM")) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_new_process(script, *arguments):
    "Run a script in a process of its own; the last line that it prints, read as JSON. Its errors are passed on."
    done = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def cpu_name():
    "The processor's name as the system gives it."
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().split("\n") if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine():
    "What the figures were measured on, and with which versions; JSON values only."
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "system": platform.platform(),
            "cpu": cpu_name(), "cpu_instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_average_1_min": round(os.getloadavg()[0], 2), "threads": torch.get_num_threads(),
            "gpu": gpu and {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda},
            "python": platform.python_version(), "torch": torch.__version__}


def target(value, at_most=None, at_least=None):
    "A figure beside what was wanted of it."
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    wanted = f"at most {at_most}" if at_least is None else f"at least {at_least}"
    return {"value": value, "wanted": wanted, "met": met}


def rounded(value):
    "Floats with four significant digits: no more is measured."
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_json(path, results):
    "Write the results (made of dicts, lists and numbers) and print what was wanted beside what was found."
    results = rounded(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    for name, found in results.get("targets", {}).items():
        print(f"{'met   ' if found['met'] else 'MISSED'}  {name}: {found['value']} ({found['wanted']})")
    print(path)
