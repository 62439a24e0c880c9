"""Closest pairs, active units, the best decoder, KL(q(z) || p(z)) from both sides and the four terms, against sums written out and closed forms."""
from math import inf, log

import pytest
import torch
from exact import RUNGS, AddedNoise, Ladder, LinearGaussian, Rung, ToNormal, rng
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from ncp_vae import holes
from ncp_vae.bound import elbo, iwae
from ncp_vae.flows import FlowLaw, RealNVP
from ncp_vae.holes import AggregatePosterior
from ncp_vae.overlap import active_units, active_units_by_group, closest_pairs, decoder_weights, four_terms, marginal_kl
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.walk import diagonal_normal


def aggregate(x, scale=lambda x: 0.3 + x.abs() / 3):
    "q(z) of posteriors N(x, s(x)^2), for x of any shape."
    return AggregatePosterior(AddedNoise(x.shape[1:], posterior=lambda x: diagonal_normal(x, scale(x))), x)


def elsewhere(posterior, x):
    "q(z) of any posteriors."
    return AggregatePosterior(AddedNoise(x.shape[1:], posterior=posterior), x)


# ---- pairs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("event, pieces", [((3,), 1000), ((2, 2), 1000), ((3,), 5)])
def test_closest_pairs_are_those_of_the_formulas(monkeypatch, event, pieces):
    "One image after the other, the variance along the pair from 20,000 draws: 5 % is 7 of its standard errors."
    monkeypatch.setattr(holes, "_PIECE", pieces)
    x = torch.randn(12, *event, generator=rng(0))
    pairs = closest_pairs(aggregate(x))
    flat, scale = x.flatten(1), (0.3 + x.abs() / 3).flatten(1)
    for i in range(12):
        distances = (flat - flat[i]).norm(dim=1)
        distances[i] = inf
        j = distances.argmin()
        unit = (flat[j] - flat[i]) / distances[j]
        noise = torch.randn(20_000, flat.shape[1], generator=rng(i))
        std = [(noise * scale[k] @ unit).std() for k in (i, j)]
        assert pairs.index[i] == j and torch.isclose(pairs.distance[i], distances[j])
        assert torch.isclose(pairs.normalised[i], 2 * distances[j] / sum(std), rtol=0.05)


def test_more_rows_than_are_compared_at_a_time():
    x = torch.rand(2300, 1, generator=rng(0)).sort(0).values.double()
    pairs = closest_pairs(aggregate(x, torch.ones_like))
    assert ((pairs.index - torch.arange(2300)).abs() == 1).all()                 # on a line: a neighbour
    gaps = x[:, 0].diff()
    assert torch.allclose(pairs.distance[1:-1], torch.minimum(gaps[1:], gaps[:-1]))
    assert torch.allclose(pairs.normalised, pairs.distance)


def test_a_pair_at_one_place_has_distance_zero():
    pairs = closest_pairs(aggregate(torch.tensor([[1.0], [1.0], [5.0]])))
    assert pairs.index[:2].tolist() == [1, 0]
    assert pairs.distance[:2].tolist() == pairs.normalised[:2].tolist() == [0.0, 0.0] and pairs.normalised[2] > 0


def test_what_closest_pairs_refuses():
    with pytest.raises(ValueError, match="at least two images.*got 1"):
        closest_pairs(aggregate(torch.zeros(1, 2)))
    correlated = elsewhere(lambda x: MultivariateNormal(x, torch.eye(2) + 0.5), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="independent coordinates.*MultivariateNormal"):
        closest_pairs(correlated)


# ---- active units ---------------------------------------------------------------------------------------------------

def test_active_units_are_above_the_threshold():
    "Means +a and -a: the variance is a^2 exactly."
    x = torch.tensor([1.0, -1.0])[:, None].expand(2, 3) * torch.tensor([0.09, 0.11, 1.0])
    assert active_units(aggregate(x, torch.ones_like)).tolist() == [False, True, True]
    assert active_units(aggregate(x, torch.ones_like), threshold=0.5).tolist() == [False, False, True]
    assert active_units(aggregate(x.view(2, 3, 1), torch.ones_like)).shape == (3, 1)


