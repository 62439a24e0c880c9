"""LARS: draws and density by enumeration, its limits, likelihoods, the bound from pools, and what is refused.

The density on a line, and the test that tells truncated draws from the untruncated law, are in the chapter."""
from itertools import product
from math import inf, log, nan

import pytest
import torch
from exact import AddedNoise, Function, P, Table, chi_square_p, coins, ladder, outcomes, pools, rng

from ncp_vae.bound import iwae
from ncp_vae.energy import LatentWalk
from ncp_vae.engine import store
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.prior import NoiseContrastivePrior, log_sir_weight
from ncp_vae.proposals import Acceptance, check_acceptance, lars_density_ratio, lars_pool_weight, log_lars_weight
from ncp_vae.sampling import LARS, SIR
from ncp_vae.walk import FlatVAE

A = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)        # acceptances of the three outcomes of P
RATE = (P * A).sum()


def law_by_definition(T):
    "Over all T-tuples: the first accepted, and the last where none was accepted before it."
    law = torch.zeros(3, dtype=torch.float64)
    for draws in product(range(3), repeat=T):
        chance = P[list(draws)].prod()
        for i, z in enumerate(draws):
            last = i == T - 1
            law[z] += chance * (1.0 if last else A[z])
            chance = chance * (1 - A[z])
    return law


def picks(T, n=20_000, seed=0):
    return LARS(T).draw(lambda z: A.float().log()[z], outcomes(n), rng(seed))


@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_density_and_draws_are_those_of_the_definition(T):
    "A p-value below 1e-4 is one seed in ten thousand; T + 1, or no truncation at all, is another law."
    law = law_by_definition(T)
    torch.testing.assert_close(P * log_lars_weight(A.log(), RATE.log(), T).exp(), law, atol=1e-12, rtol=0)
    assert chi_square_p(picks(T), law) > 1e-4
    assert chi_square_p(picks(T), P * A / RATE) < 1e-10
    assert chi_square_p(picks(T), law_by_definition(T + 1)) < 1e-4


def test_one_draw_is_the_base_and_many_are_the_untruncated_law():
    assert torch.equal(log_lars_weight(A.log(), RATE.log(), 1), torch.zeros(3).double())
    torch.testing.assert_close(log_lars_weight(A.log(), RATE.log(), 10**6), (A / RATE).log())
    calls = []
    z = LARS(1).draw(lambda z: calls.append(z), outcomes(50), rng())
    assert not calls and len(z) == 50                                  # T = 1 asks nobody


def test_it_stops_when_all_have_been_accepted_and_never_tests_the_last():
    calls = []
    def log_a(value):
        return lambda z: calls.append(1) or torch.full(z.shape, value)
    LARS(100).draw(log_a(0.0), outcomes(50), rng())
    assert len(calls) == 1
    calls.clear()
    LARS(7).draw(log_a(-inf), outcomes(50), rng())
    assert len(calls) == 6


