"""The bound: exact identities first, then statistics.

Every statistical test has fixed seeds and accepts |z| < 5: a correct implementation fails a single comparison for
one seed in 1.7 million. Each has a broken twin that the same test must refuse."""
from itertools import product
from math import comb, exp, log, pi

import pytest
import torch
from exact import Enumerated, LinearGaussian, rng, z_scores
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

from ncp_vae.bound import _check_support, elbo, iwae, _kl_of, paired_iwae
from ncp_vae.walk import FlatVAE, Step, diagonal_normal, from_posterior, seeded


def check_mean(values, truth):
    "|z| < 5 for the mean of independent values [R]."
    z = z_scores(values, truth)
    assert abs(z) < 5, f"{abs(z):.1f} standard errors from {float(truth):.4f}"


RIGHT, WRONG = LinearGaussian(), LinearGaussian(shift=0.8, stretch=1.5)
IMAGES = torch.tensor([[0.3, -1.1, 0.2], [2.0, 0.1, 1.3], [-0.4, -0.2, -0.5]], dtype=torch.float64)
MANY = IMAGES[:1].repeat(20_000, 1)


def log_weights(vae, x, num_samples, generator=None):
    with seeded(generator):
        traces = [vae.walk(from_posterior(), evidence=vae.encode(x)) for _ in range(num_samples)]
    return torch.stack([t.likelihood.log_prob(x) + t.log_prior() - t.log_posterior() for t in traces])


# ---------------------------------------------------------------- exact

@pytest.mark.parametrize("num_samples", [1, 2, 33])
def test_iwae_is_log_p_under_the_true_posterior(num_samples):
    torch.testing.assert_close(iwae(RIGHT, IMAGES, num_samples), RIGHT.log_evidence(IMAGES))


def test_the_tight_case_notices_every_missing_term():
    with seeded(rng(0)):
        trace = RIGHT.walk(from_posterior(), evidence=RIGHT.encode(IMAGES))
    terms = {"likelihood": trace.likelihood.log_prob(IMAGES), "prior": trace.log_prior(), "q": -trace.log_posterior()}
    torch.testing.assert_close(sum(terms.values()), RIGHT.log_evidence(IMAGES))
    for left_out in terms:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(sum(v for k, v in terms.items() if k != left_out), RIGHT.log_evidence(IMAGES))
    with pytest.raises(AssertionError):                                    # the sum of the weights, not their mean
        torch.testing.assert_close(iwae(RIGHT, IMAGES, 5) + log(5), RIGHT.log_evidence(IMAGES))


@pytest.mark.parametrize("vae, x", [(WRONG, IMAGES), (Enumerated.random((2, 3, 2)), torch.tensor([0, 1, 2, 2]))])
def test_the_streaming_sum_is_the_log_mean_of_all_weights(vae, x):
    torch.testing.assert_close(iwae(vae, x, 20, generator=rng(1)),
                               log_weights(vae, x, 20, rng(1)).logsumexp(0) - log(20))


def test_iwae_streams():
    "The encoder runs once, and no walk ever has more rows than there are images."
    calls = []
    class Counting(LinearGaussian):
        def encode(self, x):
            calls.append("encode")
            return super().encode(x)
        def walk(self, choose, **arguments):
            trace = super().walk(choose, **arguments)
            calls.append(len(trace.latents[0]))
            return trace
    iwae(Counting(), IMAGES, 7)
    assert calls == ["encode"] + [3] * 7


def test_the_tight_case_cannot_see_the_order_of_mean_and_log():
    "All weights are equal, so the mean of logs passes too: what refuses it are the cases with unequal weights below."
    torch.testing.assert_close(log_weights(RIGHT, IMAGES, 7).mean(0), RIGHT.log_evidence(IMAGES))


def test_paired_bounds_share_their_draws():
    "Each row is the bound that iwae gives for its ratio alone, and the one-sample gain is the ratio at the draw."
    def log_r(trace):
        return -trace.latents[0].square().sum(1)
    base, with_r = paired_iwae(WRONG, IMAGES, 1, [None, log_r], rng(12))
    with seeded(rng(12)):
        trace = WRONG.walk(from_posterior(), evidence=WRONG.encode(IMAGES))
    torch.testing.assert_close(with_r - base, log_r(trace))
    for num_samples in (1, 5):
        base, with_r = paired_iwae(WRONG, IMAGES, num_samples, [None, log_r], rng(12))
        torch.testing.assert_close(base, iwae(WRONG, IMAGES, num_samples, generator=rng(12)))
        alone = iwae(WRONG, IMAGES, num_samples, lambda latents: -latents[0].square().sum(1), rng(12))
        torch.testing.assert_close(with_r, alone)


