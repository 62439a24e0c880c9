"""Energies: the loss against enumeration, `fit_ebm` against known ratios and against the classifier, and how a failure ends.

The two-layer Gaussian, the two coordinates of a chain and what a short chain learns are checked in the chapter itself."""
import copy
import warnings

import pytest
import torch
from exact import AddedNoise, Enumerated, Function, Ladder, Rung, TrainedTable, ladder, ladder_images, rng
from torch import nn

from ncp_vae.engine import checkpoint
from ncp_vae.energy import EBMLoss, LatentWalk, check_explosion, mle_loss
from ncp_vae.engine.train import fit_ebm, fit_ncp
from ncp_vae.flows import RealNVP
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import HMC, MALA, SIR, SMC, JointLangevin, JointMALA, Langevin, Sampler
from ncp_vae.walk import FlatVAE, Step, Trace, WithPriors, diagonal_normal, from_posterior, from_prior, replay

# ---- enumeration: a coin, then a die of three faces, sixteen images --------------------------------------------------------

JOINT = torch.tensor([[1, 2, 1], [3, 3, 6]])            # r p / Z in sixteenths
GROUP_WISE = torch.tensor([[2, 4, 2], [2, 2, 4]])       # r_1 p_1 / Z_1 is fair; the second group as in JOINT


class Rows(Sampler):
    "A law in sixteenths over the six states, as sixteen rows."
    def __init__(self, counts):
        states = torch.arange(6).repeat_interleave(counts.flatten())
        self.latents = [states // 3, states % 3]

    def sample(self, ncp, n, temperature=1.0, generator=None):
        return ncp.vae.walk(replay(self.latents), n=n)


class Discrete:
    """Learned tables with r p / Z = JOINT, and a posterior that knows its z: the loss has no sampling error.

    `exact` is minus the ELBO under r p / Z, all sums written out, `gradient` that of a value by every table."""

    def __init__(self):
        generator = rng()
        def table(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.logits = [table(2).requires_grad_(), table(2, 3).requires_grad_()]
        self.decoder = table(2, 3, 16).requires_grad_()
        self.p = [logits.softmax(-1) for logits in self.logits]
        first, second = (each.detach() for each in self.p)
        r1 = 0.5 / first                                # so that the group-wise law begins with a fair coin
        r2 = JOINT / 16 / (first * r1)[:, None] / second
        self.ratios = [TrainedTable(r1.log()[None]), TrainedTable(r2.log())]
        self.z = torch.randint(6, (16,), generator=generator)          # of each image
        one = nn.functional.one_hot
        q = [one(self.z // 3, 2).double(), one(self.z % 3, 3).double()[:, None].expand(16, 2, 3)]
        self.vae = Enumerated(self.p, q, self.decoder.softmax(-1))
        self.x = torch.arange(16)
        self.tables = [*(ratio.log_table for ratio in self.ratios), *self.logits, self.decoder]

    def exact(self):
        f = self.ratios[0].log_table.T + self.ratios[1].log_table
        log_joint = f + self.p[0].log()[:, None] + self.p[1].log()
        log_px = self.vae.px.log().flatten(0, 1)[self.z, self.x]
        return log_joint.logsumexp((0, 1)) - (log_joint.flatten()[self.z] + log_px).mean()

    def gradient(self, value):
        found = torch.autograd.grad(value, self.tables, retain_graph=True, allow_unused=True)
        return torch.cat([torch.zeros_like(t).flatten() if g is None else g.flatten() for t, g in zip(self.tables, found)])

    def loss(self, counts, joint=True):
        return EBMLoss(self.vae, self.ratios, Rows(counts), joint)(self.x, 0)["loss"]


def test_the_joint_loss_has_the_gradient_of_the_bound():
    "Eq. 3 to 6 of the joint-EBM paper, for ratios, priors and decoder at once; the twin draws group by group."
    case = Discrete()
    truth = case.gradient(case.exact())
    torch.testing.assert_close(case.gradient(case.loss(JOINT)), truth, atol=1e-12, rtol=0)
    assert (case.gradient(case.loss(GROUP_WISE)) - truth).abs().max() > 0.01


def test_with_the_vae_frozen_only_the_ratios_are_taught():
    case = Discrete()
    found, truth = (case.gradient(value) for value in (case.loss(JOINT, joint=False), case.exact()))
    of_ratios = sum(ratio.log_table.numel() for ratio in case.ratios)
    torch.testing.assert_close(found[:of_ratios], truth[:of_ratios], atol=1e-12, rtol=0)
    assert found[of_ratios:].abs().max() == 0 and truth[of_ratios:].abs().max() > 0.01
    assert [name for name, _ in EBMLoss(case.vae, case.ratios, Rows(JOINT)).named_parameters()] == [
        "ratios.0.log_table", "ratios.1.log_table"]


def test_a_step_down_the_loss_goes_up_the_likelihood():
    "And with the two means exchanged it goes down."
    log_r_q, log_r_model = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5, 2.0])
    assert mle_loss(log_r_q, log_r_model) == -0.5
    for sign in (1, -1):
        case = Discrete()
        before, slope = case.exact(), case.gradient(case.loss(JOINT, joint=False))
        with torch.no_grad():
            for part, table in zip(slope.split([t.numel() for t in case.tables]), case.tables[:2]):
                table -= sign * 1e-3 * part.view_as(table)
        assert sign * (before - case.exact()) > 0


# ---- walks without an image ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", [SIR(4), SMC(2), JointLangevin(3, 0.1), JointMALA(3, 0.1), MALA(3, 0.1), HMC(2, 0.1)])
def test_samplers_see_no_difference_but_the_image(sampler):
    ncp = ladder(0.3)
    short = NoiseContrastivePrior(LatentWalk(ncp.vae), ncp.ratios)
    whole, trace = (each.sample(20, sampler, generator=rng(1)) for each in (ncp, short))
    assert all(torch.equal(a, b) for a, b in zip(whole.latents, trace.latents))
    assert trace.likelihood is None and len(trace.steps) == 3


def test_a_frozen_vae_decodes_nothing():
    vae = AddedNoise(2)
    loss = EBMLoss(vae, [MLPRatio(2, hidden=(4,))], MALA(3, 0.1))
    loss(torch.randn(8, 2, generator=rng()), 0)["loss"].backward()
    assert vae.decoded == 0
    EBMLoss(vae, [MLPRatio(2, hidden=(4,))], MALA(3, 0.1), joint=True)(torch.randn(8, 2, generator=rng()), 0)
    assert vae.decoded == 1


# ---- what is learned -------------------------------------------------------------------------------------------------------

class Quadratic(RatioEstimator):
    "log r = a z + b z^2 / 2 + e z context + constant."
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4))

    def condition(self, context):
        a, b, e, constant = self.weights
        tilt = a if context is None else a + e * context
        return lambda z: (tilt * z + b * z.square() / 2).sum(-1) + constant