def test_the_same_seed_gives_the_same_draws_and_leaves_the_global_ones():
    state = torch.get_rng_state()
    assert torch.equal(picks(5), picks(5)) and not torch.equal(picks(5), picks(5, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hierarchy_is_drawn_group_by_group():
    "Coins whose second acceptance depends on the first: prod_k p_T of each group given the one above."
    below = torch.tensor([[0.9, 0.1], [0.2, 0.4]])
    first = torch.tensor([0.3, 0.6])
    ncp = coins(first, below)
    z = ncp.sample(40_000, LARS(3), generator=rng()).latents
    def law(a):
        return 0.5 * log_lars_weight(a.log(), a.mean().log(), 3).exp()
    expected = torch.stack([law(first)[k] * law(below[k]) for k in range(2)]).flatten().double()
    assert chi_square_p(2 * z[0] + z[1], expected) > 1e-4


def test_rounding_at_both_ends():
    "Acceptances of one, in float32, whose mean is rounded above one; a rate that underflows; gradients that are finite."
    for log_a, log_z in ((0.0, 1e-7), (0.0, 0.0), (-1e-8, 0.0), (-90.0, -90.0), (-inf, -3.0), (-200.0, -3.0)):
        log_a = torch.tensor([log_a], requires_grad=True)
        value = log_lars_weight(log_a, torch.tensor(log_z), 100)
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(log_a.grad).all(), log_a
    assert log_lars_weight(torch.zeros(1), torch.zeros(()), 100).item() == pytest.approx(0, abs=1e-6)
    tiny = log_lars_weight(torch.tensor(-90.0), torch.tensor(-90.0), 100)       # Z T is nothing: the base
    assert tiny.item() == pytest.approx(0, abs=1e-6)


# ---- likelihoods --------------------------------------------------------------------------------------------------------------

def prior_of(log_a, vae=None):
    return NoiseContrastivePrior(vae or AddedNoise(1), [Function(log_a)])


def test_iwae_is_that_of_the_law():
    "a = exp(-z^2 / 2): p a / Z is N(0, 1/2), log Z = -log(2) / 2, and p_T a mixture of it and the base."
    ncp = prior_of(lambda z: -z.square().sum(-1) / 2)
    ncp.log_z.fill_(-log(2) / 2)
    x, T = torch.tensor([[-1.0], [0.2], [2.5]]), 3
    found = iwae(ncp.vae, x.repeat(300, 1), 100, lars_density_ratio(ncp, T), rng()).double().exp().view(300, 3)
    base = (1 - 0.5**0.5) ** (T - 1)
    density = lambda variance: torch.exp(-x[:, 0].double() ** 2 / 2 / variance) / (2 * torch.pi * variance) ** 0.5
    truth = base * density(2.0) + (1 - base) * density(1.5)                      # x = z + noise of variance 1
    assert ((found.mean(0) - truth).abs() < 5 * found.std(0) / 300**0.5).all()
    assert ((found.mean(0) - density(1.5)).abs() > 5 * found.std(0) / 300**0.5).any()


def test_latents_and_walks_give_the_same():
    ncp = prior_of(lambda z: -z.square().sum(-1) / 2)
    ncp.log_partition(1000, rng())
    trace = ncp.vae.sample(5, generator=rng())
    density = lars_density_ratio(ncp, 7)
    assert torch.equal(density(trace), density(trace.latents)) and density(trace).shape == (5,)


# ---- acceptances --------------------------------------------------------------------------------------------------------------

def test_an_acceptance_bends_a_ratio():
    log_r = torch.tensor([-3.0, 0.0, 50.0, 200.0])
    bent = Acceptance(Function(lambda z: z), log_bound=2.0)(log_r)
    assert (bent <= 0).all() and torch.allclose(bent[:2], log_r[:2] - 2 - torch.log1p((log_r[:2] - 2).exp()))


def test_draws_of_a_bent_ratio_approach_those_of_the_prior():
    "ladder: with log C of 4 nats the law is that of p r but for 1 / C; each group is N(1, 0.7^2), ... of `RUNGS`."
    ncp = ladder()
    accepted = NoiseContrastivePrior(LatentWalk(ncp.vae), [Acceptance(ratio, 4.0) for ratio in ncp.ratios])
    z = accepted.sample(1000, LARS(2000), generator=rng()).latents[0]
    assert abs(z.mean() - 1) < 5 * 0.7 / 1000**0.5 and abs(z.std() - 0.7) < 0.08


def test_it_is_stored(tmp_path):
    torch.manual_seed(0)
    ncp = NoiseContrastivePrior(DenseVAE((1, 2, 2), 2, (4,)), [Acceptance(MLPRatio(2, hidden=(4,)), 1.5)])
    ncp.log_partition(100, rng())
    again = store.load(store.save(ncp, tmp_path / "lars"))
    z = [torch.randn(5, 2, generator=rng())]
    assert again.ratios[0].log_bound == 1.5
    assert torch.equal(lars_density_ratio(ncp, 9)(z), lars_density_ratio(again, 9)(z))


# ---- pools --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 50])
def test_weights_of_a_pool_average_to_one_in_every_pool(T, K):
    tuples, _ = pools(K)
    each = []
    for k in range(K):
        others = A.log()[tuples[:, [j for j in range(K) if j != k]]].logsumexp(1)
        each.append(lars_pool_weight(A.log()[tuples[:, k]], others, K, T).exp())
    torch.testing.assert_close(torch.stack(each).mean(0), torch.ones(len(tuples)).double(), atol=1e-9, rtol=0)


def test_a_pool_without_truncation_is_sir():
    log_a, log_rest = torch.tensor([-2.0, -0.1]).double(), torch.tensor(0.7).double()
    torch.testing.assert_close(lars_pool_weight(log_a, log_rest, 6, 10**7), log_sir_weight(log_a, log_rest, 6))


# ---- what is refused ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [0, -1, 2.5, True])
def test_a_truncation_that_is_none(T):
    ncp = prior_of(lambda z: -z.square().sum(-1))
    ncp.log_z.fill_(-0.5)
    for call in (LARS, lambda T: lars_density_ratio(ncp, T)):
        with pytest.raises(ValueError, match="truncation T must be a whole number of at least 1"):
            call(T)


@pytest.mark.parametrize("bad", [nan, inf, 0.1])
def test_a_ratio_that_is_no_acceptance(bad):
    "One row is enough; zero itself and -inf are acceptances."
    def log_a(z):
        return torch.where(torch.arange(z.shape[-2]) == 3, bad, -1.0)
    ncp = prior_of(log_a)
    ncp.log_z.fill_(-0.5)
    for call in (lambda: ncp.sample(5, LARS(4), generator=rng()), lambda: lars_density_ratio(ncp)([torch.zeros(5, 1)])):
        with pytest.raises(ValueError, match="log a of an acceptance is at most 0, got .*Acceptance"):
            call()
    check_acceptance(torch.tensor([0.0, -inf]))


def test_log_z_that_is_none():
    ncp = prior_of(lambda z: -z.square().sum(-1))
    for log_z in (nan, 0.2):
        ncp.log_z.fill_(log_z)
        with pytest.raises(ValueError, match="log Z of an acceptance is at most 0, got .*log_partition"):
            lars_density_ratio(ncp)


def test_no_density_of_several_groups():
    with pytest.raises(ValueError, match="3 groups; below the first one Z is another number"):
        lars_density_ratio(ladder())


def test_a_ratio_of_another_shape():
    with pytest.raises(ValueError, match="log_ratio must map"):
        NoiseContrastivePrior(LatentWalk(FlatVAE(2)), [Function(lambda z: -z.square())]).sample(5, LARS(3))
