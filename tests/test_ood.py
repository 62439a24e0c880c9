"""L>k and LLR>k: against tables of a discrete walk of three groups, and what the prior, the ratio and the input must be.

The two-level Gaussian, its broken twins and the directions in which a ratio moves the scores are checked in the chapter itself."""
import pytest
import torch
from exact import AddedNoise, Enumerated, Function, Ladder, Table, ToNormal, ladder, rng
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ncp_vae.flows import RealNVP
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.ood import bounds_above, walk_above
from ncp_vae.prior import NoiseContrastivePrior, ReweightedPrior
from ncp_vae.walk import WithPriors, diagonal_normal, from_posterior, from_prior, seeded

SIZES = (2, 3, 2)


@pytest.fixture
def discrete():
    "A walk of three groups by tables, images 0..2, and a prior that reweights it by tables."
    vae = Enumerated.random(SIZES, number=3)
    tables = [torch.randn(above, size, generator=rng(k), dtype=torch.float64) for k, (above, size) in enumerate(zip((1, 2, 6), SIZES))]
    return vae, ReweightedPrior(vae, [Table(table.exp()) for table in tables])


def by_tables(vae, x, tables=None):
    "L>0, L>1, L>2 of one image, all sums written out: [3]."
    def at(law, above):
        return law.reshape(-1, law.shape[-1])[above]
    found = torch.zeros(3, dtype=torch.float64)
    for state in torch.cartesian_prod(*(torch.arange(size) for size in SIZES)):
        above, weight, gained = 0, 1.0, []
        for k, size in enumerate(SIZES):
            q, p = at(vae.q[k][x], above), at(vae.p[k], above)
            weight = weight * q[state[k]]
            ratio = 0.0 if tables is None else tables[k][above, state[k]]
            gained.append(ratio - (q * (q / p).log()).sum())
            above = above * size + state[k]
        for k in range(3):
            at_k = 0
            for j, size in enumerate(SIZES):
                z = state[j] if j < 3 - k else at(vae.p[j], at_k).argmax()
                at_k = at_k * size + z
            found[k] += weight * (vae.px.flatten(0, -2)[at_k, x].log() + sum(gained[:3 - k]))
    return found


@pytest.mark.parametrize("reweighted", [False, True])
def test_three_groups_by_tables(discrete, reweighted):
    "The mean over many walks lies within 4.5 standard errors of the sums; counted from the other end, or with all terms, it does not."
    vae, prior = discrete
    tables = [ratio.log_table for ratio in prior.ratios] if reweighted else None
    n = 20_000
    for image in range(3):
        x = torch.full((n,), image)
        found = bounds_above(prior if reweighted else vae, x, generator=rng(image)).double()
        truth = by_tables(vae, image, tables)
        error = (found.var(1) / n).sqrt()
        assert found.shape == (3, n) and ((found.mean(1) - truth).abs() < 4.5 * error).all()
        twin = by_tables(vae, image, None if reweighted else [ratio.log_table for ratio in prior.ratios])
        assert ((found.mean(1) - twin).abs() > 10 * error).any()


def test_each_row_is_the_walk_that_it_says(discrete):
    "To the bit, at the very draws: the k last latents are the prior's most likely, the terms of the groups above are those of the ELBO."
    vae, prior = discrete
    x = torch.arange(3).repeat(20)
    rows, reweighted = (bounds_above(each, x, generator=rng(5)) for each in (vae, prior))
    with seeded(rng(5)):
        trace = vae.walk(from_posterior(), evidence=x)
    ratios = torch.stack(prior.log_ratios(trace))
    for k in range(3):
        filled = walk_above(vae, trace.latents, k, lambda step: step.prior.probs.argmax(-1))
        assert all(torch.equal(a, b) for a, b in zip(filled.latents[:3 - k], trace.latents))
        kl = sum(torch.distributions.kl_divergence(step.posterior, step.prior) for step in trace.steps[:3 - k])
        torch.testing.assert_close(rows[k], filled.likelihood.log_prob(x) - kl)
        torch.testing.assert_close(reweighted[k] - rows[k], ratios[:3 - k].sum(0))
        if k:
            assert any(not torch.equal(a, b) for a, b in zip(filled.latents[3 - k:], trace.latents[3 - k:]))


