"""Sampling-importance-resampling with the paper's classifier: memory, time and arithmetic rate, all in one run.

    python benchmarks/sir.py             # about twenty minutes; writes benchmarks/results/sir.json
    python benchmarks/sir.py --quick --out /some/file.json
"""
import copy
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common                                                                                  # noqa: E402

from ncp_vae.models.ratios import ConvRatio                                                    # noqa: E402
from ncp_vae.models.speed import Autocast, cpp_compiler, speed_up                              # noqa: E402
from ncp_vae.nce import nce_loss                                                               # noqa: E402
from ncp_vae.sampling import SIR, effective_sample_size                                        # noqa: E402
from ncp_vae.walk import diagonal_normal                                                       # noqa: E402

LATENT, CONTEXT = (20, 8, 8), (128, 8, 8)      # the smallest maps of a CelebA-64 model
ROWS = 512                                     # rows in one call: a map of 64 channels then takes 8 MB
FULL = {"width": 64, "narrow": 16, "proposals": [500, 5_000, 50_000], "rate_proposals": 512, "at_once": [128, 512, 2_048],
        "images": 16, "steps": 60, "batch": 32, "matrix": 2_048, "repeats": 7, "compile": True, "compare_memory": True,
        "rows": [1, 4, 16, 64], "row_proposals": [100, 1_000], "row_proposals_narrow": [10_000], "at_once_most": 40_000}
QUICK = {"width": 8, "narrow": 4, "proposals": [64, 128, 256], "rate_proposals": 128, "at_once": [128],
         "images": 2, "steps": 3, "batch": 8, "matrix": 256, "repeats": 1, "compile": False, "compare_memory": False,
         "rows": [1, 3], "row_proposals": [64], "row_proposals_narrow": [128], "at_once_most": 200}


def standard(rows):
    "The base prior: N(0, 1) in every entry, for so many images."
    return diagonal_normal(torch.zeros(rows, *LATENT), torch.ones(rows, *LATENT))


def draws(n):
    "Context, and draws of q (first) and p: a shift by 0.04 plus what twenty channels of the context say."
    context = torch.randn(n, *CONTEXT)
    shift = 0.04 * (1 + context[:, :LATENT[0]])
    z = torch.randn(2, n, *LATENT)
    z[0] += shift
    return context, z, (z * shift - shift**2 / 2).flatten(2).sum(-1)


