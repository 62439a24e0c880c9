"""SNIS: the loss of the sampler's own bound by enumeration and written out, `fit_snis` and `fit_lars` where the ratio is known, what is refused.

The slack of the bound in 50 dimensions and the optimum for each number of proposals are checked in the chapter."""
from itertools import product
from math import log

import pytest
import torch
from exact import TARGET, AddedNoise, Enumerated, Function, P, R, Table, TrainedTable, Z, ladder, rng
from torch import nn
from torch.distributions import Independent, Normal

from ncp_vae.energy import LatentWalk
from ncp_vae.engine.train import fit_lars, fit_snis
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior, log_sir_weight
from ncp_vae.proposals import Acceptance, PoolLoss, lars_pool_weight
from ncp_vae.sampling import LARS, SIR
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal


# ---- the loss ---------------------------------------------------------------------------------------------------------------

def bound_by_enumeration(vae, tables, budgets, x):
    "E_q sum_k log w_k over all latents and all pools: a scalar, with gradients by the tables."
    total = 0
    for first in range(2):
        for second in range(3):
            chance = vae.q[0][x, first] * vae.q[1][x, first, second]
            for k, (z, row, p) in enumerate([(first, 0, vae.p[0]), (second, first, vae.p[1][first])]):
                log_r, M = tables[k][row], budgets[k]
                for others in product(range(len(p)), repeat=M - 1):
                    pool = torch.stack([log_r[z], *(log_r[other] for other in others)])
                    of_pool = torch.stack([p[other] for other in others]).prod() if others else 1.0
                    total = total + chance * of_pool * (log_r[z] - pool.exp().mean().log())
    return total


