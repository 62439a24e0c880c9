"""The deep hierarchy: its walk, its sizes, its regularisers, what it restores and what it refuses."""
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.train import fit_vae
from ncp_vae.models.batch_norm import readjusted_batch_norm
from ncp_vae.models.cells import NormedConv2d, bottom_up_cell, top_down_cell
from ncp_vae.models.nvae import NVAE, PRESETS, NVAEConfig, Preset, _balance_alpha, _gaussian, preset
from ncp_vae.models.spectral import SpectralNorms, norm_scales, stacked_kernels
from ncp_vae.walk import FlatVAE, check_trace, diagonal_normal, from_posterior, from_prior, replay

TINY = preset("digits").config
SCALES = NVAEConfig((3, 12, 12), (1, 2), channels=4, blocks=1, cells_per_block=2, latent_channels=3, cells_per_group=1,
                    padding=2, likelihood="normal")
ALL = {"two scales, padded, Normal": SCALES, "tiny": TINY, "one group": replace(TINY, groups_per_scale=(1,)),
       "logistics": replace(TINY, likelihood="discretised_logistics", mixtures=3),
       "colour logistics": replace(SCALES, likelihood="discretised_logistics", mixtures=2, bits=5)}


def images(config, n=6):
    "Zeros and ones, which every likelihood can produce."
    return torch.bernoulli(torch.full((n, *config.image_shape), 0.4))


@pytest.fixture(params=ALL, ids=list(ALL))
def vae(request):
    return NVAE(ALL[request.param]).eval()


def seeded(seed):
    "A generator of its own."
    return torch.Generator().manual_seed(seed)


# ---- the walk -------------------------------------------------------------------------------------------------------

def test_every_shape_is_the_declared_one(vae):
    x = images(vae.config)
    trace = check_trace(vae, vae.walk(from_posterior(), evidence=vae.encode(x)), len(x))
    assert trace.likelihood.event_shape == x.shape[1:] and trace.likelihood.mean.shape == x.shape
    assert len(trace.steps) == sum(vae.config.groups_per_scale) == len(vae.kl_alpha)
    bound = elbo(vae, x)
    assert bound.elbo.isfinite().all() and (bound.kl >= 0).all()


def test_a_replay_without_the_image_is_the_same_walk(vae):
    with torch.no_grad():
        seen = vae.walk(from_posterior(), evidence=vae.encode(images(vae.config)))
        again = vae.walk(replay(seen.latents), n=6)
    assert torch.equal(seen.log_prior(), again.log_prior()) and torch.equal(seen.likelihood.mean, again.likelihood.mean)
    for a, b in zip(seen.steps, again.steps):
        assert b.posterior is None and (a.context is b.context is None if a.index == 0 else torch.equal(a.context, b.context))


def test_the_context_knows_the_groups_before_and_not_the_rest():
    vae = NVAE(replace(TINY, groups_per_scale=(4,))).eval()
    latents = vae.walk(from_prior(), n=2).latents
    steps = vae.walk(replay(latents), n=2).steps
    changed = [z + 1.0 if k == 1 else z for k, z in enumerate(latents)]
    others = vae.walk(replay(changed), n=2).steps
    same = [torch.equal(a.context, b.context) for a, b in zip(steps[1:], others[1:])]
    assert same == [True, False, False]


def test_the_first_prior_has_the_floor_in_it():
    first = NVAE(TINY).walk(from_prior(), n=2).steps[0].prior
    assert torch.equal(first.mean, torch.zeros(2, 4, 4, 4)) and torch.allclose(first.stddev, torch.tensor(1.01))


def test_the_posterior_is_the_prior_where_the_encoder_adds_nothing():
    vae = NVAE(TINY).eval()
    with torch.no_grad():
        for group in vae.groups:
            group.residual.weight.fill_(1e-8), group.residual.log_norm.fill_(-100.0), group.residual.bias.zero_()
        assert torch.allclose(elbo(vae, images(TINY)).kl, torch.zeros(6, 2), atol=1e-5)


def test_clamp_and_floor_of_the_residual_act_on_the_sum():
    "Facts of the published code: -3 and -4 together give a sigma of 0.0220."
    parameters = torch.cat([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), -7.0)], 1)
    assert _gaussian(parameters).stddev.item() == pytest.approx(0.0220, abs=5e-5)


