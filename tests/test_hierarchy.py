"""Samplers over a hierarchy against laws that are known: by enumeration, in closed form, and only then by statistics.

Seeds are fixed, so a failure means that the code has changed. On a fresh seed a score beyond 5 standard errors comes by
chance once in 1.7 million times (Gaussian), or once in 80,000 where the error is that of 40 runs (Student). There are about
150 scores of the first kind and 60 of the second: a family-wise false-alarm rate of about 1 in 1,200. The broken twins must
fail the same check."""
from math import exp, inf, log, nan, sqrt
from types import SimpleNamespace

import pytest
import torch
from exact import (GROUP_WISE, JOINT, RUNGS, SLOPE, WIDTH, AddedNoise, Function, Ladder, Rung, coins, ladder, ladder_images,
                   ladder_law, rng, worst)
from torch.distributions import Independent, Normal, Uniform

import ncp_vae.hierarchy
import ncp_vae.sampling
from ncp_vae.chains import HMC, ISIR, MALA, Langevin
from ncp_vae.engine.train import fit_ncp
from ncp_vae.hierarchy import (_PILOT, _RUNS, SMC, JointLangevin, JointMALA, NoiseWalk, _from_noise, descend, law_gap, noise_of,
                               proposal_budget, _systematic)
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.prior import PIECE, NoiseContrastivePrior
from ncp_vae.resampling import SIR, Sampler, effective_sample_size
from ncp_vae.walk import Step, TopDownVAE, Trace, diagonal_normal, seeded

ALL = [SIR(20), SIR([20, 30, 10]), Langevin(5, 0.1), MALA(5, 0.1), HMC(2, 0.3), HMC(2), ISIR(2, 5), SMC(), SMC(4, resample_below=1.0),
       SMC([4, 1, 3]), JointLangevin(5, 0.1), JointMALA(5, 0.1)]
def flat(trace):
    return torch.cat(trace.latents, 1).double()


def moments(z):
    i, j = torch.triu_indices(z.shape[1], z.shape[1])
    return torch.cat([z, z[:, i] * z[:, j]], 1)


def moments_of(mean, covariance):
    i, j = torch.triu_indices(len(mean), len(mean))
    return torch.cat([mean, (covariance + mean.outer(mean))[i, j]])


# the discrete example

def shares(draw, runs=40, n=2000):
    g = rng(1)
    pairs = [draw(n, g).latents for _ in range(runs)]
    return torch.stack([torch.bincount(2 * z1 + z2, minlength=4) / n for z1, z2 in pairs])


class WeightForgotten(SMC):
    "Broken: the particle that SIR picked, without its mean ratio."
    def sample(self, ncp, n, temperature=1.0, generator=None):
        return SIR(self.proposals).sample(ncp, n, temperature, generator)


class WeightOfThePick(Sampler):
    "Broken: SMC of one resampling whose weight is the ratio of the pick, and not the mean of the proposals' ratios."
    def sample(self, ncp, n, temperature=1.0, generator=None):
        trace = SIR(64).sample(ncp, n, temperature, generator)
        chosen = _systematic(ncp.log_ratio(trace.latents))
        return Trace([z[chosen] for z in trace.latents], trace.steps, trace.likelihood)


@pytest.mark.parametrize("sampler, own, other", [
    (SIR(100), GROUP_WISE, JOINT), (SMC(), JOINT, GROUP_WISE), (SMC(8), JOINT, GROUP_WISE), (SMC(3, resample_below=0.0), JOINT, GROUP_WISE),
    (SMC(resample_below=1.0), JOINT, GROUP_WISE), (SMC([2, 5]), JOINT, GROUP_WISE), (SMC([5, 1]), JOINT, GROUP_WISE), (ISIR(4, 6), GROUP_WISE, JOINT)])
def test_the_two_laws_are_told_apart(sampler, own, other):
    found = shares(lambda n, g: coins().sample(n, sampler, generator=g))
    assert worst(found, own) < 5 and worst(found, other) > 25


@pytest.mark.parametrize("broken", [WeightForgotten(64), WeightOfThePick()])
def test_a_wrong_weight_is_seen(broken):
    assert worst(shares(lambda n, g: coins().sample(n, broken, generator=g)), JOINT) > 25


# the ladder of Gaussians

def test_sir_has_the_group_wise_law():
    z = flat(ladder(0.5).sample(4000, SIR(1000), generator=rng(2)))
    group, joint, covariance, _ = ladder_law(0.5)
    assert worst(moments(z), moments_of(group, covariance)) < 5 and worst(moments(z), moments_of(joint, covariance)) > 20


@pytest.mark.parametrize("sampler", [MALA(60, 0.15), HMC(15, 0.25)])
def test_chains_in_each_group_have_the_group_wise_law(sampler):
    z = flat(ladder(0.5).sample(4000, sampler, generator=rng(3)))
    group, joint, covariance, _ = ladder_law(0.5)
    assert worst(moments(z), moments_of(group, covariance)) < 5 and worst(moments(z), moments_of(joint, covariance)) > 20


