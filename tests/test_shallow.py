"""The shallow VAEs: sizes by hand, the floor of the posterior, flows on either side, pixels in order, training, storing."""
import json
from itertools import product

import pytest
import torch
from torch.distributions import Normal

from ncp_vae.bound import elbo
from ncp_vae.engine import store
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.flows import RealNVP
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.models.shallow import AutoregressiveBernoulli, ResnetHVAE, ShallowConfig, ShallowVAE, _PixelNet
from ncp_vae.walk import WithPriors, check_trace, from_posterior, from_prior, replay

IMAGES = torch.bernoulli(torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
TWO = dict(steps=2, batch_size=16, lr=1e-3, seed=0)
KINDS = ["dense", "conv", "resnet", "pixel"]
BOTH_WAYS = [(kind, blocks) for kind in KINDS for blocks in (0, 2)]


def config(kind, **kwargs):
    return ShallowConfig(**{**dict(kind=kind, image_shape=(1, 8, 8), latent_dim=4, posterior_hidden=8, width=0.1), **kwargs})


def model(kind="dense", **kwargs):
    torch.manual_seed(0)
    return ShallowVAE(config(kind, **kwargs))


def count(vae):
    return sum(parameter.numel() for parameter in vae.parameters())


def moved(vae):
    "The same VAE, its flow no longer at its start: every parameter a little off, the actnorms set."
    with torch.no_grad():
        for parameter in vae.flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    elbo(vae.train(), IMAGES)
    return vae


def test_a_config_goes_through_json_and_an_unknown_key_is_refused():
    once = config("resnet", posterior_blocks=3, min_log_std=-float("inf"))
    assert ShallowConfig.from_dict(json.loads(json.dumps(once.to_dict()))) == once
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]"):
        ShallowConfig.from_dict(once.to_dict() | dict(depth=3))


def test_a_field_that_came_later_is_left_out_at_its_default():
    "So what was stored before reads as what it was, and a checkpoint of then is of the same training."
    before, pure = ShallowConfig("dense").to_dict(), ShallowConfig("dense", posterior_pure=True).to_dict()
    assert set(pure) - set(before) == {"posterior_pure"}
    assert not ShallowConfig.from_dict(before).posterior_pure and ShallowConfig.from_dict(pure).posterior_pure
    with pytest.raises(ValueError, match=r"missing keys \['width'\]"):
        ShallowConfig.from_dict({name: value for name, value in before.items() if name != "width"})


@pytest.mark.parametrize("wrong, words", [
    (dict(kind="deep"), "kind must be one of .*'deep'"), (dict(kind="conv", image_shape=(1, 30, 28)), "divisible by 4, got 30 x 28"),
    (dict(kind="resnet", image_shape=(1, 28, 27)), "divisible by 4, got 28 x 27"), (dict(image_shape=(8, 8)), "image_shape must be"),
    (dict(posterior_blocks=1, latent_dim=1), "latent_dim of at least 2, got 1"), (dict(latent_dim=0), "latent_dim must be .* got 0"),
    (dict(posterior_blocks=-1), "posterior_blocks must be .* got -1"), (dict(latent_dim=2.5), "latent_dim must be .* got 2.5"),
    (dict(posterior_hidden=0), "posterior_hidden must be .* got 0"), (dict(width=0.0), "width must be positive"),
    (dict(min_log_std=float("nan")), "min_log_std below infinity, got 0.1 and nan")])
def test_what_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        config(**{**dict(kind="dense"), **wrong})


def test_a_dense_net_takes_any_size_and_images_of_another_one_are_refused():
    vae = model("dense", image_shape=(1, 5, 7))
    assert vae.sample(3).likelihood.mean.shape == (3, 1, 5, 7)
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\)"):
        vae.encode(IMAGES)


def test_sizes_of_the_paper():
    "Weights and biases of each layer, by hand; 40 latents."
    heads = 2 * 40
    dense = 785 * 500 + 501 * 500 + 501 * heads + 41 * 500 + 501 * 500 + 501 * 784
    assert count(ShallowVAE(ShallowConfig("dense"))) == dense
    assert count(ShallowVAE(ShallowConfig("dense", latent_dim=64))) == dense + 501 * 48 + 24 * 500
    down = [(1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 16, 1)]
    up = [(16, 64, 1), (64, 64, 2), (64, 64, 1), (64, 32, 2), (32, 32, 1)]
    skips = sum(0 if (i, s) == (o, 1) else s * s * i * o + o for i, o, s in down + up)
    resnet = sum(9 * i * o + o + 9 * o * o + o for i, o, _ in down + up) + skips + 785 * heads + 41 * 784 + 33
    assert count(ShallowVAE(ShallowConfig("resnet"))) == resnet
    residual_maps = resnet - 33                                     # what PixelVAE has of it, without the last layer
    above, left = 6 * 33 * 33 + 33, 4 * 33 * 33 + 33
    pixels = 3 * (2 * above + left + 4 * 66 * 33 + 33) + 34
    assert count(ShallowVAE(ShallowConfig("pixel"))) == residual_maps + pixels
    with_flow = ShallowVAE(ShallowConfig("dense", posterior_blocks=20))
    assert count(with_flow) == dense + count(with_flow.flow) and count(with_flow.flow) == count(RealNVP(40, 20, 256))


