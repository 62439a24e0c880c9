"""What one GPU does: train the Fashion-MNIST preset, and time sampling from a model of CelebA-64's shape.

    python benchmarks/gpu.py train --minutes 9      # again and again until it says that the run has succeeded
    python benchmarks/gpu.py sample --minutes 9     # again and again until no piece is left
    python benchmarks/gpu.py sample --device cpu --quick --out /some/folder      # tiny, to see that the script works

A call to `train` interrupts the run half a minute before its time is up, as Ctrl-C would; the next one resumes it. A call to
`sample` starts no new piece after its time; a piece writes its file when it is whole and is never measured twice.
"""
import json
import signal
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.engine import checkpoint, cost                                                    # noqa: E402
from ncp_vae.engine.experiment import home, read_json, read_record, state_of                   # noqa: E402
from ncp_vae.engine.train import Machine, fit_ncp, fit_vae                                     # noqa: E402
from ncp_vae.models.nvae import NVAE, preset                                                   # noqa: E402
from ncp_vae.models.ratios import ConvRatio                                                    # noqa: E402
from ncp_vae.models.speed import Autocast, speed_up                                            # noqa: E402
from ncp_vae.prior import NoiseContrastivePrior                                                # noqa: E402
from ncp_vae.sampling import SIR                                                               # noqa: E402

VARIANTS = {"bfloat16-channels_last": {"bf16": True, "channels_last": True}, "bfloat16": {"bf16": True},
            "float32-channels_last": {"channels_last": True}, "float32": {},
            "bfloat16-channels_last-heuristics": {"bf16": True, "channels_last": True},     # without cudnn.benchmark
            "bfloat16-channels_last-compiled": {"bf16": True, "channels_last": True, "compile": True}}
FULL = {"preset": "celeba64-30", "width": 64, "proposals": 5_000, "budget": 500, "batch": 100, "at_once": 4_096,
        "memory_proposals": [500, 5_000, 50_000], "memory_at_once": 448, "sweep": [64, 512, 4_096, 16_384],
        "matrix": 8_192, "repeats": 3, "variants": list(VARIANTS), "train_batch": 256, "train_steps": [5, 25],
        "trainings": [["bfloat16-channels_last", 1], ["bfloat16", 1], ["float32-channels_last", 2], ["bfloat16-channels_last", 2],
                      ["bfloat16-channels_last-compiled", 1]]}
QUICK = {"preset": "digits", "width": 2, "proposals": 128, "budget": 64, "batch": 2, "at_once": 64,
         "memory_proposals": [64, 128], "memory_at_once": 64, "sweep": [64, 128],
         "matrix": 64, "repeats": 1, "variants": ["bfloat16-channels_last", "float32"], "train_batch": 8, "train_steps": [1, 2],
         "trainings": [["bfloat16-channels_last", 2]]}


def device_for(args):
    "The device that was asked for; SystemExit where it cannot be had, or would say nothing."
    if args.device == "cpu" and not args.quick:
        raise SystemExit("gpu.py: on a CPU these shapes take hours and say nothing; add --quick to see that the script works")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"gpu.py: torch {torch.__version__} finds no CUDA GPU here. Run it on a machine that has one, or see that "
                         "the script works with --device cpu --quick")
    if args.quick and args.out is None:
        raise SystemExit("gpu.py: --quick needs --out FOLDER, so that its figures do not stand beside real ones")
    return torch.device(args.device)


# ---- sampling: the model --------------------------------------------------------------------------------------------