@pytest.mark.parametrize("sampler", [SMC(), SMC(4, resample_below=0.9), SMC([1, 6, 2])])
def test_smc_has_the_joint_law(sampler):
    g = rng(4)
    means = torch.stack([moments(flat(ladder(0.5).sample(3000, sampler, generator=g))).mean(0) for _ in range(40)])
    group, joint, covariance, _ = ladder_law(0.5)
    assert worst(means, moments_of(joint, covariance)) < 5 and worst(means, moments_of(group, covariance)) > 20


def noise_matrix():
    "eps = matrix @ z on the ladder."
    matrix = torch.eye(3).double()
    matrix[1, 0] = matrix[2, 1] = -SLOPE
    matrix[1:] /= WIDTH
    return matrix


def joint_langevin_law(steps, step_size, tilt):
    "Mean and covariance of the noise after so many steps from N(0, I)."
    _, joint, covariance, _ = ladder_law(tilt)
    goal, precision = noise_matrix() @ joint, torch.linalg.inv(noise_matrix() @ covariance @ noise_matrix().T)
    turn, mean, S = torch.eye(3) - step_size / 2 * precision, torch.zeros(3).double(), torch.eye(3).double()
    for _ in range(steps):
        mean, S = goal + turn @ (mean - goal), turn @ S @ turn.T + step_size * torch.eye(3)
    return mean, S


@pytest.mark.parametrize("steps, step_size", [(1, 0.3), (3, 0.4), (40, 0.5)])
def test_joint_langevin_has_its_exact_law(steps, step_size):
    z = flat(ladder(0.5).sample(20_000, JointLangevin(steps, step_size), generator=rng(5)))
    noise = moments(z @ noise_matrix().T)
    assert worst(noise, moments_of(*joint_langevin_law(steps, step_size, 0.5))) < 5
    assert worst(noise, moments_of(*joint_langevin_law(10_000, 0.001, 0.5))) > 10          # the target, without the bias
    assert steps > 4 or worst(noise, moments_of(*joint_langevin_law(steps + 1, step_size, 0.5))) > 7


def test_joint_langevin_tends_to_the_joint_law():
    "The step is so small that its bias, about half a per cent of a variance, is below a standard error (two per cent)."
    z = flat(ladder(0.5).sample(4000, JointLangevin(400, 0.01), generator=rng(6)))
    group, joint, covariance, _ = ladder_law(0.5)
    assert worst(moments(z), moments_of(joint, covariance)) < 5 and worst(moments(z), moments_of(group, covariance)) > 20


def test_the_metropolis_test_removes_the_bias():
    "The same step and number of steps: the one has the law with the bias, the other the target."
    target = moments_of(*joint_langevin_law(10_000, 0.001, 0.5))
    biased, right = (moments(flat(ladder(0.5).sample(20_000, sampler, generator=rng(31))) @ noise_matrix().T)
                     for sampler in (JointLangevin(40, 0.4), JointMALA(40, 0.4)))
    assert worst(right, target) < 5 and worst(biased, target) > 15
    assert worst(right, moments_of(*joint_langevin_law(40, 0.4, 0.5))) > 15


def test_few_proposals_are_biased_and_the_iterated_race_is_not():
    group, joint, covariance, _ = ladder_law(0.5)
    biased, right = (moments(flat(ladder(0.5).sample(20_000, sampler, generator=rng(32)))) for sampler in (SIR(8), ISIR(6, 8)))
    assert worst(right, moments_of(group, covariance)) < 5 and worst(biased, moments_of(group, covariance)) > 15
    assert worst(right, moments_of(joint, covariance)) > 20


def tempered_laws(temperature):
    "Means of the group-wise and the joint law of r p_T without a tilt; their conditional precisions add up."
    more, group = temperature ** -2 - 1, []
    A, B, b = torch.zeros(3, 3).double(), torch.zeros(3, 3).double(), torch.zeros(3).double()
    for k, (shift, width) in enumerate(RUNGS):
        A[k, k], B[k, k] = 1 / width, 1 / (WIDTH if k else 1.0)
        b[k], above = A[k, k] * shift, group[-1] if k else 0.0
        if k:
            A[k, k - 1], B[k, k - 1] = -0.5 * A[k, k], -SLOPE * B[k, k]
        pull = (0.5 * above + shift) * A[k, k] ** 2 + more * SLOPE * above * B[k, k] ** 2
        group.append(pull / (A[k, k] ** 2 + more * B[k, k] ** 2))
    return torch.stack(group), torch.linalg.solve(A.T @ A + more * B.T @ B, A.T @ b)