class Known(FlatVAE):
    "q(z | x) = N(-0.5, 0.7^2) for every x: log q(z) / p(z) is quadratic."
    def posterior(self, x):
        return diagonal_normal(torch.full_like(x, -0.5), torch.full_like(x, 0.7))


def correlation(vae, found, truth, x):
    "Of log ratios at posterior and prior draws."
    with torch.no_grad():
        vae = LatentWalk(vae)
        walks = [vae.walk(from_posterior(rng(1)), evidence=vae.encode(x)), vae.walk(from_prior(generator=rng(2)), n=len(x))]
        rows = [torch.cat([each.log_ratio(walk) for walk in walks]) for each in (found, truth)]
    return torch.corrcoef(torch.stack(rows))[0, 1].item()


def test_maximum_likelihood_and_nce_find_the_same_ratio():
    "On a line, where both losses are exact but for draws: above 0.99 with the truth and with each other."
    vae, x = Known(1), torch.zeros(512, 1)
    log_q, log_p = (diagonal_normal(torch.full((1,), mean), torch.full((1,), scale)) for mean, scale in ((-0.5, 0.7), (0.0, 1.0)))
    truth = NoiseContrastivePrior(vae, [Function(lambda z: (log_q.log_prob(z) - log_p.log_prob(z)).sum(-1))])
    how = dict(steps=120, batch_size=256, lr=0.1, seed=0)
    ebm = fit_ebm(vae, x, ratios=[Quadratic()], sampler=JointMALA(3, 0.3), persistent=True, **how)
    ncp = fit_ncp(vae, x, ratios=[Quadratic()], **how)
    assert min(correlation(vae, ebm, truth, x), correlation(vae, ncp, truth, x), correlation(vae, ebm, ncp, x)) > 0.99


