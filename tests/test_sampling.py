"""Samplers against laws that are known: by enumeration, by hand, and only then by statistics.

Exact tests come first. The statistical ones use fixed seeds, so they fail only when the code changes; on a fresh seed
a check at 5 standard errors fails by chance once in 1.7 million times and a p-value below 1e-6 once in a million, and
there are fewer than 60 of both kinds here: a family-wise false-alarm rate below 1e-4. Each has a broken twin, a sampler
or a law with one deliberate mistake, which the same check must reject."""
import weakref
from functools import partial
from itertools import product
from math import exp, inf, isnan, log, nan, pi, sin, sqrt
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal

from ncp_vae import sampling
from ncp_vae.sampling import (BLOCK, HMC, JITTER, MALA, SIR, WARM_UP, Chain, Langevin, Race, Sampler,
                              effective_sample_size, evaluate, kinetic, leapfrog, merge, metropolis, pareto_k_hat,
                              propose, race)
from ncp_vae.walk import FlatVAE, Step, TopDownVAE, Trace, diagonal_normal, seeded

P, R = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
SAMPLERS = [SIR(70), Langevin(3, 0.1), MALA(3, 0.1), HMC(3, 0.3), HMC(2)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(rows, *event, dtype=torch.float32):
    loc = torch.zeros(rows, *event, dtype=dtype)
    return diagonal_normal(loc, torch.ones_like(loc))


def outcomes(rows):
    return Categorical(P.float().expand(rows, 3))


def log_r(z):
    return R.float().log()[z]


def tilt(z):
    "With base N(0, 1) in each coordinate the target is N(1/2, 1/2)."
    return (z - z.square() / 2).sum(-1)


def wavy(z):
    return torch.sin(3 * z[..., 0]) + 0.1 * z[..., 0] * z[..., 1] ** 3 - 0.2 * z.square().sum(-1)


def sir_law(M, p=P, r=R):
    "By brute force, over all M-tuples of proposals."
    law = torch.zeros(len(p), dtype=torch.float64)
    for proposals in product(range(len(p)), repeat=M):
        i = torch.tensor(proposals)
        law.index_add_(0, i, p[i].prod() * r[i] / r[i].sum())
    return law


def chi_square_p(picks, law):
    expected = len(picks) * law
    statistic = ((picks.bincount(minlength=len(law)) - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2).item()


def errors(z, mean, variance):
    "The larger of: by how many standard errors do the mean and the variance of Gaussian rows miss theirs?"
    n = len(z)
    return max(abs(z.mean() - mean) / sqrt(variance / n), abs(z.var() - variance) / (variance * sqrt(2 / n))).item()


# SIR, exactly

@pytest.mark.parametrize("M, law", [(1, (0.5, 0.3, 0.2)), (2, (0.3125, 0.37, 0.3175)), (4, (0.1879, 0.3746, 0.4375)),
                                    (8, (0.1337, 0.345, 0.5213))])
def test_the_law_that_the_others_lean_on(M, law):
    assert torch.allclose(sir_law(M), torch.tensor(law).double(), atol=5e-5)


@pytest.mark.parametrize("M", [1, 63, 64, 65, 500, 1000])
def test_chunks_do_not_change_the_result(M):
    results = [SIR(M, chunk).resample(tilt, normal(6, 2), generator(M)) for chunk in (1, 7, 64, 500, 5000, None)]
    for other in results[1:]:
        assert torch.equal(other.z, results[0].z)
        assert torch.allclose(other.ess, results[0].ess, rtol=1e-4)                       # float32, another order
        assert torch.allclose(other.log_mean_ratio, results[0].log_mean_ratio, atol=1e-5)


def test_streaming_is_one_argmax_over_all_proposals():
    M, rows = 777, 9
    with seeded(generator(3)):
        z, keys = map(torch.cat, zip(*propose(normal(rows, 2), M, 64)))
    log_w = tilt(z)
    best = (log_w + keys).argmax(0)
    result = SIR(M, chunk=100).resample(tilt, normal(rows, 2), generator(3))
    assert torch.equal(result.z, z[best, torch.arange(rows)])
    assert torch.allclose(result.ess, effective_sample_size(log_w, 0), rtol=1e-4)
    assert torch.allclose(result.log_mean_ratio, log_w.logsumexp(0) - log(M), atol=1e-5)


def test_races_merge_in_any_order():
    z, log_w, keys = torch.randn(300, 4, 2, generator=generator()), *torch.randn(2, 300, 4, generator=generator(1))
    log_w[:100, 0] = -inf                                                 # a chunk in which a row has no weight at all
    parts = [race(z[i], log_w[i], keys[i]) for i in (slice(100), slice(100, 130), slice(130, 300))]
    at_once = race(z, log_w, keys)
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for merged in (merge(merge(parts[a], parts[b]), parts[c]), merge(parts[a], merge(parts[b], parts[c]))):
            assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(merged, at_once))


@pytest.mark.parametrize("M, chunk", [(100, 7), (1000, 300), (64, 64), (5, None)])
def test_each_proposal_is_evaluated_once_and_few_at_a_time(M, chunk):
    sizes = []
    SIR(M, chunk).draw(lambda z: sizes.append(len(z)) or tilt(z), normal(3, 2), generator())
    assert sum(sizes) == M and max(sizes) <= (chunk or M)


@pytest.mark.parametrize("M", [640, 6400])
def test_memory_does_not_grow_with_the_number_of_proposals(M):
    alive, most = weakref.WeakSet(), 0

    class Watched(torch.Tensor):
        pass

    class Watching(Independent):
        def sample(self, shape=torch.Size()):
            z = super().sample(shape).as_subclass(Watched)
            alive.add(z)
            return z

    def log_ratio(z):
        nonlocal most
        most = max(most, len(alive))
        return tilt(z.as_subclass(torch.Tensor))
    SIR(M, chunk=2 * BLOCK).draw(log_ratio, Watching(Normal(torch.zeros(3, 2), 1.0), 1), generator())
    assert 1 <= most <= 4                                       # this chunk's blocks, and at most those of one before


def test_weights_of_zero_are_never_chosen():
    z = SIR(400).draw(lambda z: torch.where(z[..., 0] > 1.5, 0.0, -inf), normal(500, 1), generator())
    assert (z > 1.5).all()


@pytest.mark.parametrize("log_ratio, message", [
    (lambda z: torch.full(z.shape[:-1], -inf), "weight zero"),
    (lambda z: torch.where(z[..., 0] > 2, nan, 0.0), "NaN"),
    (lambda z: torch.where(z[..., 0] > 2, inf, 0.0), "inf"),
    (lambda z: z[..., :1], "must map"),
    (lambda z: z.sum(), "must map")])
def test_broken_ratios_are_errors(log_ratio, message):
    with pytest.raises(ValueError, match=message):
        SIR(200).draw(log_ratio, normal(5, 2), generator())


def test_a_row_without_any_weight_is_an_error_though_others_have_some():
    with pytest.raises(ValueError, match="weight zero"):
        SIR(10).draw(lambda z: torch.tensor([0.0, -inf]).expand(z.shape[:-1]), normal(2, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prior_without_independent_is_refused(sampler):
    with pytest.raises(ValueError, match="batch"):
        sampler.draw(tilt, Normal(torch.zeros(4, 4), 1.0))               # batch [4, 4], event []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_log_weights_and_keys_are_at_least_float32(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        (z, keys), = propose(normal(3, 2, dtype=dtype), 10, 64)
        result = SIR(10).resample(tilt, normal(3, 2, dtype=dtype))
    finally:
        torch.set_default_dtype(before)
    wide = torch.promote_types(dtype, torch.float32)
    assert keys.dtype == torch.float32 and result.z.dtype == dtype == z.dtype
    assert result.ess.dtype == result.log_mean_ratio.dtype == wide


@pytest.mark.parametrize("make, value", [
    (lambda: SIR(0), "0"), (lambda: SIR(-3), "-3"), (lambda: SIR(2.5), "2.5"), (lambda: SIR([4, 0]), "0"),
    (lambda: SIR(5, chunk=0), "0"), (lambda: Langevin(0, 0.1), "0"), (lambda: Langevin(5, 0.0), "0.0"),
    (lambda: Langevin(5, None), "None"), (lambda: MALA(5, -0.5), "-0.5"), (lambda: MALA(1.5, 0.5), "1.5"),
    (lambda: MALA(5, nan), "nan"), (lambda: HMC(5, inf), "inf"), (lambda: HMC(0), "0"), (lambda: HMC(5, 0.0), "0.0"),
    (lambda: HMC(5, 0.1, leapfrog=0), "0")])
def test_settings_are_checked_and_named(make, value):
    with pytest.raises(ValueError, match=f"got {value}$"):
        make()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_randomness_comes_from_the_generator_alone(sampler):
    torch.manual_seed(1)
    before, g = torch.get_rng_state(), generator(7)
    first, second = sampler.draw(tilt, normal(4, 2), g), sampler.draw(tilt, normal(4, 2), g)
    assert torch.equal(before, torch.get_rng_state())                               # the global state is untouched
    assert torch.equal(first, sampler.draw(tilt, normal(4, 2), generator(7))) and not torch.equal(first, second)
    unseeded = sampler.draw(tilt, normal(4, 2))
    torch.manual_seed(1)
    assert torch.equal(unseeded, sampler.draw(tilt, normal(4, 2)))
    assert first.shape == (4, 2) and first.dtype == torch.float32 and not first.requires_grad


# SIR, by statistics

@pytest.mark.parametrize("M", [1, 2, 3, 5])
def test_sir_has_its_finite_law(M):
    picks = SIR(M, chunk=2).draw(log_r, outcomes(50_000), generator(M))
    assert chi_square_p(picks, sir_law(M)) > 1e-6
    assert chi_square_p(picks, R * P / (R * P).sum()) < 1e-6             # broken: the limit instead of the law of M
    assert chi_square_p(picks, sir_law(M + 1)) < 1e-6                    # broken: off by one
    assert chi_square_p(picks, sir_law(M, r=R.sqrt())) < 1e-6 or M == 1  # broken: weights at half the log ratio


def test_a_constant_ratio_gives_the_base():
    picks = SIR(5).draw(lambda z: torch.full(z.shape, 300.0), outcomes(50_000), generator())
    assert chi_square_p(picks, P) > 1e-6 and chi_square_p(picks, sir_law(2)) < 1e-6


def test_tied_weights_are_picked_uniformly():
    z, log_w = torch.arange(8).expand(50_000, 8).T, torch.zeros(8, 50_000)
    with seeded(generator()):
        keys = next(propose(outcomes(50_000), 8, 64))[1]
    picks = race(z, log_w, keys).z
    assert chi_square_p(picks, torch.full((8,), 1 / 8).double()) > 1e-6
    coarse = -torch.rand(8, 50_000, generator=generator()).mul(4).ceil().log()       # broken: keys of 4 values
    assert chi_square_p(race(z, log_w, coarse).z, torch.full((8,), 1 / 8).double()) < 1e-6


def test_the_mean_ratio_is_unbiased():
    Z = exp(0.25) / sqrt(2)                                                          # of the tilt
    estimates = SIR(50).resample(tilt, normal(20_000, 1), generator()).log_mean_ratio.exp()
    error = estimates.std() / sqrt(len(estimates))
    assert abs(estimates.mean() - Z) < 5 * error
    assert abs(estimates.mean() * 50 / 49 - Z) > 5 * error                           # broken: M - 1 in the mean


# groups

class Coins(TopDownVAE):
    "Two fair coins; the second one's ratio depends on the first."
    latent_shapes, context_shapes = [torch.Size([])] * 2, [None, torch.Size([])]

    def walk(self, choose, *, n=None, evidence=None):
        fair = Categorical(logits=torch.zeros(n, 2))
        z1 = choose(Step(0, None, fair, None))
        z2 = choose(Step(1, z1, fair, None))
        return Trace([z1, z2], [], Normal(z2.float(), 1.0))


class Table:
    "log r(z, c) from a table: [contexts, outcomes]."
    def __init__(self, table):
        self.log_table = torch.tensor(table).log()

    def condition(self, context):
        def log_ratio(z):
            return self.log_table[torch.zeros_like(z) if context is None else context.expand(z.shape), z]
        return log_ratio


def coins():
    return SimpleNamespace(vae=Coins(), ratios=[Table([[1.0, 3.0]]), Table([[1.0, 1.0], [4.0, 2.0]])])


@pytest.mark.parametrize("budgets", [3, [3, 3], [1, 4]])
def test_groups_are_drawn_one_after_the_other(budgets):
    z1, z2 = SIR(budgets).sample(coins(), 50_000, generator=generator()).latents
    first, second = (3, 3) if budgets == 3 else budgets
    half = torch.full((2,), 0.5, dtype=torch.float64)
    law1 = sir_law(first, half, torch.tensor([1.0, 3.0]).double())
    law2 = torch.stack([half, sir_law(second, half, torch.tensor([4.0, 2.0]).double())])
    picks = 2 * z1 + z2
    assert chi_square_p(picks, (law1[:, None] * law2).flatten()) > 1e-6
    assert chi_square_p(picks, (law1[:, None] * law2.flip(0)).flatten()) < 1e-6      # broken: the other context


def test_budgets_must_fit_the_groups():
    with pytest.raises(ValueError, match="3 budgets for 2"):
        SIR([1, 2, 3]).sample(coins(), 5)
    with pytest.raises(ValueError, match="for_group"):
        SIR([1, 2]).draw(log_r, outcomes(5))


class Flat(FlatVAE):
    def likelihood(self, z):
        return diagonal_normal(z, torch.ones_like(z))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def condition(self, context):
        return lambda z: self.net(z).squeeze(-1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_works_on_a_network_and_leaves_it_alone(sampler):
    network = Network()
    trace = sampler.sample(SimpleNamespace(vae=Flat(2), ratios=[network]), 4, generator=generator())
    assert trace.latents[0].shape == (4, 2) and not trace.latents[0].requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_sample_scales_the_base_prior():
    flat = SimpleNamespace(vae=Flat(1), ratios=[SimpleNamespace(condition=lambda c: lambda z: 0 * z[..., 0])])
    z = MALA(10, 0.1).sample(flat, 5000, temperature=0.5, generator=generator()).latents[0]
    assert errors(z, 0.0, 0.25) < 5 < errors(z, 0.0, 1.0)                             # broken: no temperature


def test_a_sampler_must_define_draw():
    with pytest.raises(NotImplementedError, match="Sampler"):
        Sampler().draw(tilt, normal(1, 1))
    with pytest.raises(NotImplementedError, match="Chain"):
        Chain(1, 0.1).draw(tilt, normal(1, 1))


# what the weights say

@pytest.mark.parametrize("rate", [1.25, 2.0, 4.0])
def test_k_hat_of_exponentials_is_known(rate):
    "Target Exp(1), proposal Exp(rate): k = 1 - 1 / rate. The standard error of a mean of 20 is about 0.02."
    def k_hat(of, seed):
        z = torch.empty(20_000, dtype=torch.float64).exponential_(of, generator=generator(seed))
        return pareto_k_hat((of - 1) * z + 17.0)                          # a constant does no harm
    mean = torch.tensor([k_hat(rate, seed) for seed in range(20)]).mean()
    broken = torch.tensor([k_hat(2 * rate, seed) for seed in range(20)]).mean()
    assert abs(mean - (1 - 1 / rate)) < 0.1 < abs(broken - (1 - 1 / rate))


def test_k_hat_at_its_ends():
    g = generator()
    assert isnan(pareto_k_hat(torch.randn(24, generator=g))) and not isnan(pareto_k_hat(torch.randn(25, generator=g)))
    assert isnan(pareto_k_hat(torch.zeros(1000)))
    assert pareto_k_hat(1e4 * torch.randn(1000, generator=g)) == inf      # one weight has everything
    one_winner = torch.randn(100, generator=g)
    one_winner[3] = 1000.0
    assert pareto_k_hat(one_winner) == inf
    holes = torch.randn(1000, generator=g)
    holes[::2] = -inf
    assert abs(pareto_k_hat(holes)) < 1


def test_effective_sample_size():
    assert torch.allclose(effective_sample_size(torch.full((3, 10), 500.0), 1), torch.full((3,), 10.0))
    assert effective_sample_size(torch.tensor([0.0, -inf, -inf]), 0) == 1
    assert abs(effective_sample_size(torch.tensor([1.0, 3.0]).log(), 0) - 1.6) < 1e-6


# chains, exactly

def central_difference(f, z, h=1e-5):
    return torch.stack([(f(z + h * e) - f(z - h * e)) / (2 * h) for e in torch.eye(len(z), dtype=z.dtype)])


def at(rows=1):
    return partial(evaluate, wavy, normal(rows, 2, dtype=torch.float64))


def point(seed, rows=1):
    return torch.randn(rows, 2, dtype=torch.float64, generator=generator(seed))


def test_the_gradient_is_that_of_both_parts():
    z, base = point(0), MultivariateNormal(torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[2, 0.7], [0.7, 1]]).double())
    with torch.no_grad():
        state = evaluate(wavy, base, z)
        both = central_difference(lambda x: (wavy(x[None]) + base.log_prob(x[None]))[0], z[0])
        ratio_only = central_difference(lambda x: wavy(x[None])[0], z[0])
    assert torch.allclose(state.gradient[0], both, atol=1e-8)
    assert not torch.allclose(state.gradient[0], ratio_only, atol=1e-2)               # broken: without log p


def test_rows_are_independent_chains():
    z = point(0, rows=5)
    together = at(5)(z)
    z[2] = nan
    with_a_broken_row = at(5)(z)
    rest = torch.tensor([0, 1, 3, 4])
    for whole, broken in zip(together, with_a_broken_row):
        assert torch.equal(whole[rest], broken[rest])
    assert not with_a_broken_row.log_target[2].isfinite()


@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_events_of_any_shape(sampler, event):
    def log_ratio(z):
        return z if not event else z.flatten(-len(event)).sum(-1)
    assert sampler.draw(log_ratio, normal(4, *event), generator()).shape == (4, *event)


def test_leapfrog_is_reversible_and_preserves_volume():
    z, v = point(1), point(2)
    end, w = leapfrog(at(), at()(z), v, 0.2, 15)
    back, minus_v = leapfrog(at(), end, -w, 0.2, 15)
    assert (end.z - z).abs().max() > 0.3
    assert torch.allclose(back.z, z, atol=1e-12) and torch.allclose(-minus_v, v, atol=1e-12)

    def flow(x):
        state, v = leapfrog(at(), at()(x[None, :2]), x[None, 2:], 0.2, 15)
        return torch.cat([state.z[0], v[0]])

    def euler(x):                                                            # broken: both moves at once
        z, v = x[None, :2], x[None, 2:]
        for _ in range(15):
            z, v = z + 0.2 * v, v + 0.2 * at()(z).gradient
        return torch.cat([z[0], v[0]])
    x = torch.cat([z[0], v[0]])
    assert abs(torch.linalg.det(central_difference(flow, x)) - 1) < 1e-7
    assert abs(torch.linalg.det(central_difference(euler, x)) - 1) > 0.01


def test_the_energy_error_is_of_second_order():
    z, v = point(3, rows=200), point(4, rows=200)
    start, change = at(200)(z), []
    for k in range(1, 5):
        end, w = leapfrog(at(200), start, v, 0.2 / 2**k, 5 * 2**k)
        change.append((end.log_target - kinetic(w) - start.log_target + kinetic(v)).square().mean().sqrt().item())
    assert all(abs(log(a / b) / log(2) - 2) < 0.1 for a, b in zip(change, change[1:]))


def test_metropolis_with_one_step_is_mala():
    lam, start = 0.7, at(400)(point(5, rows=400))
    with seeded(generator(6)):
        state, alpha = metropolis(at(400), start, sqrt(lam), 1)
    with seeded(generator(6)):
        noise = torch.randn_like(start.z)
        uniform = torch.rand_like(start.log_target)
    there = at(400)(start.z + lam / 2 * start.gradient + sqrt(lam) * noise)

    def log_q(to, frm):
        return Normal(frm.z + lam / 2 * frm.gradient, sqrt(lam)).log_prob(to.z).sum(1)
    ratio = there.log_target - start.log_target + log_q(start, there) - log_q(there, start)
    by_hand = ratio.exp().clamp(max=1)
    assert torch.allclose(alpha, by_hand, atol=1e-9) and 0.1 < alpha.mean() < 0.9
    assert torch.allclose(state.z, torch.where((uniform < by_hand)[:, None], there.z, start.z))
    without_q = (there.log_target - start.log_target).exp().clamp(max=1)              # broken: a symmetric proposal
    assert (alpha - without_q).abs().max() > 0.01


def test_langevin_is_the_papers_rule():
    lam, base = 0.3, normal(4, 2, dtype=torch.float64)
    ours = Langevin(3, lam).draw(wavy, base, generator(8))
    with seeded(generator(8)):
        z = base.sample()
        for _ in range(3):
            z = z.requires_grad_()
            gradient, = torch.autograd.grad((-wavy(z) - base.log_prob(z)).sum(), z)
            z = (z - 0.5 * lam * gradient + sqrt(lam) * torch.randn_like(z)).detach()
    assert torch.allclose(ours, z, atol=1e-12)


@pytest.mark.parametrize("sampler, evaluations", [(Langevin(7, 0.1), 8), (MALA(7, 0.1), 8), (HMC(7, 0.1), 36),
                                                  (HMC(7, 0.1, leapfrog=2), 15), (HMC(7), 1 + 5 * (WARM_UP + 7))])
def test_the_cost_is_as_documented(sampler, evaluations):
    calls = []
    sampler.draw(lambda z: calls.append(len(z)) or tilt(z), normal(3, 1), generator())
    assert calls == [3] * evaluations


def test_the_step_is_frozen_after_the_warm_up(monkeypatch):
    steps, transition = [], HMC.transition
    monkeypatch.setattr(HMC, "transition", lambda self, target, state, step: (
        steps.append(step), transition(self, target, state, step))[1])
    run = HMC(30).evolve(tilt, normal(20, 2), generator())
    assert len(steps) == WARM_UP + 30 and len(set(steps[:WARM_UP])) > WARM_UP / 2
    assert set(steps[WARM_UP:]) == {run.step_size}


@pytest.mark.parametrize("scale", [0.003, 1.0, 50.0])
def test_the_tuned_step_follows_the_scale(scale):
    base = diagonal_normal(torch.zeros(50, 10), torch.full((50, 10), scale))
    run = HMC(20).evolve(lambda z: tilt(z / scale), base, generator())
    assert 0.6 < run.acceptance.mean() < 0.97 and 0.2 < run.step_size / scale < 1.5
    assert run.acceptance.shape == (50,) and 0 <= run.acceptance.min() and run.acceptance.max() <= 1 + 1e-6


def test_acceptance_goes_to_one_with_the_step():
    rates = [MALA(10, lam).evolve(tilt, normal(200, 5), generator()).acceptance.mean().item() for lam in (1.0, 0.1, 1e-4)]
    assert rates[0] < rates[1] < rates[2] and rates[2] > 0.999
    assert Langevin(5, 0.1).evolve(tilt, normal(3, 1)).acceptance.eq(1).all()


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("sampler", [MALA(40, 0.5), HMC(40, 0.4)])
def test_a_proposal_without_a_finite_target_is_rejected(sampler, bad):
    narrow = diagonal_normal(torch.zeros(100, 1), torch.full((100, 1), 0.2))
    z = sampler.draw(lambda z: torch.where(z[..., 0] > 1, bad, 5 * z[..., 0]), narrow, generator())
    assert (z <= 1).all() and z.std() > 0.1


class BrokenGradient(torch.autograd.Function):
    "3 x, whose gradient is NaN beyond 1."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 3 * x

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        return torch.where(x > 1, nan, 3 * gradient)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("sampler", [MALA(40, 0.5), HMC(40, 0.4)])
def test_a_path_through_a_broken_gradient_is_rejected(sampler, validate):
    "Inside such a path z itself becomes NaN; a prior that validates its arguments must not stumble over it."
    narrow = Independent(Normal(torch.zeros(100, 1), 0.2, validate_args=validate), 1, validate_args=validate)
    z = sampler.draw(lambda z: BrokenGradient.apply(z[..., 0]), narrow, generator())
    assert (z <= 1).all() and len(z.unique()) == 100


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_start_without_a_finite_target_is_an_error(sampler, bad):
    with pytest.raises(ValueError, match=r"in \d+ of 50 rows at the start"):
        sampler.draw(lambda z: torch.where(z[..., 0] > 0, bad, 0.0), normal(50, 1), generator())


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_a_start_with_a_broken_gradient_is_an_error(sampler):
    with pytest.raises(ValueError, match=r"in \d+ of 50 rows at the start"):
        sampler.draw(lambda z: BrokenGradient.apply(z[..., 0]), normal(50, 1), generator())


def test_langevin_says_where_it_left_the_numbers():
    with pytest.raises(ValueError, match="step_size 9.0"):
        Langevin(500, 9.0).draw(tilt, normal(3, 1), generator())                      # unstable beyond 4 / precision
    with pytest.raises(ValueError, match="on the way"):
        Langevin(50, 0.5).draw(lambda z: torch.where(z[..., 0] > 1, nan, z[..., 0]),
                               diagonal_normal(torch.zeros(9, 1), torch.full((9, 1), 0.2)), generator())


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_chains_need_a_continuous_prior(sampler):
    with pytest.raises(ValueError, match="continuous"):
        sampler.draw(log_r, outcomes(4))


# chains, by statistics: the target of the tilt is N(1/2, 1/2), its precision c = 2

def langevin_law(steps, lam, c=2.0):
    "The linear recursion from N(0, 1)."
    rho = 1 - lam * c / 2
    return (1 - rho**steps) / c, rho ** (2 * steps) + (1 - rho ** (2 * steps)) * lam / (1 - rho**2)


@pytest.mark.parametrize("steps, lam", [(1, 0.3), (2, 0.3), (5, 0.3), (30, 1.0)])
def test_langevin_has_its_law_after_each_number_of_steps(steps, lam):
    z = Langevin(steps, lam).draw(tilt, normal(10_000, 1), generator(steps))
    assert errors(z, *langevin_law(steps, lam)) < 5
    if steps < 3:
        assert errors(z, *langevin_law(steps + 1, lam)) > 5                            # broken: off by one
    assert errors(z, 0.5, 0.5) > 5                                                    # broken: no bias


def test_the_stationary_variance_of_langevin_on_a_standard_normal():
    for lam, variance in ((0.5, 1.143), (1.0, 1.333)):
        z = Langevin(30, lam).draw(lambda z: 0 * z[..., 0], normal(20_000, 1), generator())
        assert abs(variance - 1 / (1 - lam / 4)) < 1e-3 and errors(z, 0.0, 1 / (1 - lam / 4)) < 5 < errors(z, 0.0, 1.0)


@pytest.mark.parametrize("sampler", [MALA(40, 0.9), HMC(20, 0.6), HMC(10), HMC(15, 0.9, leapfrog=2)])
def test_corrected_chains_have_the_target(sampler, monkeypatch):
    z = sampler.draw(tilt, normal(4000, 1), generator())
    assert errors(z, 0.5, 0.5) < 5
    monkeypatch.setattr(sampling, "metropolis", lambda target, state, step, steps: (
        leapfrog(target, state, torch.randn_like(state.z), 1.3 * step, steps)[0], torch.full((len(state.z),), 0.8)))
    fixed = type(sampler)(sampler.steps, sampler.step_size or 0.9)
    assert errors(fixed.draw(tilt, normal(4000, 1), generator()), 0.5, 0.5) > 5     # broken: no correction


def test_mala_without_its_correction_is_seen():
    assert errors(MALA(40, 0.9).draw(tilt, normal(10_000, 1), generator()), 0.5, 0.5) < 5
    assert errors(Langevin(40, 0.9).draw(tilt, normal(10_000, 1), generator()), 0.5, 0.5) > 5


@pytest.mark.parametrize("sampler", [MALA(150, 0.15), HMC(30)])
def test_a_target_that_is_no_gaussian(sampler):
    "r p with log r = z - z^4 / 2: distribution function by quadrature; KS at 2 exp(-2 * 2.7^2) = 1e-6."
    def log_ratio(z):
        return z[..., 0] - z[..., 0] ** 4 / 2
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)

    def ks(x, log_density):
        cdf = log_density.exp().cumsum(0) / log_density.exp().sum()
        x = x[:, 0].double().sort().values
        values, i = cdf[torch.searchsorted(grid, x)], torch.arange(len(x) + 1) / len(x)
        return torch.maximum(values - i[:-1], i[1:] - values).max().item() * sqrt(len(x))
    z = sampler.draw(log_ratio, normal(4000, 1), generator())
    assert ks(z, log_ratio(grid[:, None]) - grid**2 / 2) < 2.7
    assert ks(z, log_ratio(grid[:, None])) > 2.7                                      # broken: the prior forgotten
    assert ks(z, 0.5 * (log_ratio(grid[:, None]) - grid**2 / 2)) > 2.7                # broken: too warm


@pytest.mark.parametrize("sampler", [MALA(100, 0.15), HMC(15, 0.35)])
def test_a_correlated_gaussian(sampler):
    "Base N(0, I), log r = a z - z B z / 2: precision I + B, mean its inverse times a."
    a, B = torch.tensor([1.0, -0.5]), torch.tensor([[2.0, 1.5], [1.5, 2.0]])
    cov = (torch.eye(2) + B).inverse()
    z = sampler.draw(lambda z: z @ a - ((z @ B) * z).sum(-1) / 2, normal(5000, 2), generator())
    along = torch.linalg.eigh(cov).eigenvectors
    for direction in along.T:
        x = z @ direction
        assert errors(x, (direction @ cov @ a).item(), (direction @ cov @ direction).item()) < 5
    assert errors(z[:, 0], (cov @ a)[0].item(), (1 / (1 + B[0, 0])).item()) > 5       # broken: the coupling ignored


def test_a_periodic_path_still_mixes(monkeypatch):
    "Five steps of 2 sin(pi / 5) are a full turn on the standard normal; scaled to the tilt's width."
    periodic = HMC(30, step_size=2 * sin(pi / 5) * sqrt(0.5))
    assert errors(periodic.draw(tilt, normal(5000, 1), generator()), 0.5, 0.5) < 5
    monkeypatch.setattr(sampling, "JITTER", 0.0)
    stuck = periodic.draw(tilt, normal(5000, 1), generator())
    assert errors(stuck, 0.5, 0.5) > 5 > errors(stuck, 0.0, 1.0) and JITTER > 0       # broken: still the prior
