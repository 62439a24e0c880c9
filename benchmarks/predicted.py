"""Does `ncp_vae.engine.predict` foresee times? Steps of both trainings and draws of SIR here, against this machine's own rates.

    python benchmarks/predicted.py              # about three minutes; writes benchmarks/results/predicted.json
    python benchmarks/predicted.py --quick --out /some/file.json
"""
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import conv2d

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine import cost, predict                                                       # noqa: E402
from ncp_vae.engine.train import NCELoss, VAELoss                                              # noqa: E402
from ncp_vae.models.nvae import NVAE, preset                                                   # noqa: E402
from ncp_vae.models.ratios import ConvRatio                                                    # noqa: E402

CPU = torch.device("cpu")
FULL = {"presets": ["digits", "fashion_mnist8-5", "fashion_mnist"], "batch": 32, "width": 24, "maps": 64, "numbers": 2**24, "repeats": 5}
QUICK = {"presets": ["digits"], "batch": 4, "width": 2, "maps": 4, "numbers": 2**10, "repeats": 1}


def seconds(call, repeats):
    "Median CPU time of a call, which other programs disturb least."
    return statistics.median(cpu for _, cpu in cost.in_turns({"": call}, repeats, CPU)[""])


def this_machine(settings):
    "Its rate at a convolution, its bandwidth at an addition, and the seconds of a call on nothing, as a `Device` at half of its rates."
    x, w = torch.randn(32, settings["maps"], 32, 32), torch.randn(settings["maps"], settings["maps"], 3, 3)
    a, nothing = torch.randn(settings["numbers"]), torch.zeros(1)
    rate = 2 * x.numel() * w[0].numel() / seconds(lambda: conv2d(x, w, padding=1), settings["repeats"]) / 1e12
    bandwidth = 3 * 4 * a.numel() / seconds(lambda: a + a, settings["repeats"]) / 1e9
    launch = seconds(lambda: [nothing + nothing for _ in range(10_000)], settings["repeats"]) / 10_000
    attained = [value / predict.ATTAINED for value in (bandwidth, rate, rate, rate)]
    return predict.Device("this machine", common.machine()["memory_gb"], *attained, "measured"), launch


def losses(name, width):
    "Both trainings' losses on one NVAE."
    vae = NVAE(preset(name).config)
    ratios = nn.ModuleList([ConvRatio(z, c, width) for z, c in zip(vae.latent_shapes, vae.context_shapes)])
    return {"VAE": VAELoss(vae, 0, spectral=0.1), "ratios": NCELoss(vae, ratios, None, None)}


def step(loss, x):
    loss(x, 1)["loss"].backward()


def compared(name, settings, device):
    "Of both stages: seconds found, seconds foreseen at the machine's own rates, and their ratio."
    shape, rows = preset(name).config.image_shape, {}
    for stage in ("VAE", "ratios"):
        loss = losses(name, settings["width"])[stage].train()
        if stage == "ratios":
            loss.frozen[0].eval()
        found = seconds(lambda: step(loss, torch.rand(settings["batch"], *shape).round()), settings["repeats"])
        with predict.counted(), torch.device("meta"):
            there = losses(name, settings["width"])[stage]
        foreseen = predict.step_cost(predict.Stage(stage, there, shape, settings["batch"], 1)).seconds(device)
        rows[stage] = {"found_s": found, "foreseen_s": sum(foreseen.values()), "of_it": foreseen,
                       "found_over_foreseen": found / sum(foreseen.values())}
    return rows


def main():
    args = common.arguments("predicted", __doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else FULL
    device, predict.LAUNCH = this_machine(settings)
    results = {"benchmark": "predicted", "quick": args.quick, "machine": common.machine(), "settings": settings, "rates": vars(device),
               "launch_s": predict.LAUNCH, "found": {name: compared(name, settings, device) for name in settings["presets"]}}
    common.write_json(args.out, results)


if __name__ == "__main__":
    main()
