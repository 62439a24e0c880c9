"""ncp_vae.prior: exact tests first, then statistical ones.

Statistical tests use fixed seeds and a tolerance of 5 standard errors: a correct program fails
such a comparison with a probability of 6e-7 over the choice of the seed, the two dozen of them here
together with about 1e-5. Each has a broken twin, a plausible mistake that it must reject."""
from itertools import product
from math import comb, inf, isnan, log, nan, sqrt

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

from ncp_vae.bound import iwae
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import (NoiseContrastivePrior, estimate_log_mean, _log_pool, _log_sir_weight,
                           of_its_own)
from ncp_vae.sampling import SIR
from ncp_vae.walk import FlatVAE, Step, TopDownVAE, Trace, diagonal_normal, from_prior, seeded

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)     # a discrete base prior and ratio, Z = 1
R = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


class Table(RatioEstimator):
    "log r(z, c) from a table of r, indexed [z] or [c, z]."
    def __init__(self, table):
        super().__init__()
        self.register_buffer("log_table", torch.as_tensor(table).log())

    def condition(self, context):
        if context is None:
            return lambda z: self.log_table[z]
        return lambda z: self.log_table[context.expand_as(z), z]


class Tilt(RatioEstimator):
    "From N(0, I) to N(loc, scale^2 I), times exp(log_z)."
    def __init__(self, loc, scale, log_z):
        super().__init__()
        self.target, self.log_z = Normal(loc, scale), log_z

    def condition(self, context):
        base = Normal(0.0, 1.0)
        return lambda z: (self.target.log_prob(z) - base.log_prob(z)).sum(-1) + self.log_z


class Pixel(FlatVAE):
    "A flat VAE with Gaussian latents whose decoder counts its calls."
    decoded = 0

    def likelihood(self, z):
        self.decoded += 1
        return diagonal_normal(z, torch.ones_like(z))

    def posterior(self, x):
        return diagonal_normal(x / 2, torch.full_like(x, 0.5 ** 0.5))


class Die(TopDownVAE):
    "z in {0, 1, 2} with the law P; x in {0, 1}; q(z | x) is uniform."
    head = torch.tensor([0.1, 0.5, 0.8])

    def __init__(self):
        super().__init__()
        self.latent_shapes, self.context_shapes = [torch.Size([])], [None]

    def encode(self, x):
        return Categorical(logits=torch.zeros(len(x), 3))

    def walk(self, choose, *, n=None, evidence=None):
        n = evidence.batch_shape[0] if n is None else n
        step = Step(0, None, Categorical(P.float().expand(n, 3)), evidence)
        z = choose(step)
        return Trace([z], [step], Bernoulli(self.head[z]))


class Coins(TopDownVAE):
    "Two fair coins; the second group's context is the first coin."
    def __init__(self):
        super().__init__()
        self.latent_shapes, self.context_shapes = [torch.Size([])] * 2, [None, torch.Size([])]

    def walk(self, choose, *, n=None, evidence=None):
        fair = Categorical(logits=torch.zeros(n, 2))
        first = Step(0, None, fair, None)
        z1 = choose(first)
        second = Step(1, z1, fair, None)
        z2 = choose(second)
        return Trace([z1, z2], [first, second], Normal(z2.float(), 1.0))


STATES = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])]
JOINT = torch.tensor([1.0, 1.0, 4.0, 2.0]) / 8                 # r2 = (1, 1 | 4, 2)
GROUP_WISE = torch.tensor([1 / 4, 1 / 4, 1 / 3, 1 / 6])


def coins(r1=(1.0, 1.0), r2=((1.0, 1.0), (4.0, 2.0))) -> NoiseContrastivePrior:
    return NoiseContrastivePrior(Coins(), [Table(r1), Table(r2)])


def gaussian(dim=3, loc=0.5, scale=0.8, log_z=0.7) -> NoiseContrastivePrior:
    return NoiseContrastivePrior(Pixel(dim), [Tilt(loc, scale, log_z)])


