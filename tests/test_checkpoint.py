"""Files that are whole or not there: what is refused, and writing aside and renaming, also of folders. Trainings that are killed: test_train.py."""
import os
import signal
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
    torn, hostile = tmp_path / "torn.pt", tmp_path / "hostile.pt"
    torn.write_bytes(file.read_bytes()[:-20])
    torch.save(Hostile(), hostile)
    for path in (torn, hostile):
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
