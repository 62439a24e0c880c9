"""The two-stage VAE on a linear Gaussian model whose log p(x) is known: its bound, its draws, and what its posterior refuses.

Outer: x = W z + sigma eps; inner: z = u + s eps, u ~ N(0, I), so that z ~ N(0, (1 + s^2) I)."""
import copy
from math import log

import pytest
import torch
from exact import AddedNoise, LinearGaussian, rng, worst

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine import store
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.models.two_stage import LatentVAE, TwoStage
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import SIR, SMC, JointLangevin, JointMALA
from ncp_vae.walk import check_trace, diagonal_normal, draw, from_posterior, from_prior, replay

S = 0.7
MEAN, SCALE = 1 / (1 + S**2), S / (1 + S**2) ** 0.5            # of q(u | z): MEAN z, SCALE
IMAGES = torch.rand(64, 1, 4, 4, generator=rng(0))


def linear(stretch=1.0, shift=0.0, stretch_u=1.0):
    def posterior(z):
        return diagonal_normal(MEAN * z, torch.full_like(z, stretch_u * SCALE))
    outer = LinearGaussian(shift, stretch, t=(1 + S**2) ** 0.5)
    return TwoStage(outer, AddedNoise(2, S, posterior).double())


def seen(n):
    "Images of the model."
    return linear().sample(n, generator=rng(9)).likelihood.sample()


X = seen(3000)
LOG_P = linear().outer.log_evidence(X)


def test_with_exact_encoders_every_draw_of_the_bound_is_log_p():
    for seed in (0, 1):
        assert (elbo(linear(), X, rng(seed)).elbo - LOG_P).abs().max() < 1e-9
    assert (iwae(linear(), X, 3, generator=rng(2)) - LOG_P).abs().max() < 1e-9


@pytest.mark.parametrize("wrong", [dict(stretch=1.4), dict(shift=0.5), dict(stretch_u=1.4), dict(stretch=1.2, stretch_u=1.3)])
def test_it_lies_below_by_both_divergences(wrong):
    "Within five standard errors; and 200 samples, each with a z of its own, bring back all but a twentieth."
    vae, stretch_u = linear(**wrong), wrong.get("stretch_u", 1.0)
    gap = vae.outer.gap() + 2 * ((stretch_u**2 - 1) / 2 - log(stretch_u))
    short = LOG_P - elbo(vae, X, rng(0)).elbo
    assert worst(short, gap) < 5 and short.mean() > 0
    left = LOG_P[:500] - iwae(vae, X[:500], 200, generator=rng(1))
    assert left.mean() < gap / 20


def test_a_density_at_another_z_is_no_bound():
    "The twin states q(u | z) at the mean of q(z | x): above log p(x) by E KL(q(u | z) || q(u | mean))."
    vae = linear()
    trace = vae.walk(from_posterior(rng(0)), evidence=vae.encode(X))
    u, z = trace.latents
    claimed = vae.inner.posterior(vae.encode(X).mean).log_prob(u) + trace.steps[1].posterior.log_prob(z)
    above = trace.likelihood.log_prob(X) + trace.log_prior() - claimed - LOG_P
    expected = (MEAN**2 * vae.encode(X).variance / (2 * SCALE**2)).sum(1).mean()
    assert worst(above, expected) < 5 and above.mean() > 5 * above.std() / len(X) ** 0.5


def test_the_walk_keeps_its_contract():
    vae = linear()
    assert vae.latent_shapes == [torch.Size([2])] * 2 and vae.context_shapes == [None, torch.Size([2])]
    check_trace(vae, vae.walk(from_posterior(rng(0)), evidence=vae.encode(X)), len(X))
    trace = check_trace(vae, vae.walk(from_prior(generator=rng(0)), n=7), 7)
    assert [step.index for step in trace.steps] == [0, 1] and torch.equal(trace.steps[1].context, trace.latents[0])
    again = vae.walk(replay(trace.latents), n=7)
    assert torch.equal(again.log_prior(), trace.log_prior()) and torch.equal(again.likelihood.mean, trace.likelihood.mean)
    assert vae.sample(3, temperature=0.5, generator=rng(1)).steps[1].prior.base_dist.scale.unique().item() == S


def test_a_draw_is_a_function_of_the_generator_alone():
    vae = linear(stretch=1.4)
    one = elbo(vae, X[:9], rng(3)).elbo
    torch.rand(1)
    before = torch.get_rng_state()
    assert torch.equal(elbo(vae, X[:9], rng(3)).elbo, one) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(elbo(vae, X[:9], rng(4)).elbo, one)


def test_pairs_are_drawn_together():
    """With exact encoders and images of the model the pairs have the prior's law: variances 1 and 1 + s^2, covariance 1, within five
    standard errors. A z drawn afresh below the u loses covariance, by the variance of q(z | x), and is found."""
    vae = linear(stretch=1.0)
    vae.outer.sigma = 1.0                                    # a wide q(z | x)
    x = vae.sample(20_000, generator=rng(1)).likelihood.sample()
    u, z = vae.walk(from_posterior(rng(0)), evidence=vae.encode(x)).latents
    assert worst(u * u, 1.0) < 5 and worst(z * z, 1 + S**2) < 5 and worst(u * z, 1.0) < 5
    assert worst(u * vae.encode(x).sample(), 1.0) > 10


