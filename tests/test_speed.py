"""The switches for speed change times, not answers; and the benchmark that measures the times runs.

Picks: SIR keeps the largest of M keys log w + Gumbel. Two largest of some hundred keys are closer than 1e-4 in about one row of ten
thousand, so float32 ways whose logits agree to 1e-4 pick alike; the seeds are fixed anyway. torch.compile needs a C++ compiler,
and one test is skipped where there is none."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ncp_vae.bound import elbo
from ncp_vae.models.nvae import NVAE, preset
from ncp_vae.models.ratios import ConvRatio, MLPRatio, PooledLogit
from ncp_vae.models.speed import Autocast, _outermost, cpp_compiler, speed_up
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import SIR
from ncp_vae.walk import FlatVAE, diagonal_normal

ROOT = Path(__file__).resolve().parents[1]
LATENT, CONTEXT, ROWS = (4, 8, 8), (3, 8, 8), 6
PRIOR = diagonal_normal(torch.zeros(ROWS, *LATENT), torch.ones(ROWS, *LATENT))


def network(context=CONTEXT, spread=1.5):
    "An untrained classifier in eval mode, its last layer scaled so that its logits have this spread in nats."
    ratio = ConvRatio(LATENT, context, width=8).eval()
    with torch.no_grad():
        row = None if context is None else torch.randn(1, *context)
        log_r = ratio.condition(row)(torch.randn(256, 1, *LATENT))
        ratio.trunk[-1].linear.weight *= spread / log_r.std()
    return ratio


def weigh(ratio, context, proposals=100):
    with torch.no_grad():
        return ratio.condition(context)(PRIOR.sample((proposals,)))


def pick(ratio, context, chunk=None):
    with torch.no_grad():
        return SIR(100, chunk).draw(ratio.condition(context), PRIOR, torch.Generator().manual_seed(1))


# ---- channels_last and chunks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_picks(context, chunk, channels_last):
    ratio, c = network(context), None if context is None else torch.randn(ROWS, *CONTEXT)
    fast = speed_up(copy.deepcopy(ratio), channels_last=channels_last)
    assert torch.equal(pick(fast, c, chunk), pick(ratio, c))


def test_another_ratio_picks_otherwise():
    "The twin of the test above: picks are sensitive to the logits."
    ratio, c = network(), torch.randn(ROWS, *CONTEXT)
    other = copy.deepcopy(ratio)
    nn.init.normal_(other.trunk[-1].linear.weight)
    assert not torch.equal(pick(other, c), pick(ratio, c))


def test_same_logits_in_float64():
    "The formats differ by the order of sums alone."
    ratio = network().double()
    fast = speed_up(copy.deepcopy(ratio), channels_last=True)
    z, c = torch.randn(20, ROWS, *LATENT).double(), torch.randn(ROWS, *CONTEXT).double()
    assert torch.allclose(fast.condition(c)(z), ratio.condition(c)(z), atol=1e-12)


def test_maps_stay_channels_last_through_the_network():
    "Otherwise every convolution would rearrange them."
    ratio, formats = speed_up(network(), channels_last=True), []
    for part in ratio.trunk[:-1]:
        part.register_forward_hook(lambda module, inputs, out: formats.append(out.is_contiguous(memory_format=torch.channels_last)))
    weigh(ratio, torch.randn(ROWS, *CONTEXT))
    assert formats == 9 * [True]


def test_in_place_and_the_same_state():
    ratio = network()
    before = copy.deepcopy(ratio.state_dict())
    assert speed_up(ratio, channels_last=True) is ratio
    assert ratio.state_dict().keys() == before.keys()
    assert all(torch.equal(ratio.state_dict()[key], before[key]) for key in before)
    network().load_state_dict(ratio.state_dict())


def test_switches_are_off_by_default():
    ratio = speed_up(network())
    assert ratio.from_z.weight.is_contiguous() and ratio.trunk._compiled_call_impl is None


# ---- compile --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not cpp_compiler(), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_network_picks_the_same():
    "One block between the first layer and the last, to compile in seconds; benchmarks/sir.py does it with all eight."
    ratio, c = network(), torch.randn(ROWS, *CONTEXT)
    ratio.trunk = nn.Sequential(ratio.trunk[0], ratio.trunk[4], PooledLogit(16)).eval()
    compiled = speed_up(copy.deepcopy(ratio), channels_last=True, compile=True)
    assert torch.equal(pick(compiled, c), pick(ratio, c))
    assert compiled.trunk._compiled_call_impl is not None and compiled.state_dict().keys() == ratio.state_dict().keys()


def test_without_a_compiler_it_is_said_before_anything_is_changed(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ratio = network()
    with pytest.raises(RuntimeError, match="C\\+\\+ compiler"):
        speed_up(ratio, channels_last=True, compile=True)
    assert ratio.from_z.weight.is_contiguous()
    assert speed_up(ratio, channels_last=True) is ratio                       # this one needs none


def test_an_empty_part_is_not_compiled():
    "The first group of a hierarchy has no cells; a graph of nothing breaks what is compiled around it."
    module = nn.ModuleDict(dict(empty=nn.Sequential(), full=nn.Sequential(nn.Identity())))
    assert list(_outermost(module)) == [module["full"]]


def test_thirty_groups_are_two_dozen_graphs(monkeypatch):
    "Groups of one scale share their graphs. Counted by torch's own backend, which compiles nothing; few channels, no backward pass."
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend=counter)))
    vae = speed_up(NVAE(replace(preset("celeba64-30").config, channels=4, latent_channels=2)).eval(), compile=True)
    torch._dynamo.reset()
    with torch.no_grad():
        elbo(vae, torch.rand(2, 3, 64, 64))
    assert len(vae.latent_shapes) == 30 and 0 < counter.frame_count <= 24


def test_nothing_to_compile_is_an_error():
    with pytest.raises(ValueError, match="Linear has none"):
        speed_up(nn.Linear(2, 1), compile=True)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------

def types_of(ratio, c, where):
    "The dtypes that a layer gives, plain and under Autocast."
    found = []
    handle = where.register_forward_hook(lambda module, inputs, out: found.append(out.dtype))
    outer = [weigh(ratio, c).dtype, weigh(Autocast(ratio), c).dtype]
    handle.remove()
    return found, outer


def test_layers_in_bfloat16_and_logits_in_float32():
    ratio, c = network(), torch.randn(ROWS, *CONTEXT)
    for layer in (ratio.from_context, ratio.trunk[1].branch[2], ratio.trunk[-2]):
        assert types_of(ratio, c, layer) == ([torch.float32, torch.bfloat16], 2 * [torch.float32])
    for layer in (ratio.from_z, ratio.trunk[-1]):           # a latent and a logit keep the digits that they have
        assert types_of(ratio, c, layer)[0] == 2 * [torch.float32]
    assert {p.dtype for p in Autocast(ratio).parameters()} == {torch.float32}


def test_weights_hardly_change():
    ratio, c, z = network(), torch.randn(ROWS, *CONTEXT), PRIOR.sample((300,))
    with torch.no_grad():
        plain, low = ratio.condition(c)(z), Autocast(ratio).condition(c)(z)
    assert plain.std(0).min() > 0.8 and not torch.equal(plain, low)
    tv = (plain.softmax(0) - low.softmax(0)).abs().sum(0) / 2
    assert tv.max() < 0.02


def test_a_constant_costs_no_precision():
    "Logits around -40: the last layer in float32 keeps their differences, which bfloat16 would round to quarters of a nat."
    ratio, c, z = network(), torch.randn(ROWS, *CONTEXT), PRIOR.sample((100,))
    with torch.no_grad():
        before = Autocast(ratio).condition(c)(z)
        ratio.trunk[-1].linear.bias -= 40
        after = Autocast(ratio).condition(c)(z)
    assert (after + 40 - before).abs().max() < 1e-4
    assert ((before - 40).bfloat16().float() + 40 - before).abs().max() > 0.05       # twin


def test_sampling_stays_in_float32():
    ratio, c = Autocast(network()), torch.randn(ROWS, *CONTEXT)
    found = SIR(100).resample(ratio.condition(c), PRIOR, torch.Generator().manual_seed(0))
    assert found.z.dtype == found.log_mean_ratio.dtype == found.ess.dtype == torch.float32


def test_autocast_of_a_perceptron_and_without_context():
    ratio = Autocast(MLPRatio(5, hidden=(8, 8)))
    assert ratio(torch.randn(3, 5)).dtype == torch.float32


def test_gradients_pass_through():
    ratio, c = network(), torch.randn(ROWS, *CONTEXT)
    z = torch.randn(ROWS, *LATENT, requires_grad=True)
    plain, = torch.autograd.grad(ratio(z, c).sum(), z)
    low, = torch.autograd.grad(Autocast(ratio)(z, c).sum(), z)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(plain.flatten(1), low.flatten(1)).min() > 0.99


def test_all_switches_stack():
    ratio, c, z = network(), torch.randn(ROWS, *CONTEXT), PRIOR.sample((300,))
    fast = speed_up(Autocast(copy.deepcopy(ratio)), channels_last=True)
    assert fast.ratio.from_z.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain, low = ratio.condition(c)(z), fast.condition(c)(z)
    assert ((plain.softmax(0) - low.softmax(0)).abs().sum(0) / 2).max() < 0.02


# ---- one group ------------------------------------------------------------------------------------------------------

class Flat(FlatVAE):
    "p(z) = N(0, I); nobody looks at its likelihood."

    def likelihood(self, z):
        return diagonal_normal(z, torch.ones_like(z))


@pytest.mark.parametrize("wrap", [lambda ratio: ratio, lambda ratio: speed_up(ratio, channels_last=True), Autocast])
def test_one_group_is_the_flat_code_to_the_bit(wrap):
    ratio = wrap(network(None))
    walked = NoiseContrastivePrior(Flat(LATENT), [ratio]).sample(ROWS, SIR(100), generator=torch.Generator().manual_seed(1))
    assert torch.equal(walked.latents[0], pick(ratio, None))


# ---- the benchmark --------------------------------------------------------------------------------------------------

def test_benchmark_runs_and_says_on_what(tmp_path, command):
    command("python", ROOT / "benchmarks" / "sir.py", "--quick", "--out", tmp_path / "sir.json")
    found = json.loads((tmp_path / "sir.json").read_text())
    assert found["quick"] and {"memory", "time_in_proposals", "time_in_rows", "at_once", "rate", "same_answers", "settings"} <= found.keys()
    assert {"date", "cpu", "cpus", "threads", "packages", "python", "gpus", "load_average_1_min"} <= found["machine"].keys()
    assert found["targets"] and all({"value", "wanted", "met"} == target.keys() for target in found["targets"].values())
    equal = found["same_answers"]["against_plain"]["channels_last"]["equal_picks"]
    assert equal == 1.0 and all(min(case["peak_mb"], case["before_mb"]) > 0 for case in found["memory"].values())
