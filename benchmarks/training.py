"""All K classifiers from one posterior walk: the step of `fit_ncp` against its measured parts, and against K trainings.

    python benchmarks/training.py             # about three minutes; writes benchmarks/results/training.json
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine.data import Binarized, binarize, load                                      # noqa: E402
from ncp_vae.engine.evaluate import group_reports                                              # noqa: E402
from ncp_vae.engine.train import fit, fit_ncp, fit_vae                                         # noqa: E402
from ncp_vae.models.hierarchical import DenseHierarchy                                         # noqa: E402
from ncp_vae.models.nvae import NVAE, NVAEConfig                                               # noqa: E402
from ncp_vae.models.ratios import ConvRatio, MLPRatio                                          # noqa: E402
from ncp_vae.nce import nce_loss                                                               # noqa: E402
from ncp_vae.prior import NoiseContrastivePrior                                                # noqa: E402
from ncp_vae.sampling import Left                                                              # noqa: E402
from ncp_vae.walk import draw, from_posterior                                                  # noqa: E402

IMAGE = (1, 8, 8)      # scikit-learn's digits
FULL = {"groups": [10, 30], "batch": 64, "width": 8, "hidden": 64, "vae_steps": 600, "loss_steps": 200, "binarisations": 10,
        "timed": {"dense": {"rounds": 5, "steps": 20, "alone_steps": 10}, "nvae": {"rounds": 3, "steps": 4, "alone_steps": 3}}}
QUICK = {"groups": [2], "batch": 16, "width": 2, "hidden": 8, "vae_steps": 3, "loss_steps": 3, "binarisations": 1,
         "timed": {"dense": {"rounds": 1, "steps": 3, "alone_steps": 3}, "nvae": {"rounds": 1, "steps": 3, "alone_steps": 3}}}


# ---- the models -----------------------------------------------------------------------------------------------------

def built(kind, groups, settings):
    "A VAE of so many groups on digits and, untrained, a classifier for each."
    torch.manual_seed(0)
    if kind == "dense":
        vae = DenseHierarchy(IMAGE, groups, latent_dim=4, hidden=128, width=32)
        make = partial(MLPRatio, hidden=(settings["hidden"],) * 3)
    else:
        vae = NVAE(NVAEConfig(IMAGE, (groups,), channels=8, blocks=1, cells_per_block=1, latent_channels=4, cells_per_group=1))
        make = partial(ConvRatio, width=settings["width"])
    return vae.eval(), nn.ModuleList(make(z, c) for z, c in zip(vae.latent_shapes, vae.context_shapes))


class Clocked(Binarized):
    "Dynamically binarised images that note when a batch is read: between two reads lies one whole step of the loop."
    def __init__(self, images):
        super().__init__(images)
        self.times = []

    def __getitems__(self, indices):
        self.times.append(time.perf_counter())
        return super().__getitems__(indices)

    def steps(self):
        "Seconds of each step but the first, in which memory is taken and caches are cold."
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


class Alone(nn.Module):
    """The loss of one group's classifier; every step walks for it alone.

    leave: the walk ends at the group. Otherwise it goes on to the end, and draws the negatives of the groups before as well:
    all random numbers are then those of the training in one pass."""
    def __init__(self, vae, ratio, k, leave):
        super().__init__()
        self.ratio, self.k, self.leave, self.frozen = ratio, k, leave, (vae,)     # in a tuple: not a part of this module

    def forward(self, x, step):
        vae, seen, choose = self.frozen[0], [], from_posterior()
        def choose_or_leave(step):
            seen.append((step, choose(step)))
            if self.leave and step.index == self.k:
                raise Left
            return seen[-1][1]
        with torch.no_grad():
            try:
                vae.walk(choose_or_leave, evidence=vae.encode(x))
            except Left:
                pass
            here, z = seen[self.k]
            negatives = [draw(step.prior) for step, _ in (seen[-1:] if self.leave else seen[:self.k + 1])]
        return {"loss": nce_loss(*self.ratio.condition(here.context)(torch.stack([z, negatives[-1]])))}


def train_alone(vae, ratios, data, leave, **settings):
    "Every classifier by itself, with the loop that `fit_ncp` has."
    for k, ratio in enumerate(ratios):
        fit(Alone(vae, ratio.train(), k, leave), data, name=f"group {k}", **settings)


# ---- time -----------------------------------------------------------------------------------------------------------

def classifier_step(ratio, step, z):
    "A function that takes one step of a classifier on these draws: forward, backward, Adam."
    optimizer, mixed = torch.optim.Adam(ratio.train().parameters(), 1e-3), torch.stack([z, draw(step.prior)])
    def take():
        nce_loss(*ratio.condition(step.context)(mixed)).backward()
        optimizer.step(), optimizer.zero_grad()
    return take


def parts(vae, ratios, x):
    "{name: call} of one posterior walk and of a step of every classifier, on the draws of such a walk."
    def walk():
        with torch.no_grad():
            return vae.walk(from_posterior(), evidence=vae.encode(x))
    trace = walk()
    steps = {str(k): classifier_step(*of) for k, of in enumerate(zip(ratios, trace.steps, trace.latents))}
    return {"walk": walk, **steps}


def time_trainings(kind, groups, images, settings):
    "Seconds of a step: in one pass, of its parts, and of K trainings, measured in turns."
    vae, ratios = built(kind, groups, settings)
    timed = settings["timed"][kind]
    same = {"batch_size": settings["batch"], "lr": 1e-3, "seed": 0}
    calls, found = parts(vae, copy.deepcopy(ratios), binarize(images[:settings["batch"]], 0)), {"one pass": []}
    found |= {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(timed["rounds"]):
        data = Clocked(images)
        fit_ncp(vae, data, ratios=copy.deepcopy(ratios), steps=timed["steps"], **same)
        found["one pass"] += data.steps()
        for _ in range(timed["steps"] - 2):
            for name, call in calls.items():
                found[name].append(common.seconds(call))
    step = {name: median(times) for name, times in found.items()}
    classifiers = [step[str(k)] for k in range(groups)]
    allowed = step["walk"] + sum(classifiers)
    alone = {leave: time_alone(vae, ratios, images, leave, timed["alone_steps"], same) for leave in (True, False)}
    return {"one_pass_ms": 1e3 * step["one pass"], "walk_ms": 1e3 * step["walk"], "classifier_ms": 1e3 * mean(classifiers),
            "parts_allow_ms": 1e3 * allowed, "speed_of_allowed": allowed / step["one pass"],
            "alone_leaving_ms": 1e3 * alone[True], "alone_whole_walk_ms": 1e3 * alone[False],
            "gain_leaving": alone[True] / step["one pass"], "gain_whole_walk": alone[False] / step["one pass"],
            "least_gain_of_parts_whole_walk": (groups * step["walk"] + sum(classifiers)) / allowed}


def time_alone(vae, ratios, images, leave, steps, same):
    "Seconds of one step of each of K trainings, added up."
    total = 0.0
    for k, ratio in enumerate(copy.deepcopy(ratios)):
        data = Clocked(images)
        fit(Alone(vae, ratio.train(), k, leave), data, name=f"group {k}", steps=steps, **same)
        total += median(data.steps())
    return total


# ---- losses ---------------------------------------------------------------------------------------------------------

def weights_apart(kind, groups, images, settings):
    "The largest difference of any weight after a few steps in one pass and alone, from the same random numbers."
    vae, ratios = built(kind, groups, settings)
    together, alone = ratios, copy.deepcopy(ratios)
    same = {"steps": 3, "batch_size": settings["batch"], "lr": 1e-3, "seed": 0}
    fit_ncp(vae, Binarized(images), ratios=together, **same)
    train_alone(vae, alone, Binarized(images), leave=False, **same)
    return max((a - b).abs().max().item() for a, b in zip(together.state_dict().values(), alone.state_dict().values()))


def compare_losses(groups, images, test, settings):
    "Held-out losses of each group, trained both ways to the end with random numbers of their own, above a trained VAE."
    vae, ratios = built("dense", groups, settings)
    fit_vae(vae, Binarized(images), steps=settings["vae_steps"], batch_size=settings["batch"], lr=2e-3, seed=0,
            kl_warmup=settings["vae_steps"] // 5)
    together, alone = ratios, copy.deepcopy(ratios)
    same = {"steps": settings["loss_steps"], "batch_size": settings["batch"], "lr": 1e-3}
    fit_ncp(vae, Binarized(images), ratios=together, seed=0, **same)
    train_alone(vae, alone, Binarized(images), leave=True, seed=1, **same)
    held_out = torch.cat([binarize(test, copy) for copy in range(settings["binarisations"])])
    one, other = (group_reports(NoiseContrastivePrior(vae, found).eval(), held_out, seed)
                  for seed, found in enumerate([together, alone]))
    apart = [a.loss - b.loss for a, b in zip(one, other)]
    errors = [hypot(a.loss_std_error, b.loss_std_error) for a, b in zip(one, other)]
    rows = {name: [[report.loss, report.loss_std_error] for report in reports] for name, reports in
            {"one_pass": one, "alone": other}.items()}
    return {**rows, "largest_difference_in_std_errors": max(abs(d) / e for d, e in zip(apart, errors)),
            "mean_difference": mean(apart), "mean_difference_std_error": stdev(apart) / groups**0.5}


def main():
    args = common.arguments("training", __doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else FULL
    images, test = load("digits", "train").images, load("digits", "test").images
    results = {"benchmark": "training", "quick": args.quick, "machine": common.machine(), "settings": settings, "time": {},
               "losses": {}, "weights_apart": {}, "targets": {}}
    for groups in settings["groups"]:
        for kind in settings["timed"]:
            name = f"{kind}, K = {groups}"
            print(name, flush=True)
            results["time"][name] = found = time_trainings(kind, groups, images, settings)
            results["targets"][f"speed of what the parts allow, {name}"] = common.target(found["speed_of_allowed"], at_least=0.9)
        results["weights_apart"][f"dense, K = {groups}"] = weights_apart("dense", groups, images, settings)
        results["losses"][f"dense, K = {groups}"] = found = compare_losses(groups, images, test, settings)
        results["targets"][f"largest difference of held-out losses in standard errors, K = {groups}"] = common.target(
            found["largest_difference_in_std_errors"], at_most=4.0)
    common.write_json(args.out, results)


if __name__ == "__main__":
    main()