def test_a_flow_posterior_tells_its_mean_by_draws():
    "One coordinate of the base follows the image, the other does not. The flow is as it was made, a linear map with actnorms unset."
    torch.manual_seed(0)
    flow = RealNVP(2, blocks=1, hidden=4).eval()
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).repeat(20, 1)
    q = elsewhere(lambda x: FlowLaw(diagonal_normal(x, torch.ones_like(x)), flow), x)
    state = torch.get_rng_state()
    found = active_units(q)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(found, active_units(q))
    with torch.no_grad():
        means = flow.inverse(x)[0]
    assert torch.equal(found, means.var(0, correction=0) > 0.01) and found.any()


def test_the_noise_of_drawn_means_is_not_taken_for_activity():
    """Deviation 4 and no image followed: a mean of 100 draws varies by 0.16, of 1,000 by 0.016, both above the threshold. Over 4,000 images
    0.16 is known to 0.0036, a third of the threshold. The second coordinate varies by 0.05 besides, and is found."""
    flow = RealNVP(2, blocks=1, hidden=4).eval()
    flow.layers[0].lower.data.zero_(), flow.layers[0].upper.data.zero_(), flow.layers[0].log_diagonal.data.zero_()
    x = torch.tensor([0.0, 0.05**0.5]) * torch.tensor([1.0, -1.0]).repeat(2000)[:, None]
    order = flow.inverse(torch.tensor([[1.0, 0.0]]))[0][0].abs() < 0.5          # where the first coordinate of the noise ends up
    q = elsewhere(lambda x: FlowLaw(diagonal_normal(x, torch.full_like(x, 4.0)), flow), x)
    assert torch.equal(active_units(q), order) and order.sum() == 1


def test_groups_of_a_hierarchy_have_active_units_of_their_own():
    """z_2 takes half of z_1 and the image takes it back: given z_1 its mean follows the image, on average over the walks it does not. A mean
    of 5 draws varies by .04, above the threshold; over 2,000 images that is known to .001. In parts of images, and without touching the
    global stream."""
    x = torch.randn(2000, 1, generator=rng(0)) @ torch.tensor([[1.0, -0.5, 0.5]])
    vae = Ladder(laws=[Rung(*each) for each in RUNGS], by_image=0.5)
    state = torch.get_rng_state()
    assert [units.tolist() for units in active_units_by_group(vae, x, 5)] == [[True], [False], [True]]
    assert torch.equal(state, torch.get_rng_state())
    assert [units.tolist() for units in active_units_by_group(vae, x, 5, threshold=0.5)] == [[True], [False], [False]]
    with pytest.raises(ValueError, match="at least 2, got 1"):
        active_units_by_group(vae, x, 1)


# ---- the best decoder -----------------------------------------------------------------------------------------------

def test_weights_are_the_posterior_of_the_image(monkeypatch):
    monkeypatch.setattr(holes, "_PIECE", 5)
    x, z = torch.randn(17, 2, generator=rng(0)).double(), torch.randn(9, 2, generator=rng(1)).double()
    density = Independent(Normal(x, 0.3 + x.abs() / 3), 1).log_prob(z[:, None]).exp()
    weights = decoder_weights(aggregate(x), z)
    assert weights.shape == (9, 17) and torch.allclose(weights, density / density.sum(1, keepdim=True))


def test_far_away_weights_are_finite():
    weights = decoder_weights(aggregate(torch.tensor([[0.0], [1.0]]), torch.ones_like), torch.tensor([[1e3]]))
    assert weights.isfinite().all() and weights[0, 1] == 1