def trained(width, steps, batch):
    "A ConvRatio after some steps, in eval mode."
    torch.manual_seed(0)
    ratio = ConvRatio(LATENT, CONTEXT, width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(ratio.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-7)
    for _ in range(steps):
        context, z, _ = draws(batch)
        loss = nce_loss(*ratio.condition(context)(z))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return ratio.eval().to(memory_format=torch.contiguous_format)


def expanded(ratio, context):
    "log r with the context copied to every proposal: [M, B, *latent] -> [M, B]. The same function, without `condition`."
    weight = torch.cat([ratio.from_z.weight, ratio.from_context.weight], 1)
    def log_ratio(z):
        pairs = torch.cat([z, context.expand(len(z), *context.shape)], 2).flatten(0, 1)
        return ratio.trunk(conv2d(pairs, weight, ratio.from_z.bias, padding=1)).view(z.shape[:2])
    return log_ratio


def all_at_once(log_ratio, prior, proposals):
    "SIR as it is usually written: draw all, weigh all in one call, pick one. Returns [B, *latent]."
    z = prior.sample((proposals,))
    pick = torch.multinomial(log_ratio(z).softmax(0).T, 1)[:, 0]
    return z[pick, torch.arange(z.shape[1])]


def drawn(ratio, context, proposals, kind="streaming"):
    "One draw for each row of the context. kind: runs, in their chunks; streaming, at once, or one of them with the context expanded."
    prior = standard(len(context))
    with torch.no_grad():
        log_ratio = expanded(ratio, context) if kind.endswith("expanded") else ratio.condition(context)
        if kind == "runs":
            return SIR(proposals).draw(log_ratio, prior, torch.Generator().manual_seed(1))
        if kind.startswith("streaming"):
            return SIR(proposals, max(1, ROWS // len(context))).draw(log_ratio, prior, torch.Generator().manual_seed(1))
        return all_at_once(log_ratio, prior, proposals)


# ---- memory ---------------------------------------------------------------------------------------------------------

def measure_memory(width, proposals, kind, threads):
    "In a process of its own: print the peak memory of one draw."
    torch.set_num_threads(threads)
    ratio = speed_up(ConvRatio(LATENT, CONTEXT, width).eval(), channels_last=True)
    before = common.peak_mb()
    drawn(ratio, torch.randn(1, *CONTEXT), proposals, kind)
    print(json.dumps({"peak_mb": common.peak_mb(), "before_mb": before}))


def memory(settings, threads):
    "Peak memory of streaming at the smallest and largest M, and, for comparison, of three ways at the middle one."
    few, middle, many = settings["proposals"]
    cases = [("streaming", few), ("streaming", many)]
    if settings["compare_memory"]:
        cases += [("streaming", middle), ("at once", middle), ("at once, expanded", middle)]
    return {f"{kind}, M = {m}": common.in_new_process(__file__, "--memory-of", settings["narrow"], m, kind, "--threads", threads)
            for kind, m in cases}


# ---- time -----------------------------------------------------------------------------------------------------------

def time_in_proposals(ratio, settings):
    "Seconds of one draw, and microseconds a proposal, at every M."
    context = torch.randn(1, *CONTEXT)
    calls = {str(m): lambda m=m: drawn(ratio, context, m) for m in settings["proposals"]}
    times = common.compare(calls, min(3, settings["repeats"]))
    return {m: {**found, "microseconds_a_proposal": 1e6 * found["median_s"] / int(m)} for m, found in times.items()}


def time_at_once(ratio, settings):
    "The four ways of `drawn`, at several M, with one network."
    context = torch.randn(1, *CONTEXT)
    kinds = ("streaming", "streaming, expanded", "at once", "at once, expanded")
    return {str(m): common.compare({kind: lambda kind=kind: drawn(ratio, context, m, kind) for kind in kinds}, settings["repeats"])
            for m in settings["at_once"]}


def time_in_rows(nets, settings):
    """SIR in the chunks of the runs against expanding everything, for several rows and M.

    nets: {name: (network, [M])}. Where all at once would take gigabytes, the expansion goes in chunks."""
    found = {}
    for name, (ratio, proposals) in nets.items():
        for rows, m in [(rows, m) for m in proposals for rows in settings["rows"]]:
            context = torch.randn(rows, *CONTEXT)
            kind = "at once, expanded" if rows * m <= settings["at_once_most"] else "streaming, expanded"
            times = common.compare({"SIR": lambda: drawn(ratio, context, m, "runs"), kind: lambda: drawn(ratio, context, m, kind)},
                                   3 if rows * m <= 1_000 else 1)
            found[f"{rows} rows, M = {m}, {name}"] = {**times, "SIR over it": times["SIR"]["cpu_s"] / times[kind]["cpu_s"]}
    return found


def variants(ratio, settings):
    "The same network with every combination of the switches that is of use."
    found = {"plain": ratio, "channels_last": speed_up(copy.deepcopy(ratio), channels_last=True)}
    if settings["compile"] and cpp_compiler():
        found["channels_last, compiled"] = speed_up(copy.deepcopy(ratio), channels_last=True, compile=True)
    return {**found, **{f"{name}, bfloat16": Autocast(module) for name, module in found.items()}}


def matrix_products(size):
    "The machine's own large matrix products: torch's own, and oneDNN's, which some processors are faster with."
    a, b = torch.randn(size, size), torch.randn(size, size)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    calls = {"float32": lambda: a @ b, "bfloat16": lambda: half_a @ half_b}
    if torch.backends.mkldnn.is_available():
        dnn_a, dnn_b = a.to_mkldnn(), b.to_mkldnn()
        calls["float32, oneDNN"] = lambda: linear(dnn_a, dnn_b)
    return calls


def rate(networks, settings):
    "GFLOP/s of SIR's proposals (drawing, weighing, racing) and of large matrix products, measured in turns."
    m, context = settings["rate_proposals"], torch.randn(1, *CONTEXT)
    plain = networks["plain"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        log_ratio = plain.condition(context)
        before = counter.get_total_flops()
        log_ratio(torch.randn(1, 1, *LATENT))
    flops = counter.get_total_flops() - before
    products = matrix_products(settings["matrix"])
    calls = {f"matrix product, {name}": call for name, call in products.items()}
    calls |= {name: lambda module=module: drawn(module, context, m) for name, module in networks.items()}
    with torch.no_grad():
        times = common.compare(calls, settings["repeats"])
    count = {name: 2 * settings["matrix"]**3 if name.startswith("matrix") else m * flops for name in calls}
    rates = {name: {**times[name], "gflop_s": count[name] / times[name]["median_s"] / 1e9} for name in calls}
    best = {dtype: max(found["gflop_s"] for name, found in rates.items() if name.startswith(f"matrix product, {dtype}"))
            for dtype in ("float32", "bfloat16")}
    for name in networks:
        rates[name]["of_matrix_product"] = rates[name]["gflop_s"] / best["bfloat16" if "bfloat16" in name else "float32"]
    return {"proposals": m, "gflop_a_proposal": flops / 1e9, "matrix_size": settings["matrix"], "rates": rates}


# ---- the same answers -----------------------------------------------------------------------------------------------

def same_answers(networks, settings):
    "Against the plain network: share of equal picks from the same random numbers, differences of logits, TV of the weights."
    context, z, exact = draws(settings["images"])
    proposals = standard(settings["images"]).sample((settings["rate_proposals"],))
    with torch.no_grad():
        logits = {name: torch.cat([*map(module.condition(context), proposals.split(max(1, ROWS // len(context))))])
                  for name, module in networks.items()}
        held_out = networks["plain"].condition(context)(z)
    picks = {name: drawn(module, context, settings["rate_proposals"]) for name, module in networks.items()}
    plain = logits["plain"]
    found = {}
    for name in networks:
        tv = (logits[name].softmax(0) - plain.softmax(0)).abs().sum(0) / 2
        found[name] = {"equal_picks": (picks[name] == picks["plain"]).flatten(1).all(1).double().mean().item(),
                       "largest_difference_nats": (logits[name] - plain).abs().max().item(),
                       "tv_mean": tv.mean().item(), "tv_largest": tv.max().item()}
    return {"images": settings["images"], "proposals": settings["rate_proposals"],
            "loss": nce_loss(*held_out).item(), "loss_of_exact_ratio": nce_loss(*exact).item(),
            "spread_of_logits_nats": plain.std(0).mean().item(),
            "ess": effective_sample_size(plain, 0).mean().item(), "against_plain": found}


def targets(results, settings):
    "What was asked of these figures."
    few, middle, many = map(str, settings["proposals"])
    stored, times, rates = results["memory"], results["time_in_proposals"], results["rate"]["rates"]
    exact = [found for name, found in results["same_answers"]["against_plain"].items() if "bfloat16" not in name]
    half = [found for name, found in results["same_answers"]["against_plain"].items() if "bfloat16" in name]
    fast = max((name for name in rates if "matrix" not in name and "bfloat16" not in name), key=lambda name: rates[name]["gflop_s"])
    slowest = max(common.ratio(times, "streaming", "at once, expanded") for times in results["at_once"].values())
    growth = stored[f"streaming, M = {many}"]["peak_mb"] - stored[f"streaming, M = {few}"]["peak_mb"]
    per = {m: times[m]["microseconds_a_proposal"] for m in (few, middle, many)}
    return {f"peak memory at M = {many} over M = {few}, MB": common.target(growth, at_most=150),
            f"time a proposal at M = {many} over M = {middle}": common.target(per[many] / per[middle], at_most=1.1),
            "time of streaming over expanding all at once, largest": common.target(slowest, at_most=1.0),
            "CPU time of SIR over expanding, for 1 to 64 rows, largest": common.target(
                max(found["SIR over it"] for found in results["time_in_rows"].values()), at_most=1.0),
            f"float32 rate over a large matrix product's ({fast})": common.target(rates[fast]["of_matrix_product"], at_least=0.7),
            "bfloat16 over float32 speed, same switches": common.target(common.ratio(rates, fast, f"{fast}, bfloat16"), at_least=1.5),
            "TV of the weights under bfloat16, mean": common.target(max(found["tv_mean"] for found in half), at_most=0.02),
            "equal picks, float32, smallest share": common.target(min(found["equal_picks"] for found in exact), at_least=1.0)}


def main():
    parser = common.arguments("sir", __doc__.split("\n")[0])
    parser.add_argument("--memory-of", nargs=3, metavar=("WIDTH", "M", "KIND"), help="one measurement in a process of its own")
    args = parser.parse_args()
    if args.memory_of:
        width, proposals, kind = args.memory_of
        return measure_memory(int(width), int(proposals), kind, args.threads)
    torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else FULL
    results = {"benchmark": "sir", "quick": args.quick, "machine": common.machine(),
               "settings": {**settings, "latent": LATENT, "context": CONTEXT, "rows": ROWS}}
    results["memory"] = memory(settings, args.threads)
    ratio = trained(settings["width"], settings["steps"], settings["batch"])
    networks = variants(ratio, settings)
    results["rate"] = rate(networks, settings)
    results["same_answers"] = same_answers(networks, settings)
    results["at_once"] = time_at_once(networks["channels_last"], settings)
    narrow = speed_up(ConvRatio(LATENT, CONTEXT, settings["narrow"]).eval(), channels_last=True)
    results["time_in_proposals"] = time_in_proposals(narrow, settings)
    results["time_in_rows"] = time_in_rows({
        f"width {settings['width']}": (networks["channels_last"], settings["row_proposals"]),
        f"width {settings['narrow']}": (narrow, settings["row_proposals_narrow"])}, settings)
    results["targets"] = targets(results, settings)
    common.write_json(args.out, results)


if __name__ == "__main__":
    main()
