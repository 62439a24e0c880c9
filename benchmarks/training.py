"""A training step against a loop by hand; and all K classifiers from one posterior walk, against parts and K trainings.

    python benchmarks/training.py             # about five minutes; writes benchmarks/results/training.json
    python benchmarks/training.py --quick --out /some/file.json
"""
import copy
import sys
import time
from functools import partial
from math import hypot
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine.data import Binarized, binarize, load                                      # noqa: E402
from ncp_vae.engine.groups import group_logits                                               # noqa: E402
from ncp_vae.engine.train import Recipe, fit, fit_ncp, fit_vae                                 # noqa: E402
from ncp_vae.hierarchy import descend                                                          # noqa: E402
from ncp_vae.models.flat import lars_vae                                                       # noqa: E402
from ncp_vae.models.hierarchical import DenseHierarchy                                         # noqa: E402
from ncp_vae.models.nvae import NVAE, NVAEConfig                                               # noqa: E402
from ncp_vae.models.ratios import ConvRatio, MLPRatio                                          # noqa: E402
from ncp_vae.nce import nce_loss                                                               # noqa: E402
from ncp_vae.walk import draw, from_posterior, seeded                                          # noqa: E402

IMAGE = (1, 8, 8)      # scikit-learn's digits
FULL = {"groups": [10, 30], "batch": 64, "width": 8, "hidden": 64, "vae_steps": 200, "loss_steps": 200, "copies": 10,
        "steps": {"dense": {"one_pass": 60, "alone": 10}, "nvae": {"one_pass": 8, "alone": 4}},
        "by_hand": {"side": 28, "batch": 128, "turns": 300}}
QUICK = {"groups": [2], "batch": 16, "width": 2, "hidden": 8, "vae_steps": 3, "loss_steps": 3, "copies": 1,
         "steps": {"dense": {"one_pass": 4, "alone": 4}, "nvae": {"one_pass": 4, "alone": 4}},
         "by_hand": {"side": 8, "batch": 16, "turns": 5}}


# ---- what is trained ------------------------------------------------------------------------------------------------

def built(kind, groups, settings):
    "A VAE of so many groups on digits, in eval mode, and a classifier for each group; nothing is trained."
    torch.manual_seed(0)
    if kind == "dense":
        vae = DenseHierarchy(IMAGE, groups, latent_dim=2, hidden=128, width=32)
        for group in vae.groups:              # thirty residual cells in a row: with torch's weights the state grows a thousandfold
            group.cell[-1].weight.data *= 0.3
        make = partial(MLPRatio, hidden=(settings["hidden"],) * 3)
    else:
        vae = NVAE(NVAEConfig(IMAGE, (groups,), channels=8, blocks=1, cells_per_block=1, latent_channels=4, cells_per_group=1))
        make = partial(ConvRatio, width=settings["width"])
    return vae.eval(), nn.ModuleList(make(z, c) for z, c in zip(vae.latent_shapes, vae.context_shapes))


class Alone(nn.Module):
    """The loss of one group's classifier, with a walk of its own at every step.

    leave: the walk ends at the group. Otherwise it goes to the end, and the negatives of the groups before are drawn as well:
    all random numbers are then those of the training in one pass."""
    def __init__(self, vae, ratio, k, leave):
        super().__init__()
        self.ratio, self.k, self.leave, self.frozen = ratio.train(), k, leave, (vae,)     # in a tuple: no part of this module

    def forward(self, x, step):
        vae, seen, choose = self.frozen[0], [], from_posterior()
        def choose_or_leave(step):
            seen.append((step, choose(step)))
            return None if self.leave and step.index == self.k else seen[-1][1]
        with torch.no_grad():
            descend(vae, choose_or_leave, evidence=vae.encode(x))
            here, z = seen[self.k]
            negatives = [draw(step.prior) for step, _ in seen[self.k if self.leave else 0:self.k + 1]]
        return {"loss": nce_loss(*self.ratio.condition(here.context)(torch.stack([z, negatives[-1]])))}


def fit_alone(vae, ratios, data, leave, **settings):
    "Every classifier by itself, with the loop that `fit_ncp` has."
    for k, ratio in enumerate(ratios):
        fit(Alone(vae, ratio, k, leave), data, name=f"group {k}", **settings)