def chi_squared(dim, loc, scale):
    "Var(r / Z) of `gaussian`."
    one = torch.tensor(loc**2 / (2 - scale**2)).exp().item() / (scale * sqrt(2 - scale**2))
    return one**dim - 1


# ------------------------------------------------ the log of a mean, exactly

def test_estimate_is_the_textbook_formula():
    log_w = torch.randn(500, generator=seed(0), dtype=torch.float64)
    w, estimate = log_w.exp(), estimate_log_mean(log_w)
    assert estimate.value == pytest.approx(w.mean().log().item(), abs=1e-12)
    assert estimate.std_error == pytest.approx((w.std() / w.mean() / sqrt(500)).item(), rel=1e-12)
    assert estimate.bias == -estimate.std_error ** 2 / 2
    assert estimate.ess == pytest.approx((w.sum() ** 2 / w.square().sum()).item(), rel=1e-12)
    assert estimate.num_samples == 500


@pytest.mark.parametrize("shift", [-5000.0, 5000.0])
def test_a_constant_in_log_r_moves_the_value_alone(shift):
    log_w = torch.randn(200, generator=seed(1), dtype=torch.float64)
    here, there = estimate_log_mean(log_w), estimate_log_mean(log_w + shift)
    assert there.value - here.value == pytest.approx(shift, abs=1e-9)
    for name in ("std_error", "ess", "k_hat"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-9)


def test_sums_are_in_float64():
    log_w = torch.zeros(2**20)                   # in float32 the log of the count would cost 1e-6
    log_w[0] = 1e-3
    assert estimate_log_mean(log_w).value == pytest.approx(1e-3 / 2**20, rel=2e-3)


def test_equal_weights_have_no_error_and_zero_weights_count():
    equal = estimate_log_mean(torch.full((50,), 3.0))
    assert equal.value == pytest.approx(3.0, abs=1e-12)
    assert equal.std_error < 1e-12 and isnan(equal.k_hat)
    half = estimate_log_mean(torch.tensor([0.0, -inf]))
    assert (half.value, half.std_error, half.ess) == pytest.approx((-log(2), 1.0, 1.0))


@pytest.mark.parametrize("log_w, what", [
    ([0.0], "at least 2"), ([0.0, nan], "NaN"), ([0.0, inf], "inf"), ([-inf, -inf], "all 2")])
def test_estimate_refuses(log_w, what):
    with pytest.raises(ValueError, match=what):
        estimate_log_mean(torch.tensor(log_w))


# ------------------------------------------------ the class, exactly

def test_one_ratio_for_each_group():
    with pytest.raises(ValueError, match="2 ratios for a VAE of 1 latent groups"):
        NoiseContrastivePrior(Pixel(1), [Table(R), Table(R)])
    assert not gaussian().vae.training


def test_log_ratio_is_the_sum_over_groups_at_their_contexts():
    ncp = coins(r1=(2.0, 5.0), r2=((1.0, 3.0), (4.0, 7.0)))
    by_group = torch.stack(ncp.log_ratios(STATES)).exp()
    assert by_group.allclose(torch.tensor([[2.0, 2, 5, 5], [1, 3, 4, 7]]))
    assert ncp.log_ratio(STATES).exp().allclose(torch.tensor([2.0, 6, 20, 35]))


@pytest.mark.parametrize("latents", [torch.zeros(2, 4), [torch.zeros(4)], []])
def test_latents_must_be_one_tensor_a_group(latents):
    with pytest.raises(ValueError, match="list of 2 tensors"):
        coins().log_ratio(latents)


def test_a_vae_without_contexts_is_not_decoded_for_its_ratio():
    ncp = gaussian()
    ncp.log_ratio([torch.zeros(5, 3)])
    assert ncp.vae.decoded == 0
    log_ratio = ncp.sir_log_ratio(8)
    before = ncp.vae.decoded
    log_ratio([torch.zeros(5, 3)])
    assert ncp.vae.decoded == before


def test_log_prob_is_a_density():
    ncp = coins()
    ncp.log_z.fill_(log(2))                       # the exact Z of the joint target
    assert ncp.log_prob(STATES).exp().allclose(JOINT)         # whole-number z does not round log Z
    assert not ncp.log_prob(STATES).exp().allclose(GROUP_WISE, atol=0.05)