def built(settings, variant, device):
    "A noise contrastive prior of the preset's shape with random weights, in eval mode."
    bf16, switches = variant.get("bf16", False), {key: on for key, on in variant.items() if key != "bf16"}
    torch.manual_seed(0)
    with device:
        vae = NVAE(preset(settings["preset"]).config)
        ratios = [speed_up(ConvRatio(z, c, settings["width"]).eval(), **switches)
                  for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    return NoiseContrastivePrior(vae, [Autocast(ratio) if bf16 else ratio for ratio in ratios]).eval()


def scales(ncp):
    "{side: (a group of that side with a context, how many groups there are)}."
    sides = [shape[-1] for shape in ncp.vae.latent_shapes]
    return {side: (max(k for k, other in enumerate(sides) if other == side), sides.count(side)) for side in sorted(set(sides))}


def flops(ncp, k, width):
    "Floating-point operations of one proposal in group k, without the context's half of the first convolution."
    z, c = ncp.vae.latent_shapes[k], ncp.vae.context_shapes[k]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        log_ratio = ConvRatio(z, c, width).eval().condition(None if c is None else torch.empty(1, *c))
        before = counter.get_total_flops()
        log_ratio(torch.empty(1, 1, *z))
    return counter.get_total_flops() - before


def drawn(ncp, proposals, batch, at_once=None):
    "Walk once with so many images; so many proposals, of all images together, are evaluated at a time, by default as in the runs."
    sampler = SIR(proposals, at_once and max(1, at_once // batch))
    return ncp.sample(batch, sampler, generator=torch.Generator().manual_seed(1)).latents[-1]


# ---- sampling: the pieces -------------------------------------------------------------------------------------------

def measure_time(settings, ncp, device, batch):
    "Seconds an image with M proposals in every group, and with a tenth of the groups at M and the others at a budget."
    groups, most = len(ncp.ratios), settings["proposals"]
    counts = {"all": [most] * groups, "budgets": [most if k % 10 == 0 else settings["budget"] for k in range(groups)]}
    drawn(ncp, settings["budget"], batch)                          # libraries try their ways, and compilers compile
    times = {name: cost.once(partial(drawn, ncp, proposals, batch), device)[0] for name, proposals in counts.items()}
    work = [flops(ncp, k, settings["width"]) for k in range(groups)]
    tflop = {name: sum(map(int.__mul__, proposals, work)) / 1e12 for name, proposals in counts.items()}
    return {name: {"seconds": seconds, "s_an_image": seconds / batch, "evaluations_an_image": sum(counts[name]),
                   "tflop_an_image": tflop[name], "tflop_s": batch * tflop[name] / seconds} for name, seconds in times.items()}


def measure_rate(settings, ncp, device, dtype):
    "TFLOP/s of the classifiers alone at each scale, of all groups together, and of a large matrix product, in turns."
    size, rows, products = settings["matrix"], settings["at_once"], 10
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls, work, counts = {"matrix product": lambda: [a @ b for _ in range(products)]}, {}, {}
    with torch.no_grad():
        for side, (k, count) in scales(ncp).items():
            z, c = (torch.randn(n, *shape, device=device) for n, shape in
                    ((rows, ncp.vae.latent_shapes[k]), (1, ncp.vae.context_shapes[k])))
            calls[side] = partial(ncp.ratios[k].condition(c), z[:, None])
            work[side], counts[side] = rows * flops(ncp, k, settings["width"]), count
        times = common.compare(calls, 5 * settings["repeats"], device)
    work["matrix product"] = products * 2 * size**3
    rates = {str(name): {**found, "tflop_s": work[name] / found["median_s"] / 1e12} for name, found in times.items()}
    together = (sum(counts[side] * work[side] for side in counts)
                / sum(counts[side] * times[side]["median_s"] for side in counts) / 1e12)
    return {"rates": rates, "all_groups_tflop_s": together, "of_matrix_product": together / rates["matrix product"]["tflop_s"]}


def measure_memory(settings, ncp, device):
    "MB that one image needs at its peak at each M, in small chunks and in those of the runs. Each is drawn once unmeasured."
    found, most = {}, settings["memory_proposals"][-1]
    for m, at_once in [*((m, settings["memory_at_once"]) for m in settings["memory_proposals"]), (most, None)]:
        call = partial(drawn, ncp, m, 1, at_once)
        call()
        grown = cost.peak_growth(call, device)
        found[str(m) if at_once else f"{m}, in the chunks of the runs"] = {"growth_mb": grown and grown / 1e6}
    return found


def trainer(settings, ncp, stage, variant, parts):
    "A function of a number of steps: it trains one stage for so long, on random images."
    shape, batch = ncp.vae.config.image_shape, settings["train_batch"]
    images, ratios = torch.rand(2 * batch, *shape).round(), [getattr(ratio, "ratio", ratio) for ratio in ncp.ratios]
    common_settings = {"batch_size": batch, "lr": 1e-5, "seed": 0, "machine": Machine(**variant, parts=parts)}
    if stage == "vae":
        return lambda steps: fit_vae(ncp.vae, images, steps=steps, kl_warmup=4, kl_balance=True, spectral=0.1, **common_settings)
    return lambda steps: fit_ncp(ncp.vae, images, ratios=ratios, steps=steps, **common_settings)


def measure_training(settings, ncp, device, stage, variant, parts):
    "Images a second of one stage, by what the longer of two trainings takes beyond the shorter; the first, not counted, compiles."
    trained = trainer(settings, ncp, stage, variant, parts)
    few, many = settings["train_steps"]
    grown = cost.peak_growth(partial(trained, few), device)
    times = {steps: cost.once(partial(trained, steps), device)[0] for steps in (few, many)}
    seconds = (times[many] - times[few]) / (many - few)
    speed = settings["train_batch"] / seconds if seconds > 0 else None                   # tiny shapes: the clock is too coarse
    return {"seconds": {str(steps): found for steps, found in times.items()}, "s_a_step": seconds, "images_a_second": speed,
            "growth_mb": grown and grown / 1e6}


def kernels(call):
    "How many kernels and copies a call starts on the GPU, and the seconds that they run, added up."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    there = [event for event in profile.profiler.kineto_results.events() if event.device_type() == torch.autograd.DeviceType.CUDA]
    return len(there), sum(event.duration_ns() for event in there) / 1e9


def measure_kernels(settings, ncp, device, stage, variant):
    "Of one step of a stage: kernels, and seconds that they run; what two steps need beyond one."
    if device.type != "cuda":
        return None
    trained = trainer(settings, ncp, stage, variant, 1)
    trained(1)
    (few, short), (many, long) = (kernels(partial(trained, steps)) for steps in (1, 2))
    return {"kernels_a_step": many - few, "busy_s_a_step": long - short}


def sweep(settings, ncp, device):
    "Microseconds a proposal against how many are evaluated at once, at each scale."
    found = {}
    for side, (k, _) in scales(ncp).items():
        z, c = (torch.randn(n, *shape, device=device) for n, shape in
                ((max(settings["sweep"]), ncp.vae.latent_shapes[k]), (1, ncp.vae.context_shapes[k])))
        with torch.no_grad():
            log_ratio = ncp.ratios[k].condition(c)
            times = common.compare({n: partial(log_ratio, z[:n, None]) for n in settings["sweep"]}, settings["repeats"], device)
        found[str(side)] = {str(n): {**row, "microseconds_a_proposal": 1e6 * row["median_s"] / n} for n, row in times.items()}
    return found


def pieces(settings):
    "{name: (variant, measurement)}, the most wanted first, and last what waits for a compiler."
    found, first, batch = {}, settings["variants"][0], settings["batch"]
    for name in settings["variants"]:
        dtype = torch.bfloat16 if VARIANTS[name].get("bf16") else torch.float32
        found[f"rate-{name}"] = (name, partial(measure_rate, dtype=dtype))
        found[f"time-{name}-batch1"] = (name, partial(measure_time, batch=1))
        if name == first:
            found |= {f"kernels-{stage}-{name}": (name, partial(measure_kernels, stage=stage, variant=VARIANTS[name]))
                      for stage in ("vae", "ncp")}
    for name, parts in settings["trainings"]:
        for stage in ("vae", "ncp"):
            found[f"train-{stage}-{name}-parts{parts}"] = (
                name, partial(measure_training, stage=stage, variant=VARIANTS[name], parts=parts))
    found |= {f"sweep-{first}": (first, sweep), f"memory-{first}": (first, measure_memory),
              f"time-{first}-batch{batch}": (first, partial(measure_time, batch=batch))}
    return dict(sorted(found.items(), key=lambda item: ("compiled" in item[0], item[1][0] != first)))


def done(path, settings, machine):
    "What a piece wrote, if it was of these settings and this GPU; else None: it is measured anew."
    part = json.loads(path.read_text()) if path.is_file() else None
    same = part and part["settings"] == settings and part["machine"]["gpus"] == machine["gpus"]
    return part if same else None


def targets(parts):
    "What was asked for, from the pieces that are there; each names the piece with its best value."
    def best(kind, value, pick):
        found = {name: value(part["found"]) for name, part in parts.items() if name.startswith(kind)}
        return pick(found.items(), key=lambda item: item[1]) if found else None
    wanted = {}
    if fastest := best("time", lambda found: found["all"]["s_an_image"], min):
        wanted[f"seconds an image, all proposals ({fastest[0]})"] = common.target(fastest[1], at_most=0.4)
        name, value = best("time", lambda found: found["budgets"]["s_an_image"], min)
        wanted[f"seconds an image, with budgets ({name})"] = common.target(value, at_most=0.1)
    if rate := best("rate-bfloat16", lambda found: found["of_matrix_product"], max):
        wanted[f"classifiers' rate over a large matrix product's ({rate[0]})"] = common.target(rate[1], at_least=0.3)
    def growth(found):
        grown = [row["growth_mb"] or 0.0 for name, row in found.items() if name.isdigit()]       # None: a system that cannot tell
        return max(grown) - grown[0]
    if memory := best("memory", growth, max):
        wanted[f"growth of peak memory with the number of proposals, MB, the worst ({memory[0]})"] = common.target(
            memory[1], at_most=150)
    return wanted


def sample(args):
    device, settings, machine = device_for(args), QUICK if args.quick else FULL, common.machine()
    folder, stop = args.out or common.RESULTS / "gpu", time.monotonic() + 60 * args.minutes
    torch.set_float32_matmul_precision("high")           # as convolutions are by default: both in TF32 where the GPU has it
    parts, left = {}, {}
    for name, of in pieces(settings).items():
        part = done(folder / f"{name}.json", settings, machine)
        (parts if part else left)[name] = part or of
    for name, (variant, measure) in list(left.items()):
        if time.monotonic() > stop:
            break
        began = time.monotonic()
        torch.backends.cudnn.benchmark = not variant.endswith("heuristics")
        try:
            found = measure(settings, built(settings, VARIANTS[variant], device), device)
        except Exception:                               # of memory, or of a compiler: the other pieces can still be measured
            traceback.print_exc()
            print(f"{name}: failed")
            continue
        parts[name] = {"benchmark": f"gpu {name}", "quick": args.quick, "machine": machine, "settings": settings,
                       "seconds": time.monotonic() - began, "found": found}
        common.write_json(folder / f"{name}.json", parts[name])
        del left[name]
    common.write_json(folder / "sample.json", {"benchmark": "gpu sample", "quick": args.quick, "machine": machine,
                                               "pieces": sorted(parts), "left": list(left), "targets": targets(parts)})
    print(f"{len(left)} pieces left: call again" if left else "no piece is left")


# ---- training -------------------------------------------------------------------------------------------------------

TINY = {"model": "nvae:digits", "vae_steps": 60, "ncp_steps": 40, "ncp_width": 2, "held_out_images": 64, "test_images": 64,
        "num_samples": 2, "log_z_samples": 100, "proposals": 64, "bound_images": 32, "draws": 100, "feature_steps": 5,
        "most_proposals": 64, "target_ess": 4}
CLI = [sys.executable, "-c", "from ncp_vae.engine.cli import main; raise SystemExit(main())"]


def call_for(seconds, command):
    "Run a command; after so many seconds, or at Ctrl-C or SIGTERM, interrupt it and wait for its end. Its exit code."
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, start_new_session=True)       # a terminal's Ctrl-C reaches this process alone
    try:
        return process.wait(max(0.0, seconds))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        return process.wait()                  # ncp-vae gives its run a minute to save, then ends it
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(run):
    "Of each stage: steps taken, of how many, and steps a second, the median over the lines of its history."
    stages, rows = {}, []
    if (run / "history.jsonl").is_file():
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().split("\n") if line]
    for stage in ("vae", "ncp"):
        if (run / f"{stage}.ckpt").is_file():
            saved, lines = checkpoint.load(run / f"{stage}.ckpt"), [row for row in rows if row["stage"] == stage]
            speeds = [(b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in zip(lines, lines[1:])
                      if b["seconds"] > a["seconds"] and b["step"] > a["step"]]
            stages[stage] = {"step": saved["step"], "of": saved["settings"]["steps"],
                             "steps_a_second": statistics.median(speeds) if speeds else None}
    return stages


def report(args, run):
    "Write how far the run has come, and, once it has succeeded, what it found."
    asked, state = read_json(run / "params.json"), state_of(run)
    results = {"benchmark": "gpu train", "quick": args.quick, "machine": common.machine(), "preset": asked["preset"],
               "params": asked["params"], "state": state, "stages": progress(run)}
    if state == "succeeded":
        found = {name: vars(metric) for name, metric in read_record(run)["metrics"].items()}
        results |= {"metrics": found} if args.quick else {"metrics": found, "targets": {
            "nats of the NCP on Fashion-MNIST, below the best of one latent": common.target(found["nll_ncp"]["value"], at_most=224.07),
            "and below the best of all": common.target(found["nll_ncp"]["value"], at_most=223.36),
            "gain of the NCP, the paper's on MNIST": common.target(found["nll_gain"]["value"], at_least=0.57)}}
    common.write_json((args.out or common.RESULTS / "gpu") / "train.json", results)
    for stage, at in results["stages"].items():
        speed = f", {at['steps_a_second']:.3g} steps a second" if at["steps_a_second"] else ""
        print(f"{stage}: step {at['step']} of {at['of']}{speed}")
    trained = len(results["stages"]) == 2 and all(at["step"] == at["of"] for at in results["stages"].values())
    print("the run has succeeded" if state == "succeeded" else f"the run is {state}: call again")
    if trained and state != "succeeded":
        print("both trainings are done; a cell that measures begins anew where it was interrupted: give it the minutes that it needs")


def train(args):
    device_for(args)
    run = args.run or (args.out / "run" if args.out else home() / "runs" / "gpu-fashion_mnist")
    begun = (run / "params.json").is_file()
    if begun and args.param:
        raise SystemExit(f"gpu.py: {run} keeps the parameters it was begun with; leave out -p, or name another folder with --run")
    if not begun or state_of(run) != "succeeded":
        values = ([f"{name}={value}" for name, value in TINY.items()] if args.quick else []) + args.param
        new = ["--preset", "smoke" if args.quick else "full", "--out", str(run), *(word for pair in values for word in ("-p", pair))]
        code = call_for(60 * args.minutes - 30 if args.minutes > 1 else 60 * args.minutes,
                        [*CLI, "run", "hierarchical", *(["--resume", str(run)] if begun else new)])
        if not (run / "params.json").is_file() or code in (1, 2):
            raise SystemExit(f"gpu.py: the run failed with exit code {code}; what it printed says why")
    report(args, run)


def main(argv=None):
    parser = common.argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train | sample")
    for function in (train, sample):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--minutes", type=float, default=9.0, help="how long this call may take (default 9)")
        command.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only with --quick")
        command.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs; its figures mean nothing")
        command.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results/gpu)")
        if function is train:
            command.add_argument("--run", type=Path, help="folder of the run (default runs/gpu-fashion_mnist)")
            command.add_argument("-p", "--param", action="append", default=[], metavar="NAME=VALUE",
                                 help="change the preset full, at the first call; see `ncp-vae params hierarchical`")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