# ---- time -----------------------------------------------------------------------------------------------------------

def clocks():
    "Seconds of this process on the CPU, and on the clock."
    return time.process_time(), time.perf_counter()


class Clocked(Binarized):
    """Dynamically binarised images that time the loop which reads them: from one batch to the next is one whole step.

    between: called, untimed, before each batch. steps: (CPU seconds, seconds on the clock) of each step."""
    def __init__(self, images, between=lambda: None):
        super().__init__(images)
        self.steps, self.began, self.between = [], None, between

    def __getitem__(self, index):
        if self.began is not None:
            self.steps.append([now - then for now, then in zip(clocks(), self.began)])
        self.between()
        self.began = clocks()
        return super().__getitem__(index)

    def step(self):
        "The median step, CPU seconds, without the first, in which memory is taken and caches are cold."
        return median(cpu for cpu, _ in self.steps[1:])


def classifier_step(ratio, step, z):
    "A function that takes one step of a classifier on these draws: forward, backward, Adam."
    optimizer, mixed = torch.optim.Adam(ratio.train().parameters(), 1e-3), torch.stack([z, draw(step.prior)])
    def take():
        nce_loss(*ratio.condition(step.context)(mixed)).backward()
        optimizer.step(), optimizer.zero_grad()
    return take


class Parts:
    "One posterior walk, and a step of every classifier on the draws of such a walk; each call times both."
    def __init__(self, vae, ratios, x):
        self.vae, self.x, self.times = vae, x, []
        trace = self.walk()
        self.classifiers = [classifier_step(*of) for of in zip(ratios, trace.steps, trace.latents)]

    def walk(self):
        with torch.no_grad():
            return self.vae.walk(from_posterior(), evidence=self.vae.encode(self.x))

    def __call__(self):
        start = time.process_time()
        self.walk()
        walked = time.process_time()
        for take in self.classifiers:
            take()
        self.times.append((walked - start, time.process_time() - walked))

    def medians(self):
        "CPU seconds of the walk, and of a step of all classifiers."
        return [median(column) for column in zip(*self.times[2:])]


def again_and_again(call, repeats):
    "The median CPU seconds of a call that has the caches to itself."
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return median(times)


def time_trainings(kind, groups, images, settings):
    "A step in one pass and its parts, taken in turns, then a step of each of K trainings."
    vae, ratios = built(kind, groups, settings)
    steps, same = settings["steps"][kind], {"batch_size": settings["batch"], "lr": 1e-3, "seed": 0}
    parts = Parts(vae, copy.deepcopy(ratios), binarize(images[:settings["batch"]], 0))
    data = Clocked(images, between=parts)
    fit_ncp(vae, data, ratios=copy.deepcopy(ratios), steps=steps["one_pass"], **same)
    (walk, classifiers), one_pass = parts.medians(), data.step()
    cached = again_and_again(parts.walk, steps["one_pass"]) + groups * again_and_again(parts.classifiers[1], steps["one_pass"])
    alone = {}
    for leave in (True, False):
        clocks = [Clocked(images) for _ in ratios]
        for k, ratio in enumerate(copy.deepcopy(ratios)):
            fit(Alone(vae, ratio, k, leave), clocks[k], name=f"group {k}", steps=steps["alone"], **same)
        alone[leave] = sum(clock.step() for clock in clocks)
    return {"one_pass_ms": 1e3 * one_pass, "walk_ms": 1e3 * walk, "classifier_ms": 1e3 * classifiers / groups,
            "parts_ms": 1e3 * (walk + classifiers), "speed_of_parts": (walk + classifiers) / one_pass,
            "parts_again_and_again_ms": 1e3 * cached, "speed_of_parts_again_and_again": cached / one_pass,
            "alone_whole_walk_ms": 1e3 * alone[False], "gain_over_whole_walks": alone[False] / one_pass,
            "alone_leaving_ms": 1e3 * alone[True], "gain_over_leaving_walks": alone[True] / one_pass}


# ---- a loop by hand -------------------------------------------------------------------------------------------------

