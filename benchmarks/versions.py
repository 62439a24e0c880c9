"""A training step and SIR, of this version and of another one, in turns: did they become slower? And how many calls is a deep step?

    git worktree add /some/folder COMMIT
    python benchmarks/versions.py /some/folder       # about ten minutes; writes benchmarks/results/versions.json
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

HERE = Path(__file__).resolve().parent.parent
FULL = {"turns": 5, "steps": 200, "repeats": 12, "samples": 100, "proposals": 200, "preset": "celeba64-30", "parts": [1, 2]}
QUICK = {"turns": 1, "steps": 3, "repeats": 1, "samples": 2, "proposals": 3, "preset": "photos32", "parts": [1]}


def measured(settings):
    "CPU milliseconds of a step of stage one, of stage two, and of SIR, of the package that this process imports."
    import torch

    from ncp_vae.engine.data import Binarized
    from ncp_vae.engine.train import fit_ncp, fit_vae
    from ncp_vae.models.hierarchical import DenseHierarchy
    from ncp_vae.sampling import SIR
    torch.manual_seed(0)
    data = Binarized(torch.rand(2000, 1, 28, 28))
    vae = DenseHierarchy((1, 28, 28), 4, 4, 128, 32)
    how = {"batch_size": 128, "lr": 1e-3, "seed": 0}
    found, steps = {}, settings["steps"]

    def spent(call):
        began = time.process_time()
        result = call()
        return 1e3 * (time.process_time() - began), result
    fit_vae(vae, data, steps=2, **how)
    fit_ncp(vae, data, steps=2, **how)
    found["vae_step_ms"] = spent(lambda: fit_vae(vae, data, steps=steps, **how))[0] / steps
    milliseconds, ncp = spent(lambda: fit_ncp(vae, data, steps=steps, **how))
    found["ncp_step_ms"] = milliseconds / steps
    generator = torch.Generator().manual_seed(0)
    draw = [spent(lambda: ncp.sample(settings["samples"], SIR(settings["proposals"]), generator=generator))[0]
            for _ in range(1 + settings["repeats"])]
    found["sir_ms_an_image"] = median(draw[1:]) / settings["samples"]
    return found


def counted(settings):
    """Calls of torch's operations, views left out, in a step of each stage, by the number of parts of a batch; and graphs compiled.

    Of the preset's depth, with few channels: how many calls there are does not depend on their sizes, and neither on the device, but
    for what that device fuses."""
    import copy
    from dataclasses import replace

    import torch
    from torch._dynamo.testing import CompileCounter
    from torch.utils._python_dispatch import TorchDispatchMode

    from ncp_vae.engine.train import Machine, fit_ncp, fit_vae
    from ncp_vae.models.nvae import NVAE, preset
    from ncp_vae.models.ratios import ConvRatio

    class Calls(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += not func.is_view
            return func(*args, **(kwargs or {}))
    torch.manual_seed(0)
    config = replace(preset(settings["preset"]).config, channels=4, latent_channels=2)
    model, images = NVAE(config), torch.rand(2 * max(settings["parts"]), *config.image_shape)
    ratios = [ConvRatio(z, c, 4) for z, c in zip(model.latent_shapes, model.context_shapes)]
    how = {"batch_size": len(images), "lr": 1e-5, "seed": 0}
    trainings = {
        "vae": lambda steps, **machine: fit_vae(copy.deepcopy(model), images, steps=steps, kl_warmup=1, kl_balance=True, spectral=0.1,
                                                machine=Machine(**machine), **how),
        "ncp": lambda steps, **machine: fit_ncp(copy.deepcopy(model), images, ratios=copy.deepcopy(ratios), steps=steps,
                                                machine=Machine(**machine), **how)}

    def calls(stage, steps, parts):
        with Calls() as counting:
            trainings[stage](steps, parts=parts)
        return counting.number
    found = {f"{stage}, {parts} parts": calls(stage, 3, parts) - calls(stage, 2, parts)
             for stage in trainings for parts in settings["parts"]}
    for stage, training in trainings.items():
        counter = CompileCounter()
        torch.nn.Module.compile = lambda self, c=counter: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, backend=c))
        training(1, compile=True)
        found[f"{stage}, graphs"] = counter.frame_count
    return found


def of(clone, settings, what="--measure"):
    "`measured`, or `counted`, in a process that imports the package of a clone."
    done = subprocess.run([sys.executable, __file__, what, json.dumps(settings)], stdout=subprocess.PIPE, text=True,
                          check=True, cwd=clone, env={**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.strip().split("\n")[-1])


def main():
    import common
    parser = common.arguments("versions", __doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="a clone of the other version")
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    clones = {"this": HERE, "other": args.other.resolve()}
    turns = [{name: of(clone, settings) for name, clone in clones.items()} for _ in range(settings["turns"])]
    commit = {name: subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
              for name, clone in clones.items()}
    times = {name: {key: median(turn[name][key] for turn in turns) for key in turns[0][name]} for name in clones}
    ratios = {key: median(turn["this"][key] / turn["other"][key] for turn in turns) for key in times["this"]}
    counts = {name: of(clone, settings, "--count") for name, clone in clones.items()}
    targets = {f"{key} over the other version's": common.target(value, at_most=1.05) for key, value in ratios.items()}
    common.write_json(args.out, {"benchmark": "versions", "quick": args.quick, "machine": common.machine(), "settings": settings,
                                 "commit": commit, "counts": counts, "median_cpu": times, "this_over_other": ratios, "turns": turns,
                                 "targets": targets})


if __name__ == "__main__":
    if sys.argv[1:2] in (["--measure"], ["--count"]):
        print(json.dumps({"--measure": measured, "--count": counted}[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        main()