@pytest.mark.parametrize("sampler, law, runs", [(SIR(500), 0, 1), (ISIR(8, 20), 0, 1), (SMC(), 1, 40), (JointMALA(60, 0.4), 1, 1)])
def test_a_temperature_parts_the_two_laws(sampler, law, runs):
    "The ratios are perfect: at temperature one both laws are the target. Independent rows in one run, or the means of many runs."
    g = rng(33)
    z = [flat(ladder().sample(8000 // runs, sampler, 0.7, g)) for _ in range(runs)]
    z = z[0] if runs == 1 else torch.stack([each.mean(0) for each in z])
    assert worst(z, tempered_laws(0.7)[law]) < 5 < worst(z, tempered_laws(0.7)[1 - law])
    assert worst(z, tempered_laws(1.0)[law]) > 20


# the walk as a function of noise

@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_noise_and_walk_are_inverse(temperature):
    walk = NoiseWalk(ladder(0.5), 7, temperature)
    with seeded(rng(34)):
        eps = walk.base.sample()
    assert eps.shape == (7, 3) and torch.allclose(noise_of(walk, walk.trace(eps)), eps, atol=1e-5)
    assert torch.allclose(walk.log_ratio(eps), ladder(0.5).log_ratio(walk.trace(eps)), atol=1e-5)
    assert torch.allclose(walk.trace(eps).latents[0], temperature * eps[:, :1])
    assert torch.allclose(flat(walk.trace(eps)) @ noise_matrix().T, temperature * eps.double(), atol=1e-5)


def test_the_ratio_is_smooth_in_the_noise():
    walk = NoiseWalk(ladder(0.5), 4)
    eps = torch.randn(4, 3, generator=rng(35)).requires_grad_()
    gradient, = torch.autograd.grad(walk.log_ratio(eps).sum(), eps)
    for d in range(3):
        move = 1e-2 * torch.eye(3)[d]
        slope = (walk.log_ratio(eps + move) - walk.log_ratio(eps - move)) / 2e-2       # the ratio is quadratic: exact
        assert torch.allclose(slope, gradient[:, d], atol=2e-3, rtol=2e-3)


class Funnel(TopDownVAE):
    latent_shapes, context_shapes = [torch.Size([1])] * 2, [None, torch.Size([1])]

    def walk(self, choose, *, n=None, evidence=None):
        first = Step(0, None, diagonal_normal(torch.zeros(n, 1), torch.ones(n, 1)), None)
        z1 = choose(first)
        second = Step(1, z1, diagonal_normal(0 * z1, (0.8 * z1).exp()), None)
        z2 = choose(second)
        return Trace([z1, z2], [first, second], diagonal_normal(z2, torch.ones_like(z2)))


def test_no_log_sigma_is_left():
    "Ratios of one leave the noise standard normal; a kept log sigma moves the first group's mean to -0.8."
    one = Function(lambda z: 0 * z.sum(-1))
    kept = Function(lambda z, c: 0 * z.sum(-1) - (0 if c is None else 0.8 * c.sum(-1)), of_context=True)
    first = [JointLangevin(60, 0.1).sample(SimpleNamespace(vae=Funnel(), ratios=[r, r]), 4000, generator=rng(7)).latents[0]
             for r in (one, kept)]
    assert worst(first[0], 0.0) < 5 and worst(first[1], 0.0) > 30
    assert worst(first[1], -0.8 * (1 - 0.95 ** 60)) < 5


# Z

@pytest.mark.parametrize("sampler", [SMC(), SMC(4), SMC(resample_below=0.0), SMC(2, resample_below=1.0), SMC([1, 5])])
def test_z_is_unbiased(sampler):
    g = rng(8)
    found = torch.tensor([sampler.run(coins((0.5, 1.5)), 8, generator=g).log_z for _ in range(400)]).double().exp()
    assert worst(found, 2.5) < 5                                                # (0.5 * 1 + 1.5 * 3) / 2
    assert worst(found * 8 / 7, 2.5) > 5                                      # broken: n - 1 in the mean


def test_z_is_unbiased_on_the_ladder():
    g = rng(9)
    found = torch.tensor([SMC().run(ladder(0.5), 100, generator=g).log_z for _ in range(300)]).double().exp()
    assert worst(found, exp(ladder_law(0.5)[3])) < 5 and worst(found, exp(ladder_law(0.4)[3])) > 5
    estimate = ladder(0.5).log_partition(20_000, rng(10))
    assert abs(estimate.value - ladder_law(0.5)[3]) < 5 * estimate.std_error and estimate.k_hat < 0.7


def test_one_particle_is_importance_sampling():
    "With n = 1 and one proposal the estimate of log Z is log r of a walk of the base prior."
    population = SMC().run(ladder(0.5), 1, generator=rng(11))
    assert abs(population.log_z - ladder(0.5).log_ratio(population.trace.latents).item()) < 1e-5


def test_log_partition_takes_the_estimate_of_smc():
    """The mean of Z-hat over runs is what is stored; its error is that of the runs. Ten runs know it to about a quarter, so the mean
    of 40 reports has a relative error of 0.04, and the spread of 40 values one of 0.11."""
    ncp, g, truth = ladder(0.5), rng(36), ladder_law(0.5)[3]
    found = [ncp.log_partition(400, g, SMC()) for _ in range(40)]
    values = torch.tensor([each.value for each in found]).double()
    assert worst(values.exp(), exp(truth)) < 5 < worst(values.exp(), exp(truth) * 1.15)
    assert all(each.num_samples == _RUNS and each.bias == -each.std_error ** 2 / 2 for each in found)
    assert abs(sum(each.std_error for each in found) / 40 / values.std().item() - 1) < 5 * 0.12
    assert ncp.log_z == pytest.approx(found[-1].value) and ncp.log_z_std_error == pytest.approx(found[-1].std_error)
    trace = ncp.sample(5, SMC(), generator=g)
    assert torch.allclose(ncp.log_prob(trace), trace.log_prior() + ncp.log_ratio(trace) - found[-1].value, atol=1e-5)


@pytest.mark.parametrize("samples, runs, particles", [(400, _RUNS, 40), (3, _RUNS, 1), (12 * PIECE, 12, PIECE)])
def test_runs_of_log_partition(samples, runs, particles):
    "All in all num_samples particles, at least _RUNS runs, at most PIECE in one: memory does not grow."
    ncp, seen, run = coins((0.5, 1.5)), [], SMC.run
    method = SMC()
    method.run = lambda ncp, n, **settings: seen.append(n) or run(method, ncp, n, **settings)
    assert ncp.log_partition(samples, rng(37), method).num_samples == runs and seen == [particles] * runs


def test_log_partition_of_smc_has_random_numbers_of_its_own():
    before = torch.get_rng_state()
    first, again, other = (coins((0.5, 1.5)).log_partition(100, rng(s), SMC()).value for s in (38, 38, 39))
    assert first == again != other and torch.equal(before, torch.get_rng_state())


# how far apart the two laws are

def rare():
    "Tails once in a thousand, which the first ratio repairs; below tails all ratios are 100."
    return coins((0.5005, 500.0), ((1.0, 1.0), (100.0, 100.0)), tails=0.001)


def expected_gap(M):
    "What `law_gap` tends to on `rare` with pools of M: the number of tails in a pool is binomial."
    tails = torch.arange(M + 1).double()
    chance = torch.distributions.Binomial(M, torch.tensor(0.001).double()).log_prob(tails).exp()
    total = 500 * tails + 0.5005 * (M - tails)
    return log(0.999 * 0.5005 + 0.5 * 100) - (chance * ((total / M).log() + 500 * tails / total * log(100))).sum().item()


def test_law_gap_is_the_divergence():
    """Coins: log 2 - log(3) / 2. Rare coins: with pools of 500 and 2,000 the number that these pools give, far from the limit, 1.619.
    The spread of log Z_2 over walks of the base prior, 0.146, would call the two laws of the rare coins close."""
    gap = law_gap(coins(), 4000, 300, rng(40))
    assert abs(gap.value - (log(2) - log(3) / 2)) < 5 * gap.std_error and gap.std_error < 0.01
    limit = log(50.5) - 0.5 * log(100)
    for M in (500, 2000):
        gap = law_gap(rare(), 2000, [M, 1], rng(41))
        assert abs(gap.value - expected_gap(M)) < 5 * gap.std_error < gap.value - limit
    assert abs(expected_gap(200_000) - limit) < 0.01
    spread = log(100) * sqrt(0.001 * 0.999)
    assert spread < 0.15 < 1.6 < limit


def test_law_gap_on_the_ladder():
    "Of two Gaussians of one covariance; without a tilt only the pools' bias is left, which is of order 1/M."
    group, joint, covariance, _ = ladder_law(0.5)
    truth = 0.5 * ((joint - group) @ torch.linalg.solve(covariance, joint - group)).item()
    gap = law_gap(ladder(0.5), 4000, 500, rng(42))
    assert abs(gap.value - truth) < 5 * gap.std_error < truth / 4
    small, large = law_gap(ladder(), 8000, 40, rng(43)), law_gap(ladder(), 2000, 400, rng(43))
    assert 5 < small.value / large.value < 20 and large.value < 0.005


def test_the_error_of_law_gap_is_honest():
    "Over 80 runs; a standard deviation of 80 has a relative error of 0.08."
    found = [law_gap(coins(), 400, 200, rng(s)) for s in range(80)]
    values = torch.tensor([gap.value for gap in found]).double()
    assert abs(sum(gap.std_error for gap in found) / 80 / values.std().item() - 1) < 0.4
    assert worst(values, log(2) - log(3) / 2) < 5


def test_what_law_gap_costs():
    "One M a group; the walks in pieces; no likelihood; random numbers of its own."
    ncp, before = ladder(), torch.get_rng_state()
    gap = law_gap(ncp, PIECE + 500, [3, 20, 7], rng(44))
    assert [ratio.seen for ratio in ncp.ratios] == [(PIECE + 500) * M for M in (3, 20, 7)] and ncp.vae.groups_walked == 6
    assert gap == law_gap(ladder(), PIECE + 500, [3, 20, 7], rng(44)) and torch.equal(before, torch.get_rng_state())


# resampling

def test_systematic_resampling_is_unbiased_and_even():
    "Weights that are all different: a pattern that repeats would count the same score several times."
    log_w = torch.cat([torch.tensor([-inf] * 2), 1.5 * torch.randn(20, generator=rng(12)), torch.tensor([-inf] * 2)])
    log_w[7] = -inf
    expected = 24 * log_w.double().softmax(0)
    with seeded(rng(12)):
        counts = torch.stack([_systematic(log_w).bincount(minlength=24) for _ in range(4000)]).double()
        independent = torch.multinomial(log_w.exp(), 24, replacement=True).bincount(minlength=24)
    assert ((counts - expected).abs() < 1).all() and (counts.sum(1) == 24).all() and (independent - expected).abs().max() > 1
    alive = expected > 0
    assert alive.sum() == 19 and (counts[:, ~alive] == 0).all()
    assert worst(counts[:, alive], expected[alive]) < 5 < worst(counts[:, alive], expected[alive].round())


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -53])
def test_systematic_resampling_at_the_ends(u, monkeypatch):
    "Also where the sum of the weights falls short of one in floating point, the zero weights at both ends get nothing."
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: torch.full((), u, **kind))
    for n in (3, 7, 1000):
        log_w = torch.cat([torch.tensor([-inf]), torch.randn(n, generator=rng(n)), torch.tensor([-inf] * 2)])
        chosen = _systematic(log_w)
        assert len(chosen) == n + 3 and chosen.min() >= 1 and chosen.max() <= n


