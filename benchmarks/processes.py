"""Two processes of one thread against one: steps of both stages, samples; beside what `ncp_vae.engine.scale` foresees for them.

    python benchmarks/processes.py              # about a quarter of an hour on two idle cores; writes benchmarks/results/processes.json
    python benchmarks/processes.py --quick --out /some/file.json
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402
import predicted                                                                               # noqa: E402

from ncp_vae.engine import predict                                                             # noqa: E402
from ncp_vae.engine.processes import drawn_in_blocks, this_process                             # noqa: E402
from ncp_vae.engine.scale import Cluster, exchange, share                                      # noqa: E402
from ncp_vae.engine.train import Machine, fit_ncp, fit_vae                                     # noqa: E402
from ncp_vae.models.nvae import NVAE, preset                                                   # noqa: E402
from ncp_vae.models.ratios import ConvRatio                                                    # noqa: E402
from ncp_vae.prior import NoiseContrastivePrior                                                # noqa: E402
from ncp_vae.sampling import SIR                                                               # noqa: E402

CPU = torch.device("cpu")
FULL = {"preset": "fashion_mnist8-5", "batches": [32, 128], "width": 24, "steps": [1, 5], "samples": 64, "block": 8, "proposals": 100,
        "numbers": 2**22, "turns": 3, "rates": predicted.FULL}
QUICK = {"preset": "digits", "batches": [8], "width": 2, "steps": [1, 2], "samples": 4, "block": 2, "proposals": 64,
         "numbers": 2**10, "turns": 1, "rates": predicted.QUICK}


# ---- in each process ------------------------------------------------------------------------------------------------

def trainer(settings, kind):
    "A function of a number of steps, of stage one (vae), of stage two by rows (ncp) or with its groups split (groups)."
    torch.manual_seed(0)
    vae = NVAE(preset(settings["preset"]).config)
    shape, batch = vae.config.image_shape, settings["batch"]
    images = torch.rand(4 * batch, *shape).round()
    ratios = [ConvRatio(z, c, settings["width"]) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    how = {"batch_size": batch, "lr": 1e-5, "seed": 0, "machine": Machine(split_groups=kind == "groups")}
    if kind == "vae":
        return lambda steps: fit_vae(vae, images, steps=steps, spectral=0.1, **how)
    return lambda steps: fit_ncp(vae, images, ratios=ratios, steps=steps, **how)


def seconds(call):
    "Of a call that all processes begin together, on this one's clock, until the last has finished."
    here = this_process()
    if here.num_processes > 1:
        torch.distributed.barrier()
    began = time.perf_counter()
    call()
    if here.num_processes > 1:
        torch.distributed.barrier()
    return time.perf_counter() - began


def measured(settings):
    "Seconds of a step of each kind of training, of a sample, and of an exchange of numbers between processes."
    torch.set_num_threads(1)
    found, (few, many) = {}, settings["steps"]
    this_process()
    for kind in ("vae", "ncp", "groups"):
        train = trainer(settings, kind)
        train(1)
        short, long = seconds(lambda: train(few)), seconds(lambda: train(many))
        found[kind] = (long - short) / (many - few)
    ncp = train(1)
    assert isinstance(ncp, NoiseContrastivePrior)

    def sampled(n):
        return drawn_in_blocks(lambda m, generator: ncp.sample(m, SIR(settings["proposals"]), generator=generator).likelihood.mean,
                               n, 0, settings["block"])
    sampled(2 * settings["block"])
    found["samples"] = seconds(lambda: sampled(settings["samples"])) / settings["samples"]
    numbers = torch.zeros(settings["numbers"])
    if this_process().num_processes > 1:
        found["exchange"] = min(seconds(lambda: torch.distributed.all_reduce(numbers)) for _ in range(5))
    return found


# ---- around them ----------------------------------------------------------------------------------------------------

def on(processes, settings):
    "What the first of so many processes measured."
    port = common.free_port()
    started = [subprocess.Popen([sys.executable, __file__, "--measure", json.dumps(settings)], stdout=subprocess.PIPE, text=True,
                                env=os.environ | common.rank_environment(processes, rank, port)) for rank in range(processes)]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("processes.py: a process failed; its error stands above")
    return json.loads(printed[0].strip().split("\n")[-1])


def foreseen(settings, exchanged):
    "Times faster on two processes, by the counts of `scale` at this machine's own rates and the exchange's measured speed."
    device, predict.LAUNCH = predicted.this_machine(settings["rates"])
    size = 4 * settings["numbers"]
    cluster = Cluster(device, 2, size / exchanged / 1e9 / predict.ATTAINED, 0.0, 0.0, "measured")
    assert abs(exchange(size, 2, cluster) - exchanged) < 1e-9
    with predict.counted(), torch.device("meta"):
        losses = predicted.losses(settings["preset"], settings["width"])
    shape = preset(settings["preset"]).config.image_shape
    stages = {name: predict.Stage(name, loss, shape, settings["batch"], 1) for name, loss in losses.items()}
    one = {name: share(stage, cluster) for name, stage in stages.items()}
    two = {"vae": share(stages["VAE"], cluster, rows=2), "ncp": share(stages["ratios"], cluster, rows=2),
           "groups": share(stages["ratios"], cluster, groups=2)}
    of = {"vae": "VAE", "ncp": "ratios", "groups": "ratios"}
    return {kind: {"one_s": one[of[kind]].total, "two_s": shared.total, "faster": one[of[kind]].total / shared.total}
            for kind, shared in two.items()}


def compared(settings):
    "At one batch size: what each turn measured on one and on two processes, and how much faster two are, found and foreseen."
    turns = [{count: on(count, settings) for count in (1, 2)} for _ in range(settings["turns"])]
    middle = {count: {name: median(turn[count][name] for turn in turns) for name in turns[0][count]} for count in (1, 2)}
    faster = {name: middle[1][name] / middle[2][name] for name in ("vae", "ncp", "samples")}
    faster["groups"] = middle[1]["ncp"] / middle[2]["groups"]
    return {"turns": turns, "median_s": middle, "faster": faster, "foreseen": foreseen(settings, middle[2]["exchange"])}


def main():
    args = common.arguments("processes", __doc__.split("\n")[0]).parse_args()
    settings = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    found = {batch: compared({**settings, "batch": batch}) for batch in settings["batches"]}
    faster = found[max(found)]["faster"]
    common.write_json(args.out, {
        "benchmark": "processes", "quick": args.quick, "machine": common.machine(), "settings": settings, "batches": found,
        "targets": {"two processes over one, stage two, the better way": common.target(max(faster["ncp"], faster["groups"]), at_least=1.7),
                    "two processes over one, samples": common.target(faster["samples"], at_least=1.8)}})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(json.loads(sys.argv[2]))))
    else:
        main()