@pytest.mark.parametrize("kind, blocks", BOTH_WAYS)
def test_the_walk_is_valid_and_every_parameter_learns(kind, blocks):
    vae = model(kind, posterior_blocks=blocks, image_shape=(1, 8, 12)).train()
    x = torch.bernoulli(torch.rand(16, 1, 8, 12))
    check_trace(vae, vae.walk(from_posterior(), evidence=vae.encode(x)), 16)
    check_trace(vae, vae.walk(from_prior(), n=3), 3)
    elbo(vae, x)                                        # the actnorms are set
    if vae.flow is not None:                            # a coupling's hidden layer learns once its output has moved
        for layer in vae.flow.layers[1::3]:
            torch.nn.init.normal_(layer.network[-1].weight, std=0.1)
    (-elbo(vae, x).elbo.mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


def test_the_two_levels_have_the_sizes_of_the_paper():
    def dense(*widths):
        return sum((i + 1) * o for i, o in zip(widths, widths[1:]))
    flat = count(ShallowVAE(ShallowConfig("resnet"))) + 40 * 784            # its decoder is given both vectors
    extra = dense(784, 150, 150) + dense(40, 150, 150) + dense(300, 300, 80) + dense(40, 150, 150, 80)
    assert count(ResnetHVAE(ShallowConfig("resnet"))) == flat + extra


def test_width_shrinks_units_and_channels():
    assert model("dense", width=0.1).heads.in_features == 50
    small = model("conv", width=0.5)
    assert [layer.out_channels for layer in small.encoder[0] if hasattr(layer, "out_channels")] == [16, 16, 32, 32, 32, 8]
    assert model("conv", width=0.001).heads.in_features == 4                  # one channel of 2 x 2 places is left


@pytest.mark.parametrize("floor", [-11.0, 0.5])
def test_the_floor_of_the_posterior_cuts_the_value_and_the_gradient(floor):
    vae = model(min_log_std=floor)
    with torch.no_grad():
        vae.heads.weight.zero_()
        vae.heads.bias.copy_(torch.tensor([3.0, 0, 0, 0, floor - 1, floor, floor + 1, floor + 2]))
    q = vae.posterior(IMAGES)
    assert torch.allclose(q.stddev[0], torch.tensor([0.0, 0, 1, 2]).add(floor).exp(), rtol=1e-6)
    assert q.mean[0].tolist() == [3, 0, 0, 0]
    q.stddev.log().sum().backward()
    slopes = vae.heads.bias.grad / len(IMAGES)
    assert torch.allclose(slopes[[4, 6, 7]], torch.tensor([0.0, 1, 1])) and torch.equal(slopes[:4], torch.zeros(4))


def test_a_posterior_at_the_floor_has_a_finite_bound_and_gradient():
    vae = model()
    torch.nn.init.constant_(vae.heads.bias[4:].data, -1e4)
    (-elbo(vae, IMAGES).elbo.mean()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in vae.parameters())


def explicit_bound(vae, prior, x, generator):
    "The bound of the same draw, with log q by the transform's own Jacobian matrix: [B], nats."
    with torch.no_grad():
        mean, log_std = vae.heads(vae.encoder(x)).chunk(2, -1)
        z = vae.walk(from_posterior(generator), evidence=vae.encode(x)).latents[0]
        w = vae.flow.transform(z)[0]
    rows = [torch.autograd.functional.jacobian(lambda z: vae.flow.transform(z[None])[0][0], each) for each in z]
    log_q = Normal(mean, log_std.exp()).log_prob(w).sum(-1) + torch.linalg.slogdet(torch.stack(rows))[1]
    return (vae.likelihood(z).log_prob(x) + prior.log_prob(z) - log_q).detach()


@pytest.mark.parametrize("flow_prior", [False, True])
def test_the_bound_of_a_flow_posterior_is_that_of_an_explicit_density(flow_prior):
    "With gradients, where the draw remembers its density, and without, where it is found by a pass back."
    vae = moved(model("dense", posterior_blocks=3)).eval()
    whole = WithPriors(vae, [RealNVP(4, 2, 8)]).eval() if flow_prior else vae
    prior = whole.laws[0](None, 32) if flow_prior else vae.prior(32)
    expected = explicit_bound(vae, prior, IMAGES, torch.Generator().manual_seed(3))
    remembered = elbo(whole, IMAGES, torch.Generator().manual_seed(3)).elbo
    with torch.no_grad():
        found = elbo(whole, IMAGES, torch.Generator().manual_seed(3)).elbo
    assert (remembered - expected).abs().max() < 1e-4 and (found - expected).abs().max() < 1e-4
    assert remembered.requires_grad


@pytest.mark.parametrize("kind, blocks", BOTH_WAYS)
def test_each_kind_trains_is_stored_and_carries_a_contrastive_prior(kind, blocks, tmp_path):
    vae = model(kind, posterior_blocks=blocks)
    before = {name: value.clone() for name, value in vae.named_parameters()}
    fit_vae(vae, IMAGES, **TWO)
    assert all(not torch.equal(value.cpu(), before[name]) for name, value in vae.named_parameters() if "flow" not in name)
    ncp = fit_ncp(vae, IMAGES, ratios=[MLPRatio(4, hidden=(8,))], **TWO)
    again = store.load(store.save(ncp.cpu(), tmp_path / "ncp"))
    assert again.vae.config == vae.config
    with torch.no_grad():
        for prior in (ncp, again):
            trace = prior.vae.walk(from_posterior(torch.Generator().manual_seed(1)), evidence=prior.vae.encode(IMAGES))
            bound = elbo(prior.vae, IMAGES, torch.Generator().manual_seed(1)).elbo
            answer = bound, prior.log_ratio(trace.latents)
            first = answer if prior is ncp else first
    assert all(torch.equal(a, b) for a, b in zip(first, answer))


def two_levels(prior):
    torch.manual_seed(0)
    vae = ResnetHVAE(config("resnet"))
    return WithPriors(vae, [RealNVP(4, 2, 8), None]) if prior else vae


@pytest.mark.parametrize("prior", [False, True])
def test_two_levels_are_a_walk_that_trains_is_stored_and_carries_a_contrastive_prior(prior, tmp_path):
    vae = two_levels(prior)
    trace = check_trace(vae, vae.walk(from_posterior(), evidence=vae.encode(IMAGES)), 32)
    assert torch.equal(trace.steps[1].context, trace.latents[0])
    again = vae.walk(replay(trace.latents), n=32)
    assert torch.equal(again.likelihood.mean, trace.likelihood.mean)
    assert torch.equal(again.steps[1].prior.mean, trace.steps[1].prior.mean)
    check_trace(vae, vae.walk(from_prior(), n=3), 3)
    fit_vae(vae, IMAGES, **TWO)
    (-elbo(vae, IMAGES).elbo.mean()).backward()
    assert all(parameter.grad is not None for name, parameter in vae.named_parameters())
    ratios = [MLPRatio(4, hidden=(8,)), MLPRatio(4, 4, hidden=(8,))]
    ncp = fit_ncp(vae, IMAGES, ratios=ratios, **TWO).cpu()
    stored = store.load(store.save(ncp, tmp_path / "ncp"))
    samples = [one.sample(3, generator=torch.Generator().manual_seed(0)).latents for one in (ncp, stored)]
    assert all(torch.equal(a, b) for a, b in zip(*samples))


def test_both_vectors_reach_the_image_and_the_second_posterior_sees_the_first():
    vae = two_levels(False).eval()
    evidence = vae.encode(IMAGES)
    z = [torch.randn(32, 4), torch.randn(32, 4)]
    plain = vae.walk(replay(z), evidence=evidence)
    for moved_group in (0, 1):
        other = vae.walk(replay([part + (k == moved_group) for k, part in enumerate(z)]), evidence=evidence)
        assert not torch.allclose(other.likelihood.mean, plain.likelihood.mean)
        assert torch.equal(other.steps[1].posterior.mean, plain.steps[1].posterior.mean) is bool(moved_group)


@pytest.mark.parametrize("wrong", [dict(kind="conv"), dict(kind="resnet", posterior_blocks=1)])
def test_two_levels_are_residual_and_without_a_flow_of_the_posterior(wrong):
    with pytest.raises(ValueError, match="ResnetHVAE: expected kind 'resnet' and posterior_blocks 0, got"):
        ResnetHVAE(config(**wrong))


def every_image(*shape):
    "All binary images of a shape: [2^numbers, *shape]."
    numbers = torch.Size(shape).numel()
    return torch.tensor(list(product([0.0, 1.0], repeat=numbers))).view(-1, *shape)


def pixel_law(rows, *shape):
    "A law with rough weights, so that pixels do depend on each other."
    net = _PixelNet(shape[0], 3).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return AutoregressiveBernoulli(net, torch.randn(rows, 3, *shape[1:]))


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 2)])
def test_the_masses_of_all_images_add_up_to_one(shape):
    law, images = pixel_law(2, *shape), every_image(*shape)
    masses = law.log_prob(images.unsqueeze(1).expand(-1, 2, *shape)).double().exp()
    assert (masses.sum(0) - 1).abs().max() < 1e-5 and masses.max() > 2 * masses.mean()
    assert torch.allclose(law.log_prob(images[:2]).double().exp(), masses[:2].diagonal(), rtol=1e-5)