def test_rows_come_in_random_order():
    with seeded(rng(13)):
        chosen = _systematic(torch.zeros(1000))
    assert torch.equal(chosen.sort().values, torch.arange(1000)) and (chosen == torch.arange(1000)).sum() < 20


def test_ancestors_are_those_of_the_rows():
    "Rows with one ancestor in a group carry one latent there, in it and in all above it; the trace is a walk of them."
    population = SMC(resample_below=0.9).run(ladder(0.5), 300, generator=rng(14))
    latents, lines = population.trace.latents, population.ancestors
    assert lines.shape == (3, 300) and len(population.ess) == 3 and all(1 <= e <= 300 for e in population.ess)
    for k in range(3):
        for line in lines[k].unique():
            assert all(len(z[lines[k] == line].unique()) == 1 for z in latents[:k + 1])
        assert len(lines[k].unique()) == len(latents[k].unique())
    distinct = [len(line.unique()) for line in lines]
    assert distinct == sorted(distinct) and distinct[0] < 250
    for k in (1, 2):
        assert torch.equal(population.trace.steps[k].context, latents[k - 1])


def test_rows_of_smc_are_not_independent():
    g = rng(15)
    runs = torch.stack([SMC().sample(ladder(0.5), 300, generator=g).latents[0][:, 0] for _ in range(60)])
    naive, real = runs.std(1).mean() / sqrt(300), runs.mean(1).std()       # the latter's relative error: 1 / sqrt(118)
    assert real > 1.5 * naive
    g = rng(15)
    runs = torch.stack([SIR(20).sample(ladder(0.5), 300, generator=g).latents[0][:, 0] for _ in range(60)])
    assert 0.6 < runs.mean(1).std() / (runs.std(1).mean() / sqrt(300)) < 1.5


