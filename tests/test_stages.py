"""Later stages: what their loss has as its minimum, by enumeration, by draws, and through the library's own training.

Where a gradient is compared with zero, the bound is 5 standard errors of a mean of many draws: a fresh seed fails with
probability 6e-7 for each comparison. Seeds are fixed. Every check has a broken twin that must fail it."""
from itertools import product
from math import log

import pytest
import torch
from exact import Function, Table
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn.functional import softplus

from ncp_vae import stages
from ncp_vae.chains import MALA
from ncp_vae.engine import train
from ncp_vae.engine.groups import group_logits
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator, StagedRatio, log_mean_ratio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.resampling import SIR, Sampler
from ncp_vae.stages import Negatives, prior_negatives, stage_negatives
from ncp_vae.walk import Step, TopDownVAE, Trace, diagonal_normal, rows

FIVE = 5.0    # standard errors


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# two groups, z_1 of two values and z_2 of three: q(z1), q(z2 | z1), p(z2 | z1)

Q1 = tensor([0.7, 0.3])
Q2 = tensor([[0.5, 0.35, 0.15], [0.2, 0.3, 0.5]])
P2 = tensor([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
SCORE = (Q2 / P2).log()
FIRST = tensor([[0.6, 0.0, -0.4], [-0.5, 0.1, 1.2]])     # stage one: not half of anything
RESIDUAL = SCORE - FIRST
LOG_Z = (P2 * FIRST.exp()).sum(1, keepdim=True).log()


class Exact(Sampler):
    "Draws of r p / Z itself, by enumeration of three outcomes."

    def draw(self, log_ratio, prior, generator=None):
        z = torch.arange(3)[:, None].expand(3, *prior.batch_shape)
        return Categorical(logits=(log_ratio(z) + prior.log_prob(z)).T).sample()


class ByDefault(SIR):
    "A subclass of SIR with a law of its own: draws of the prior, whatever the ratio."

    def draw(self, log_ratio, prior, generator=None):
        return prior.sample()


def table_step(n, seed):
    torch.manual_seed(seed)
    z1 = Q1.multinomial(n, replacement=True)
    return Step(1, z1, Categorical(probs=P2[z1]), None), Categorical(probs=Q2[z1]).sample()


def scores(logits, step, z_q, found):
    "The derivative of the expected loss by each logit of the table, in standard errors: [2, 3]."
    z1, values = step.context, torch.zeros(len(z_q), 6, dtype=torch.float64)
    at_q, at_p = logits[z1, z_q] + found.offset_q, logits[z1, found.z] + found.offset_p
    values.scatter_add_(1, (3 * z1 + z_q)[:, None], -torch.sigmoid(-at_q)[:, None])
    values.scatter_add_(1, (3 * z1 + found.z)[:, None], torch.sigmoid(at_p)[:, None])
    return (values.mean(0) / (values.std(0) / len(values) ** 0.5)).view(2, 3)


def minimum(loss, *shape):
    "Newton's method from zero on a convex loss of few numbers."
    x = torch.zeros(*shape, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, x).flatten()
        hessian = torch.autograd.functional.hessian(loss, x).view(x.numel(), x.numel())
        x = x - torch.linalg.solve(hessian, gradient).view(shape)
    assert gradient.abs().max() < 1e-12
    return x


# ---- the law of a row, by enumeration --------------------------------------------------------------------------------

def enumerated(M, own=True, told=True):
    "The expected loss over all ordered pools of M: own=False takes the positives' offset from a pool without them."
    r, terms = FIRST.exp(), []
    for z1 in range(2):
        for pool in product(range(3), repeat=M):
            chance, weights = P2[z1, list(pool)].prod(), r[z1, list(pool)]
            for m, z in enumerate(pool):                       # the pick
                terms.append((Q1[z1] * chance * weights[m] / weights.sum(), z1, z, 1, (weights.mean()).log()))
            for z in range(3):                                 # a positive, in the place of the last one
                mean = (weights[:-1].sum() + r[z1, z]) / M if own else weights.mean()
                terms.append((Q1[z1] * Q2[z1, z] * chance, z1, z, -1, mean.log()))
    chance, offset = torch.stack([t[0] for t in terms]), told * torch.stack([t[4] for t in terms])
    z1, z, sign = (torch.tensor([t[i] for t in terms]) for i in (1, 2, 3))
    return lambda logits: (chance * softplus(sign * (logits[z1, z] + offset))).sum()


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_the_minimum_is_the_residual_for_every_pool(M):
    assert torch.allclose(minimum(enumerated(M), 2, 3), RESIDUAL, atol=1e-9)
    assert (minimum(enumerated(M, told=False), 2, 3) - RESIDUAL).abs().max() > 0.05         # twin: nothing told
    assert (minimum(enumerated(M, own=False), 2, 3) - RESIDUAL).abs().max() > 0.02          # twin: another pool


# ---- stage_negatives, by its draws -----------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", [SIR(1), SIR(2), SIR(16), SIR([9, 3]), SIR(130, chunk=7)], ids=lambda s: str(s.proposals))
@pytest.mark.parametrize("ratio", [Table(FIRST.exp()), StagedRatio([StagedRatio([Table((0.3 * FIRST).exp()), Table((0.5 * FIRST).exp())]), Table((0.2 * FIRST).exp())])],
                         ids=["one stage", "three stages"])
def test_the_gradient_vanishes_at_the_residual(sampler, ratio):
    "Also with a budget for each group, a budget of one, and a base that is itself a product of stages."
    step, z_q = table_step(100_000, seed=0)
    found = stage_negatives(ratio, sampler, step, z_q)
    assert found.z.dtype == torch.long and found.offset_q.shape == found.offset_p.shape == z_q.shape
    assert scores(RESIDUAL, step, z_q, found).abs().max() < FIVE
    silent = Negatives(found.z, torch.zeros(()), torch.zeros(()))
    assert scores(RESIDUAL, step, z_q, silent).abs().max() > 2 * FIVE                        # twin: nothing told
    assert scores(RESIDUAL + 0.1, step, z_q, found).abs().max() > 2 * FIVE                   # twin: another logit


def test_the_picks_of_one_proposal_are_the_prior_and_are_told_their_own_ratio():
    "SIR(1) was taken for draws of r p once: the stage then counted the first one twice."
    step, z_q = table_step(1000, seed=1)
    found, log_ratio = stage_negatives(Table(FIRST.exp()), SIR(1), step, z_q), Table(FIRST.exp()).condition(step.context)
    assert torch.allclose(found.offset_q, log_ratio(z_q)) and torch.allclose(found.offset_p, log_ratio(found.z))


def test_the_free_check_of_a_later_stage_is_that_of_the_product(monkeypatch):
    "log E over the negatives of exp(logit + offset) is log E_p[r], here averaged over z_1, for any logit."
    step, z_q = table_step(100_000, seed=2)
    monkeypatch.setattr(stages, "_POOL", 20)                                     # Z-hat is unbiased for every pool
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(3)).double()
    truth = (Q1[:, None] * P2 * (FIRST + logits).exp()).sum().log()
    for sampler in (SIR(2), SIR(8), Exact()):
        found = stage_negatives(Table(FIRST.exp()), sampler, step, z_q)
        mean = log_mean_ratio(logits[step.context, found.z] + found.offset_p)
        assert abs(mean.value - truth) < FIVE * mean.std_error
        silent = log_mean_ratio(logits[step.context, found.z])
        assert abs(silent.value - truth) > FIVE * silent.std_error


def test_beside_another_sampler_the_optimum_has_the_bias_of_its_pool(monkeypatch):
    """With _POOL draws of their own for Z-hat, both sides: e^l = q / (r p) Z E[1/(1 + Z-hat e^l)] / E[Z-hat/(1 + Z-hat e^l)].

    For _POOL = 2 it is solved by enumeration, and the gradient vanishes there and not at the residual; for 1000 it
    vanishes at the residual, whose error is then 1e-3 at most."""
    r, pools = FIRST.exp(), list(product(range(3), repeat=2))
    chance = torch.stack([P2[:, list(pool)].prod(1) for pool in pools])                      # [pools, z1]
    mean = torch.stack([r[:, list(pool)].mean(1) for pool in pools])
    biased = RESIDUAL
    for _ in range(200):
        inverse = chance[..., None] / (1 + mean[..., None] * biased.exp())
        biased = RESIDUAL + LOG_Z + inverse.sum(0).log() - (inverse * mean[..., None]).sum(0).log()
    step, z_q = table_step(400_000, seed=4)
    monkeypatch.setattr(stages, "_POOL", 2)
    found = stage_negatives(Table(FIRST.exp()), Exact(), step, z_q)
    assert found.offset_q is found.offset_p
    assert scores(biased, step, z_q, found).abs().max() < FIVE < 2 * FIVE < scores(RESIDUAL, step, z_q, found).abs().max()
    monkeypatch.undo()
    step, z_q = table_step(15_000, seed=5)
    found = stage_negatives(Table(FIRST.exp()), Exact(), step, z_q)
    assert scores(RESIDUAL, step, z_q, found).abs().max() < FIVE
    assert scores(RESIDUAL + LOG_Z, step, z_q, found).abs().max() > 2 * FIVE


def test_whatever_stage_one_was():
    """A single group, N(m, 1) against N(0, 1), stage one exp(a z): the residual is (m - a) z - m^2 / 2 for every a and M.
    Without the offsets a pool of 500 would leave its constant, log Z = a^2 / 2 at least in part."""
    m, n = 1.0, 40_000
    step = Step(0, None, diagonal_normal(torch.zeros(n, 1), torch.ones(n, 1)), None)

    for a in (-0.5, 0.5, 1.0, 1.5):
        for M in (1, 5, 500):
            torch.manual_seed(6)
            z_q = torch.randn(n, 1) + m
            found = stage_negatives(Function(lambda z: a * z.squeeze(-1)), SIR(M), step, z_q)
            residual = lambda z: ((m - a) * z - m**2 / 2).squeeze(-1)
            for told in (True, False):
                at_q, at_p = residual(z_q) + told * found.offset_q, residual(found.z) + told * found.offset_p
                each = torch.stack([torch.sigmoid(at_p) - torch.sigmoid(-at_q),                       # by a constant
                                    torch.sigmoid(at_p) * found.z[:, 0] - torch.sigmoid(-at_q) * z_q[:, 0]])   # by a slope
                z = (each.mean(1) / (each.std(1) / n**0.5)).abs().max()
                assert (z < FIVE) == told, (a, M, told, z)


def test_first_stage_is_told_nothing():
    step, z_q = table_step(50_000, seed=7)
    found = prior_negatives(step, z_q)
    assert found.offset_q == found.offset_p == 0 and found.offset_q.is_floating_point()
    assert scores(SCORE, step, z_q, found).abs().max() < FIVE


def test_a_sampler_with_a_law_of_its_own_keeps_it():
    step, z_q = table_step(5000, seed=8)
    found = stage_negatives(Table(FIRST.exp()), ByDefault(4), step, z_q)
    share = torch.stack([torch.bincount(found.z[step.context == z1], minlength=3) for z1 in range(2)]).double()
    error = (P2 * (1 - P2) / share.sum(1, keepdim=True)).sqrt()
    assert ((share / share.sum(1, keepdim=True) - P2).abs() < FIVE * error).all()


def test_without_context_a_chain_is_told_nothing():
    step = Step(0, None, diagonal_normal(torch.zeros(8, 2), torch.ones(8, 2)), None)
    found = stage_negatives(MLPRatio(2, hidden=(4,)), MALA(2, 0.1), step, torch.zeros(8, 2))
    assert found.offset_q == found.offset_p == 0 and found.z.shape == (8, 2) and not found.z.requires_grad


def test_rows_without_any_weight_are_refused():
    step, z_q = table_step(100, seed=9)
    nothing = Table(torch.zeros(2, 3, dtype=torch.float64))
    for sampler in (SIR(1), SIR(3)):
        with pytest.raises(ValueError, match=f"all {sampler.proposals} ratios of a row are zero"):
            stage_negatives(nothing, sampler, step, z_q)
    broken = Table(torch.full((2, 3), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        stage_negatives(broken, SIR(3), step, z_q)
    some = Table(tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))       # a positive of weight zero is no reason
    found = stage_negatives(some, SIR(30), step, z_q)
    assert found.offset_q.isfinite().all() and (found.z != 2).all()


def test_offsets_do_not_feel_an_autocast():
    "bf16 keeps 8 bits: at a logit of 20 its steps are 0.06 nats."
    torch.manual_seed(10)
    ratio, z_q = nn.Linear(3, 1), torch.randn(64, 3)
    steep = Function(lambda z: 20 * ratio(z).squeeze(-1))
    step, found = Step(0, None, diagonal_normal(torch.zeros(64, 3), torch.ones(64, 3)), None), []
    for enabled in (False, True):
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(stage_negatives(steep, SIR(5), step, z_q))
            inside = steep(z_q)
    assert torch.equal(found[0].offset_q, found[1].offset_q) and torch.equal(found[0].z, found[1].z)
    assert (inside - steep(z_q)).abs().max() > 1e-3                              # twin: it would have been felt
    assert not found[1].offset_p.requires_grad


# ---- through the training of the library -----------------------------------------------------------------------------

class TwoGroups(TopDownVAE):
    "x in (-1, 1): q(z_1 | x) = N(x, 0.01^2), q(z_2 | z_1, x) = N(1.5 + z_1, 1), and p(z_2 | z_1) = N(0, 1)."
    latent_shapes, context_shapes = [torch.Size([1])] * 2, [None, torch.Size([1])]

    def encode(self, x):
        return x

    def walk(self, choose, *, n=None, evidence=None):
        n = rows(n, None if evidence is None else len(evidence))
        zero, one = torch.zeros(n, 1), torch.ones(n, 1)
        known = evidence is not None
        steps = [Step(0, None, diagonal_normal(zero, one), diagonal_normal(evidence, 0.01 * one) if known else None)]
        z1 = choose(steps[0])
        steps.append(Step(1, z1, diagonal_normal(zero, one), diagonal_normal(1.5 + z1, one) if known else None))
        z2 = choose(steps[1])
        return Trace([z1, z2], steps, diagonal_normal(z2, one))


class Part(RatioEstimator):
    "A share of the log ratio of N(1.5 + z_1, 1) to N(0, 1); of nothing where there is no context."

    def __init__(self, share):
        super().__init__()
        self.share = share

    def condition(self, context):
        m = 0.0 if context is None else 1.5 + context
        return lambda z: self.share * (m * z - 0.5 * m * m).squeeze(-1)


class Perfect(Sampler):
    "Draws of r p / Z for `Part(0.5)`: N((1.5 + z_1) / 2, 1); in group 1 those of the prior."

    def draw(self, log_ratio, prior, generator=None):
        z = torch.randn(prior.batch_shape + prior.event_shape)
        tilt = log_ratio(torch.ones_like(z)) - log_ratio(torch.zeros_like(z))        # = m / 2
        return z + tilt[:, None]


def kept(sampler, seed, ratio=None):
    "The slope of log E_{p(z2 | z1)}[r] of the trained product on log Z(z_1) of stage one, over z_1 in (-1, 1)."
    vae, data = TwoGroups(), 2 * torch.rand(4096, 1, generator=torch.Generator().manual_seed(seed)) - 1
    base = NoiseContrastivePrior(vae, [Part(0.5), Part(0.5)])
    torch.manual_seed(seed)
    ratios = [MLPRatio(1, hidden=(8,)), MLPRatio(1, 1, hidden=(32, 32))]
    ncp = train.fit_ncp(vae, data, ratios=ratios, base=base, sampler=sampler, steps=300, batch_size=256, lr=1e-2, seed=seed)
    z1, z2 = torch.linspace(-1, 1, 21), torch.linspace(-6, 9, 301)
    with torch.no_grad():
        log_r = ncp.ratios[1].condition(z1[:, None])(z2[:, None, None].expand(-1, 21, 1))            # [301, 21]
    log_p = Normal(0.0, 1.0).log_prob(z2)[:, None] + log(z2[1] - z2[0])
    log_Z2, log_Z1 = (log_r + log_p).logsumexp(0), -(1.5 + z1).square() / 8
    x = log_Z1 - log_Z1.mean()
    return ((x * log_Z2).sum() / (x * x).sum()).item()


@pytest.mark.parametrize("sampler, pool", [(SIR([2, 64]), None), (Perfect(), 64)], ids=["SIR", "another"])
def test_the_librarys_training_leaves_nothing_over_and_without_offsets_it_does(monkeypatch, sampler, pool):
    """The second stage of `fit_ncp`: E_{p(z2 | z1)}[r] of the product must not depend on z_1. Over five seeds the slope on
    stage one's log Z(z_1) was 0.03 +- 0.02 with SIR's offsets and -0.02 +- 0.01 with another sampler's, single runs from
    -0.05 to 0.08; with the offsets set to zero, the twin, 0.77 to 0.90 (SIR lags a little behind r p) and 0.98 to 1.04."""
    if pool:
        monkeypatch.setattr(stages, "_POOL", pool)
    assert abs(kept(sampler, seed=0)) < 0.25

    def silent(ratio, sampler, step, z_q):
        return Negatives(stage_negatives(ratio, sampler, step, z_q).z, torch.zeros(()), torch.zeros(()))
    monkeypatch.setattr(train, "stage_negatives", silent)
    assert kept(sampler, seed=0) > 0.6


def test_logits_of_a_later_stage_come_with_their_offsets():
    "The loss and the held-out report read them from `group_logits`: log r of the stage plus what the stage is told."
    vae, x = TwoGroups(), torch.zeros(4000, 1)
    ratios = [Part(0.0), Part(0.0)]
    base = [Part(0.5), Part(0.5)]
    told = lambda step, z_q: stage_negatives(base[step.index], SIR([1, 8]), step, z_q)
    torch.manual_seed(0)
    (_, first_p), (log_q, log_p) = group_logits(vae, ratios, x, told)
    assert (first_p == 0).all()                                 # group 1: its base ratio is 1
    for logits in (log_q, log_p):                               # group 2: the logits are the offsets of a pool each
        assert logits.shape == (4000,) and logits.std() > 0.05
    # E over the negatives of the mean ratio is E_p[r] = exp(-1.5^2 / 8), where z_1 is 0
    mean = log_mean_ratio(log_p)
    assert abs(mean.value + 1.5**2 / 8) < FIVE * mean.std_error + 0.005           # z_1 is 0 up to its 0.01