def test_log_prob_of_a_gaussian_and_its_gradient():
    ncp = gaussian()
    ncp.log_z.fill_(0.7)
    z = torch.randn(6, 3, generator=seed(2), requires_grad=True)
    exact = Normal(0.5, 0.8).log_prob(z).sum(-1)
    assert ncp.log_prob([z]).allclose(exact, atol=1e-5)
    got, = torch.autograd.grad(ncp.log_prob([z]).sum(), z)
    assert got.allclose(-(z - 0.5) / 0.64, atol=1e-5)


def test_no_density_before_log_partition():
    for call in (gaussian().log_prob, gaussian().normalised_log_ratio):
        with pytest.raises(ValueError, match="log_partition"):
            call([torch.zeros(2, 3)])


def test_log_partition_refuses_and_keeps_what_it_had():
    ncp = gaussian()
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ncp.log_partition(1)
    assert ncp.vae.decoded == 0                   # refused before any work
    kept = ncp.log_partition(100, seed(3))
    ncp.ratios[0].log_z = nan
    with pytest.raises(ValueError, match="NaN"):
        ncp.log_partition(100)
    assert ncp.log_z.item() == pytest.approx(kept.value, abs=1e-6)
    assert ncp.log_z_std_error.item() == pytest.approx(kept.std_error, rel=1e-6)


def test_log_partition_takes_another_method_and_keeps_its_estimate():
    class Fixed:
        asked = []

        def log_partition(self, ncp, num_samples, generator=None):
            self.asked.append((ncp, num_samples, generator))
            return estimate_log_mean(torch.tensor([0.2, 0.4]))

    ncp, generator = gaussian(), seed(3)
    kept = ncp.log_partition(100, generator, Fixed())
    assert Fixed.asked == [(ncp, 100, generator)]
    assert ncp.log_z.item() == pytest.approx(kept.value) != pytest.approx(0.7, abs=0.1)
    assert ncp.log_z_std_error.item() == pytest.approx(kept.std_error) and ncp.vae.decoded == 0
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ncp.log_partition(1, method=Fixed())
    assert len(Fixed.asked) == 1


def test_log_z_travels_with_the_state_dict():
    ncp, other = gaussian(), gaussian()
    ncp.log_partition(100, seed(4))
    other.load_state_dict(ncp.state_dict())
    z = [torch.ones(2, 3)]
    assert torch.equal(other.log_prob(z), ncp.log_prob(z))


def test_a_generator_decides_everything_and_leaves_the_global_state_alone():
    ncp, before = gaussian(), torch.get_rng_state()
    first, again = [ncp.log_partition(2500, seed(5)) for _ in range(2)]
    assert first == again != ncp.log_partition(2500, seed(6))
    z = [torch.ones(2, 3)]
    assert torch.equal(ncp.sir_log_ratio(9, seed(5))(z), ncp.sir_log_ratio(9, seed(5))(z))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_its_own_has_other_numbers_than_its_parents_seed():
    def numbers(generator):
        with seeded(generator):
            return torch.randn(100)

    before = torch.get_rng_state()
    own, parent = torch.randn(100, generator=of_its_own(seed(5))), torch.randn(100, generator=seed(5))
    through = numbers(of_its_own(seed(5))), numbers(seed(5))
    streams = torch.stack([own, parent, *through])
    assert len(streams.unique()) == 400                              # no number in two of them
    assert torch.equal(own, torch.randn(100, generator=of_its_own(seed(5))))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    first = of_its_own(None)
    torch.manual_seed(6)
    assert of_its_own(None).initial_seed() == first.initial_seed() != of_its_own(None).initial_seed()


def test_log_weights_have_the_asked_number():
    weights = gaussian().log_weights(2345, seed(7))               # two pieces and a bit
    assert weights.shape == (2345,) and len(weights.unique()) > 2300


# ------------------------------------------------ the density of SIR, exactly