def test_no_pixel_is_seen_by_itself_or_by_one_before_it():
    "For every pixel of an image within reach: the slope is zero exactly at it and behind it, and nowhere before it."
    law = pixel_law(1, 1, 5, 6)
    slopes = torch.autograd.functional.jacobian(lambda x: law._logits(x).flatten(), torch.rand(1, 1, 5, 6)).view(30, 30)
    assert torch.equal(slopes != 0, torch.ones(30, 30, dtype=torch.bool).tril(-1))


def test_draws_have_the_law_and_their_probabilities_its_mean():
    "20,000 draws of 16 images; 16 frequencies within four standard errors, and so the four means."
    law, images = pixel_law(1, 1, 2, 2), every_image(1, 2, 2)
    masses = law.log_prob(images.unsqueeze(1)).exp()[:, 0]
    codes = law.sample((20000,)).flatten(1) @ torch.tensor([8.0, 4, 2, 1])
    counts = torch.bincount(codes.long(), minlength=16)
    assert ((counts / 20000 - masses).abs() < 4 * (masses * (1 - masses) / 20000).sqrt() + 1e-4).all()
    exact = (masses[:, None] * images.flatten(1)).sum(0)
    many = AutoregressiveBernoulli(law.net, law.maps.expand(20000, -1, -1, -1))
    means = many.mean.flatten(1)
    assert ((means.mean(0) - exact).abs() < 4 * means.std(0) / 20000**0.5 + 1e-6).all()
    assert means.std(0)[0] < 1e-6 < means.std(0)[1]                 # nothing comes before the first pixel