def test_log_ratio_moves_the_bound_to_the_tilted_prior():
    m, t = 0.7, 0.5
    vae, log_z = LinearGaussian(m=m, t=t), 2 * (log(t) + m**2 / (2 * t**2))
    def log_r(latents):
        return (latents[0].square() / 2 * (1 - 1 / t**2) + m * latents[0] / t**2).sum(1)
    torch.testing.assert_close(iwae(vae, IMAGES, 6, lambda z: log_r(z) - log_z), vae.log_evidence(IMAGES))
    with pytest.raises(AssertionError):                                    # without the ratio; without log Z
        torch.testing.assert_close(iwae(vae, IMAGES, 6), vae.log_evidence(IMAGES))
    torch.testing.assert_close(iwae(vae, IMAGES, 6, log_r) - log_z, vae.log_evidence(IMAGES))


def test_log_ratio_of_a_constant_and_of_zero_weight():
    base = iwae(WRONG, IMAGES, 9, generator=rng(3))
    torch.testing.assert_close(iwae(WRONG, IMAGES, 9, lambda z: torch.full((3,), 2.5), rng(3)), base + 2.5)
    nothing = iwae(WRONG, IMAGES, 9, lambda z: torch.full((3,), -torch.inf), rng(3))
    assert torch.isneginf(nothing).all()