def pools(size):
    "All pools of `size` draws of P: sums of r [N, 1] and probabilities [N, 1]."
    index = torch.tensor(list(product(range(3), repeat=size)))
    return R[index].sum(1, keepdim=True), P[index].prod(1, keepdim=True)


def sir_law(M):
    "P(SIR keeps i) by its definition: all M-tuples."
    index = torch.tensor(list(product(range(3), repeat=M)))
    kept = P[index].prod(1, keepdim=True) * R[index] / R[index].sum(1, keepdim=True)
    return torch.stack([kept[index == i].sum() for i in range(3)])


@pytest.mark.parametrize("M", [2, 3, 6])
def test_sir_density_is_the_law_of_sir(M):
    rest, probability = pools(M - 1)
    density = P * (probability * _log_sir_weight(R.log(), rest.log(), M).exp()).sum(0)
    assert density.sum().item() == pytest.approx(1, abs=1e-12)
    assert density.allclose(sir_law(M), atol=1e-12)
    forgotten = P * (probability * R / (rest / (M - 1))).sum(0)   # the twin: without its own ratio
    assert forgotten.sum() > 1.2


@pytest.mark.parametrize("M", [2, 3, 6])
def test_bound_lies_between_its_floor_and_the_density(M):
    rest, probability = pools(M - 1)
    bound = P.log() + (probability * _log_sir_weight(R.log(), rest.log(), M)).sum(0)
    floor = (P * R).log() - ((R - 1) / M).log1p()                    # Z = 1
    assert (floor < bound).all() and (bound < sir_law(M).log()).all()


def test_sir_weight_at_the_edges():
    log_r = torch.tensor([500.0, -inf, 2.0])
    log_rest = torch.tensor([-500.0, 0.0, 2.0 + log(15)])
    got = _log_sir_weight(log_r, log_rest, 16).tolist()
    assert got == pytest.approx([log(16), -inf, 0.0], abs=1e-6)


def test_sir_log_ratio_is_one_shared_pool():
    ncp, z = gaussian(), torch.randn(50, 3, generator=seed(8))
    log_ratio = ncp.sir_log_ratio(16, seed(9))
    log_w = log_ratio([z])
    assert torch.equal(log_ratio([z]), log_w)    # no fresh draws
    share = (log_w - log(16)).exp().double()    # r / (r + R)
    rest = ncp.log_ratio([z]).double().exp() * (1 - share) / share
    assert rest.allclose(rest[0], rtol=1e-3) and (log_w <= log(16)).all()


def test_later_pools_are_drawn_at_each_rows_own_context():
    # r2 depends on the context alone, so every pool's mean is r2 and the weight is exactly 1
    ncp = coins(r2=((1.0, 1.0), (30.0, 30.0)))
    assert ncp.sir_log_ratio(3)(STATES).allclose(torch.zeros(4), atol=1e-5)
    step = ncp.vae.walk(from_prior(), n=1).steps[1]       # the twin: one row's context for all
    twin = _log_sir_weight(ncp.log_ratios(STATES)[1], _log_pool(ncp.ratios[1], step, 2), 3)
    assert twin.abs().max() > 0.5


def test_a_pool_has_one_draw_less_than_sir_has_proposals():
    ncp, seen = gaussian(), []
    ncp.ratios[0].condition = lambda context: lambda z: (seen.append(len(z)), z.sum(-1))[1]
    ncp.sir_log_ratio(100)
    assert sum(seen) == 99


def test_one_proposal_is_the_base_prior():
    ncp, z = gaussian(), torch.randn(50, 3, generator=seed(8))
    assert torch.equal(ncp.sir_log_ratio(1)([z]), torch.zeros(50))
    x = torch.randn(20, 3, generator=seed(9))
    assert torch.equal(iwae(ncp.vae, x, 3, ncp.sir_log_ratio(1), seed(10)),
                       iwae(ncp.vae, x, 3, None, seed(10)))
    step = ncp.vae.walk(from_prior(), n=4).steps[0]
    assert torch.equal(_log_pool(ncp.ratios[0], step, 0), torch.full((4,), -inf))