def test_row_0_is_the_elbo():
    vae = DenseHierarchy((1, 4, 4), 3, 2, 16, 8)
    x = torch.bernoulli(torch.full((7, 1, 4, 4), 0.5))
    with seeded(rng(2)), torch.no_grad():
        trace = vae.eval().walk(from_posterior(), evidence=vae.encode(x))
        expected = trace.likelihood.log_prob(x) - torch.stack(
            [torch.distributions.kl_divergence(step.posterior, step.prior) for step in trace.steps]).sum(0)
    with torch.no_grad():
        rows = bounds_above(vae, x, generator=rng(2))
    assert rows.shape == (3, 7)
    torch.testing.assert_close(rows[0], expected)


def test_one_group_has_the_elbo_alone():
    "And with a ratio log r at the draw on top."
    vae = AddedNoise(2)
    x = torch.randn(5, 2, generator=rng())
    prior = ReweightedPrior(vae, [ToNormal(0.5, 0.8)])
    plain, ours = bounds_above(vae, x, 3, rng(1)), bounds_above(prior, x, 3, rng(1))
    log_evidence = Normal(0.0, 2**0.5).log_prob(x).sum(1)
    assert plain.shape == ours.shape == (1, 5)
    mean = torch.stack([bounds_above(vae, x, 1, rng(seed))[0] for seed in range(2000)])
    assert ((mean.mean(0) - log_evidence).abs() < 4.5 * mean.std(0) / 2000**0.5).all()      # the posterior is exact
    with seeded(rng(1)):
        draws = [vae.posterior(x).rsample() for _ in range(3)]
    torch.testing.assert_close((ours - plain)[0], torch.stack([prior.log_ratio([z]) for z in draws]).mean(0))


def test_samples_are_averaged():
    vae, x = Ladder(laws=list(ladder().ratios)), torch.randn(6, 1, generator=rng())
    with seeded(rng(4)):
        each = [bounds_above(vae, x) for _ in range(5)]
    torch.testing.assert_close(bounds_above(vae, x, 5, rng(4)), torch.stack(each).mean(0))