def test_a_hierarchy_finds_its_ratio_by_one_chain():
    "A ladder of two whose target is its rungs'; group-wise samplers are refused, their law is another."
    rungs = [Rung(1.0, 0.7), Rung(0.5, 0.42)]
    vae = Ladder(2, laws=rungs, by_image=0.5)
    x = ladder_images(1024, 0)[:, :2]
    ebm = fit_ebm(vae, x, ratios=[Quadratic(), Quadratic()], sampler=JointMALA(3, 0.2), persistent=True,
                  steps=200, batch_size=256, lr=0.1, seed=0)
    assert correlation(vae, ebm, NoiseContrastivePrior(vae, rungs), x) > 0.99
    assert type(ebm) is NoiseContrastivePrior and not ebm.training
    with pytest.raises(ValueError, match="SIR draws group by group, .* all 2 groups: take JointLangevin, JointMALA or SMC"):
        fit_ebm(vae, x, sampler=SIR(8), steps=1, batch_size=8, lr=0.1, seed=0)


def small(joint=False, steps=6, **how):
    torch.manual_seed(0)
    vae = DenseVAE((2,), 2, hidden=(8,), sigma=0.5)
    before = [parameter.clone() for parameter in vae.parameters()]
    ebm = fit_ebm(vae, torch.rand(64, 2, generator=rng()), joint=joint, ratios=[MLPRatio(2, hidden=(8,))],
                  **{**dict(sampler=JointLangevin(2, 0.1), steps=steps, batch_size=16, lr=1e-2, seed=3), **how})
    return ebm, before


@pytest.mark.parametrize("joint", [False, True])
def test_the_vae_moves_where_it_is_asked_to(joint):
    ebm, before = small(joint)
    same = [torch.equal(*pair) for pair in zip(before, ebm.vae.parameters())]
    assert not any(same) if joint else all(same)
    assert not ebm.vae.training


class Stop(Exception):
    "Ends a training between two steps."


class Data(torch.utils.data.Dataset):
    "64 points, whose reading fails at the given time; the first two are for the images that are tried out and the fingerprint."
    def __init__(self, fails=None):
        self.reads, self.fails = 0, fails

    def __len__(self):
        return 64

    def __getitems__(self, rows):
        self.reads += 1
        if self.reads == self.fails:
            raise Stop
        return torch.linspace(0, 1, 128).view(64, 2)[rows]


def test_a_persistent_training_resumes_to_the_bit(tmp_path):
    "The chains are in the checkpoint. With others in their place the end is another."
    path = tmp_path / "ebm.pt"
    def run(data, checkpoint):
        torch.manual_seed(0)
        vae, ratios = DenseVAE((2,), 2, hidden=(8,), sigma=0.5), [MLPRatio(2, hidden=(8,))]
        return fit_ebm(vae, data, ratios=ratios, sampler=JointLangevin(2, 0.1), persistent=True, steps=6, batch_size=16,
                       lr=1e-2, seed=3, checkpoint=checkpoint).ratios.state_dict()
    straight = run(Data(), None)
    with pytest.raises(Stop):
        run(Data(fails=6), path)
    saved = checkpoint.load(path)
    assert saved["step"] == 3 and saved["loss"]["draws.here"].abs().max() > 0
    saved["loss"]["draws.here"].zero_()
    checkpoint.save(tmp_path / "moved.pt", saved)
    resumed, moved = run(Data(), path), run(Data(), tmp_path / "moved.pt")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not all(torch.equal(straight[name], moved[name]) for name in straight)


def test_persistent_chains_go_on_and_short_ones_do_not():
    "Without a ratio a chain is a walk of the noise: its last place is the next one's start, or it is not."
    vae, ratio = Known(1), Function(lambda z: 0 * z.sum(-1))
    starts = []
    class Watched(JointLangevin):
        def evolve(self, log_ratio, prior, generator=None, start=None):
            starts.append(start.clone())
            return super().evolve(log_ratio, prior, generator, start)
    for chains in (0, 8):
        loss = EBMLoss(vae, [ratio], Watched(2, 0.1), chains=chains)
        starts.clear()
        ends = [loss.negatives(8, step).latents[0] for step in range(3)]
        assert [torch.equal(start, end) for start, end in zip(starts[1:], ends)] == [chains > 0] * 2
    with pytest.raises(ValueError, match="9 rows for 8 persistent chains"):
        loss.negatives(9, 1)
    with pytest.raises(ValueError, match="persistent chains need JointLangevin or JointMALA, got MALA"):
        EBMLoss(vae, [ratio], MALA(2, 0.1), chains=8)


class Normed(MLPRatio):
    "With batch norm, whose mode at each call is noted."
    def __init__(self):
        super().__init__(1, hidden=(4,))
        self.norm, self.modes = nn.BatchNorm1d(1), []

    def condition(self, context):
        log_ratio = super().condition(context)
        def normed(z):
            self.modes.append((self.training, len(z)))
            return log_ratio(self.norm(z))
        return normed