@pytest.mark.parametrize("M, what", [
    (0, "at least 1, got 0"), (-3, "at least 1, got -3"), (2.5, "at least 1, got 2.5"),
    ([4, 4], "2 budgets for 1 latent groups"), ([], "0 budgets for 1 latent groups"),
    ([0], "at least 1, got 0")])
def test_sir_log_ratio_refuses(M, what):
    ncp = gaussian()
    with pytest.raises(ValueError, match=what):
        ncp.sir_log_ratio(M)
    assert ncp.vae.decoded == 0                   # refused before any work


# ------------------------------------------------ a budget for each group, exactly

R1, R2 = (0.5, 2.0), ((1.0, 3.0), (4.0, 0.5))     # of two fair coins; rows of R2: the first coin


def picked(r, M):
    "P(SIR with M proposals keeps v) for a fair coin, by its definition: [2]."
    ones = torch.arange(M + 1).double()
    chance = torch.tensor([comb(M, i) / 2**M for i in range(M + 1)], dtype=torch.float64)
    share = ones * r[1] / (ones * r[1] + (M - ones) * r[0])
    return torch.stack([(chance * (1 - share)).sum(), (chance * share).sum()])


def coin_bound(r, M):
    "log 1/2 + E log r(v) / ((r(v) + R) / M), R of M - 1 fair coins, written out: [2]."
    ones = torch.arange(M).double()
    chance = torch.tensor([comb(M - 1, i) / 2 ** (M - 1) for i in range(M)], dtype=torch.float64)
    rest = ones * r[1] + (M - 1 - ones) * r[0]
    return torch.stack([log(0.5) + (chance * (M * v / (v + rest)).log()).sum() for v in r])


def of_plan(group, plan, joined):
    "A number of each of the four states of STATES, from those of the groups."
    first, below = group(R1, plan[0]), [group(r, plan[1]) for r in R2]
    return torch.stack([joined(first[i], below[i][j]) for i in range(2) for j in range(2)])


def law_of_plan(plan):
    return of_plan(picked, plan, lambda a, b: a * b)


def bound_of_plan(plan):
    return of_plan(coin_bound, plan, lambda a, b: a + b)


@pytest.mark.parametrize("plan", [[1, 3], [2, 4], [3, 2]])
def test_the_bound_of_a_plan_is_below_its_law_and_tight_in_the_end(plan):
    slack = []
    for factor in (1, 4, 16, 64):
        larger = [M * factor for M in plan]
        law, bound = law_of_plan(larger), bound_of_plan(larger)
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        assert (bound < law.log()).all()
        slack.append((law.log() - bound).max().item())
    assert slack[1] < slack[0] and slack[3] < 0.3 * slack[2] and slack[3] < 0.02    # as 1 / M


@pytest.mark.parametrize("plan", [[1, 3], [2, 4]])
def test_sir_log_ratio_of_a_plan_has_the_enumerated_mean(plan):
    ncp, copies, g = coins(R1, R2), [z.repeat(50) for z in STATES], seed(21)
    calls = [ncp.sir_log_ratio(plan, g)(copies).view(50, 4).mean(0) for _ in range(400)]
    runs = torch.stack(calls).double() + 2 * log(0.5)
    for state in range(4):
        assert abs(z_score(runs[:, state], bound_of_plan(plan)[state])) < 5
    scores = [z_score(runs[:, state], bound_of_plan(plan[::-1])[state]) for state in range(4)]
    assert max(map(abs, scores)) > 20             # the twin: the plan read from the other end


@pytest.mark.parametrize("plan", [[1, 3], [2, 4]])
def test_sir_of_a_plan_has_the_law_that_is_bounded(plan):
    trace = coins(R1, R2).sample(20_000, SIR(plan), generator=seed(22))
    counts = torch.bincount(2 * trace.latents[0] + trace.latents[1], minlength=4)

    def chi_square(law):
        return ((counts - 20_000 * law).square() / (20_000 * law)).sum().item()
    assert chi_square(law_of_plan(plan)) < 33     # 3 degrees of freedom: 3e-7
    assert chi_square(law_of_plan(plan[::-1])) > 200


