"""What all tests share."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

torch.set_num_threads(1)            # small tensors: on a busy machine a second thread costs a factor of ten
os.environ.pop("IN_TEST", None)     # nbdev's runner sets it, and nbdev_export does nothing where it is set


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
