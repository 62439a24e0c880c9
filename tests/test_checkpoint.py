"""Files that are whole or not there: what is refused, and writing aside and renaming, also of folders. Trainings that are killed: test_train.py."""
import io
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from ncp_vae.engine import checkpoint


class Hostile:
    def __reduce__(self):
        return os.system, ("echo a stranger ran",)


def test_what_is_torn_missing_or_hostile_is_refused_by_name(tmp_path, capfd):
    file = checkpoint.save(tmp_path / "new" / "model.pt", dict(step=3, weights=torch.arange(4.0)))
    assert torch.equal(checkpoint.load(file)["weights"], torch.arange(4.0))
    torn, hostile, bare = (tmp_path / f"{name}.pt" for name in ("torn", "hostile", "bare"))
    torn.write_bytes(file.read_bytes()[:-20])
    checkpoint.save(hostile, Hostile())
    torch.save(Hostile(), bare)                  # without the sum that would get it to the second check
    for path in (torn, hostile, bare):
        with pytest.raises(ValueError, match=f"{path.name} is not a whole checkpoint"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    assert "a stranger ran" not in capfd.readouterr().out


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    with checkpoint.replacing(tmp_path / "a" / "two") as part:
        part.mkdir()
        (part / "first").write_text("1")
        assert not (tmp_path / "a" / "two").exists()
        (part / "second").write_text("2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["two"]
    assert sorted(path.read_text() for path in (tmp_path / "a" / "two").iterdir()) == ["1", "2"]


def test_all_of_it_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    def watched(number):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        assert not (tmp_path / "two").exists()
        fsync(number)
    monkeypatch.setattr(os, "fsync", watched)
    with checkpoint.replacing(tmp_path / "two") as part:
        part.mkdir()
        for name in ("first", "second"):
            (part / name).write_text(name)
    assert sorted(synced) == ["first", "second"] and (tmp_path / "two").is_dir()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_one_stays_alone(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        with checkpoint.replacing(tmp_path / "file") as part:
            part.write_text("half of it")
            raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_an_interrupt_waits_for_the_end_of_the_step_and_no_other_thread_holds_it():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.hold_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("the step")
    def elsewhere():
        with checkpoint.hold_interrupt():
            done.append(signal.getsignal(signal.SIGINT) is before)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == ["the step", True] and signal.getsignal(signal.SIGINT) is before


# ---- what a disk does to a file --------------------------------------------------------------------------------------

def test_no_flipped_or_missing_byte_is_taken(tmp_path):
    "Each byte in turn, and lengths of all kinds. torch.load alone takes most of them, and other weights with some."
    file = checkpoint.save(tmp_path / "a.pt", dict(step=3, weights=torch.ones(4)))
    whole = file.read_bytes()
    spoilt = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:] for at in range(len(whole))]
    for content in [*spoilt, *(whole[:at] for at in range(0, len(whole), 31)), whole[:-1], whole + b"\0"]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="a.pt is not a whole checkpoint"):
            checkpoint.load(file)


def test_two_are_kept_and_the_older_one_is_taken_where_the_newer_is_no_good(tmp_path):
    path = tmp_path / "a.pt"
    def refuse(*steps):
        def check(file, state):
            if state["step"] in steps:
                raise checkpoint.Damaged(f"{file} is of step {state['step']}")
        return check
    for step in (1, 2, 3):
        checkpoint.save(path, dict(step=step), keep=True)
    assert sorted(tmp_path.iterdir()) == [path, checkpoint.older(path)]
    assert checkpoint.load_last(path, refuse()) == (path, dict(step=3))
    with pytest.warns(UserWarning, match="a.pt is of step 3; going on from .*a.pt.older, which is older"):
        assert checkpoint.load_last(path, refuse(3)) == (checkpoint.older(path), dict(step=2))
    with pytest.raises(ValueError, match="a.pt is of step 3; .*a.pt.older is of step 2; delete"):
        checkpoint.load_last(path, refuse(2, 3))


def test_the_older_one_goes_when_the_newer_is_read_back_and_not_before(tmp_path, monkeypatch):
    "A disk that loses a bit; it says so while the old one is still there, and the older."
    path = tmp_path / "a.pt"
    for step in (1, 2):
        checkpoint.save(path, dict(step=step), keep=True)
    write = checkpoint._Summed.write
    def lossy(self, data):
        size = write(self, data)
        if self.tell() > 200:
            self.seek(100)
            io.BufferedWriter.write(self, b"?")
            self.seek(0, os.SEEK_END)
        return size
    monkeypatch.setattr(checkpoint._Summed, "write", lossy)
    with pytest.raises(OSError, match="a.pt: the disk does not give back what was written"):
        checkpoint.save(path, dict(step=3), keep=True)
    assert sorted(tmp_path.iterdir()) == [path, checkpoint.older(path)]
    assert [checkpoint.load(file)["step"] for file in (path, checkpoint.older(path))] == [2, 1]


def test_a_disk_that_is_full_at_any_byte(tmp_path):
    """A limit on the size of files stands for it, here and in `store.save`: an error, what was there stays, and nothing else is there.

    torch.save has words of its own for it where a tensor is larger than a buffer; safetensors has an error of its own.
    In a process of its own, since the limit is one on all that it writes."""
    code = """
import resource, shutil, signal, sys, torch
from pathlib import Path
from ncp_vae.engine import checkpoint, store
from ncp_vae.models.ratios import MLPRatio
place, model = Path(sys.argv[1]), MLPRatio(1, hidden=(8,))
for step in (1, 2):
    checkpoint.save(place / "a.pt", dict(step=step, w=torch.ones(20_000)), keep=True)
size = (place / "a.pt").stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
failed = 0
for limit in [*range(0, 4000, 200), *range(4000, size, 4000)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in (lambda: checkpoint.save(place / "a.pt", dict(step=3, w=torch.ones(20_000)), keep=True), lambda: store.save(model, place / "model")):
        try:
            write()
        except OSError as error:
            failed += error.strerror == "File too large"
            assert sorted(file.name for file in place.iterdir()) == ["a.pt", "a.pt.older"]
    assert [checkpoint.load(place / name)["step"] for name in ("a.pt", "a.pt.older")] == [2, 1]
    shutil.rmtree(place / "model", ignore_errors=True)
print(failed)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.save(place / "a.pt", dict(step=3), keep=True)
print([checkpoint.load(place / name)["step"] for name in ("a.pt", "a.pt.older")])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed, steps = done.stdout.split(maxsplit=1)
    assert int(failed) > 30 and steps == "[3, 2]\n"


def test_a_file_system_without_links_has_a_copy(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError("no links here")
    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        checkpoint.save(tmp_path / "a.pt", dict(step=step), keep=True)
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("a.pt", "a.pt.older")] == [2, 1]