def test_a_plan_of_equal_numbers_is_one_number():
    ncp = coins(R1, R2)
    assert torch.equal(ncp.sir_log_ratio(5, seed(23))(STATES), ncp.sir_log_ratio([5, 5], seed(23))(STATES))
    assert ncp.sir_log_ratio([1, 1])(STATES).abs().max() == 0
    for wrong in ([5], [5, 5, 5]):
        with pytest.raises(ValueError, match=f"{len(wrong)} budgets for 2 latent groups"):
            ncp.sir_log_ratio(wrong)


def test_a_diverged_ratio_is_refused_by_the_pool():
    with pytest.raises(ValueError, match="NaN"):
        gaussian(log_z=nan).sir_log_ratio(4)


# ------------------------------------------------ statistics

def z_score(values, truth):
    return ((values.mean() - truth) / values.std() * sqrt(len(values))).item()


def test_log_partition_and_its_error():
    ncp, chi2 = gaussian(), chi_squared(3, 0.5, 0.8)
    runs = [ncp.log_partition(2000, seed(100 + i)) for i in range(60)]
    values = torch.tensor([run.value for run in runs]).double()
    assert abs(z_score(values, 0.7 - chi2 / 4000)) < 5
    # the spread of 60 values is known within 9 %: 5 of those
    assert abs(values.std().item() / sqrt(chi2 / 2000) - 1) < 0.46
    errors = torch.tensor([run.std_error for run in runs]).double()
    assert abs(errors.mean().item() / sqrt(chi2 / 2000) - 1) < 0.05    # each within a few per cent
    twin = torch.stack([ncp.log_weights(2000, seed(i)).mean() for i in range(60)])   # mean of logs
    assert abs(z_score(twin, 0.7)) > 50


def test_log_partition_is_too_low_by_half_its_variance():
    chi2, S = chi_squared(1, 1.0, 0.8), 50
    log_w = gaussian(1, 1.0).log_weights(20_000 * S, seed(10)).double().view(20_000, S)
    values = log_w.logsumexp(1) - log(S)
    assert abs(z_score(values, 0.7 - chi2 / (2 * S))) < 5
    assert z_score(values, 0.7) < -5    # the twin: no bias


def test_samples_of_two_groups_follow_the_group_wise_target():
    trace = coins().sample(10_000, SIR(200), generator=seed(11))
    counts = torch.bincount(2 * trace.latents[0] + trace.latents[1], minlength=4)
    def chi_square(law):
        return ((counts - 10_000 * law).square() / (10_000 * law)).sum().item()
    assert chi_square(GROUP_WISE) < 33    # 3 degrees of freedom: 3e-7
    assert chi_square(JOINT) > 1000    # the twin: the other target


def test_bound_of_two_groups_is_about_the_group_wise_target():
    # a pool's mean of r2(. | 1) in {4, 2} has at M = 4096 a relative error of 1/3/64; 5 are 0.026
    density = (2 * log(0.5) + coins().sir_log_ratio(4096, seed(12))(STATES)).exp()
    assert (density / GROUP_WISE - 1).abs().max() < 0.027
    assert (density / JOINT - 1).abs().max() > 0.3    # the twin: the other target


class Noisy(FlatVAE):
    "x = z + 2 noise; one posterior for every image."
    def likelihood(self, z):
        return diagonal_normal(z, torch.full_like(z, 2.0))

    def posterior(self, x):
        return diagonal_normal(torch.full_like(x, 0.5), torch.full_like(x, 0.9))


class Slope(RatioEstimator):
    def condition(self, context):
        return lambda z: 3 * z.sum(-1)