@pytest.mark.parametrize("below, walks", [(0.0, [3, 3]), (1.0, [1, 2, 3, 3])])
def test_a_resampling_costs_a_walk_to_its_group_and_no_evaluation(below, walks):
    ncp = ladder(0.5)
    SMC(5, resample_below=below).sample(ncp, 100, generator=rng(16))
    assert ncp.vae.groups_walked == sum(walks)
    assert [ratio.seen for ratio in ncp.ratios] == [500] * 3


# leaving a walk

def test_a_chooser_may_leave_a_walk():
    vae = Ladder()
    seen = []
    assert descend(vae, seen.append, 4) is None and [step.index for step in seen] == [0] and vae.groups_walked == 1
    assert descend(vae, lambda step: step.prior.mean, 4).latents[2].shape == (4, 1)
    with pytest.raises(ZeroDivisionError):                                     # other exceptions pass
        descend(vae, lambda step: 1 / 0, 4)


def test_names_can_still_be_had_from_the_sampling_module():
    for name in ("SMC", "JointLangevin", "JointMALA", "proposal_budget", "law_gap", "Population"):
        assert getattr(ncp_vae.sampling, name) is getattr(ncp_vae.hierarchy, name)


def test_joint_langevin_does_not_decode_on_its_way():
    decoded = []

    class Decoding(Ladder):
        def walk(self, choose, *, n=None, evidence=None):
            trace = super().walk(choose, n=n, evidence=evidence)
            decoded.append(n)
            return trace
    ncp = NoiseContrastivePrior(Decoding(laws=ladder().ratios, by_image=0.5), ladder().ratios)
    JointLangevin(7, 0.1).sample(ncp, 5)
    assert decoded == [5] and [ratio.seen for ratio in ncp.ratios] == [8 * 5] * 3
    decoded.clear(), SMC().sample(ncp, 5), proposal_budget(ncp, 10, 2), law_gap(ncp, 10, 2)
    assert decoded == [5]
    decoded.clear(), proposal_budget(ncp, 10, 2, images=torch.zeros(4, 3))
    assert decoded == []


# one group, and the contract of every sampler

@pytest.mark.parametrize("sampler", [each for each in ALL if not isinstance(getattr(each, "proposals", 1), list)]
                         + [SIR([9]), SMC([9])])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_group_is_the_flat_code_to_the_bit(sampler, temperature):
    ratio = MLPRatio(2)
    one, flat_one = (NoiseContrastivePrior(vae, [ratio]).sample(50, sampler, temperature, rng(17))
                     for vae in (Ladder(1, (2,)), AddedNoise(2)))
    assert torch.equal(one.latents[0], flat_one.latents[0]) and torch.equal(one.likelihood.mean, flat_one.likelihood.mean)


@pytest.mark.parametrize("sampler, flat_one", [(JointLangevin(9, 0.2), Langevin(9, 0.2)), (JointMALA(9, 0.2), MALA(9, 0.2))])
def test_in_one_standard_normal_group_the_noise_is_the_latent(sampler, flat_one):
    "So joint Langevin is Langevin there, joint MALA is MALA, and both are what `draw` returns for that one step."
    ratio = MLPRatio(2)
    ncp = NoiseContrastivePrior(AddedNoise(2), [ratio])
    z = ncp.sample(30, flat_one, generator=rng(18)).latents[0]
    assert torch.allclose(ncp.sample(30, sampler, generator=rng(18)).latents[0], z, atol=1e-5)
    assert torch.allclose(sampler.draw(ratio.condition(None), AddedNoise(2).prior(30), rng(18)), z, atol=1e-5)