@pytest.mark.parametrize("budgets", [[3, 2], [1, 3], [2, 1]])
def test_value_and_gradient_in_two_groups_are_those_of_the_sum_over_all_pools(budgets):
    "Means of 200 losses of 200 rows, in standard errors; a pool that is not the posterior's z_<k would be another sum."
    vae = Enumerated.random()
    ratios = [TrainedTable(torch.randn(*shape, generator=rng(k), dtype=torch.float64)) for k, shape in enumerate([(1, 2), (2, 3)])]
    tables = [ratio.log_table for ratio in ratios]
    loss = PoolLoss(vae, ratios, budgets)
    def flat(value):
        slopes = torch.autograd.grad(value, tables, allow_unused=True)
        return torch.cat([value.detach()[None], *(torch.zeros_like(t).flatten() if g is None else g.flatten()
                                                  for t, g in zip(tables, slopes))])
    torch.manual_seed(0)
    found = torch.stack([flat(loss(torch.ones(200, dtype=torch.long), step)["loss"]) for step in range(200)])
    truth = flat(-bound_by_enumeration(vae, tables, budgets, 1))
    error = found.std(0) / 200**0.5
    assert ((found.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
    assert (error[0] < 0.03) and (truth.abs() > 10 * error).any()


def test_the_bound_is_below_the_targets_own_density_and_the_twin_is_above():
    "Posteriors that are the target: the best gain is KL(TARGET || P). Without the own ratio the loss promises more than that."
    vae = Enumerated([P], [TARGET.expand(3, 3)], torch.full((3, 3), 1 / 3).double())
    best = (TARGET * (R / Z).log()).sum()
    def gain(weigh):
        torch.manual_seed(1)
        loss = PoolLoss(vae, [Table(R)], 4, weigh=weigh)
        found = torch.stack([-loss(torch.zeros(64, dtype=torch.long), 0)["loss"] for _ in range(500)])
        return found.mean(), 5 * found.std() / 500**0.5
    mean, error = gain(log_sir_weight)
    twin, twin_error = gain(lambda log_r, log_rest, M: log_r - log_rest + log(M - 1))
    assert mean + error < best < twin - twin_error


def small(fit, joint=False, deep=False, **how):
    torch.manual_seed(0)
    vae = DenseHierarchy((1, 2, 2), groups=2, latent_dim=2, hidden=8, width=8) if deep else DenseVAE((1, 2, 2), 2, hidden=(8,))
    before = [parameter.clone() for parameter in vae.parameters()]
    ratios = [MLPRatio(z, c, hidden=(8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    x = torch.rand(64, 1, 2, 2, generator=rng()).bernoulli(generator=rng(1))
    return fit(vae, x, joint=joint, **{**dict(ratios=ratios, proposals=8, steps=6, batch_size=16, lr=1e-2, seed=3), **how}), before


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("fit", [fit_snis, fit_lars])
def test_the_vae_moves_where_it_is_asked_to(fit, joint, deep):
    start = [p.clone() for p in small(fit, joint, deep, steps=1, lr=1e-12)[0].ratios.parameters()]
    prior, before = small(fit, joint, deep)
    same = [torch.equal(*pair) for pair in zip(before, prior.vae.parameters())]
    assert not all(same) if joint else all(same)
    assert type(prior) is NoiseContrastivePrior and not prior.training and not prior.vae.training
    assert not any(torch.allclose(a, b, atol=1e-6) for a, b in zip(start, prior.ratios.parameters()) if a.dim() > 1)
    prior.sample(4, SIR(8) if fit is fit_snis else LARS(5))


def test_a_frozen_vae_decodes_nothing_and_gets_no_gradient():
    vae = WithPriors(AddedNoise(2), [Learned()])
    PoolLoss(vae, [MLPRatio(2, hidden=(4,))], 8)(torch.randn(8, 2, generator=rng()), 0)["loss"].backward()
    assert vae.vae.decoded == 0 and vae.laws[0].loc.grad is None
    PoolLoss(vae, [MLPRatio(2, hidden=(4,))], 8, joint=True)(torch.randn(8, 2, generator=rng()), 0)["loss"].backward()
    assert vae.vae.decoded == 1 and vae.laws[0].loc.grad is not None


class Learned(nn.Module):
    "A base prior with a mean that is learned; its draws have gradients or not."
    def __init__(self, has_rsample=True):
        super().__init__()
        self.loc, self.has_rsample = nn.Parameter(torch.zeros(2)), has_rsample

    def forward(self, context, n):
        law = Normal(self.loc.expand(n, 2), 1.0)
        law.has_rsample = self.has_rsample
        law = Independent(law, 1)
        return law


def test_a_trained_base_learns_from_its_proposals_too():
    "d/d loc of the gain at fixed positives, by finite differences; with the proposals detached it would be another number."
    law = Learned()
    vae = WithPriors(AddedNoise(2), [law])
    loss = PoolLoss(vae, [Function(lambda z: (z - z.square() / 2).sum(-1))], 8, joint=True)
    x = torch.randn(8, 2, generator=rng())
    def value(shift):
        with torch.no_grad():
            law.loc.fill_(shift)
        torch.manual_seed(5)
        return loss(x, 0)
    by_hand = (value(1e-2)["loss"] - value(-1e-2)["loss"]) / 2e-2
    value(0.0)["loss"].backward()
    assert law.loc.grad.sum().item() == pytest.approx(by_hand.item(), abs=1e-3)
    gain = (value(1e-2)["gain"] - value(-1e-2)["gain"]) / 2e-2
    assert abs(gain.item()) > 0.05                        # the share that comes through the proposals alone


def test_a_trained_base_whose_draws_have_no_gradient_is_refused():
    vae = WithPriors(AddedNoise(2), [Learned(has_rsample=False)])
    x = torch.randn(8, 2, generator=rng())
    with pytest.raises(ValueError, match="base prior of group 0 is trained, but its draws are not reparameterised"):
        PoolLoss(vae, [MLPRatio(2, hidden=(4,))], 8, joint=True)(x, 0)
    PoolLoss(vae, [MLPRatio(2, hidden=(4,))], 8)(x, 0)                                  # frozen: nothing is to be learned


class Normed(RatioEstimator):
    "A ratio with batch norm, of which nothing is left but whether a row came with its own kind."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)

    def condition(self, context):
        return lambda z: self.norm(z.reshape(-1, 1)).view(z.shape[:-1])


def test_positives_and_proposals_share_one_batch_norm():
    "Positives far from the proposals are seen to be far; by statistics of their own both would have mean zero."
    vae = AddedNoise(1, posterior=lambda x: diagonal_normal(x + 10, torch.ones_like(x)))
    gain = -PoolLoss(vae, [Normed()], 65).train()(torch.zeros(64, 1), 0)["loss"]
    assert gain > 0.5


# ---- what is learned ---------------------------------------------------------------------------------------------------------

class Quadratic(RatioEstimator):
    "log r = a z + b z^2 / 2."
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))

    def condition(self, context):
        a, b = self.weights
        return lambda z: (a * z + b * z.square() / 2).sum(-1)


class Known(FlatVAE):
    "q(z | x) = N(-0.5, 0.7^2) for every x."
    def posterior(self, x):
        return diagonal_normal(torch.full_like(x, -0.5), torch.full_like(x, 0.7))


@pytest.mark.parametrize("proposals", [16, 256])
def test_the_bound_finds_q_over_p_with_any_number_of_proposals(proposals):
    "log q/p = a z + b z^2 / 2 + ...: a = -0.5 / 0.49, b = 1 - 1 / 0.49."
    prior = fit_snis(Known(1), torch.zeros(2048, 1), ratios=[Quadratic()], proposals=proposals, steps=300, batch_size=256, lr=0.05, seed=0)
    a, b = prior.ratios[0].weights.tolist()
    assert a == pytest.approx(-0.5 / 0.49, abs=0.15) and b == pytest.approx(1 - 1 / 0.49, abs=0.15)


def test_lars_learns_where_to_accept():
    "Its bound rises to what the acceptance of the known posterior can win, and its ratio is an `Acceptance`."
    prior = fit_lars(Known(1), torch.zeros(2048, 1), truncation=20, ratios=[Quadratic()], proposals=128, steps=200, batch_size=256, lr=0.05,
                     seed=0)
    assert type(prior.ratios[0]) is Acceptance
    z = NoiseContrastivePrior(LatentWalk(prior.vae), prior.ratios).sample(20_000, LARS(20), generator=rng()).latents[0]
    assert abs(z.mean() + 0.5) < 0.08 and abs(z.std() - 0.7) < 0.1


def test_a_training_resumes_to_the_bit_and_not_with_other_proposals(tmp_path):
    path = tmp_path / "snis.pt"
    def run(checkpoint=None, **more):
        return small(fit_snis, checkpoint=checkpoint, **more)[0].ratios.state_dict()
    straight, again, resumed = run(), run(path), run(path)
    assert all(torch.equal(straight[name], each[name]) for name in straight for each in (again, resumed))
    with pytest.raises(ValueError, match=r"proposals is \[8\] there and \[9\] here"):
        run(path, proposals=9)


# ---- what is refused ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("proposals, words", [(0, "number of proposals M must be a whole number of at least 1, got 0"),
                                              (2.5, "at least 1, got 2.5"), (1, "one proposal has weight 1"), ([4, 4], "2 budgets for 1")])
@pytest.mark.parametrize("fit", [fit_snis, fit_lars])
def test_proposals_that_are_none(fit, proposals, words):
    with pytest.raises(ValueError, match=words):
        small(fit, proposals=proposals)


def test_ratios_that_are_not_finite_end_the_training():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="snis: .* at step 0"):
            small(fit_snis, ratios=[Function(Bad(bad))])


class Bad(nn.Module):
    "log r with one parameter, and a value that is none."
    def __init__(self, value):
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(())), value

    def forward(self, z):
        return self.weight * z.sum(-1) + self.value


def test_several_groups_with_a_budget_each():
    ncp = ladder()
    x = torch.randn(16, 3, generator=rng())
    loss = PoolLoss(ncp.vae, ncp.ratios, [4, 1, 3], weigh=lambda *pool: lars_pool_weight(*pool, 3))
    assert loss.budgets == [4, 1, 3]
    assert torch.isfinite(PoolLoss(ncp.vae, ncp.ratios, [4, 1, 3])(x, 0)["loss"])