def test_the_generator_alone_decides_and_priors_are_paired():
    "One seed gives one result and the same draws under every prior; the global state is left alone."
    vae = DenseHierarchy((1, 4, 4), 3, 2, 16, 8)
    ratios = [MLPRatio(z, c, hidden=(8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    x = torch.bernoulli(torch.full((4, 1, 4, 4), 0.5))
    silent = ReweightedPrior(vae, [Function(lambda z, c: 0 * z.sum(-1), of_context=True)] * 3)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (bounds_above(vae, x, 2, rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(bounds_above(silent, x, 2, rng(1)), first)
        ours = bounds_above(NoiseContrastivePrior(vae, ratios), x, 2, rng(1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)
    assert (ours != first).any(1).all() and torch.isfinite(ours).all()


def test_log_z_is_no_part_of_it():
    "A ratio times a number moves every image alike: no ranking sees it."
    vae = DenseHierarchy((1, 4, 4), 2, 2, 16, 8)
    x = torch.bernoulli(torch.full((6, 1, 4, 4), 0.5))
    def level(value):
        return Function(lambda z, c: value + 0 * z.sum(-1), of_context=True)
    with torch.no_grad():
        plain = bounds_above(vae, x, generator=rng())
        ours = bounds_above(ReweightedPrior(vae, [level(2.0), level(0.5)]), x, generator=rng())
    torch.testing.assert_close(ours - plain, torch.tensor([[2.5], [2.0]]).expand(2, 6), rtol=0, atol=1e-4)


def test_a_model_in_training_mode_is_scored_in_eval_mode():
    "Batch norm takes its running means, and keeps them."
    class Normed(AddedNoise):
        def __init__(self):
            super().__init__(2)
            self.norm = nn.BatchNorm1d(2)
        def encode(self, x):
            return super().encode(self.norm(x))
    vae = Normed().train()
    x = torch.randn(8, 2, generator=rng()) + 3
    with torch.no_grad(), pytest.warns(UserWarning, match="batch norm"):
        found = bounds_above(vae, x, generator=rng())
    assert vae.training and vae.norm.running_mean.eq(0).all()
    with torch.no_grad():
        assert torch.equal(found, bounds_above(vae.eval(), x, generator=rng()))


class Pair(nn.Module):
    "Two Gaussians on a line."
    def forward(self, context, n):
        return MixtureSameFamily(Categorical(torch.ones(n, 2)), Independent(Normal(torch.zeros(n, 2, 1), torch.ones(n, 2, 1)), 1))


class Loose(nn.Module):
    "A mixture inside `Independent`."
    def forward(self, context, n):
        return Independent(MixtureSameFamily(Categorical(torch.ones(n, 1, 2)), Normal(torch.zeros(n, 1, 2), torch.ones(n, 1, 2))), 1)


@pytest.mark.parametrize("law, name", [(Pair(), "MixtureSameFamily"), (Loose(), "MixtureSameFamily")])
def test_a_prior_without_a_mode_is_named(law, name):
    vae = WithPriors(Ladder(groups=2, laws=list(ladder().ratios)), [None, law])
    with pytest.raises(ValueError, match=f"prior of group 1 is a {name}, which has no mode"):
        bounds_above(vae, torch.randn(4, 1))
    above = WithPriors(vae.vae, [law, None])                     # at the top nobody asks for its mode
    assert bounds_above(above, torch.randn(4, 1)).shape == (2, 4)


def test_a_flow_has_no_mode_either():
    vae = Ladder(groups=2, event=(2,), laws=list(ladder().ratios))
    with pytest.raises(ValueError, match="group 1 is a .*, which has no mode"):
        bounds_above(WithPriors(vae, [None, RealNVP(2, 2, 8)]), torch.randn(4, 2))


@pytest.mark.parametrize("num_samples", [0, -3])
def test_samples_below_one_are_refused(num_samples):
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {num_samples}"):
        bounds_above(AddedNoise(1), torch.zeros(2, 1), num_samples)


def test_images_that_the_model_cannot_make_are_refused():
    vae = DenseHierarchy((1, 4, 4), 2, 2, 16, 8)
    with pytest.raises(ValueError, match="outside the likelihood's support"):
        bounds_above(vae, torch.full((2, 1, 4, 4), 0.5))


def test_walk_above_replays_the_top_and_asks_below():
    vae = Ladder(groups=3)
    latents = list(torch.randn(3, 5, 1, generator=rng()))
    for k in range(4):
        asked = []
        def below(step):
            asked.append(step.index)
            return step.prior.mean + 7
        trace = walk_above(vae, latents, k, below)
        assert asked == list(range(3 - k, 3))
        for j in range(3):
            expected = latents[j] if j < 3 - k else 7 + (0.8 * trace.latents[j - 1] if j else 0 * latents[0])
            torch.testing.assert_close(trace.latents[j], expected)
    drawn = walk_above(vae, [latents[0]], 2, from_prior(generator=rng()))       # only what is needed
    assert torch.equal(drawn.latents[0], latents[0]) and not torch.equal(drawn.latents[1], latents[1])


def test_walk_above_refuses():
    vae = Ladder(groups=3)
    latents = list(torch.randn(3, 5, 1))
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"between 0 and the 3 latent groups, got {k}"):
            walk_above(vae, latents, k, from_prior())
    with pytest.raises(ValueError, match="at least one latent"):
        walk_above(vae, [], 3, from_prior())
    with pytest.raises(ValueError, match="1 latents given"):
        walk_above(vae, latents[:1], 1, from_prior())


def test_gradients_reach_the_images():
    vae = Ladder(groups=2, laws=list(ladder().ratios), by_image=0.5)
    x = torch.randn(3, 2, generator=rng()).requires_grad_()
    class Narrow(type(vae)):
        def walk(self, choose, **how):
            trace = super().walk(choose, **how)
            trace.likelihood = diagonal_normal(trace.latents[-1].expand(-1, 2), torch.ones(len(trace.latents[0]), 2))
            return trace
    vae.__class__ = Narrow
    bounds_above(vae, x, generator=rng()).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).any()