def test_draw_of_one_group():
    "Of SMC it is SIR, row by row; of joint Langevin it has the law of the group in its own noise."
    prior = diagonal_normal(torch.full((20_000, 1), 2.0), torch.full((20_000, 1), 0.1))
    assert torch.equal(SMC(6).draw(lambda z: z.sum(-1), prior, rng(19)), SIR(6).draw(lambda z: z.sum(-1), prior, rng(19)))
    z = JointLangevin(60, 0.1).draw(lambda z: 10 * z.sum(-1), prior, rng(20))    # N(2, 0.1^2) e^(10 z): N(2.1, 0.1^2)
    assert worst(z.double(), 2.0 + 0.1 * (1 - 0.95 ** 60)) < 5 and abs(z.std() / 0.1 / (1 - 0.1 / 4) ** -0.5 - 1) < 0.03


@pytest.mark.parametrize("sampler", ALL)
def test_shapes_and_random_numbers(sampler):
    ncp = ladder(0.2)
    torch.manual_seed(1)
    before, g = torch.get_rng_state(), rng(21)
    first, second = sampler.sample(ncp, 6, generator=g), sampler.sample(ncp, 6, generator=g)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(flat(first), flat(ncp.sample(6, sampler, generator=rng(21)))) and not torch.equal(flat(first), flat(second))
    assert [z.shape for z in first.latents] == [(6, 1)] * 3 and first.likelihood.batch_shape == (6,)
    assert not any(z.requires_grad for z in first.latents)


@pytest.mark.parametrize("event", [(), (2, 3)])
@pytest.mark.parametrize("sampler", [SMC(2), SMC([2, 3]), JointLangevin(3, 0.1), JointMALA(3, 0.1)])
def test_events_of_any_shape(sampler, event):
    numbers = -len(event)
    ratio = Function(lambda z: z.sum(tuple(range(numbers, 0))) if numbers else 1 * z)
    trace = sampler.sample(SimpleNamespace(vae=Ladder(2, event), ratios=[ratio, ratio]), 4)
    assert [z.shape for z in trace.latents] == [(4, *event)] * 2


@pytest.mark.parametrize("sampler", [SMC(), JointLangevin(80, 0.1)])
def test_a_temperature_scales_each_prior(sampler):
    "With ratios of one the rows are those of the base prior at the temperature."
    one = Function(lambda z: 0 * z.sum(-1))
    g, ncp = rng(22), SimpleNamespace(vae=Ladder(2), ratios=[one, one])
    z = flat(sampler.sample(ncp, 10_000, 0.5, g))
    width = 1 / (1 - 0.1 / 4) if isinstance(sampler, JointLangevin) else 1.0           # Langevin's bias of a variance
    for values, variance in ((z[:, 0], 0.25), ((z[:, 1] - SLOPE * z[:, 0]), 0.25 * WIDTH ** 2)):
        assert worst(values.square()[:, None], variance * width) < 5 < worst(values.square()[:, None], variance * width * 1.2)


def test_networks_are_left_alone():
    ncp = NoiseContrastivePrior(Ladder(), [MLPRatio(1), MLPRatio(1, 1), MLPRatio(1, 1)])
    for sampler in (SMC(), JointLangevin(3, 0.1), JointMALA(3, 0.1)):
        assert not flat(sampler.sample(ncp, 4)).requires_grad
        assert all(p.grad is None for p in ncp.parameters())


# budgets

def even_ladder(shifts):
    "Ratios whose ESS is M exp(-d^2) at every context: q is p moved by d of its deviations."
    sigmas = [1.0] + [WIDTH] * (len(shifts) - 1)
    return NoiseContrastivePrior(Ladder(len(shifts)), [Rung(d * sigma, sigma, SLOPE) for d, sigma in zip(shifts, sigmas)])


def test_budgets_are_what_the_groups_need():
    "Var(w^2) = (e^(4 d^2) - 1) E[w^2]^2, so 32 walks of 4000 proposals know the largest of these to 1.4 per cent."
    shifts = (0.2, 0.6, 0.9)
    ncp = even_ladder(shifts)
    budgets = proposal_budget(ncp, 4000, 50, rng(23))
    assert all(isinstance(M, int) and abs(M / (50 * exp(d * d)) - 1) < 0.08 for M, d in zip(budgets, shifts))
    for M, d in zip(budgets, shifts):
        prior = diagonal_normal(torch.zeros(2000, 1), torch.ones(2000, 1))
        ess = SIR(M).resample(Rung(d, 1.0).condition(None), prior, rng(24)).ess
        assert ess.mean() > 50 * 0.95                                                  # in fresh proposals
    assert SIR(budgets).sample(ncp, 5).latents[2].shape == (5, 1)


def test_a_group_that_cannot_reach_the_target_gets_the_maximum():
    assert proposal_budget(even_ladder((0.0, 5.0)), 200, 50, rng(25)) == [50, 200]