@pytest.mark.parametrize("law", ["bernoulli", "normal"])
def test_no_step_away_from_the_best_decoder_helps(law):
    "sum_i w_i log p(x_i | z) has no gradient at FP 8, and is lower in every one of 50 directions."
    x = torch.bernoulli(torch.full((6, 4), 0.5), generator=rng(0)).double()
    x[:2] = torch.tensor([[0.0] * 4, [1.0] * 4])                                 # no pixel is the same everywhere
    z = torch.randn(5, 4, generator=rng(1)).double()
    weights = decoder_weights(aggregate(x, lambda x: 1.0 + x), z)
    def term(mean):
        p = Bernoulli(mean[:, None]) if law == "bernoulli" else Normal(mean[:, None], 0.5)
        return (weights * p.log_prob(x).sum(2)).sum(1)
    best = (weights @ x).requires_grad_()
    value = term(best)
    assert torch.autograd.grad(value.sum(), best)[0].abs().max() < 1e-9
    for seed in range(50):
        step = 1e-3 * torch.randn(best.shape, generator=rng(seed)).double()
        assert (term((best + step).clamp(1e-6, 1 - 1e-6)) < value).all()


# ---- KL(q(z) || p(z)) -----------------------------------------------------------------------------------------------

def test_both_sides_are_the_sums_written_out(monkeypatch):
    monkeypatch.setattr(holes, "_PIECE", 5)
    x = torch.randn(13, 2, generator=rng(0))
    q = aggregate(x)
    above, below = marginal_kl(q, 1, generator=rng(3))
    with torch.random.fork_rng():
        torch.manual_seed(torch.randint(2**62, (), generator=rng(3)).item())
        z = torch.cat([law.sample() for law in q.posteriors])
    table = Independent(Normal(x, 0.3 + x.abs() / 3), 1).log_prob(z[:, None])
    log_p = Normal(0.0, 1.0).log_prob(z).sum(1) + log(13)
    without = table.masked_fill(torch.eye(13, dtype=torch.bool), -inf)
    for found, rows, kind in ((above, table, "upper bound"), (below, without, "lower bound")):
        values = (rows.logsumexp(1) - log_p).double()
        assert found.value == pytest.approx(values.mean().item(), abs=1e-5) and found.kind == kind
        assert found.std_error == pytest.approx((values.var() / 13).sqrt().item(), rel=1e-4) and found.n == 13


def test_of_a_fixed_set_of_images_the_upper_side_is_exact():
    "Against the integral of the mixture's log ratio on a line: 5 standard errors of 900 draws."
    x = torch.tensor([[-1.5], [0.2], [2.0]])
    grid = torch.linspace(-12, 12, 4001).double()
    q = aggregate(x)
    density = q.log_prob(grid[:, None])
    log_ratio = density - Normal(0.0, 1.0).log_prob(grid)
    truth = torch.trapezoid(density.exp() * log_ratio, grid).item()
    variance = torch.trapezoid(density.exp() * (log_ratio - truth).square(), grid).item()
    above, below = marginal_kl(q, 300, generator=rng(0))
    assert abs(above.value - truth) < 5 * (variance / 900) ** 0.5 and below.value < truth - 0.5


def test_of_a_sample_of_images_they_enclose_the_truth_and_close():
    "x = z + eps with its exact posterior: q = p and the KL is 0. Over 30 sets; 5 standard errors."
    found = {}
    for n in (20, 80):
        sides = [marginal_kl(AggregatePosterior(AddedNoise(1), torch.randn(n, 1, generator=rng(s)) * 2**0.5), 4, generator=rng(s))
                 for s in range(30)]
        found[n] = torch.tensor([[side.value for side in pair] for pair in sides])
        mean, error = found[n].mean(0), found[n].std(0) / 30**0.5
        assert mean[0] > -5 * error[0] and mean[1] < 5 * error[1]
        assert mean[0] > mean[1]
    assert found[80].mean(0)[0] < found[20].mean(0)[0] and found[80].mean(0)[1] > found[20].mean(0)[1]


def test_a_reweighted_prior_moves_both_sides_by_the_mean_of_its_log_ratio():
    x = torch.randn(50, 2, generator=rng(0))
    ratio = ToNormal(0.5, 0.8, log_z=0.7)
    q = aggregate(x)
    plain = marginal_kl(q, 3, generator=rng(1))
    moved = marginal_kl(q, 3, lambda latents: ratio(latents[0]) - 0.7, rng(1))
    other = aggregate(x)
    other.prior = diagonal_normal(torch.full((1, 2), 0.5), torch.full((1, 2), 0.8))
    for side, under, twin in zip(moved, marginal_kl(other, 3, generator=rng(1)), plain):
        assert side.value == pytest.approx(under.value, abs=1e-5) and abs(side.value - twin.value) > 0.05