def random_batch(images, size):
    "What every such loop begins with: some rows, binarised."
    return torch.bernoulli(images[torch.randint(len(images), (size,))])


def vae_by_hand(vae, images, size, fused):
    "A function that takes a step of stage one as anybody writes it: sums of tensors, without this library."
    optimizer = torch.optim.Adam(vae.train().parameters(), 1e-3, fused=fused)
    def take():
        x = random_batch(images, size)
        loc, raw = vae.encoder((x - vae.mean).flatten(1)).chunk(2, dim=-1)
        sigma = softplus(raw).clamp_min(1e-5)
        logits = vae.decoder(loc + sigma * torch.randn_like(loc)).view_as(x) + vae.bias
        kl = (loc**2 + sigma**2 - 1).sum(-1) / 2 - sigma.log().sum(-1)
        loss = binary_cross_entropy_with_logits(logits, x, reduction="sum") / size + kl.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return take


def ratio_by_hand(vae, ratio, images, size, fused):
    "The same for stage two: posterior and prior draws of the frozen VAE through one classifier."
    optimizer = torch.optim.Adam(ratio.train().parameters(), 1e-3, fused=fused)
    def take():
        with torch.no_grad():
            loc, raw = vae.encoder((random_batch(images, size) - vae.mean).flatten(1)).chunk(2, dim=-1)
            z_q = loc + softplus(raw).clamp_min(1e-5) * torch.randn_like(loc)
            z_p = torch.randn_like(loc)
        log_q, log_p = ratio(torch.cat([z_q, z_p])).chunk(2)
        loss = softplus(-log_q).mean() + softplus(log_p).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return take


class Turns:
    "Steps by hand, one of each kind in turn with a step of the library; each call times all of them."
    def __init__(self, by_hand):
        self.by_hand, self.times = by_hand, {name: [] for name in by_hand}

    def __call__(self):
        with torch.enable_grad():
            for name, take in self.by_hand.items():
                began = clocks()
                take()
                self.times[name].append([now - then for now, then in zip(clocks(), began)])


