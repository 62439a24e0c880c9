"""A training in a process of its own: its signals, its errors, and that it goes on."""
import os
import signal
import threading
import time

import pytest
import torch

from ncp_vae.engine.job import describe_job, in_job, run_job
from ncp_vae.engine.train import Recipe, fit_vae
from ncp_vae.models.flat import DenseVAE

HOW = dict(steps=400, batch_size=8, lr=1e-3, seed=0, recipe=Recipe(lr_drops=(0.5,)))
POINTS = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))


def vae():
    torch.manual_seed(0)
    return DenseVAE((2,), 2, hidden=(8,), sigma=0.5)


def terminate_when(file):
    "SIGTERM to this process once a file is there."
    while not file.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_job_that_is_stopped_goes_on_to_the_bit(tmp_path):
    """SIGTERM to the notebook's process ends the job with a checkpoint in the middle. A process of the job, which is this one here, ends
    the training, and the same call as before only loads it."""
    folder, before = tmp_path / "job", signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate_when, args=[folder / "history.jsonl"], daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        in_job(folder, "fit_vae", vae(), POINTS, **HOW)
    assert signal.getsignal(signal.SIGTERM) == before and not (folder / "trained").exists()
    assert 50 <= torch.load(folder / "checkpoint", weights_only=True)["step"] < 400
    run_job(folder)
    (folder / "checkpoint").unlink()
    found = in_job(folder, "fit_vae", vae(), POINTS, **HOW).state_dict()
    whole = fit_vae(vae(), POINTS, **HOW).state_dict()
    assert whole.keys() == found.keys() and all(torch.equal(value.cpu(), found[name]) for name, value in whole.items())


def test_a_job_that_fails_says_why_here(tmp_path):
    "Its data were damaged on the way."
    folder = describe_job(tmp_path / "job", "fit_vae", vae(), POINTS, **HOW)
    (folder / "tensors.pt").write_bytes((folder / "tensors.pt").read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="failed: Damaged: .*tensors.pt is not a whole checkpoint .*; see .*log.txt"):
        in_job(folder, "fit_vae", vae(), POINTS, **HOW)
    assert "Traceback" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("change, error", [(dict(lr=1e-2), ValueError), (dict(beta=2.0), ValueError), (dict(stepps=3), TypeError),
                                           (dict(history="elsewhere"), TypeError)])
def test_a_folder_is_of_one_job(change, error, tmp_path):
    describe_job(tmp_path / "job", "fit_vae", vae(), POINTS, **HOW)
    describe_job(tmp_path / "job", "fit_vae", vae(), POINTS, **HOW)
    with pytest.raises(error):
        describe_job(tmp_path / "job", "fit_vae", vae(), POINTS, **{**HOW, **change})
    with pytest.raises(ValueError, match="another job"):
        describe_job(tmp_path / "job", "fit_vae", vae(), POINTS + 1, **HOW)
    with pytest.raises(ValueError, match="fit_vae or fit_ncp, got 'fit_gan'"):
        describe_job(tmp_path / "new", "fit_gan", vae(), POINTS, **HOW)