def untrained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outer = DenseVAE((1, 4, 4), 3, (16,), sigma=0.1)
        return TwoStage(outer, LatentVAE(outer.latent_shapes[0], 2, (8,)))


def test_the_second_stage_is_trained_on_a_frozen_first_one():
    vae = untrained()
    vae.outer.requires_grad_(False)
    assert vae.train().inner.training and not vae.outer.training
    before = copy.deepcopy(vae.state_dict())
    first = elbo(vae.eval(), IMAGES, rng(1)).elbo.mean()
    fit_vae(vae, IMAGES, steps=30, batch_size=32, lr=1e-2, seed=0)
    moved = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"inner"} and "inner.log_sigma" in before and elbo(vae, IMAGES, rng(1)).elbo.mean() > first


def test_both_stages_are_trained_together_where_both_need_it():
    vae = untrained()
    before = copy.deepcopy(vae.state_dict())
    fit_vae(vae, IMAGES, steps=3, batch_size=32, lr=1e-2, seed=0)
    assert not any(torch.equal(vae.state_dict()[name], before[name]) for name in ("outer.encoder.0.weight", "inner.encoder.0.weight"))


def test_the_deviation_is_the_latents_own():
    "One for each number; a map keeps its shape."
    inner = LatentVAE((2, 1, 3))
    assert inner.latent_shapes == [torch.Size([6])] and inner.log_sigma.shape == (2, 1, 3)
    law = inner.likelihood(torch.zeros(4, 6))
    assert (law.batch_shape, law.event_shape) == ((4,), (2, 1, 3)) and law.stddev.unique().item() == pytest.approx(0.1353, abs=1e-4)


def test_ratios_over_both_groups_do_what_any_ncp_does():
    vae = untrained()
    ratios = [MLPRatio(z, c, hidden=(8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    ncp = fit_ncp(vae, IMAGES, ratios=ratios, steps=5, batch_size=32, lr=1e-3, seed=0)
    assert isinstance(ncp, NoiseContrastivePrior)
    for sampler in (SIR(5), SMC(5), JointLangevin(2, 0.01), JointMALA(2, 0.01)):
        assert ncp.sample(4, sampler).likelihood.mean.shape == (4, 1, 4, 4)
    assert abs(ncp.log_partition(200, rng(0)).value) < 2
    assert iwae(vae, IMAGES[:5], 3, ncp.normalised_log_ratio, rng(1)).isfinite().all()


def test_it_is_stored_and_comes_back_to_the_bit(tmp_path):
    vae = untrained().eval()
    again = store.load(store.save(vae, tmp_path / "two"))
    assert torch.equal(elbo(again, IMAGES, rng(0)).elbo, elbo(vae, IMAGES, rng(0)).elbo)


def swapped(step):
    "u from the posterior, but another one is taken."
    z = draw(step.posterior)
    return z if step.index else z + 1


@pytest.mark.parametrize("choose, words", [
    (swapped, "made with that of u"), (lambda step: step.posterior.sample((4,)), r"once a walk, not in shape \(4,\)"),
    (lambda step: draw(step.posterior if step.index else step.prior), "the walk must choose u by from_posterior")])
def test_a_z_beside_a_u_of_another_origin_is_refused(choose, words):
    vae = linear()
    with pytest.raises(ValueError, match=words):
        vae.walk(choose, evidence=vae.encode(X))


def test_a_density_at_latents_of_another_origin_is_refused():
    "Also at an earlier draw of its own, whose z is gone."
    vae = linear()
    trace = vae.walk(from_posterior(rng(0)), evidence=vae.encode(X))
    with pytest.raises(ValueError, match="knows the density of u only where it has drawn u itself"):
        vae.walk(replay(trace.latents), evidence=vae.encode(X)).log_posterior()
    trace.log_posterior()
    draw(trace.steps[0].posterior)
    with pytest.raises(ValueError, match="knows the density of u only where it has drawn u itself"):
        trace.log_posterior()


def test_other_numbers_of_groups_and_other_shapes_are_refused():
    deep = DenseHierarchy((1, 4, 4), groups=2, latent_dim=2, hidden=8, width=8)
    with pytest.raises(ValueError, match=r"two VAEs of 1 latent group each are needed, got \[2, 1\] groups"):
        TwoStage(deep, LatentVAE((2,)))
    wrong = TwoStage(DenseVAE((1, 4, 4), 3, (8,), sigma=0.1), LatentVAE((5,), hidden=(8,)))
    with pytest.raises(ValueError, match=r"images of shape \(3,\); this VAE was built for \(5,\)"):
        elbo(wrong, IMAGES)