def test_the_same_seed_gives_the_same_bound_and_spares_the_global_state():
    before = torch.get_rng_state()
    for f in (lambda g: iwae(WRONG, IMAGES, 3, generator=g), lambda g: elbo(WRONG, IMAGES, g).elbo):
        assert torch.equal(f(rng(1)), f(rng(1))) and not torch.equal(f(rng(1)), f(rng(2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_no_samples_are_refused(num_samples):
    with pytest.raises(ValueError, match=f"at least 1, got {num_samples}"):
        iwae(WRONG, IMAGES, num_samples)


class Binary(FlatVAE):
    "Two pixels, each 0 or 1."

    def posterior(self, x):
        return diagonal_normal(x, torch.ones_like(x))

    def likelihood(self, z):
        return Independent(Bernoulli(logits=z, validate_args=False), 1)


@pytest.mark.parametrize("x, words", [(torch.tensor([[0.0, 0.5]]), r"images in \[0, 0.5\] lie outside"),
                                      (torch.ones(1, 1), r"images of shape \(1, 1\); the likelihood gives \(1, 2\)")])
def test_images_that_the_likelihood_cannot_produce_are_refused(x, words):
    vae, possible = Binary(2), torch.tensor([[0.0, 1.0]])
    _check_support(vae.likelihood(torch.zeros(1, 2)), possible)
    assert elbo(vae, possible).elbo.isfinite().all() and iwae(vae, possible, 2).isfinite().all()
    with pytest.raises(ValueError, match=words):
        _check_support(vae.likelihood(torch.zeros(1, 2)), x)
    for bound in (lambda: elbo(vae, x.expand(1, 2)), lambda: iwae(vae, x.expand(1, 2), 2)):
        if x.shape == (1, 2):
            with pytest.raises(ValueError, match=words):
                bound()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bounds_on_a_gpu():
    vae, x = LinearGaussian(shift=0.8, stretch=1.5).cuda(), IMAGES.cuda()
    log_ratios = [None, lambda trace: -trace.latents[0].square().sum(1)]
    bounds = paired_iwae(vae, x, 5, log_ratios, rng(1))
    assert bounds.shape == (2, 3) and bounds.device == x.device
    assert torch.equal(bounds, paired_iwae(vae, x, 5, log_ratios, rng(1))) and elbo(vae, x).elbo.device == x.device
    right = LinearGaussian().cuda()
    torch.testing.assert_close(iwae(right, x, 7).cpu(), RIGHT.log_evidence(IMAGES))
    with pytest.raises(ValueError, match="images of shape"):
        _check_support(right.likelihood(torch.zeros(3, 2, dtype=x.dtype, device="cuda")), x[:1])


def test_elbo_adds_up_and_its_kl_is_the_formula():
    bound = elbo(WRONG, IMAGES, rng(4))
    torch.testing.assert_close(bound.elbo, bound.reconstruction - bound.kl.sum(1))
    q = WRONG.posterior(IMAGES)
    torch.testing.assert_close(bound.kl[:, 0], ((q.mean**2 + q.variance - 1) / 2 - q.stddev.log()).sum(1))
    tables = elbo(Enumerated.random((2, 3, 2)), torch.tensor([0, 1, 2, 2]), rng(4))
    assert tables.kl.shape == (4, 3) and (tables.kl > 0).all()


def test_gradients_of_both_bounds_with_common_random_numbers():
    def f(bound):
        def value(shift):
            vae = LinearGaussian(stretch=1.5)
            vae.shift = shift
            return bound(vae)
        return value
    shift = torch.tensor([0.8, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f(lambda vae: elbo(vae, IMAGES, rng(5)).elbo.sum()), shift)
    assert torch.autograd.gradcheck(f(lambda vae: iwae(vae, IMAGES, 4, generator=rng(5)).sum()), shift)


# ---------------------------------------------------------------- statistics

def test_elbo_is_log_p_minus_the_gap():
    truth = WRONG.log_evidence(IMAGES)[0] - WRONG.gap()
    bound = elbo(WRONG, MANY, rng(6))
    check_mean(bound.elbo, truth)
    exchanged = torch.distributions.kl_divergence(WRONG.prior(1), WRONG.posterior(IMAGES[:1]))
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: KL(p || q)
        check_mean(bound.reconstruction - exchanged, truth)


@pytest.mark.parametrize("x", [0, 1, 2])
def test_elbo_of_a_hierarchy_by_enumeration(x):
    vae = Enumerated.random((2, 3, 2))
    q, log_w = vae.log_weights(x)
    images = torch.full((20_000,), x)
    bound = elbo(vae, images, rng(7))
    check_mean(bound.elbo, (q * log_w).sum())
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: the last group's KL forgotten
        check_mean(bound.reconstruction - bound.kl[:, :-1].sum(1), (q * log_w).sum())


@pytest.mark.parametrize("x", [0, 1, 2])
def test_the_two_sample_bound_by_enumeration_of_pairs(x):
    vae = Enumerated.random((2, 3))
    q, log_w = vae.log_weights(x)
    truth = sum(q[i] * q[j] * (torch.logaddexp(log_w[i], log_w[j]) - log(2)) for i, j in product(range(6), repeat=2))
    images = torch.full((20_000,), x)
    check_mean(iwae(vae, images, 2, generator=rng(8)), truth)
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: logs averaged
        check_mean(log_weights(vae, images, 2, rng(8)).mean(0), truth)


GRID = torch.linspace(-40, 40, 40_001, dtype=torch.float64)


def log_normal(z, loc, std):
    return -((z - loc) / std) ** 2 / 2 - log(std) - log(2 * pi) / 2


def integral(values):
    return torch.trapezoid(values, GRID)


def wrong_moment(k):
    "E[(w / p(x))^k] of WRONG by quadrature: two independent coordinates alike."
    log_weight = log_normal(GRID, 0.0, 1.0) - log_normal(GRID, WRONG.shift, WRONG.stretch)
    return integral((log_normal(GRID, WRONG.shift, WRONG.stretch) + k * log_weight).exp()).item() ** 2


@pytest.mark.parametrize("num_samples", [8, 32])
def test_the_gap_is_the_one_of_the_expansion(num_samples):
    "Y - log(1 + Y) with Y = mean weight / p(x) - 1 has the gap as its mean and a relative error of 1 % here."
    second, third = wrong_moment(2) - 1, wrong_moment(3) - 3 * wrong_moment(2) + 2
    gap = second / (2 * num_samples) + (0.75 * second**2 - third / 3) / num_samples**2
    log_px = WRONG.log_evidence(IMAGES)[0]

    def sample(values):
        return (values - log_px).exp() - 1 - (values - log_px)
    values = sample(iwae(WRONG, MANY, num_samples, generator=rng(13)))
    assert 5 * values.std() / len(values) ** 0.5 < 0.1 * gap               # the window does not hold zero
    check_mean(values, gap)
    log_w = log_weights(WRONG, MANY, num_samples, rng(13))
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: half the samples
        check_mean(sample(log_w[::2].logsumexp(0) - log(num_samples // 2)), gap)
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: logs averaged
        check_mean(log_px - log_w.mean(0), gap)


def test_more_samples_are_better_and_stay_below():
    "In expectation: each doubling rises by more than five standard errors, and none reaches log p(x)."
    log_px = WRONG.log_evidence(IMAGES)[0]

    def check_rises(bounds):
        means, errors = torch.stack([b.mean() for b in bounds]), torch.stack([b.std() for b in bounds]) / len(MANY)**0.5
        assert (means.diff() > 5 * torch.hypot(errors[1:], errors[:-1])).all(), "does not rise"
        assert (means + 5 * errors < log_px).all(), "not below"
    check_rises([iwae(WRONG, MANY, s, generator=rng(20 + s)) for s in (1, 2, 4, 8)])
    log_w = [log_weights(WRONG, MANY, s, rng(20 + s)) for s in (1, 2, 4, 8)]
    with pytest.raises(AssertionError, match="does not rise"):             # the broken twin: logs averaged
        check_rises([w.mean(0) for w in log_w])
    with pytest.raises(AssertionError, match="not below"):                 # the broken twin: summed, not averaged
        check_rises([w.logsumexp(0) for w in log_w])


@pytest.mark.parametrize("num_samples", [2, 4])
def test_a_rare_small_weight_costs_what_the_binomial_sum_says(num_samples):
    "Weights a or 2 - a, one half each: the variance is 1 for all small a, the gap is not."
    log_a = -100.0
    def log_mean(high):
        return log((high * (2 - exp(log_a)) + (num_samples - high) * exp(log_a)) / num_samples)
    gap = -sum(comb(num_samples, high) * 0.5**num_samples * log_mean(high) for high in range(num_samples + 1))
    assert gap > 10 / (2 * num_samples)                                    # ten times Var / (2 S p^2)
    centre = RIGHT.posterior(MANY).mean[0, 0]
    def log_ratio(latents):
        return torch.where(latents[0][:, 0] < centre, log_a, log(2 - exp(log_a)))
    check_mean(RIGHT.log_evidence(IMAGES)[0] - iwae(RIGHT, MANY, num_samples, log_ratio, rng(14)), gap)
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: the variance alone
        check_mean(RIGHT.log_evidence(IMAGES)[0] - iwae(RIGHT, MANY, num_samples, log_ratio, rng(14)),
                   1 / (2 * num_samples))


def test_weights_average_to_p_of_x():
    "E[w] = p(x), with any posterior; w is bounded here because q is wider than the true posterior."
    log_px = WRONG.log_evidence(IMAGES)[0]
    log_w = iwae(WRONG, MANY, 1, generator=rng(9))
    check_mean((log_w - log_px).exp(), 1.0)
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: log q forgotten
        check_mean((log_w + elbo(WRONG, MANY, rng(9)).kl[:, 0] - log_px).exp(), 1.0)


def test_kl_without_a_formula_is_an_unbiased_draw():
    "A mixture of one component is a Normal, but torch knows no formula for it."
    n = 20_000
    q = diagonal_normal(torch.full((n, 2), 0.5), torch.full((n, 2), 0.7))
    one = Independent(Normal(torch.zeros(n, 1, 2), torch.full((n, 1, 2), 1.3)), 1)
    p = MixtureSameFamily(Categorical(torch.ones(n, 1)), one)
    known = _kl_of(Step(0, None, diagonal_normal(torch.zeros(n, 2), torch.full((n, 2), 1.3)), q), None)
    assert known.std() < 1e-6
    with seeded(rng(10)):
        z = q.sample()
    estimate = _kl_of(Step(0, None, p, q), z)
    check_mean(estimate, known[0])
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: a draw of the prior
        check_mean(_kl_of(Step(0, None, p, q), p.sample()), known[0])


def test_a_perfect_prior_gains_the_marginal_kl():
    "With r = q(z) / p(z) the mean one-sample bound rises by KL(q(z) || p(z))."
    vae = Enumerated.random((2, 3))
    aggregate = vae.posterior_joint(1).mean(0)
    log_r = (aggregate / (vae.p[0][:, None] * vae.p[1])).log()
    images = torch.arange(3).repeat(10_000)
    def gain(log_ratio):
        return iwae(vae, images, 1, log_ratio, rng(11)) - iwae(vae, images, 1, generator=rng(11))
    truth = (aggregate * log_r).sum()
    check_mean(gain(lambda z: log_r[z[0], z[1]]), truth)
    with_q = Enumerated.random((2, 3))                                                # the same gain with q as the model's own prior
    with_q.p = [aggregate.sum(1), aggregate / aggregate.sum(1, keepdim=True)]
    of_prior = iwae(with_q, images, 1, generator=rng(11)) - iwae(vae, images, 1, generator=rng(11))
    torch.testing.assert_close(of_prior, gain(lambda z: log_r[z[0], z[1]]))
    first = (vae.posterior_joint(1)[0] / (vae.p[0][:, None] * vae.p[1])).log()
    with pytest.raises(AssertionError, match="standard errors"):           # the broken twin: fitted to one image only
        check_mean(gain(lambda z: first[z[0], z[1]]), truth)


def test_many_samples_do_not_save_a_narrow_posterior():
    "Half as wide as it should be, the variance of its weights is infinite: eight times the samples only halve the gap, about."
    narrow = LinearGaussian(stretch=0.5)
    gaps = [narrow.log_evidence(IMAGES)[0] - iwae(narrow, MANY, s, generator=rng(15)).mean() for s in (1, 8, 64)]
    assert all(1.6 < above / below < 2.6 for above, below in zip(gaps, gaps[1:]))