def test_batch_norm_sees_positives_and_negatives_together_and_the_chain_in_eval_mode():
    ratio = Normed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EBMLoss(Known(1), [ratio], JointLangevin(2, 0.1)).train()(torch.zeros(8, 1), 0)
    assert ratio.modes == [(False, 8)] * 3 + [(True, 16)] and ratio.training


# ---- explosions ------------------------------------------------------------------------------------------------------------

def test_an_explosion_ends_within_a_step_and_the_last_good_state_is_kept_and_named(tmp_path):
    "A rate of 10: step 0 is taken, in step 1 it is seen. The file and the caller's ratio hold the weights from before."
    torch.manual_seed(0)
    ratio, path = MLPRatio(1, hidden=(32, 32)), tmp_path / "ebm.pt"
    before = copy.deepcopy(ratio.state_dict())
    with pytest.raises(FloatingPointError) as caught:
        fit_ebm(Known(1), torch.zeros(64, 1), ratios=[ratio], sampler=JointLangevin(20, 0.1), steps=50, batch_size=32,
                lr=10.0, seed=0, checkpoint=path)
    words = str(caught.value)
    assert words.startswith("ebm, step 1: ") and "group 0" in words
    assert words.endswith(f"the last good state, that of step 0, is in {path}.good")
    kept = checkpoint.load(f"{path}.good")
    assert kept["step"] == 0
    for name, value in before.items():
        assert torch.equal(ratio.state_dict()[name], value) and torch.equal(kept["loss"][f"ratios.0.{name}"], value)


@pytest.mark.parametrize("steps", [20, 600])
def test_a_coarse_chain_ends_in_its_first_step(steps):
    "With 600 steps it overflows on the way. Nothing had been in order, and nothing has moved."
    ratio = MLPRatio(1, hidden=(4,))
    before = copy.deepcopy(ratio.state_dict())
    with pytest.raises(FloatingPointError, match="ebm, step 0: .* group 0.*; no step had been in order"):
        fit_ebm(Known(1), torch.zeros(64, 1), ratios=[ratio], sampler=Langevin(steps, 10.0), steps=5, batch_size=8,
                lr=1e-3, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in ratio.state_dict().items())


def test_the_group_that_exploded_is_named():
    "After 3 steps by what is found then, after 200 by the overflow on the way."
    flat = Function(lambda z: 0 * z.sum(-1))
    steep = [Function(lambda z: 1e4 * z.square().sum(-1)), Function(lambda z, c: 1e4 * (z - 0.8 * c).square().sum(-1), True)]
    vae = Ladder(2, laws=[Rung(1.0, 0.7), Rung(0.5, 0.42)], by_image=0.5)
    for k in range(2):
        ratios = [steep[i] if i == k else flat for i in range(2)]
        for steps in (3, 200):
            with pytest.raises(FloatingPointError, match=f"ebm, step 4: .*group {k}"):
                EBMLoss(vae, ratios, JointLangevin(steps, 0.1))(ladder_images(8, 0), 4)


def found(value, z, law):
    check_explosion([torch.tensor([0.0, value])], Trace([z], [Step(0, None, law, None)], None))


@pytest.mark.parametrize("value, bad", [(1e5, False), (-2e6, True), (float("nan"), True), (float("inf"), True)])
def test_energies_have_a_limit(value, bad):
    law = diagonal_normal(torch.zeros(2, 1), torch.ones(2, 1))
    if not bad:
        return found(value, torch.zeros(2, 1), law)
    with pytest.raises(FloatingPointError, match="exploded in group 0: .* the limits are 1e.06 and 100"):
        found(value, torch.zeros(2, 1), law)


@pytest.mark.parametrize("law, inside, outside", [
    (diagonal_normal(torch.full((2, 2), 5.0), torch.full((2, 2), 0.1)), 14.0, 16.0),
    (LatentWalk(WithPriors(Known(2), [RealNVP(2, blocks=1, hidden=4)])).walk(from_prior(), n=2).steps[0].prior, 1e4, float("nan"))])
def test_the_region_is_the_base_priors(law, inside, outside):
    "In its standard deviations; a flow tells none, so its samples need only be finite."
    found(0.0, torch.full((2, 2), inside), law)
    with pytest.raises(FloatingPointError, match="exploded in group 0"):
        found(0.0, torch.full((2, 2), outside), law)


def test_a_discrete_law_has_no_outside():
    found(0.0, torch.tensor([0, 2]), Discrete().vae.walk(from_prior(), n=2).steps[1].prior)