def test_a_draw_from_rows_within_reach_is_that_of_the_whole_image():
    law = pixel_law(2, 1, 12, 3)
    torch.manual_seed(5)
    drawn = law.sample()
    torch.manual_seed(5)
    x = torch.zeros(2, 1, 12, 3)
    for i, j in product(range(12), range(3)):
        x[..., i, j] = law._logits(x)[..., i, j].sigmoid().bernoulli()
    assert torch.equal(drawn, x) and 0 < drawn.mean() < 1


def test_dropout_is_that_of_the_walk():
    "A bound without gradients is of the model in eval mode, also where it is in training mode; a walk in training mode has dropout."
    vae = model("pixel")
    assert elbo(vae.eval(), IMAGES, torch.Generator().manual_seed(0)).reconstruction.requires_grad
    with torch.no_grad():
        quiet = elbo(vae, IMAGES, torch.Generator().manual_seed(0)).elbo
        with pytest.warns(UserWarning, match="dropout was in training mode"):
            again = elbo(vae.train(), IMAGES, torch.Generator().manual_seed(0)).elbo
    assert torch.equal(quiet, again) and vae.pixels.training
    law = vae.likelihood(torch.zeros(32, 4))
    vae.eval()
    assert not torch.equal(law.log_prob(IMAGES), law.log_prob(IMAGES)) and not vae.pixels.training


def test_both_flows_are_stored_together(tmp_path):
    vae = fit_vae(WithPriors(model("dense", posterior_blocks=2), [RealNVP(4, 2, 8)]), IMAGES, **TWO).cpu()
    again = store.load(store.save(vae, tmp_path / "vae"))
    with torch.no_grad():
        bounds = [elbo(one, IMAGES, torch.Generator().manual_seed(1)).elbo for one in (vae, again)]
    assert torch.equal(*bounds)
    assert torch.equal(vae.sample(3, generator=torch.Generator().manual_seed(0)).likelihood.mean,
                       again.sample(3, generator=torch.Generator().manual_seed(0)).likelihood.mean)
