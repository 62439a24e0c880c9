"""Several processes: what they compute is what one computes, and when one of them stops, all do."""
import json
import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributions import Independent, Normal

from ncp_vae.engine.evaluate import compare
from ncp_vae.engine.processes import BlockMean, drawn_in_blocks, this_process
from ncp_vae.engine.train import Machine, Recipe, fit, fit_ebm, fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import JointLangevin
from ncp_vae.walk import Step, TopDownVAE, Trace

# ---- two processes, once for all tests ------------------------------------------------------------------------------
# Forked from a server that has imported everything and computed nothing: a fork of this process could not run autograd.

HUNG = "hung"
FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ncp_vae.engine.evaluate", "ncp_vae.engine.train", "torch._dynamo", "torch.distributed.tensor"])


def launch(work, folder, seconds):
    """work(folder) in two gloo processes that wait for each other for so many seconds: by rank what each returned, or the error that
    ended it; None where it died without a word, HUNG where it was still there after ten minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [FORKS.Process(target=_process, args=(work, rank, port, folder, seconds)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    return [_ended(process, folder / f"{rank}.pt") for rank, process in enumerate(started)]


def _process(work, rank, port, folder, seconds):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))])
    torch.save(said(partial(work, folder)), folder / f"{rank}.pt")


def _ended(process, file):
    hung = process.is_alive()
    process.kill()
    process.join()
    return HUNG if hung else torch.load(file, weights_only=False) if file.exists() else None


def said(call):
    "What a call returns, or its error in words."
    try:
        return call()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Per rank, what every function of `WORK` found on two processes."
    return launch(all_work, tmp_path_factory.mktemp("two"), 300.0)


def all_work(folder):
    found = {}
    for work in WORK:
        place = folder / work.__name__
        place.mkdir(exist_ok=True)
        found[work.__name__] = said(partial(work, place))
    return dict(found, folder=folder)


def second():
    return this_process().process_index == 1


# ---- data-parallel: the same losses and weights ---------------------------------------------------------------------

class Given(Normal):
    "A Normal whose draws are a function of the images, so that they do not depend on who makes them."
    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale, validate_args=False)
        self.noise = noise

    def rsample(self, sample_shape=torch.Size()):
        return self.loc + self.scale * self.noise


class Known(TopDownVAE):
    "Two groups, float64."
    latent_shapes, context_shapes = [torch.Size([2])] * 2, [None, torch.Size([3])]

    def __init__(self):
        super().__init__()
        self.posteriors = nn.ModuleList([nn.Linear(4, 2), nn.Linear(7, 2)])
        self.down, self.prior, self.image = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(4, 4)
        self.double()

    def kl_weights(self, kl):
        return (kl.mean(0) / kl.mean()).detach()

    def encode(self, x):
        return x

    def walk(self, choose, *, n=None, evidence=None):
        x = torch.zeros(n, 4).double() if evidence is None else evidence
        def law(k, loc, side):
            noise = torch.sin(37.0 * (1 + k + 2 * side) * x[:, :2] + x[:, 2:])
            return Independent(Given(loc, 0.7 * torch.ones_like(loc), noise), 1)
        steps, latents, context = [], [], None
        for k in range(2):
            loc = torch.zeros_like(x[:, :2]) if k == 0 else self.prior(context)
            seen = self.posteriors[k](x if k == 0 else torch.cat([x, context], 1))
            steps.append(Step(k, context, law(k, loc, 0), None if evidence is None else law(k, seen, 1)))
            latents.append(choose(steps[-1]))
            context = torch.tanh(self.down(latents[0]))
        return Trace(latents, steps, Independent(Normal(self.image(torch.cat(latents, 1)), 1.0), 1))


def points(n=64, size=4, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)).double()


def lines(file):
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in file.read_text().splitlines()]


def data_parallel(folder):
    "A VAE with a balanced KL, then its ratios, watched both."
    torch.manual_seed(0)
    vae = fit_vae(Known(), points(), steps=10, batch_size=8, lr=1e-2, seed=0, kl_warmup=6, kl_balance=True, held_out=points(seed=1),
                  history=folder / "history")
    torch.manual_seed(0)
    ratios = [MLPRatio(2, c, (8,)).double() for c in (None, 3)]
    ncp = fit_ncp(vae, points(), ratios=ratios, steps=10, batch_size=8, lr=1e-2, seed=0, held_out=points(seed=1), history=folder / "history")
    return {name: value.detach() for name, value in ncp.state_dict().items() if not name.startswith("log_z")}


def test_two_processes_train_what_one_trains(both, tmp_path):
    """On the same batches and draws, in float64: losses (of six digits in the file) to 1e-6 and weights after 10 steps to 1e-9, which is
    rounding. The two processes agree in every bit."""
    first, other = (found["data_parallel"] for found in both)
    assert all(torch.equal(first[name], other[name]) for name in first)
    alone = data_parallel(tmp_path)
    for name in alone:
        assert torch.allclose(first[name], alone[name], rtol=0, atol=1e-9), name
    rows, expected = lines(both[0]["folder"] / "data_parallel" / "history"), lines(tmp_path / "history")
    assert len(rows) == len(expected) == 22
    for row, wanted in zip(rows, expected):
        assert row == {key: value if isinstance(value, str) else pytest.approx(value, abs=2e-6) for key, value in wanted.items()}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    def forward(self, x, step):
        return dict(loss=self.net(x).square().mean())


def one_model(folder):
    loss = Normed()
    fit(loss, points(), steps=5, batch_size=8, lr=1e-2, seed=0, name="normed")
    return {name: value.detach() for name, value in loss.state_dict().items()}


def test_all_processes_return_one_model(both):
    "Also its running means, which each process has of its own share."
    first, other = (found["one_model"] for found in both)
    assert all(torch.equal(first[name], other[name]) for name in first)


# ---- groups split over the processes --------------------------------------------------------------------------------

class Dropping(MLPRatio):
    "Random numbers of its own."
    def condition(self, context):
        log_ratio = super().condition(context)
        return lambda z: log_ratio(nn.functional.dropout(z, 0.2, self.training))


class Interrupting(torch.utils.data.Dataset):
    "Points; Ctrl-C comes to the second process (or to one that is alone) while batch number `at` is read. Three more are read before."
    def __init__(self, at):
        self.at, self.reads = at + 3 if at else None, 0

    def __len__(self):
        return 64

    def __getitems__(self, rows):
        self.reads += 1
        if self.reads == self.at and (second() or this_process().num_processes == 1):
            os.kill(os.getpid(), signal.SIGINT)
        return bits()[rows]


def bits(n=64, seed=0):
    return (points(n, seed=seed) > 0).float()


def hierarchy():
    torch.manual_seed(0)
    return DenseHierarchy((4,), 3, 2, hidden=16, width=8)


def split(folder, at=None, **changes):
    "Three groups on two processes, in two parts, watched."
    vae = hierarchy()
    torch.manual_seed(int(second()))                      # all begin with the weights of the first process
    ratios = [Dropping(z, c, (8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    how = dict(steps=10, batch_size=8, lr=1e-2, seed=0, held_out=bits(seed=1), history=folder / "history",
               checkpoint=folder / "state", machine=Machine(split_groups=True, parts=2))
    ncp = fit_ncp(vae, Interrupting(at), ratios=ratios, **{**how, **changes})
    return {name: value.detach() for name, value in ncp.ratios.state_dict().items()}


def interrupted(folder):
    return said(partial(split, folder, at=4))


def test_split_groups_are_one_process_to_the_bit(both, tmp_path):
    "Weights, history and checkpoint, of which the moments of a group come from the process that trained it."
    first, other = (found["split"] for found in both)
    alone, place = split(tmp_path), both[0]["folder"] / "split"
    assert alone.keys() == first.keys() and all(torch.equal(alone[name], first[name]) and torch.equal(alone[name], other[name]) for name in alone)
    assert lines(place / "history") == lines(tmp_path / "history")
    here, there = (torch.load(file / "state", weights_only=True) for file in (tmp_path, place))
    assert here["settings"] == there["settings"] and here["best"]["step"] == there["best"]["step"] > 0
    assert here["moments"].keys() == there["moments"].keys() == set(range(len(alone)))
    assert all(torch.equal(here["moments"][i][key], there["moments"][i][key]) for i in here["moments"] for key in here["moments"][i])


def test_split_groups_differ_from_other_seeds_and_other_groups(tmp_path):
    "The test above can fail: the draws of a group depend on the seed, and the groups have not one stream among them."
    found = [split(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert not torch.equal(found[0]["0.logit.bias"], found[1]["0.logit.bias"])


def test_split_groups_go_on_on_one_process(both, tmp_path):
    """Ctrl-C reaches the second process alone. Both stop before the same step, the checkpoint is of all groups, and one process ends
    it in every bit as if nobody had disturbed it."""
    place = both[0]["folder"] / "interrupted"
    assert [found["interrupted"].split(":")[0] for found in both] == 2 * ["KeyboardInterrupt"]
    assert torch.load(place / "state", weights_only=True)["step"] == 5          # the one that was being taken was ended
    resumed, whole = split(place), split(tmp_path)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def refused(folder):
    "What cannot be split, or shared."
    vae, how = hierarchy(), dict(steps=2, batch_size=8, lr=1e-2, seed=0)
    shared = [MLPRatio(2, c, (8,)) for c in vae.context_shapes[1:]]
    few, apart = bits(), Machine(split_groups=True)
    flat = DenseVAE((4,), 2, hidden=(8,), sigma=0.5)
    loader = torch.utils.data.DataLoader(few, 8)
    return [said(call) for call in (
        lambda: fit_ncp(flat, few, machine=apart, **how),
        lambda: fit_ncp(vae, few, machine=apart, recipe=Recipe(clip=1.0), **how),
        lambda: fit_ncp(vae, few, ratios=[MLPRatio(2, None, (8,)), shared[0], shared[0]], machine=apart, **how),
        lambda: fit_vae(flat, few, machine=apart, **how),
        lambda: fit_vae(flat, loader, **how),
        lambda: fit_vae(flat, few, **{**how, "batch_size": 1}),
        lambda: fit_ebm(flat, few, sampler=JointLangevin(2, 0.1), persistent=True, **how))]


def test_what_cannot_be_shared_is_refused(both):
    assert both[0]["refused"] == both[1]["refused"]
    words = ["2 processes for 1 groups", "clip 1.0 is of the whole gradient", "two ratios share a weight", "split_groups is for the ratios of fit_ncp",
             "DataLoader cannot be shared by 2", "batch_size 1 must be a multiple of the 2 processes", "persistent chains are of one process"]
    for found, wanted in zip(both[0]["refused"], words, strict=True):
        assert found.startswith("ValueError: ") and wanted in found


# ---- what stops one stops all ---------------------------------------------------------------------------------------

class Fails(nn.Module):
    "Linear; in step 3 the second process has a loss that is not finite, or an error."
    def __init__(self, how=None):
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.zeros(4).double())

    def forward(self, x, step):
        loss = (x @ self.w - x.sum(1)).square().mean()
        if step == 3 and second():
            if self.how == "error":
                raise ValueError("no support for these images")
            loss = loss * float("nan") if self.how == "nan" else loss
        return dict(loss=loss)


class Ends(torch.utils.data.Dataset):
    "Points; while its batch of step 3 is read, the second process is killed, sleeps for twice the timeout, or finds a NaN."
    def __init__(self, how):
        self.how, self.reads = how, 0

    def __len__(self):
        return 64

    def __getitems__(self, rows):
        self.reads += 1
        if self.reads == 4 and second():
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hangs":
                time.sleep(30)
            return points()[rows] * float("nan")
        return points()[rows]


FEW = dict(steps=8, batch_size=8, lr=1e-2, seed=0, name="few")


def stops(folder):
    return [said(lambda: fit(Fails("nan"), points(), checkpoint=folder / "nan", **FEW)), said(lambda: fit(Fails("error"), points(), **FEW)),
            said(lambda: fit(Fails(), Ends("nan"), **FEW)), said(lambda: fit(Fails(), points(), history="/dev/null/no", **FEW))]


def test_all_stop_with_the_message_of_one(both):
    "A loss that is not finite, an error in a forward pass, a NaN in the data, a file that cannot be written: on one process alone."
    assert both[0]["stops"] == both[1]["stops"]
    words = ["FloatingPointError: few: the loss is nan and its gradient's norm nan at step 3 of 8", "ValueError: no support for these images",
             "ValueError: the data holds NaN", "ValueError: cannot write"]
    for found, wanted in zip(both[0]["stops"], words, strict=True):
        assert found.startswith(wanted)
    assert not (both[0]["folder"] / "stops" / "nan").exists()            # nothing of the step that was spoilt


def ends(how, folder):
    fit(Fails(), Ends(how), checkpoint=folder / "state", **FEW)


@pytest.mark.parametrize("how, seconds", [("killed", 300.0), ("hangs", 15.0)])
def test_nobody_waits_for_ever(how, seconds, tmp_path):
    "The first process ends with an error, at once or at the timeout, and the steps before are kept."
    first, other = launch(partial(ends, how), tmp_path, seconds)
    assert first not in (None, HUNG) and "Error" in first
    assert other is None if how == "killed" else "Error" in other and other != HUNG
    assert torch.load(tmp_path / "state", weights_only=True)["step"] == 3


def killed_in_a_save(folder):
    "The first process, before the third time that it renames a file: inside its second save."
    left, rename = iter((1, 2)), os.replace
    def watched(*names):
        if not second() and not next(left, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)
    os.replace = watched
    return goes_on(folder)


def goes_on(folder):
    loss = Fails()
    fit(loss, points(), checkpoint=folder / "state", history=folder / "history", save_every=0.0, log_every=1, **FEW)
    return loss.w.detach()


def test_killed_inside_a_save_and_resumed_to_the_bit(both, tmp_path):
    "The other process ends with an error; both started anew go on from the last whole file, and the history has no gap and no repeat."
    first, other = launch(killed_in_a_save, tmp_path, 300.0)
    assert first is None and "Error" in other
    assert torch.load(tmp_path / "state", weights_only=True)["step"] == 1
    for found, alone in zip(launch(goes_on, tmp_path, 300.0), both, strict=True):
        assert torch.equal(found, alone["goes_on"])
    assert [row["step"] for row in lines(tmp_path / "history")] == [1, 2, 3, 4, 5, 6, 7, 8]


def other_checkpoints(folder):
    "A training of four steps; then the second process looks for its checkpoint elsewhere, or all are given another seed each."
    def train(steps, file, **changes):
        return fit(Fails(), points(), checkpoint=file, **{**FEW, "steps": steps, **changes})
    train(8, folder / "state")
    return [said(lambda: train(8, folder / ("none" if second() else "state"))), said(lambda: train(8, folder / "new", seed=int(second())))]


def test_processes_that_do_not_have_the_same_are_told(both):
    first, other = (found["other_checkpoints"] for found in both)
    assert first == other
    assert "step is 8 on process 0 and 0 on process 1" in first[0] and "seed is 0 on process 0 and 1 on process 1" in first[1]


def test_another_number_of_processes_is_refused(both):
    "Its draws would be others."
    with pytest.raises(ValueError, match="of another training: processes is 2 there and None here"):
        fit(Fails(), points(), checkpoint=both[0]["folder"] / "other_checkpoints" / "state", **FEW)


# ---- numbers that are shared ----------------------------------------------------------------------------------------

def shared_numbers(folder):
    "Samples, log Z and a comparison with a bound, in blocks of which the last is short."
    vae = hierarchy()
    torch.manual_seed(1)
    ncp = NoiseContrastivePrior(vae, [MLPRatio(z, c, (8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]).eval()
    def draw(n, generator):
        return ncp.sample(n, generator=generator).likelihood.mean
    rows = compare({"base": vae, "ncp": ncp}, bits(250), num_samples=3, seed=0, log_z_samples=2500, method=BlockMean(),
                   proposals=4)
    return dict(samples=drawn_in_blocks(draw, 250, seed=0), one=drawn_in_blocks(draw, 1, seed=0),
                rows={name: {key: (value.value, value.std_error) for key, value in row.items()} for name, row in rows.items()})


def test_shared_numbers_are_those_of_one_process(both, tmp_path):
    "n samples are n, and every number of a comparison is the same to the bit; also where one process has nothing to do."
    alone = shared_numbers(tmp_path)
    assert alone["samples"].shape == (250, 4) and alone["one"].shape == (1, 4)
    for found in both:
        found = found["shared_numbers"]
        assert torch.equal(found["samples"], alone["samples"]) and torch.equal(found["one"], alone["one"])
        assert found["rows"] == alone["rows"]


WORK = (data_parallel, one_model, split, interrupted, refused, stops, goes_on, other_checkpoints, shared_numbers)