def test_one_seed_for_everything_is_still_a_bound():
    # log r = 3 z, two proposals: log p_2(x) by quadrature from p_2(z) = 2 p(z) E r / (r + r')
    ncp, x, S = NoiseContrastivePrior(Noisy(1), [Slope()]), torch.tensor([[1.4]]), 2
    z = torch.arange(-10, 10, 0.02, dtype=torch.float64)
    p = Normal(0.0, 1.0).log_prob(z).exp() * 0.02
    p_2 = 2 * p * ((3 * (z[:, None] - z)).sigmoid() @ p)
    exact = (p_2 * Normal(z, 2.0).log_prob(x[0].double()).exp()).sum().log().item()

    def one_stream(value):     # the twin: a pool from the seed that iwae gets, after a walk
        with seeded(seed(value)):
            log_rest = Slope()(ncp.vae.walk(from_prior(), n=1).steps[0].prior.sample((1,)))[0]
        return lambda latents: _log_sir_weight(ncp.log_ratio(latents), log_rest, 2)

    def over_seeds(bound, n):
        return torch.cat([iwae(ncp.vae, x, S, bound(v), seed(v)) for v in range(n)]).double()

    library = over_seeds(lambda v: ncp.sir_log_ratio(2, seed(v)), 600)
    assert p_2.sum().item() == pytest.approx(1, abs=1e-9)
    assert z_score(library, exact) < -5 and z_score(over_seeds(one_stream, 600), exact) > 5
    two_seeds = over_seeds(lambda v: ncp.sir_log_ratio(2, seed(v + 1000)), 300)     # the same mean
    error = sqrt(library.var().item() / 600 + two_seeds.var().item() / 300)
    assert abs(library.mean() - two_seeds.mean()).item() < 5 * error < 0.5


def test_iwae_with_sir_log_ratio_is_the_bound_and_below_the_density_of_sir():
    M, x = 2, torch.tensor([0.0, 1.0])
    ncp = NoiseContrastivePrior(Die(), [Table(R.float())])
    torch.manual_seed(13)
    runs = torch.stack([iwae(ncp.vae, x, 1, ncp.sir_log_ratio(M)) for _ in range(2000)]).double()
    rest, probability = pools(M - 1)
    log_x = torch.stack([(1 - Die.head).log(), Die.head.log()]).double()    # log p(x | z): [x, z]
    def expectation(log_weight):    # over the uniform posterior and all pools
        return (log_x + P.log() + (probability * log_weight).sum(0) + log(3)).mean(1)
    truth = expectation(_log_sir_weight(R.log(), rest.log(), M))
    exact_sir = (log_x.exp() @ sir_law(M)).log()
    twin = expectation(R.log() - (rest / (M - 1)).log())
    assert (truth < exact_sir).all()
    for row in range(2):
        assert abs(z_score(runs[:, row], truth[row])) < 5
        assert z_score(runs[:, row], exact_sir[row]) < -5    # below what it bounds
        assert z_score(runs[:, row], twin[row]) < -5    # forgetting the own ratio is higher


def test_estimated_likelihood_moves_with_log_z():
    ncp = gaussian(2)
    x = torch.randn(20, 2, generator=seed(14))
    good = ncp.log_partition(5000, seed(15)).value
    first = iwae(ncp.vae, x, 5, ncp.normalised_log_ratio, seed(16))
    poor = ncp.log_partition(50, seed(17)).value
    second = iwae(ncp.vae, x, 5, ncp.normalised_log_ratio, seed(16))
    assert abs(good - poor) > 1e-3
    assert (second - first).allclose(torch.tensor(good - poor), atol=1e-5)


def test_estimated_likelihood_is_the_exact_one():
    # x = z + noise, prior N(0.5, 0.64): p(x) = N(0.5, 1.64); 1000 importance samples, log Z known
    ncp, x = gaussian(1), torch.linspace(-2, 3, 200)[:, None]
    exact = Normal(0.5, 1.64**0.5).log_prob(x[:, 0])
    ncp.log_z.fill_(0.7)
    error = (iwae(ncp.vae, x, 1000, ncp.normalised_log_ratio, seed(18)) - exact).double()
    assert abs(z_score(error, 0.0)) < 5 and error.abs().max() < 0.3
    ncp.log_z.fill_(0.0)                                             # the twin: log Z forgotten
    assert (iwae(ncp.vae, x, 10, ncp.normalised_log_ratio, seed(18)) - exact).mean() > 0.5