# ---- the four terms -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift, stretch", [(0.0, 1.0), (0.5, 1.3)])
def test_four_terms_of_a_linear_gaussian(shift, stretch):
    "The last column is `gap` but for the bias of iwae, some 1 / (2 S) of the weights' variance; 5 standard errors and .01."
    vae = LinearGaussian(shift, stretch)
    x = (torch.randn(400, 2, generator=rng(0)) @ vae.W.T.float() + 0.2 * torch.randn(400, 3, generator=rng(1))).double()
    terms = four_terms(vae, x, 200, generator=rng(2))
    log_p = vae.log_evidence(x).mean().item()
    exact = {"kl_z|x": vae.gap(), "elbo": log_p - vae.gap(), "kl": elbo(vae, x).kl.mean().item()}
    exact["recons"] = exact["elbo"] + exact["kl"]
    assert list(terms) == ["elbo", "recons", "kl", "kl_z|x"]
    for name, value in terms.items():
        assert abs(value.value - exact[name]) < 5 * value.std_error + 0.01, name
        assert value.n == 400 and value.kind == ("lower bound" if name == "elbo" else "estimate")


def test_terms_belong_together():
    vae, x = AddedNoise(2, posterior=lambda x: diagonal_normal(x / 2, torch.ones_like(x))), torch.randn(30, 2, generator=rng(0))
    terms = {name: value.value for name, value in four_terms(vae, x, 5, generator=rng(1)).items()}
    assert terms["elbo"] == pytest.approx(terms["recons"] - terms["kl"], abs=1e-5) and terms["kl_z|x"] > 0
    one = {name: value.value for name, value in four_terms(vae, x, 1, generator=rng(1)).items()}
    assert one["kl_z|x"] == 0 and one["elbo"] != terms["elbo"]


def test_a_reweighted_prior_leaves_the_reconstruction_alone_and_is_iwaes():
    vae, x = AddedNoise(2), torch.randn(2500, 2, generator=rng(0)) * 2**0.5
    ratio = ToNormal(0.5, 0.8, log_z=0.7)
    def log_ratio(latents):
        return ratio(latents[0]) - 0.7
    plain, moved = four_terms(vae, x, 20, generator=rng(1)), four_terms(vae, x, 20, log_ratio, rng(1))
    assert moved["recons"] == plain["recons"] and moved["elbo"].kind == "estimate"
    assert moved["kl"].value - plain["kl"].value == pytest.approx(plain["elbo"].value - moved["elbo"].value, abs=1e-4)
    log_p = moved["elbo"].value + moved["kl_z|x"].value
    again = iwae(vae, x, 20, log_ratio, rng(2))
    assert abs(log_p - again.mean().item()) < 5 * (again.std() / 2500**0.5).item()


def test_terms_of_a_hierarchy_are_of_all_its_groups():
    "Against the exact KL of each group, which depends on the z above it: 5 standard errors. The exact ratios lead to q: no KL is left."
    ratios = [Rung(*each) for each in RUNGS]
    ncp = NoiseContrastivePrior(Ladder(laws=ratios), ratios)
    ncp.log_partition(2000, rng(0))
    x = torch.randn(500, 1, generator=rng(1))
    plain, moved = four_terms(ncp.vae, x, 20, generator=rng(2)), four_terms(ncp.vae, x, 20, ncp.normalised_log_ratio, rng(2))
    kl = torch.stack([elbo(ncp.vae, x, rng(s)).kl.sum(1) for s in range(20)]).mean(0)
    assert abs(plain["kl"].value - kl.mean().item()) < 5 * (plain["kl"].std_error + (kl.std() / 500**0.5).item())
    assert moved["recons"] == plain["recons"] and abs(moved["kl"].value) < 0.1 < plain["kl"].value
