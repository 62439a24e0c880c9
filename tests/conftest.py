"""What all tests share."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

torch.set_num_threads(1)            # small tensors: on a busy machine a second thread costs a factor of ten
os.environ.pop("IN_TEST", None)     # nbdev's runner sets it, and nbdev_export does nothing where it is set
signal.signal(signal.SIGINT, signal.default_int_handler)     # a job in the background of a script begins with Ctrl-C ignored

# ---- the quick tier: `make quick` leaves out what tests/slow.txt names, one test a line with all its parameters ----

SLOW_LIST, SLOW_FROM = Path(__file__).with_name("slow.txt"), 0.5     # seconds of a CPU
SLOW, seconds = set(SLOW_LIST.read_text(encoding="utf-8").split()), {}


def name_of(item):
    return f"{item.path.name}::{item.originalname}"


def pytest_addoption(parser):
    parser.addoption("--renew-slow", action="store_true", help="take the tests that run now into tests/slow.txt, or out of it, "
                     f"by the CPU time that they need (from {SLOW_FROM} s on they are slow); in one process")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: named in tests/slow.txt; `make quick` leaves it out")


def pytest_collection_modifyitems(items):
    for item in items:
        if name_of(item) in SLOW:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    began = sum(os.times()[:4])             # of this process and those that it has waited for
    ended = yield
    seconds[name_of(item)] = seconds.get(name_of(item), 0.0) + sum(os.times()[:4]) - began
    return ended


def pytest_sessionfinish(session):
    if session.config.getoption("--renew-slow"):
        slow = (SLOW - seconds.keys()) | {name for name, spent in seconds.items() if spent >= SLOW_FROM}
        SLOW_LIST.write_text("".join(f"{name}\n" for name in sorted(slow)), encoding="utf-8")


# ---- fixtures -------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def own_seed():
    "Each test starts at seed 0 and leaves torch's global state as it was."
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def command():
    "Run a program of this environment in a process of its own; a failed assertion shows the end of its output."
    def run(name, *arguments, cwd=ROOT, timeout=1200):      # seconds, against a hang: many times what a busy machine needs
        try:
            done = subprocess.run([BIN / name, *map(str, arguments)], cwd=cwd, timeout=timeout, text=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"{name}: not finished after {timeout} s\n{(error.stdout or b'').decode()[-3000:]}", pytrace=False)
        if done.returncode:
            pytest.fail(f"{name}: exit code {done.returncode}\n{done.stdout[-6000:]}", pytrace=False)
        return done.stdout
    return run
