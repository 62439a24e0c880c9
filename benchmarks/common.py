"""What every benchmark script shares: summaries of times and memory, the machine's description, results as JSON."""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from ncp_vae.engine import cost
from ncp_vae.engine.experiment import environment

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(name, description):
    "The command line of a benchmark: --out, --quick, --threads; more may be added to the parser that is returned."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; its figures mean nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    return parser


def compare(calls, repeats, device=torch.device("cpu")):
    """Times of several calls, measured in turns by `cost.in_turns`.

    calls: {name: call}. Returns {name: {median_s, min_s, max_s, cpu_s, repeats}}: times on the clock, and the median of the time
    on the CPU. Where one thread works and cpu_s is well below median_s, the machine was busy with something else, or waited for a
    GPU."""
    found = {}
    for name, times in cost.in_turns(calls, repeats, device).items():
        wall, cpu = zip(*times)
        found[name] = {"median_s": statistics.median(wall), "min_s": min(wall), "max_s": max(wall),
                       "cpu_s": statistics.median(cpu), "repeats": repeats}
    return found


def ratio(times, name, other):
    "Median time of `name` over that of `other`."
    return times[name]["median_s"] / times[other]["median_s"]


def peak_mb():
    "The largest resident memory of this process so far, in MB (10^6 bytes). Linux only."
    return cost.resident("VmHWM") / 1e6


def in_new_process(script, *arguments):
    "Run a script in a process of its own; the last line that it prints, read as JSON. Its errors are passed on."
    done = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def free_port():
    "A port of this machine that nobody listens at."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def rank_environment(count, rank, port):
    "The variables by which one of so many processes, each of one thread, finds the others by gloo."
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def machine():
    "What the figures were measured on, and with which versions: what a run records, and how busy it was; JSON values only."
    return {**environment(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_average_1_min": round(os.getloadavg()[0], 2)}


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