def test_the_pilot_costs_what_it_says():
    ncp = even_ladder((0.2, 0.9, 1.2))
    proposal_budget(ncp, 300, 20)
    assert [ratio.seen for ratio in ncp.ratios] == [300 * _PILOT] * 3


def test_the_pilot_shares_no_random_numbers_with_the_sampler():
    "Even where both are given the same seed: no proposal of the one is a proposal of the other."
    proposals, ncp = [], ladder()
    log_ratio = ncp.ratios[0].condition
    ncp.ratios[0].condition = lambda context: lambda z: proposals.append(z.flatten()) or log_ratio(context)(z)
    proposal_budget(ncp, 64, 2, rng(26))
    pilot = torch.cat(proposals)
    proposals.clear(), ncp.sample(_PILOT, SIR(64), generator=rng(26))
    assert len(pilot) == 64 * _PILOT and not torch.isin(torch.cat(proposals), pilot).any()
    proposals.clear(), ncp.sample(_PILOT, SIR(64), generator=rng(26))
    again = torch.cat(proposals)
    proposals.clear(), ncp.sample(_PILOT, SIR(64), generator=rng(26))
    assert torch.isin(torch.cat(proposals), again).all()                               # the check can fail


def test_posterior_draws_know_the_tail_and_prior_draws_do_not():
    """q is p moved by d = 1.7 deviations in the second group, so the need is 20 e^(d^2); the mean of n posterior draws has the
    relative variance (e^(d^2) - 1) / n. The pilot of the prior is too small on average, by more than a tenth."""
    ratios = [Rung(0.3, 1.0, SLOPE), Rung(1.7 * WIDTH, WIDTH, SLOPE)]
    ncp, need = NoiseContrastivePrior(Ladder(2, laws=ratios), ratios), 20 * exp(1.7 ** 2)
    told = torch.tensor([proposal_budget(ncp, 1000, 20, rng(s), torch.zeros(500, 1)) for s in range(20)]).double()
    error = need * sqrt((exp(1.7 ** 2) - 1) / 500 / 20)
    assert abs(told[:, 1].mean() - need) < 5 * error < need * 0.25
    assert abs(told[:, 0].mean() / (20 * exp(0.09)) - 1) < 0.05                          # ceil: up to 1 in 22
    blind = torch.tensor([proposal_budget(ncp, 1000, 20, rng(s)) for s in range(40)]).double()[:, 1]
    assert worst(blind, 0.9 * need) > 5 and blind.mean() < 0.9 * need


def test_the_posterior_pilot_averages_over_images():
    "Here each image has a posterior of its own; together they are the target, whose 1 + chi^2 in the first group is the integral of q^2 / p."
    grid = torch.linspace(-6, 8, 4001).double()
    q, p = Normal(1.0, 0.7).log_prob(grid), Normal(0.0, 1.0).log_prob(grid)
    excess = (2 * q - p).exp().sum().item() * (grid[1] - grid[0]).item()
    found = [proposal_budget(ladder(), 500, 50, rng(s), ladder_images(1000, s))[0] for s in range(10)]
    assert abs(sum(found) / 10 / (50 * excess) - 1) < 0.05                               # five standard errors, and ceil