def quarters(values):
    "Lower quartile, median and upper quartile."
    return [sorted(values)[len(values) * quarter // 4] for quarter in (1, 2, 3)]


def against_by_hand(images, settings):
    """A step of `fit_vae` and of `fit_ncp` in turn with one by hand, on the VAE of the LARS/SNIS comparison.

    The medians of each, and quartiles of the ratio of neighbours, by CPU time and on the clock. By hand with Adam as torch
    has it by default, and with the fused one that the library takes."""
    images = torch.nn.functional.interpolate(images, (settings["side"],) * 2)
    size, turns = settings["batch"], settings["turns"]
    torch.manual_seed(0)
    vae, ratio = lars_vae(images.mean(0)), MLPRatio(50)
    same = {"steps": turns + 2, "batch_size": size, "lr": 1e-3, "seed": 0}
    kinds = {"by_hand": False, "by_hand_fused": True}
    found = {}
    for name, hand, train in [
            ("fit_vae", lambda fused: vae_by_hand(copy.deepcopy(vae), images, size, fused),
             lambda data: fit_vae(copy.deepcopy(vae), data, **same)),
            ("fit_ncp", lambda fused: ratio_by_hand(vae, copy.deepcopy(ratio), images, size, fused),
             lambda data: fit_ncp(vae, data, ratios=[copy.deepcopy(ratio)], **same))]:
        between = Turns({kind: hand(fused) for kind, fused in kinds.items()})
        data = Clocked(images, between)
        train(data)
        steps = data.steps[-turns:]
        found[name] = {"step_ms": [1e3 * median(column) for column in zip(*steps)]}
        for kind in kinds:
            times = between.times[kind][-turns:]
            found[name][f"{kind}_ms"] = [1e3 * median(column) for column in zip(*times)]
            for clock, column in (("cpu", 0), ("wall", 1)):
                ratios = [step[column] / time[column] for step, time in zip(steps, times)]
                found[name][f"over_{kind}_{clock}"] = quarters(ratios)
    return found


# ---- losses ---------------------------------------------------------------------------------------------------------

def weights_apart(groups, images, settings):
    "The largest difference of a weight after a few steps in one pass and alone, from the same random numbers."
    vae, together = built("dense", groups, settings)
    alone, same = copy.deepcopy(together), {"steps": 3, "batch_size": settings["batch"], "lr": 1e-3, "seed": 0}
    fit_ncp(vae, Binarized(images), ratios=together, **same)
    fit_alone(vae, alone, Binarized(images), leave=False, **same)
    return max((a - b).abs().max().item() for a, b in zip(together.state_dict().values(), alone.state_dict().values()))


def held_out_losses(vae, ratios, test, copies, seed):
    "Loss of every group and its standard error: [K] each. An image's binarisations are averaged first: they are not independent."
    with torch.no_grad(), seeded(torch.Generator().manual_seed(seed)):
        pairs = [group_logits(vae, ratios.eval(), torch.bernoulli(test)) for _ in range(copies)]
    losses = torch.stack([torch.stack([softplus(-q) + softplus(p) for q, p in groups]) for groups in pairs]).mean(0)
    return losses.mean(1).tolist(), (losses.std(1) / len(test)**0.5).tolist()


def compare_losses(groups, images, test, settings):
    "Held-out losses of each group, trained both ways with random numbers of their own. Above a VAE that leaves them work to do."
    vae, ratios = built("dense", groups, settings)
    fit_vae(vae, Binarized(images), steps=settings["vae_steps"], batch_size=settings["batch"], lr=1e-3, seed=0,
            kl_warmup=20 * settings["vae_steps"], recipe=Recipe(lr_warm_up=settings["vae_steps"] // 2))
    together, alone = ratios, copy.deepcopy(ratios)
    same = {"steps": settings["loss_steps"], "batch_size": settings["batch"], "lr": 1e-3}
    fit_ncp(vae, Binarized(images), ratios=together, seed=0, **same)
    fit_alone(vae, alone, Binarized(images), leave=True, seed=1, **same)
    (one, one_error), (other, other_error) = (held_out_losses(vae, found, test, settings["copies"], seed)
                                              for seed, found in enumerate([together, alone]))
    apart = [a - b for a, b in zip(one, other)]
    return {"one_pass": one, "one_pass_std_error": one_error, "alone": other, "alone_std_error": other_error,
            "largest_difference_in_std_errors": max(abs(d) / hypot(*e) for d, *e in zip(apart, one_error, other_error)),
            "mean_difference": mean(apart), "mean_difference_std_error": stdev(apart) / groups**0.5}


def main():
    parser = common.arguments("training", __doc__.split("\n")[0])
    args = parser.parse_args()
    if args.threads != 1:
        parser.error("this script compares CPU time, which is a speed only with one thread")
    torch.set_num_threads(1)
    settings = QUICK if args.quick else FULL
    images, test = load("digits", "train").images, load("digits", "test").images
    results = {"benchmark": "training", "quick": args.quick, "machine": common.machine(), "settings": settings, "time": {},
               "weights_apart": {}, "losses": {}}
    results["against_by_hand"] = against_by_hand(images, settings["by_hand"])
    targets = {f"step of {name} over one by hand": common.target(found["over_by_hand_cpu"][1], at_most=1.1)
               for name, found in results["against_by_hand"].items()}
    for groups in settings["groups"]:
        for kind in settings["steps"]:
            results["time"][f"{kind}, K = {groups}"] = found = time_trainings(kind, groups, images, settings)
            targets[f"speed of what the parts allow, {kind}, K = {groups}"] = common.target(found["speed_of_parts"], at_least=0.9)
        results["weights_apart"][f"dense, K = {groups}"] = apart = weights_apart(groups, images, settings)
        targets[f"weights apart, same random numbers, K = {groups}"] = common.target(apart, at_most=0.0)
        results["losses"][f"dense, K = {groups}"] = found = compare_losses(groups, images, test, settings)
        targets[f"largest difference of held-out losses in standard errors, K = {groups}"] = common.target(
            found["largest_difference_in_std_errors"], at_most=4.0)
    common.write_json(args.out, {**results, "targets": targets})


if __name__ == "__main__":
    main()
