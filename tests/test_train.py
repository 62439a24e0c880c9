"""The training loop: exact resumption, kills, and ratios whose truth is known."""
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from ncp_vae.bound import elbo
from ncp_vae.engine import checkpoint
from ncp_vae.engine import loop
from ncp_vae.engine.batches import _index_batches, batches, digest
from ncp_vae.engine.data import Binarized
from ncp_vae.engine.streams import stream
from ncp_vae.engine.loop import MONITORED, Machine, Recipe, fit
from ncp_vae.engine.train import VAELoss, fit_ebm, fit_lars, fit_ncp, fit_snis, fit_vae
from ncp_vae.flows import RealNVP
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.likelihoods import normal
from ncp_vae.models.nvae import NVAE, preset
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.resampling import SIR
from ncp_vae.sampling import JointMALA
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal, from_posterior

KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_train import train
class Data(torch.utils.data.Dataset):
    reads = 0
    def __len__(self): return 64
    def __getitems__(self, rows):
        self.reads += 1
        if self.reads == 8: os.kill(os.getpid(), signal.SIGKILL)
        return torch.linspace(0, 1, 128).view(64, 2)[rows]
train(Data(), {path!r})
"""


def train(data, checkpoint):
    torch.manual_seed(0)
    loss = VAELoss(DenseVAE((2,), 2, hidden=(8,), sigma=0.5), kl_warmup=5)
    fit(loss, data, steps=15, batch_size=16, lr=1e-2, seed=3, name="vae", checkpoint=checkpoint, save_every=0.0)
    return loss.state_dict()


def test_killed_at_once_and_resumed_to_the_bit(tmp_path):
    """SIGKILL leaves no time for anything: the checkpoint on the disk is whole, and the end is the same in every bit."""
    data = torch.linspace(0, 1, 128).view(64, 2)
    whole = train(data, None)
    path = tmp_path / "vae.ckpt"
    script = KILLED.format(tests=str(__import__("pathlib").Path(__file__).parent), path=str(path))
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 7
    resumed = train(data, path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(whole["vae.encoder.0.weight"], train(data.flip(0), None)["vae.encoder.0.weight"])   # it can differ


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_vae(DenseVAE((2,), 2, hidden=(8,), sigma=0.5), torch.rand(64, 2, generator=torch.Generator().manual_seed(0)),
            steps=3, batch_size=8, lr=1e-3, seed=0)
    before = torch.random.get_rng_state()
    torch.manual_seed(5)
    DenseVAE((2,), 2, hidden=(8,), sigma=0.5)        # the construction draws weights; the training draws nothing
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


class Shifted(FlatVAE):
    """q(z | x) = N(shift, 1) for every x, so that log q(z) / p(z) = shift z - shift^2 / 2 exactly."""
    def __init__(self, shift):
        super().__init__(1)
        self.shift = nn.Parameter(torch.tensor(shift))

    def posterior(self, x):
        loc = self.shift.expand(len(x), 1)
        return diagonal_normal(loc, torch.ones_like(loc))

    def likelihood(self, z):
        return normal(z, 1.0)


def test_the_ratio_is_found_where_it_is_known():
    """Correlation above 0.98 and an error below 0.15 nats (the largest of ten seeds was 0.08) on the bulk of both laws;
    a ratio that was trained with the labels swapped, the broken twin, fails both."""
    torch.manual_seed(0)
    ncp = fit_ncp(Shifted(1.0), torch.zeros(512, 1), ratios=[MLPRatio(1, hidden=(32, 32))], steps=500, batch_size=512,
                  lr=5e-3, seed=0)
    z = torch.linspace(-1.5, 2.5, 100)[:, None]
    exact = z[:, 0] - 0.5
    def close(log_r):
        log_r = log_r.detach()
        return torch.corrcoef(torch.stack([log_r, exact]))[0, 1] > 0.98 and (log_r - exact).abs().mean() < 0.15
    assert close(ncp.log_ratio([z]))
    assert not close(-ncp.log_ratio([z]))
    estimate = ncp.log_partition(20_000, torch.Generator().manual_seed(0))
    assert abs(estimate.value) < 0.1                 # E_p[r] = 1 up to what training left
    assert ncp.vae.shift.grad is None                # the VAE is frozen


def test_batches_of_an_epoch_cover_it_once_in_every_process():
    world = [_index_batches(24, 8, seed=1, rank=rank, world=2) for rank in range(2)]
    epoch = [i for _ in range(3) for stream in world for i in next(stream)]
    assert sorted(epoch) == list(range(24))


@pytest.mark.parametrize("change, words", [(dict(steps=0), "steps"), (dict(lr=-1.0), "lr"), (dict(batch_size=0), "batch_size"),
                                           (dict(batch_size=99), "batch_size 99.*64 images")])
def test_bad_settings_are_named(change, words):
    settings = {**dict(steps=1, batch_size=8, lr=1e-3, seed=0), **change}
    with pytest.raises(ValueError, match=words):
        fit_vae(DenseVAE((2,), 2, hidden=(8,), sigma=0.5), torch.rand(64, 2), **settings)


def test_a_batch_is_that_of_all_processes():
    "Two processes with batch_size 8 take 4 images each, and together those of one process."
    alone = next(_index_batches(24, 8, seed=1))
    shares = [next(_index_batches(24, 8, seed=1, rank=rank, world=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4] and sum(shares, []) == alone
    with pytest.raises(ValueError, match="batch_size 9 must be a multiple of the 2 processes"):
        next(_index_batches(24, 9, seed=1, world=2))


def test_nothing_is_overwritten_by_a_nan(tmp_path):
    """A NaN in the middle of the data ends the training, and the checkpoint of the steps before it is finite."""
    data = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    data[40] = float("nan")
    path = tmp_path / "vae.ckpt"
    with pytest.raises(ValueError, match="NaN"):
        for seed in range(20):                       # some seed reads row 40 after its first batch
            path.unlink(missing_ok=True)
            fit_vae(DenseVAE((2,), 2, hidden=(8,), sigma=0.5), data, steps=8, batch_size=8, lr=1e-3, seed=seed, checkpoint=path)
    if path.exists():
        assert all(torch.isfinite(v).all() for v in torch.load(path, weights_only=True)["loss"].values())


class Squares(nn.Module):
    "A loss without random numbers or batch norm."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x, step):
        return dict(loss=((x @ self.w - x.sum(1)) ** 2).mean())


def test_the_gradients_of_a_batch_in_parts_add_up_to_the_batchs(tmp_path):
    "Ten rows in three parts of four, three and three: float32 sums in another order, 1e-5 after twenty steps."
    x, found, logged = torch.randn(40, 3), [], []
    for parts in (1, 3):
        loss, history = Squares(), tmp_path / f"{parts}.jsonl"
        fit(loss, x, steps=20, batch_size=10, lr=0.1, seed=0, name="squares", machine=Machine(parts=parts), history=history, log_every=10)
        found.append(loss.w.detach().cpu())
        logged.append([json.loads(line)["loss"] for line in history.read_text().splitlines()])
    assert torch.allclose(*found, atol=1e-5) and logged[0] == pytest.approx(logged[1], abs=1e-4)
    with pytest.raises(ValueError, match="parts must be a whole number of at least 1, got 0"):
        Machine(parts=0)


class Spoilt(nn.Module):
    """A loss with batch norm. From `step` on, what is `bad` is not finite: the batch (and so the running means), or the gradient
    of a loss that is zero (that of a square root at 0, times 0)."""
    def __init__(self, bad, step):
        super().__init__()
        self.norm, self.w = nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))
        self.bad, self.at = bad, step

    def forward(self, x, step):
        bad = self.bad if step >= self.at else ""
        y = self.norm(x * float("nan") if bad == "batch" else x) * self.w
        return dict(loss=(self.w * 0).sqrt().sum() if bad == "gradient" else (y - x).square().mean())


@pytest.mark.parametrize("bad", ["batch", "gradient"])
@pytest.mark.parametrize("at", [3, 5])
def test_only_finite_steps_are_taken_and_kept(bad, at, tmp_path):
    "Also in the last of six steps; the checkpoint is finite, and a training that is sound goes on from it."
    x, path = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)), tmp_path / "a.ckpt"
    few = dict(steps=6, batch_size=8, lr=1e-2, seed=0, name="spoilt", checkpoint=path, save_every=0.0)
    loss = Spoilt(bad, at)
    with pytest.raises(FloatingPointError, match=f"at step {at} of 6.*begin anew with a lower lr than 0.01"):
        fit(loss, x, **few)
    assert torch.isfinite(loss.w).all()
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == at and all(torch.isfinite(value).all() for value in saved["loss"].values())
    sound, whole = Spoilt("", 0), Spoilt("", 0)
    fit(sound, x, **few)
    fit(whole, x, **{**few, "checkpoint": None})
    assert all(torch.equal(a, b) for a, b in zip(sound.state_dict().values(), whole.state_dict().values()))


class Far(nn.Module):
    "Loss 0 and gradient -1 at a weight near the largest float32: a step of 1e37 overflows."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.4e38))

    def forward(self, x, step):
        return dict(loss=3.4e38 - self.w)


def test_weights_that_are_not_finite_are_neither_kept_nor_returned(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(FloatingPointError, match="after step 1 of 1 w is not finite; begin anew with a lower lr than 1e\\+37"):
        fit(Far(), torch.rand(32, 3), steps=1, batch_size=8, lr=1e37, seed=0, name="far", checkpoint=path)
    assert not path.exists()


FEW = dict(steps=4, batch_size=8, lr=1e-3, seed=0)


def test_a_training_goes_on_with_another_machine_but_not_with_another_recipe(tmp_path):
    def train(steps, **how):
        return fit(Squares(), x, **{**FEW, "steps": 8}, name="squares", checkpoint=path, **how)
    class Stop(Exception):
        pass
    def stop():
        raise Stop
    x, path = torch.rand(32, 3), tmp_path / "a.ckpt"
    with pytest.raises(Stop):
        train(8, monitor=stop)
    train(8, machine=Machine(parts=4, channels_last=True))
    assert torch.load(path, weights_only=True)["step"] == 8
    with pytest.raises(ValueError, match="of another training: recipe"):
        train(8, recipe=Recipe(weight_decay=0.1))


def test_ratios_of_another_vae_data_or_base_are_not_taken_up(tmp_path):
    "Same shapes, same settings: only the values differ."
    x, path = torch.rand(32, 1, generator=torch.Generator().manual_seed(0)), tmp_path / "ncp.ckpt"
    def small():
        torch.manual_seed(0)
        return [MLPRatio(1, hidden=(4,))]
    one, other = Shifted(1.0), Shifted(1.1)
    ncp = fit_ncp(one, x, ratios=small(), checkpoint=path, **FEW)
    assert torch.equal(fit_ncp(one, x, ratios=small(), checkpoint=path, **FEW).log_ratio([x]), ncp.log_ratio([x]))
    with pytest.raises(ValueError, match="frozen is .* there and .* here"):
        fit_ncp(other, x, ratios=small(), checkpoint=path, **FEW)
    moved = x.clone()
    moved[17] += 0.5
    for data in (moved, torch.utils.data.TensorDataset(moved), x[:31]):
        with pytest.raises(ValueError, match="data is .* there and .* here"):
            fit_ncp(one, data, ratios=small(), checkpoint=path, **FEW)
    path = tmp_path / "ncp-2.ckpt"
    fit_ncp(one, x, ratios=small(), base=ncp, sampler=SIR(4), checkpoint=path, **FEW)
    with pytest.raises(ValueError, match="sampler is .* there and .* here"):
        fit_ncp(one, x, ratios=small(), base=ncp, sampler=SIR(8), checkpoint=path, **FEW)
    with torch.no_grad():
        next(ncp.ratios.parameters()).add_(1)
    with pytest.raises(ValueError, match="base is .* there and .* here"):
        fit_ncp(one, x, ratios=small(), base=ncp, sampler=SIR(4), checkpoint=path, **FEW)


SQUARES = torch.rand(32, 3, generator=torch.Generator().manual_seed(0))


def squares(path, **more):
    "Six steps, a checkpoint after each; the weights at the end."
    loss = Squares()
    fit(loss, SQUARES, **{**FEW, "steps": 6}, name="squares", checkpoint=path, save_every=0.0, log_every=1, **more)
    return loss.w.detach().cpu()


def test_where_a_byte_of_the_checkpoint_flips_the_older_one_is_taken(tmp_path):
    "In the weights, in their names, at the end; the training ends in the same bits, and its history has no gap and no step twice."
    path, history = tmp_path / "a.ckpt", tmp_path / "history.jsonl"
    whole = squares(path, history=history)
    content, before = path.read_bytes(), checkpoint.older(path).read_bytes()
    for at in (content.index(whole.numpy().tobytes()), content.index(b"settings"), len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        with pytest.warns(UserWarning, match="a.ckpt is not a whole checkpoint.*going on from .*a.ckpt.older"):
            assert torch.equal(squares(path, history=history), whole)
        assert [row["step"] for row in rows_of(history, "squares")] == [1, 2, 3, 4, 5, 6]
        assert checkpoint.load(path)["step"] == 6 and checkpoint.older(path).read_bytes() == before     # not the damaged one


def spoil(saved, what, value):
    "A checkpoint's state with something else in it; its sum will be right."
    *inside, last = what.split(".")
    part = saved
    for name in inside:
        part = part[int(name) if name.isdigit() else name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return saved


@pytest.mark.parametrize("what, value", [
    ("step", -5), ("step", 0), ("step", 10**9), ("step", 2.0), ("step", None), ("settings", None), ("settings", 3), ("best", {}),
    ("best.step", 7), ("best.loss", float("nan")), ("best.loss", "low"), ("best.step", 2), ("loss", []), ("loss.w", torch.zeros(2)),
    ("loss.w", torch.full((3,), float("nan"))), ("loss.w", torch.zeros(3, dtype=torch.float64)), ("loss.v", torch.zeros(3)),
    ("moments", {}), ("moments", None), ("moments.0.exp_avg", torch.zeros(4)), ("moments", {9: dict(step=torch.zeros(()))})])
def test_wrong_content_under_a_right_sum_is_refused_before_anything_changes(what, value, tmp_path):
    "By name; and where there is an older file, that one is taken."
    path = tmp_path / "a.ckpt"
    whole = squares(path)
    checkpoint.save(path, spoil(checkpoint.load(path), what, value))
    with pytest.warns(UserWarning, match="a.ckpt (holds no state|is no checkpoint).*going on from .*a.ckpt.older"):
        assert torch.equal(squares(path), whole)
    checkpoint.save(path, spoil(checkpoint.load(path), what, value))
    checkpoint.older(path).unlink()
    loss = Squares()
    with pytest.raises(ValueError, match="a.ckpt (holds no state|is no checkpoint)"):
        fit(loss, SQUARES, **{**FEW, "steps": 6}, name="squares", checkpoint=path)
    assert not loss.w.any()


def test_saves_take_at_most_a_fortieth_of_the_time(tmp_path, monkeypatch):
    "Steps of a second and saves of two, by a clock of its own: after three seconds the first, then every eighty."
    now, saved = [0.0], []
    def took(seconds, note=()):
        now[0] += seconds
        saved.extend(note)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "_keep", lambda training: took(2.0, [training.step]))
    class Slow(Squares):
        def forward(self, x, step):
            took(1.0)
            return super().forward(x, step)
    for every, expected in ((3.0, [4, 85, 166, 200]), (90.0, [91, 182, 200]), (0.0, [*range(1, 201), 200])):
        saved.clear()
        fit(Slow(), SQUARES, **{**FEW, "steps": 200}, name="slow", checkpoint=tmp_path / "a.ckpt", save_every=every)
        assert saved == expected


def killed_at(calls, path, history):
    "Train in a process of its own, which is killed at this call of those that put a file in its place; how it ended."
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = calls
    def watched(call):
        def watch(*arguments, **more):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)
        return watch
    try:
        for name in ("fsync", "link", "replace"):
            setattr(os, name, watched(getattr(os, name)))
        squares(path, history=history)
    finally:
        os._exit(0)


def test_killed_inside_a_save_and_resumed_to_the_bit(tmp_path):
    "Before each file is synced, linked and renamed; five such calls a save, and what was the last or the one before it goes on."
    whole, endings = squares(None), []
    for calls in (1, 2, *range(3, 13), 27, 99):
        path, history = tmp_path / f"{calls}.ckpt", tmp_path / f"{calls}.jsonl"
        endings.append(killed_at(calls, path, history))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(squares(path, history=history), whole)
        assert [row["step"] for row in rows_of(history, "squares")] == [1, 2, 3, 4, 5, 6]
        assert {file.name for file in tmp_path.glob(f"{calls}.ckpt*")} == {path.name, checkpoint.older(path).name}
    assert endings == [signal.SIGKILL] * 13 + [0]


class Rows(nn.Module):
    "Remembers how many rows each call had."
    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, x, step):
        self.seen.append(len(x))
        return dict(loss=(x * self.w).mean())


def test_parts_are_of_nearly_one_size():
    "Seven rows in three parts: none is of a single row, which batch norm refuses."
    loss = Rows()
    fit(loss, torch.rand(14, 1), steps=1, batch_size=7, lr=1e-3, seed=0, name="rows", machine=Machine(parts=3))
    assert loss.seen == [3, 2, 2]
    with pytest.raises(ValueError, match="parts 8 must be at most the batch of 7"):
        fit(loss, torch.rand(14, 1), steps=1, batch_size=7, lr=1e-3, seed=0, name="rows", machine=Machine(parts=8))


def test_eight_images_are_tried_before_the_first_step(monkeypatch):
    vae, seen = DenseVAE((2,), 2, hidden=(8,), sigma=0.5), []
    encode = DenseVAE.encode
    monkeypatch.setattr(DenseVAE, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    fit_vae(vae, torch.rand(64, 2), steps=1, batch_size=32, lr=1e-3, seed=0)
    assert max(seen[:-1]) == 8 and seen[-1] == 32


@pytest.mark.parametrize("train", [fit_vae, fit_ncp, partial(fit_ebm, sampler=JointMALA(1, 0.1)), partial(fit_snis, proposals=2),
                                   partial(fit_lars, proposals=2)])
def test_every_training_can_be_kept_as_often_as_wanted(train, monkeypatch, tmp_path):
    "Each of four steps at 0 seconds, by default the last; a number that is none is refused."
    saved, x = [], torch.rand(32, 1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(checkpoint, "save", lambda path, state, keep: saved.append(state["step"]))
    train(Shifted(1.0), x, **FEW, checkpoint=tmp_path / "a.ckpt", save_every=0.0)
    assert saved == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="save_every must be at least 0 seconds, got nan"):
        train(Shifted(1.0), x, **FEW, checkpoint=tmp_path / "a.ckpt", save_every=float("nan"))


def test_no_line_of_history_comes_twice_after_a_kill(tmp_path):
    "The lines after the checkpoint's step, written before a kill, come again: they are taken out. Other trainings' lines stay."
    path, history = tmp_path / "a.ckpt", tmp_path / "history.jsonl"
    class Killed(torch.utils.data.Dataset):
        reads = 0
        def __len__(self):
            return 32
        def __getitems__(self, rows):
            self.reads += 1
            if self.reads == 6:
                (tmp_path / "kept").write_bytes(path.read_bytes())
            if self.reads == 10:
                raise KeyboardInterrupt
            return torch.ones(len(rows), 3)
    settings = dict(steps=12, batch_size=8, lr=1e-3, seed=0, name="squares", checkpoint=path, history=history, log_every=1, save_every=0.0)
    history.write_text(json.dumps(dict(stage="vae", step=99)) + "\n")
    with pytest.raises(KeyboardInterrupt):
        fit(Squares(), Killed(), **settings)
    with open(history, "ab") as file:
        file.write(b'\xff\n5\n{"stage": "squares"}\n[]\n{"stage": "squ')   # what a disk made of lines, and one that was being written
    path.write_bytes((tmp_path / "kept").read_bytes())       # what a kill between two checkpoints leaves: step 5, nine lines
    fit(Squares(), torch.ones(32, 3), **settings)
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["step"] for row in rows] == [99, *range(1, 13)]


# ---- the best step ---------------------------------------------------------------------------------------------------

class Stops:
    "A tensor as a data set, of which the read number `last` is interrupted; one read is for a fingerprint of the data."
    def __init__(self, x, last=None):
        self.x, self.last, self.reads = x, last, 0

    def __len__(self):
        return len(self.x)

    def __getitems__(self, rows):
        self.reads += 1
        if self.reads == self.last:
            raise KeyboardInterrupt
        return self.x[rows]


def rows_of(history, stage):
    return [row for line in history.read_text().splitlines() if (row := json.loads(line))["stage"] == stage]


def test_the_state_of_the_lowest_held_out_loss_is_returned(tmp_path):
    "w goes from 0 to 1; the monitor likes 0.5, then something worse, then NaN, which is never best; from the 30th step on it counts."
    x, states = torch.rand(32, 3, generator=torch.Generator().manual_seed(0)), []
    def train(how, **more):
        loss = Squares()
        def monitor():
            states.append(loss.w.detach().clone())
            return how((loss.w.mean() - 0.5).abs().item())
        fit(loss, x, steps=60, batch_size=8, lr=0.05, seed=0, name="squares", monitor=monitor, history=tmp_path / "history.jsonl", **more)
        return loss.w.detach(), rows_of(tmp_path / "history.jsonl", "squares held-out")
    w, rows = train(lambda far: dict(loss=far))
    best = min(range(MONITORED), key=lambda i: rows[i]["loss"])
    assert len(rows) == MONITORED and 0 < best < MONITORED - 1
    assert torch.equal(w, states[best]) and rows[-1]["best_step"] == rows[best]["step"] == 3 * (best + 1)
    states.clear()
    w, rows = train(lambda far: dict(loss=far), best_from=30)
    assert torch.equal(w, states[9]) and rows[-1]["best_step"] == 30 and rows[8]["best_step"] == 0
    for silent in (lambda far: dict(loss=float("nan")), lambda far: dict(other=far)):
        states.clear()
        w, rows = train(silent)
        assert torch.equal(w, states[-1]) and rows[-1]["best_step"] == 0


@pytest.mark.parametrize("look", [3, 12, 20])
def test_a_look_that_was_interrupted_comes_again(look, tmp_path):
    "Before the best step, after it, and in the last look: the end is that of a training that nobody disturbed, history included."
    x, path, history = torch.rand(32, 3, generator=torch.Generator().manual_seed(0)), tmp_path / "a.ckpt", tmp_path / "history.jsonl"
    def train(stop=None, **files):
        loss, looks = Squares(), []
        def monitor():
            looks.append(1)
            if len(looks) == stop:
                raise KeyboardInterrupt
            return dict(loss=(loss.w.mean() - 0.5).abs().item())
        fit(loss, x, steps=40, batch_size=8, lr=0.05, seed=0, name="squares", monitor=monitor, log_every=1, **files)
        return loss.w.detach()
    whole = train(history=tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        train(look, checkpoint=path, history=history)
    assert torch.equal(train(checkpoint=path, history=history), whole)
    assert torch.equal(train(checkpoint=path, history=history), whole)            # finished: its best state is in the file
    told = [[{**row, "seconds": 0} for row in map(json.loads, file.read_text().splitlines())] for file in (history, tmp_path / "whole.jsonl")]
    assert told[0] == told[1] and whole.mean() < 0.6 < 0.8 < torch.load(path, weights_only=True)["loss"]["w"].mean()


class Spread(FlatVAE):
    "q(z | x) = N(x + b, 0.1^2), on the line and one number a pixel, p(x | z) = N(z, 0.5^2): b = -mean(x) / 5 is best."
    def __init__(self, pixels=2):
        super().__init__(pixels)
        self.b = nn.Parameter(torch.zeros(()))

    def posterior(self, x):
        return diagonal_normal(x + self.b, torch.full_like(x, 0.1))

    def likelihood(self, z):
        return normal(z, 0.5)


def points(n, seed):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


BY_HEART = dict(steps=300, batch_size=16, lr=1e-2, seed=0)


def memoriser():
    torch.manual_seed(1)
    return [MLPRatio(2, hidden=(64, 64))]


@pytest.mark.filterwarnings("ignore:fit_ncp")
def test_ratios_of_the_best_step_also_after_an_interruption(tmp_path):
    "Sixteen images are learned by heart; the lowest held-out loss comes early, and a training interrupted before or after it finds it."
    vae, held_out, history = Spread(), points(200, 1), tmp_path / "history.jsonl"
    def train(data, **files):
        return fit_ncp(vae, data, ratios=memoriser(), held_out=held_out, **BY_HEART, **files)
    whole = train(points(16, 0), history=history)
    rows = rows_of(history, "ncp held-out")
    best = min(rows, key=lambda row: row["loss"])
    assert rows[-1]["best_step"] == best["step"] < 100 and rows[-1]["loss"] > best["loss"] + 0.3
    for last in (best["step"] - 5, best["step"] + 20, 290):
        path = tmp_path / f"{last}.ckpt"
        with pytest.raises(KeyboardInterrupt):
            train(Stops(points(16, 0), last), checkpoint=path)
        resumed = train(points(16, 0), checkpoint=path)
        finished = train(Stops(points(16, 0), 20), checkpoint=path)         # reads 14: its fingerprint, and for the comparison
        for other in (resumed, finished):
            assert all(torch.equal(a, b) for a, b in zip(whole.ratios.state_dict().values(), other.ratios.state_dict().values()))
    with pytest.raises(ValueError, match="held_out is .* there and .* here"):
        fit_ncp(vae, points(16, 0), ratios=memoriser(), held_out=points(200, 2), checkpoint=path, **BY_HEART)


def test_a_vae_of_the_best_held_out_elbo(tmp_path):
    "The training images' mean is 2, so b goes to -0.4, past -0.12, the best one for others of mean 0.6; in the warm-up nothing is chosen."
    history = tmp_path / "history.jsonl"
    seen, others = 2 + points(64, 0), 0.6 + points(64, 1)
    def train(images=others, **how):
        history.unlink(missing_ok=True)
        vae = fit_vae(Spread(), seen, held_out=images, history=history, **{**dict(steps=100, batch_size=64, lr=1e-2, seed=0), **how})
        return vae, rows_of(history, "vae held-out") if images is not None else []
    vae, rows = train()
    best = max(rows, key=lambda row: row["elbo"])
    assert len(rows) == MONITORED and rows[-1]["best_step"] == best["step"] and best["loss"] == -best["elbo"]
    again = elbo(vae, others, torch.Generator().manual_seed(stream(0, "held-out"))).elbo
    assert again.mean().item() == pytest.approx(best["elbo"], abs=1e-4)
    assert best["elbo_std_error"] == pytest.approx(again.std().item() / 8, rel=1e-4)
    assert 5 <= best["step"] <= 30 and rows[-1]["elbo"] < best["elbo"] - 0.1 and -0.2 < vae.b < -0.05
    assert train(None)[0].b < -0.35
    _, rows = train(kl_warmup=60)
    assert [row["best_step"] for row in rows] == 11 * [0] + 9 * [60]


# ---- learned by heart ------------------------------------------------------------------------------------------------

def test_a_loss_far_above_that_of_the_training_is_a_warning():
    "Sixteen images for a ratio of 4,000 weights; and four thousand, with which nothing is wrong, in a first and in a second stage."
    vae, held_out = Spread(), points(400, 1)
    with pytest.warns(UserWarning, match=r"fit_ncp: the loss is 1\.3\d+ on training images and 1\.4\d+ on held-out ones: 100% of what"):
        fit_ncp(vae, points(16, 0), ratios=memoriser(), held_out=points(400, 1), **{**BY_HEART, "steps": 20, "lr": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ncp = fit_ncp(vae, points(4000, 0), ratios=memoriser(), held_out=held_out, **BY_HEART)
        fit_ncp(vae, points(4000, 0), ratios=memoriser(), held_out=held_out, base=ncp, sampler=SIR(8), **BY_HEART)
        fit_ncp(vae, points(16, 0), ratios=memoriser(), **BY_HEART)              # nothing is known of it


# ---- the default ratio ------------------------------------------------------------------------------------------------

def test_the_default_ratio_follows_the_number_of_images():
    "Where that is known; a caller's own ratio is taken as it is."
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(2)
    def trained(data, **how):
        ncp = fit_ncp(Spread(), data, **{**FEW, "steps": 1}, **how)
        return sum(weight.numel() for weight in ncp.ratios.parameters())
    few, many = points(1999, 0), points(2000, 0)
    assert trained(few) == trained(torch.utils.data.DataLoader(few, 8)) == 3 * 128 + 129 * 128 + 129
    assert trained(many) == trained(torch.utils.data.DataLoader(Endless(), 8)) == 3 * 256 + 2 * 257 * 256 + 257
    assert trained(few, ratios=memoriser()) == 3 * 64 + 65 * 64 + 65


# ---- clipping --------------------------------------------------------------------------------------------------------

def test_a_gradient_is_no_longer_than_asked(monkeypatch):
    "By hand for one step, also in parts; a shorter one is left as it is, to the bit, and 0 is no clipping."
    seen = []
    class Looks(torch.optim.Adam):
        def step(self, *args):
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(*args)
    monkeypatch.setattr(torch.optim, "Adam", Looks)
    x = 10 * torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    for clip, parts in ((0.0, 1), (0.5, 1), (0.5, 2), (1e6, 1)):
        fit(Squares(), x, steps=1, batch_size=8, lr=1e-3, seed=0, name="squares", recipe=Recipe(clip=clip), machine=Machine(parts=parts))
    free, clipped, in_parts, long = seen
    assert free.norm() > 100 and torch.equal(free, long)
    assert torch.allclose(clipped, free / free.norm() / 2, rtol=1e-5) and torch.allclose(in_parts, clipped, rtol=1e-4)
    with pytest.raises(ValueError, match="clip must be finite and at least 0"):
        Recipe(clip=-1.0)


# ---- random numbers -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [-1, 0.5, "0"])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(ValueError, match=f"a seed must be a whole number of at least 0, got {seed!r}"):
        fit(Squares(), torch.rand(32, 3), **{**FEW, "seed": seed}, name="squares")


def test_a_seed_of_any_size_will_do():
    "Also one above 2^64, which torch does not take; and it is not the seed of its lowest bits."
    found = []
    for seed in (5, 2**32 + 5, 2**80 + 5):
        loss = Squares()
        fit(loss, torch.rand(32, 3, generator=torch.Generator().manual_seed(0)), **{**FEW, "seed": seed}, name="squares")
        found.append(loss.w.detach().clone())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_streams_do_not_meet():
    "The sums that stood here before had a training's eighth process and an evaluation on the same seeds."
    uses = [("step", at, rank) for at in range(100) for rank in range(9)] + [("epoch", e) for e in range(100)]
    uses += [("likelihoods", part) for part in range(100)] + [(i,) for i in range(100)] + [(str(i),) for i in range(100)]
    seeds = {stream(seed, *use) for seed in (0, 1, 2**40) for use in uses}
    assert len(seeds) == 3 * len(uses) and all(0 <= seed < 2**63 for seed in seeds)
    assert stream(1, "step", 2) == stream(1, "step", 2) == 2738419977555684275
    with pytest.raises(ValueError, match="keys of a stream must be whole numbers and strings, got 0.5"):
        stream(0, "step", 0.5)


def test_a_step_seeds_no_device_but_its_own(monkeypatch):
    "torch.manual_seed would seed all of them, and write down a trace of its caller for each call where CUDA was not started."
    def refuse(seed):
        raise AssertionError("all devices were seeded")
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.random, "manual_seed", refuse)
    vae = fit_vae(Shifted(1.0), torch.rand(32, 1), **FEW)
    fit_ncp(vae, torch.rand(32, 1), **FEW)


@pytest.mark.parametrize("variable, inside", [(None, 1), ("3", 2)])
def test_one_thread_unless_the_environment_says_more(variable, inside, monkeypatch):
    seen, before = [], torch.get_num_threads()
    class Looks(Squares):
        def forward(self, x, step):
            seen.append(torch.get_num_threads())
            return super().forward(x, step)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    try:
        fit(Looks(), torch.rand(32, 3), **FEW, name="squares")
        assert set(seen) == {inside} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- batches --------------------------------------------------------------------------------------------------------

def test_a_batch_is_read_at_once():
    "By one call where the data can; the labels are left behind, and the rows are the same in every way."
    calls, x = [], torch.rand(32, 3)
    class Counted(Binarized):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)
    class Whole(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)
        def __getitems__(self, indices):
            return x[indices]
    assert next(batches(Counted(x.round()), 8, seed=0)).shape == (8, 3) and [len(index) for index in calls] == [8]
    labelled = torch.utils.data.TensorDataset(x, torch.arange(32))
    found = [next(batches(data, 8, seed=0)) for data in (x, Whole(), labelled, torch.utils.data.Subset(labelled, range(32)))]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_infinite_values_are_found_and_large_ones_are_not_taken_for_them():
    "Infinities of both signs, whose sum is NaN; and finite values whose sum is infinite."
    x = torch.full((4, 3), 3e38)
    assert torch.equal(next(batches(x, 4, seed=0)), x)
    x[2, 0], x[3, 0] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(batches(x, 4, seed=0))


# ---- files ----------------------------------------------------------------------------------------------------------

def test_two_writers_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    "While one process writes, another saves the same file: neither sees half of the other's."
    path, torch_save = tmp_path / "a.pt", torch.save
    def slow(state, file):
        monkeypatch.setattr(torch, "save", torch_save)
        torch_save(state, whole := io.BytesIO())
        file.write(whole.getvalue()[:400])
        checkpoint.save(path, {"step": 2})
        assert checkpoint.load(path)["step"] == 2
        file.write(whole.getvalue()[400:])
    monkeypatch.setattr(torch, "save", slow)
    checkpoint.save(path, {"step": 1})
    assert checkpoint.load(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path / "a.pt", {"step": 1})
    def full(state, file):
        file.write(b"half")
        raise OSError("no space left")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_cleared_away_and_a_living_ones_is_not(tmp_path):
    script = ("import os, signal, sys, torch\nfrom ncp_vae.engine import checkpoint\n"
              "torch.save = lambda state, file: os.kill(os.getpid(), signal.SIGKILL)\ncheckpoint.save(sys.argv[1], {})")
    path, living = tmp_path / "a.pt", tmp_path / f"a.pt.{os.getppid()}.01234567.part"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    living.touch()
    checkpoint.save(path, {})
    assert set(tmp_path.iterdir()) == {path, living}


# ---- what a model brings along --------------------------------------------------------------------------------------

class Shares(DenseVAE):
    "Weighs its one KL by two while the warm-up lasts, and is its own price."
    def kl_weights(self, kl):
        assert kl.shape == (8, 1)
        return torch.tensor([2.0])

    def regularisation(self):
        return self.encoder[0].weight.square().sum()


@pytest.mark.parametrize("wrap", [lambda vae: vae, lambda vae: WithPriors(vae, [None]),
                                  lambda vae: WithPriors(WithPriors(vae, [None]), [None])])
def test_the_loop_asks_the_model_for_its_weights(wrap):
    "A model of one's own, also inside other priors."
    vae, x = Shares((2,), 2, hidden=(4,), sigma=0.5), torch.rand(8, 2)
    def loss(step, **how):
        torch.manual_seed(0)
        return VAELoss(wrap(vae), kl_warmup=10, **how)(x, step)["loss"].item()
    kl = loss(10) - loss(0)
    assert loss(5, kl_balance=True) - loss(5) == pytest.approx(kl / 2, rel=1e-4)
    assert loss(10, kl_balance=True) == loss(10)
    assert loss(0, spectral=0.1) - loss(0) == pytest.approx(0.1 * vae.regularisation().item(), rel=1e-4)


def test_beta_weighs_the_kl_in_training_and_in_the_choice(tmp_path):
    "Twice the KL in the loss; the held-out loss that chooses the step is the one that is minimised, the ELBO beside it is the bound."
    vae, x = Shares((2,), 2, hidden=(4,), sigma=0.5), torch.rand(64, 2)
    def loss(step, beta):
        torch.manual_seed(0)
        return VAELoss(vae, kl_warmup=10, beta=beta)(x, step)["loss"].item()
    kl = loss(10, 1.0) - loss(0, 1.0)
    assert loss(10, 2.0) - loss(10, 1.0) == pytest.approx(kl, rel=1e-4)
    history = tmp_path / "history.jsonl"
    fit_vae(vae, x, held_out=x, beta=3.0, steps=20, batch_size=64, lr=1e-4, seed=0, history=history)
    row = rows_of(history, "vae held-out")[-1]
    bound = elbo(vae, x, torch.Generator().manual_seed(stream(0, "held-out")))
    assert row["elbo"] == pytest.approx(bound.elbo.mean().item(), abs=1e-3)
    assert row["loss"] == pytest.approx((2 * bound.kl.sum(-1) - bound.elbo).mean().item(), abs=1e-3)
    with pytest.raises(ValueError, match=r"beta, spectral, spectral_start, moments must be finite and at least 0, got \[0, -1"):
        fit_vae(vae, x, beta=-1, steps=1, batch_size=64, lr=1e-4, seed=0)


class Balanced(DenseHierarchy):
    "Shares the KL out by its size, and counts how often its price is asked for."
    asked = 0

    def kl_weights(self, kl):
        return kl.detach().mean(0) / kl.detach().mean()

    def regularisation(self):
        Balanced.asked += 1
        return sum(weight.square().sum() for weight in self.parameters())


def test_parts_share_the_kl_out_as_the_whole_batch_does():
    """The loss of a batch in three parts is that of the whole with the same draws, of which each part's own shares would miss 2 %.
    The look at all parts leaves no trace in the random numbers. The price counts once."""
    vae, x = Balanced((1, 2, 2), groups=2, latent_dim=3, hidden=8, width=8), torch.rand(10, 1, 2, 2).bernoulli()
    with torch.no_grad():
        for weight in vae.parameters():
            weight *= 1.5
    loss, parts = VAELoss(vae, 10, kl_balance=True, spectral=0.1), x.tensor_split(3)
    torch.manual_seed(1)
    given = loss.prepare(parts, 5)
    in_parts = sum(loss(part, 5, *more)["loss"] * len(part) / 10 for part, more in zip(parts, given))
    torch.manual_seed(1)
    bounds = [elbo(vae.train(), part) for part in parts]
    kl, reconstruction = (torch.cat(each) for each in zip(*((bound.kl, bound.reconstruction) for bound in bounds)))
    def whole(shares):
        return 0.5 * (shares * kl.mean(0)).sum() - reconstruction.mean() + 0.1 * vae.regularisation()
    assert in_parts.item() == pytest.approx(whole(vae.kl_weights(kl)).item(), rel=1e-5)
    each = sum(0.5 * (vae.kl_weights(b.kl) * b.kl.mean(0)).sum() * len(b.kl) / 10 for b in bounds)
    assert abs(each - 0.5 * (vae.kl_weights(kl) * kl.mean(0)).sum()) > 1e-3 * each
    before = Balanced.asked
    fit_vae(vae, x, steps=2, batch_size=10, lr=1e-3, seed=0, kl_warmup=9, kl_balance=True, spectral=0.1, machine=Machine(parts=3))
    assert Balanced.asked == before + 2


def test_a_look_at_the_whole_batch_leaves_batch_norms_as_they_were():
    loss = VAELoss(NVAE(preset("digits").config), 10, kl_balance=True)
    x, before = torch.rand(6, 1, 8, 8).bernoulli(), {name: value.clone() for name, value in loss.state_dict().items()}
    (shares, _), _ = loss.prepare(x.tensor_split(2), 3)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert shares.shape == (2,) and shares.mean().item() == pytest.approx(1, rel=1e-5)
    loss(x, 3)
    assert not all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert loss.prepare([x], 3) == loss.prepare([x], 30) == [(None, 1.0)]               # one part, or no warm-up: nothing to look at


def test_the_price_on_the_weights_falls_in_a_line_of_its_logarithm():
    vae, x = Shares((2,), 2, hidden=(4,), sigma=0.5), torch.rand(8, 2)
    def price(step, **how):
        torch.manual_seed(0)
        free = VAELoss(vae, kl_warmup=10)(x, step)["loss"]
        torch.manual_seed(0)
        return ((VAELoss(vae, kl_warmup=10, **how)(x, step)["loss"] - free) / vae.regularisation()).item()
    assert [price(step, spectral=0.1, spectral_start=10.0) for step in (0, 5, 10)] == pytest.approx([10, 1, 0.1], rel=1e-3)
    assert [price(step, spectral=0.1) for step in (0, 5, 10)] == pytest.approx([0.1] * 3, rel=1e-3)


def test_the_price_on_the_moments_is_that_of_the_latents_of_the_batch():
    "Its twin without the square of the mean, or with the deviation for the variance, is off by more than a hundredth."
    vae, x = DenseHierarchy((1, 4, 4), 2, 3, 8, 4), torch.rand(16, 1, 4, 4).round()
    def loss(**how):
        torch.manual_seed(0)
        return VAELoss(vae, kl_warmup=0, **how)(x, 0)
    torch.manual_seed(0)
    z = torch.cat([group.flatten(1) for group in vae.walk(from_posterior(), evidence=vae.encode(x)).latents], 1).detach().numpy()
    price = (z.mean(0) ** 2 + (z.var(0) - 1) ** 2).mean()
    found = (loss(moments=2.0)["loss"] - loss()["loss"]).item() / 2
    assert found == pytest.approx(price, abs=1e-5) and loss(moments=2.0)["elbo"] == loss()["elbo"]
    assert abs(found - ((z.var(0) - 1) ** 2).mean()) > 0.01 and abs(found - (z.mean(0) ** 2 + (z.std(0) - 1) ** 2).mean()) > 0.01


def test_moments_hold_the_latents_under_a_flow(tmp_path):
    "A flow follows wherever the latents go, so that without the price their variance is any; one seed, far from either limit."
    found = {}
    for moments in (0.0, 10.0):
        torch.manual_seed(0)
        vae = WithPriors(DenseVAE((1, 4, 4), 2, (16,)), [RealNVP(2, 2, 8)])
        x = torch.rand(512, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()
        x[:, :, :2] = x[:, :, :1, :1]                                 # something to tell
        fit_vae(vae, x, moments=moments, steps=300, batch_size=64, lr=5e-3, seed=0, checkpoint=tmp_path / f"{moments}.ckpt")
        with torch.no_grad():
            z = vae.walk(from_posterior(torch.Generator().manual_seed(0)), evidence=vae.encode(x)).latents[0]
        found[moments] = (z.mean(0) ** 2 + (z.var(0) - 1) ** 2).mean().item()
    assert found[10.0] < 0.02 < 0.1 < found[0.0]
    with pytest.raises(ValueError, match="moments"):                  # and a checkpoint knows of it
        fit_vae(vae, x, moments=1.0, steps=300, batch_size=64, lr=5e-3, seed=0, checkpoint=tmp_path / "10.0.ckpt")


def test_synchronised_batch_norm_on_one_process_is_batch_norm():
    found = []
    for sync in (False, True):
        torch.manual_seed(0)
        vae = NVAE(preset("digits").config)
        fit_vae(vae, torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)).bernoulli(), steps=1, batch_size=8, lr=1e-3, seed=0,
                spectral=0.1, machine=Machine(sync_batch_norm=sync))
        assert any(isinstance(module, nn.SyncBatchNorm) for module in vae.modules()) == sync
        found.append(vae.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_law_does_not_come_back_upon_another_vae(tmp_path):
    "A checkpoint of laws holds the VAE too: on another frozen VAE it would put its own in the place of that one."
    def fit(seed):
        torch.manual_seed(seed)
        vae = DenseVAE((2,), 2, hidden=(8,), sigma=0.5).requires_grad_(False)
        before = digest("", vae.parameters())
        law = RealNVP(2, blocks=1, hidden=4)
        fit_vae(WithPriors(vae, [law]), points(64, 0), steps=2, batch_size=32, lr=1e-2, seed=0, checkpoint=tmp_path / "law.ckpt")
        assert digest("", vae.parameters()) == before
    fit(0)
    fit(0)
    with pytest.raises(ValueError, match="another training: frozen is"):
        fit(1)


def test_rates_that_drop():
    with pytest.raises(ValueError, match=r"lr_drops must lie in \(0, 1\), got \(1,\)"):
        Recipe(lr_drops=(1,))


def test_training_does_not_load_nvae():
    code = "import sys, ncp_vae.engine.train\nassert 'ncp_vae.models.nvae' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