def test_what_a_posterior_pilot_costs():
    "The pools for Z_k, and the posterior draw itself; the images in pieces; the global random state is left alone."
    ncp, before = ladder(), torch.get_rng_state()
    first = proposal_budget(ncp, 30, 5, rng(45), ladder_images(PIECE + 200, 0))
    assert [ratio.seen for ratio in ncp.ratios] == [31 * (PIECE + 200)] * 3 and ncp.vae.groups_walked == 6
    assert first == proposal_budget(ladder(), 30, 5, rng(45), ladder_images(PIECE + 200, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampler", [SIR([3, 20, 7]), SMC([3, 20, 7])])
def test_each_group_gets_its_own_number_of_proposals(sampler):
    ncp = ladder()
    sampler.sample(ncp, 11)
    assert [ratio.seen for ratio in ncp.ratios] == [33, 220, 77]


# trained ratios

def test_trained_ratios_find_the_exact_ones():
    """`fit_ncp` on draws whose aggregate posterior is the ladder's target: correlation above 0.95 in every group, on held-out
    draws of prior and posterior in equal parts; the ratio of the wrong context must not do as well."""
    known = ladder()
    vae = known.vae
    ratios = [MLPRatio(1, None if k == 0 else 1, hidden=(32, 32)) for k in range(3)]
    ncp = fit_ncp(vae, ladder_images(8000, 27), ratios=ratios, steps=300, batch_size=250, lr=1e-2, seed=0)
    with torch.no_grad():
        trace = vae.walk(lambda step: step.posterior.sample(), evidence=ladder_images(2000, 28))
        for step, z, learned, true in zip(trace.steps, trace.latents, ncp.ratios, known.ratios):
            z = torch.cat([z, step.prior.sample()])
            context = None if step.context is None else step.context.repeat(2, 1)
            found = torch.corrcoef(torch.stack([learned(z, context), true(z, context)]))[0, 1]
            assert found > 0.95
            if context is not None:
                assert torch.corrcoef(torch.stack([learned(z, context.flip(0)), true(z, context)]))[0, 1] < 0.9


# refusals

def wall(edge, inside=0.0):
    return Function(lambda z: torch.where(z > edge, inside, -inf).sum(-1))


def walled(edge, inside=0.0):
    return SimpleNamespace(vae=Ladder(2), ratios=[wall(edge, inside), wall(-99.0)])


def test_particles_of_weight_zero_die_and_the_rest_go_on():
    population = SMC().run(walled(1.0), 2000, generator=rng(29))
    p = 1 - Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item()
    assert (population.trace.latents[0] > 1).all() and abs(exp(population.log_z) - p) < 5 * sqrt(p * (1 - p) / 2000)
    with pytest.raises(ValueError, match="weight zero"):
        SIR(1).sample(walled(1.0), 2000)


@pytest.mark.parametrize("call, error, message", [
    (lambda: SMC().sample(walled(99.0), 50), ValueError, "all 50 particles have weight zero at group 0"),
    (lambda: SMC().sample(walled(0.0, nan), 50), ValueError, "NaN or .inf"),
    (lambda: SMC().sample(walled(0.0, inf), 50), ValueError, "NaN or .inf"),
    (lambda: JointLangevin(5, 0.1).sample(walled(0.0, nan), 50), ValueError, "JointLangevin.*at the start"),
    (lambda: JointLangevin(5, 0.1).sample(walled(99.0), 50), ValueError, "JointLangevin.*at the start"),
    (lambda: JointLangevin(300, 9.0).sample(ladder(), 50), ValueError, "JointLangevin.*on the way.*9.0"),
    (lambda: JointLangevin(5, 0.1).sample(coins(), 50), ValueError, "Normal priors.*Categorical"),
    (lambda: JointMALA(5, 0.1).sample(coins(), 50), ValueError, "Normal priors.*Categorical"),
    (lambda: JointMALA(5, 0.1).sample(walled(0.0, nan), 50), ValueError, "JointMALA.*at the start"),
    (lambda: JointMALA(5, -1.0), ValueError, "JointMALA.*got -1.0"),
    (lambda: JointLangevin(5, 0.1).draw(lambda z: z.sum(-1), Independent(Uniform(torch.zeros(4, 2), torch.ones(4, 2)), 1)),
     ValueError, "Normal priors.*Uniform"),
    (lambda: SMC().sample(ladder(), 0), ValueError, "at least 1, got 0"),
    (lambda: JointLangevin(5, 0.1).sample(ladder(), 0), ValueError, "at least 1, got 0"),
    (lambda: SIR([5, 5]).sample(ladder(), 4), ValueError, "2 budgets for 3"),
    (lambda: SMC([5, 5]).sample(ladder(), 4), ValueError, "SMC: 2 budgets for 3"), (lambda: SMC([5, 0, 5]), ValueError, "SMC.*got 0"),
    (lambda: law_gap(ladder(), 4, [5, 5]), ValueError, "law_gap: 2 budgets for 3"), (lambda: law_gap(ladder(), 4, 0), ValueError, "got 0"),
    (lambda: law_gap(walled(99.0), 4, 5), ValueError, "weight zero"),
    (lambda: ladder().log_partition(1, method=SMC()), ValueError, "at least 2, got 1"),
    (lambda: SMC(0), ValueError, "got 0"), (lambda: SMC(2.5), ValueError, "got 2.5"),
    (lambda: SMC(resample_below=1.5), ValueError, "got 1.5"), (lambda: SMC(resample_below=nan), ValueError, "got nan"),
    (lambda: JointLangevin(0, 0.1), ValueError, "JointLangevin.*got 0"), (lambda: JointLangevin(5, -1.0), ValueError, "got -1.0"),
    (lambda: SMC().sample(ladder(), 4, temperature=0.0), ValueError, "temperature"),
    (lambda: JointLangevin(5, 0.1).sample(ladder(), 4, temperature=0.0), ValueError, "temperature"),
    (lambda: SMC().sample(coins(), 4, temperature=0.5), TypeError, "Normal"),
    (lambda: proposal_budget(ladder(), 100, 200), ValueError, "got 200"), (lambda: proposal_budget(ladder(), 100, nan), ValueError, "got nan"),
    (lambda: proposal_budget(ladder(), 0, 1), ValueError, "got 0"),
    (lambda: proposal_budget(walled(99.0), 10, 2), ValueError, "weight zero"),
    (lambda: proposal_budget(walled(0.0, nan), 10, 2), ValueError, "NaN or .inf")])
def test_bad_input_is_refused_and_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_noise_of_a_nested_independent():
    prior = Independent(Independent(Normal(torch.ones(3, 2, 2), 2.0), 1), 1)
    assert torch.equal(_from_noise(prior, torch.ones(3, 4)), torch.full((3, 2, 2), 3.0))


def test_ess_is_that_of_the_particles_weights():
    population = SMC(resample_below=0.0).run(coins((0.5, 1.5)), 1000, generator=rng(30))
    first = SIR(1).sample(coins(), 1000, generator=None).latents[0]
    weights = torch.tensor([0.5, 1.5])[first].log()
    assert abs(population.ess[0] / effective_sample_size(weights, 0).item() - 1) < 0.1 and abs(population.ess[0] - 800) < 50
    assert population.log_z == pytest.approx(log(2.5), abs=0.2)