def test_padding_is_cropped_and_black():
    vae = NVAE(SCALES).eval()
    x = images(SCALES)
    wide = NVAE(replace(SCALES, image_shape=(3, 16, 16), padding=0)).eval()
    wide.load_state_dict(vae.state_dict())
    framed = nn.functional.pad(x, [2] * 4)
    with torch.no_grad():
        for a, b in zip(vae.encode(x), wide.encode(framed)):
            assert torch.equal(a, b)
        z = vae.walk(from_prior(), n=3).latents
        inner = wide.walk(replay(z), n=3).likelihood.mean[..., 2:-2, 2:-2]
        assert torch.equal(vae.walk(replay(z), n=3).likelihood.mean, inner)


def test_iwae_is_above_the_elbo():
    "On average over images and draws; 5 standard errors of the paired difference."
    torch.manual_seed(3)
    vae, x = NVAE(TINY).eval(), images(TINY, 100)
    with torch.no_grad():
        gap = iwae(vae, x, 20) - torch.stack([elbo(vae, x).elbo for _ in range(20)]).mean(0)
    assert gap.mean() > 5 * gap.std() / 10


def test_gradients_reach_every_parameter(vae):
    vae.train()
    (vae.regularisation() - elbo(vae, images(vae.config)).elbo.sum()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_bf16_autocast_keeps_the_densities_in_float32():
    vae, x = NVAE(SCALES).eval(), images(SCALES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trace = vae.walk(from_posterior(), evidence=vae.encode(x))
        assert {step.prior.mean.dtype for step in trace.steps} == {trace.likelihood.mean.dtype} == {torch.float32}
        assert vae.regularisation().dtype == torch.float32


def test_autocast_does_not_round_the_latents():
    "What reads a latent or gives a Normal its parameters is in float32; the maps between are in bf16, whose eight bits are the rounding."
    vae, x, seen = NVAE(SCALES).eval(), images(SCALES), []
    for group in vae.groups:
        for layer in (group.mix, group.residual, *([group.prior] if group.prior else [])):
            layer.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
        group.cells.register_forward_hook(lambda _, given, out: seen.append(given[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vae.walk(from_posterior(), evidence=vae.encode(x))
    assert {each for each in seen if isinstance(each, tuple)} == {(torch.float32, torch.float32)}
    assert [each for each in seen if not isinstance(each, tuple)][1:] == 2 * [torch.bfloat16]


def test_double_precision_stays_double():
    vae = NVAE(TINY).double().eval()
    assert vae.walk(from_posterior(), evidence=vae.encode(images(TINY).double())).log_prior().dtype == torch.float64


def test_thirty_untrained_groups_do_not_explode():
    "The broken twin hears the groups before at full strength from the start."
    torch.manual_seed(0)
    vae = NVAE(replace(TINY, groups_per_scale=(30,)))
    x = images(TINY, 32)
    with torch.no_grad():
        quiet = elbo(vae, x).kl.mean(0)
        for group in vae.groups[1:]:
            group.prior.reset_norm(), group.see.reset_norm()
        loud = elbo(vae, x).kl.mean(0)
    assert quiet.max() < 20 and loud[-1] > 100 * quiet[-1]


def test_a_few_steps_raise_the_bound():
    torch.manual_seed(0)
    vae, x = NVAE(TINY), images(TINY, 64) * (torch.arange(8) > 3)          # the left half of every image is black
    optimizer = torch.optim.Adamax(vae.parameters(), 1e-2, eps=1e-3)
    values = []
    for _ in range(30):
        bound = elbo(vae, x).elbo.mean()
        optimizer.zero_grad()
        (1e-2 * vae.regularisation() - bound).backward()
        optimizer.step()
        values.append(bound.item())
    assert values[-1] > values[0] + 10


# ---- sizes ----------------------------------------------------------------------------------------------------------

CONTEXTS = {"mnist": [(256, 4)], "fashion_mnist": [(256, 4), (128, 8)], "cifar10": [(256, 16)], "digits": [(16, 4)], "photos32": [(16, 16)],
            "fashion_mnist8-2": [(32, 8)], **dict.fromkeys(["fashion_mnist8-5", "fashion_mnist8-10", "colour32"], [(64, 4), (32, 8)]),
            "celeba64-6": [(384, 8), (192, 16), (96, 32)], "celeba64-15": [(384, 8), (192, 16), (96, 32)],
            "celeba64-30": [(384, 8), (192, 16), (96, 32)],
            "celebahq256": [(1024, 8), (512, 16), (256, 32), (128, 64), (64, 128)]}
GROUPS = {"mnist": 10, "fashion_mnist": 15, "cifar10": 30, "digits": 2, "photos32": 3, "celeba64-6": 6, "celeba64-15": 15, "celeba64-30": 30,
          "celebahq256": 20, "fashion_mnist8-2": 2, "fashion_mnist8-5": 5, "fashion_mnist8-10": 10, "colour32": 5}


@cache
def on_meta(name):
    "A preset's net in shapes alone, without memory."
    with torch.device("meta"):
        return NVAE(preset(name).config).eval()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_shapes(name):
    "A whole walk on the meta device."
    vae, config = on_meta(name), preset(name).config
    x = torch.rand(2, *config.image_shape, device="meta")
    trace = check_trace(vae, vae.walk(from_posterior(), evidence=vae.encode(x)), 2)
    assert trace.likelihood.mean.shape == x.shape
    assert len(trace.latents) == GROUPS[name]
    found = [(z.shape[1], *step.context.shape[1:3]) for step, z in zip(trace.steps, trace.latents) if step.index]
    assert list(dict.fromkeys(found)) == [(config.latent_channels, *pair) for pair in CONTEXTS[name]]


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal", "discretised_logistics"])
@pytest.mark.parametrize("spoil", [lambda x: 255 * x, lambda x: 2 * x - 1, lambda x: x * float("nan")])
def test_images_out_of_range_are_refused_by_every_likelihood(likelihood, spoil):
    "Before a step is taken: `fit_vae` scores its first batch in eval mode. A Normal has all numbers as its support."
    vae, x = NVAE(replace(TINY, likelihood=likelihood, mixtures=2)), torch.rand(8, *TINY.image_shape).round()
    with pytest.raises(ValueError, match=r"takes images in \[0, 1\], got values from|NaN"):
        fit_vae(vae, spoil(x), steps=1, batch_size=4, lr=1e-3, seed=0)


@pytest.mark.parametrize("name, millions, flows", [("mnist", 44.1, False), ("fashion_mnist", 33.4, False), ("cifar10", 130.7, True),
                                                   ("celeba64-6", 26.6, True), ("celeba64-15", 65.0, True),
                                                   ("celeba64-30", 129.0, True), ("celebahq256", 365.4, True)])
def test_a_preset_has_the_published_size(name, millions, flows):
    "To the last digit given, or less what one or two flows a group weigh: at most 2 %."
    size = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    assert 0.98 * millions < size < millions if flows else abs(size - millions) < 0.05


def test_presets_and_configurations_survive_json():
    for each in PRESETS.values():
        assert Preset.from_dict(json.loads(json.dumps(each.to_dict()))) == each
        assert each.from_source and each.inferred


@pytest.mark.parametrize("change, words", [
    (dict(image_shape=(1, 7, 7)), "side 3.5"), (dict(image_shape=(1, 12, 12)), "side 6"), (dict(image_shape=(1, 4, 4)), "side 2"),
    (dict(groups_per_scale=(2, 2)), "side 2"), (dict(groups_per_scale=()), "groups_per_scale"), (dict(groups_per_scale=(0,)), "groups_per_scale"),
    (dict(groups_per_scale=2), "groups_per_scale"), (dict(image_shape=(1, 8, 16)), "H = W"), (dict(channels=9), "channels"),
    (dict(blocks=-1), "blocks"), (dict(latent_channels=0), "latent_channels"), (dict(cells_per_group=1.5), "cells_per_group"),
    (dict(padding=-1), "padding"), (dict(likelihood="gauss"), "'gauss'"), (dict(likelihood="discretised_logistics", bits=9), "8 bits"),
    (dict(likelihood="discretised_logistics", image_shape=(2, 8, 8)), "colours")])
def test_configurations_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]"):
        NVAEConfig.from_dict(TINY.to_dict() | dict(depth=3))
    with pytest.raises(ValueError, match=r"missing keys \['channels'\]"):
        NVAEConfig.from_dict({key: value for key, value in TINY.to_dict().items() if key != "channels"})
    with pytest.raises(ValueError, match="celeba64-15"):
        preset("celeba64")


def test_batches_and_images_that_are_refused():
    vae = NVAE(TINY)
    for call in (lambda: vae.encode(images(TINY, 1)), lambda: vae.walk(from_prior(), n=1)):
        with pytest.raises(ValueError, match="batch of 1"):
            call()
    with pytest.raises(ValueError, match="built for"):
        vae.encode(torch.rand(2, 3, 8, 8))
    assert vae.eval().walk(from_prior(), n=1).latents[0].shape == (1, 4, 4, 4)


# ---- regularisers and balancing -------------------------------------------------------------------------------------

def exact_norms(model):
    return torch.cat([torch.linalg.matrix_norm(stack, ord=2) for stack in stacked_kernels(model)]).detach()


def test_spectral_norms_are_the_largest_singular_values():
    "From below always; after 200 iterations within 1 % (two values closer than that are nearly the same value)."
    vae = NVAE(SCALES)
    for _ in range(40):
        norms = vae.spectral_norms(vae).detach()
    exact = exact_norms(vae)
    assert (norms < exact * (1 + 1e-5)).all() and (norms > 0.99 * exact).all()
    assert len(exact) == sum(isinstance(m, nn.Conv2d) for m in vae.modules())
    assert torch.allclose(vae.regularisation(), vae.spectral_norms(vae).sum() + norm_scales(vae).sum(), rtol=1e-4)


def test_a_normed_kernel_enters_with_its_norm():
    conv = NormedConv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        conv.log_norm.fill_(1.0), conv.weight.fill_(-20.0)
    assert SpectralNorms(conv)(conv).item() == pytest.approx(torch.e, rel=1e-5)


def test_the_first_call_iterates_longer_and_four_are_not_enough():
    torch.manual_seed(1)
    conv = nn.Conv2d(64, 64, 1)
    first, few = SpectralNorms(conv), SpectralNorms(conv)
    few.started.fill_(True)                                    # the broken twin: no long first call
    exact = exact_norms(conv)
    assert (first(conv) / exact).item() > max(0.97, (few(conv) / exact).item())


def test_gradients_through_two_calls_before_one_backward():
    vae = NVAE(TINY)
    (vae.regularisation() + vae.regularisation()).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)


def test_a_state_that_is_loaded_says_itself_whether_it_is_started():
    conv = nn.Conv2d(8, 8, 1)
    fresh, used = SpectralNorms(conv), SpectralNorms(conv)
    state = {name: value.clone() for name, value in fresh.state_dict().items()}
    used(conv), used.load_state_dict(state)
    assert torch.equal(used(conv), fresh(conv))                # forty iterations again, from the same start


def test_a_checkpoint_holds_all_of_it():
    vae = NVAE(TINY)
    vae.regularisation(), vae.walk(from_prior(), n=4)
    torch.manual_seed(9)
    other = NVAE(NVAEConfig.from_dict(vae.config.to_dict()))
    other.load_state_dict(vae.state_dict())
    assert torch.equal(vae.regularisation(), other.regularisation()) and other.spectral_norms.started
    a, b = (model.eval().walk(from_prior(generator=seeded(0)), n=3).likelihood.mean for model in (vae, other))
    assert torch.equal(a, b)


def test_alpha_of_the_published_models():
    def alpha(*groups):
        config = NVAEConfig((1, 8 * 2**len(groups), 8 * 2**len(groups)), groups, 4, 1, 1)
        return list(dict.fromkeys(_balance_alpha(config).tolist()))
    assert alpha(5, 10, 20) == [1, 2, 4] and alpha(5, 10) == [1, 2] and alpha(30) == [1]
    assert alpha(4, 4, 4, 4, 4) == [1, 4, 16, 64, 256]


def test_balancing_presses_what_pays():
    kl = torch.tensor([[4.0, 1.0], [2.0, 1.0]], requires_grad=True)
    vae = NVAE(TINY)
    assert torch.equal(vae.kl_alpha, torch.ones(2))
    shares = vae.kl_weights(kl)
    assert shares.mean().item() == pytest.approx(1) and not shares.requires_grad
    assert (shares[0] / shares[1]).item() == pytest.approx(3.01 / 1.01)
    vae.kl_alpha = torch.tensor([1.0, 4.0])
    assert vae.kl_weights(torch.ones(5, 2)).tolist() == pytest.approx([1.6, 0.4])


# ---- cells ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cell", [bottom_up_cell, top_down_cell])
def test_a_deep_chain_keeps_its_scale(cell):
    x = torch.randn(16, 8, 4, 4)
    for _ in range(60):
        x = cell(8)(x)
    assert 0.9 < x.std() < 1.5


# ---- batch-norm re-adjustment ---------------------------------------------------------------------------------------

def everything(vae):
    norms = [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]
    return ({name: value.clone() for name, value in vae.state_dict().items()}, [module.training for module in vae.modules()],
            [norm.momentum for norm in norms])


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_readjustment_restores_every_bit(error):
    vae = NVAE(SCALES)
    vae.groups[1].eval()
    before = everything(vae)
    def use():
        with readjusted_batch_norm(vae, 0.7, batches=3):
            assert not same(before, everything(vae)) and not any(module.training for module in vae.modules())
            if error:
                raise error
    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert same(before, everything(vae))


def test_readjustment_restores_where_its_own_walks_fail(monkeypatch):
    vae = NVAE(TINY)
    before, calls, walk = everything(vae), [], vae.walk
    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return walk(*args, **kwargs)
    monkeypatch.setattr(vae, "walk", breaks)
    with pytest.raises(MemoryError):
        with readjusted_batch_norm(vae, 0.7, batches=5):
            pass
    assert same(before, everything(vae))


def test_readjustment_leaves_the_encoder_alone_and_the_random_numbers_too():
    vae = NVAE(TINY).eval()
    before, state = everything(vae)[0], torch.get_rng_state()
    with readjusted_batch_norm(vae, 0.7, batches=2, generator=seeded(0)):
        inside = everything(vae)[0]
    assert torch.equal(state, torch.get_rng_state())
    moved = {name.split(".")[0] for name in before if name.endswith("running_var") and not torch.equal(before[name], inside[name])}
    assert moved == {"groups", "post_process"}


def test_readjusted_statistics_are_the_average_of_the_walks():
    "The plain average over all batches, without a trace of what was there; the broken twin is one momentum step for each."
    vae, means = NVAE(TINY).eval(), []
    norm = next(module for module in vae.groups[1].modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean.fill_(100.0)
    hook = norm.register_forward_pre_hook(lambda module, inputs: means.append(inputs[0].mean((0, 2, 3))))
    with readjusted_batch_norm(vae, 0.5, batches=20):
        assert len(means) == 20 and torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-5)
    hook.remove()
    assert 100 * 0.95**20 > 30                                 # what a momentum of 0.05 would have left


class OneNumberAnImage(FlatVAE):
    "The whole image is its latent, N(0, 1): a channel's variance is 1, and positions are no independent values."
    def __init__(self):
        super().__init__(1)
        self.norm = nn.BatchNorm2d(1)

    def likelihood(self, z):
        mean = self.norm(z[:, :, None, None].expand(-1, 1, 4, 4))
        return diagonal_normal(mean, torch.ones_like(mean))


@pytest.mark.parametrize("batch_size", [4, 16])
def test_readjusted_statistics_are_those_of_all_walks_together(batch_size):
    """A variance of 1/4 at a temperature of 1/2, to 5 standard errors of 20,000 images; the average of the variances of
    batches, with PyTorch's n / (n - 1) over all positions, would be 3/4 or 15/16 of that."""
    vae, n = OneNumberAnImage(), 20_000
    with readjusted_batch_norm(vae, 0.5, n // batch_size, batch_size, seeded(0)):
        assert vae.norm.running_var.item() == pytest.approx(0.25, rel=5 * (2 / n) ** 0.5)
        assert abs(vae.norm.running_mean.item()) < 5 * 0.5 / n**0.5


@pytest.mark.parametrize("settings", [dict(batches=0), dict(batch_size=1)])
def test_readjustment_without_statistics(settings):
    with pytest.raises(ValueError, match="at least 1 batch"):
        with readjusted_batch_norm(NVAE(TINY), 0.7, **settings):
            pass
