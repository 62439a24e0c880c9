"""One device from end to end, without a GPU: `elsewhere` stands for it.

What a user calls is run on a model there and on the CPU. The numbers must be the same to the bit, every tensor must lie where the
model does, and where two devices meet it is an error: so is each planted fault, a `device=` or a `.cpu()` taken out of the library.
And the places that make the host wait for the device are counted, a step of a training, a sampler or an estimate of log Z at a time:
a new one fails here, and belongs into the table only if it must be."""
import copy
import inspect
from collections import Counter
from dataclasses import astuple, is_dataclass

import pytest
import torch
from elsewhere import THERE, elsewhere, waits
from exact import rng
from torch.utils._pytree import tree_leaves

from ncp_vae import chains, hierarchy, holes, nce, overlap, prior, resampling, sampling
from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.evaluate import block_mmd2, compare
from ncp_vae.engine.features import FeatureNet, feature_distance, precision_recall
from ncp_vae.engine.groups import group_reports, sir_ess
from ncp_vae.engine.neighbours import nearest, nearest_in
from ncp_vae.engine.train import NCELoss, fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.nvae import NVAE, NVAEConfig
from ncp_vae.models.priors import GaussianMixture, VampPrior
from ncp_vae.models.ratios import ConvRatio, MLPRatio
from ncp_vae.models.two_stage import LatentVAE, TwoStage
from ncp_vae.ood import bounds_above
from ncp_vae.partition import AIS, Bridge, ReverseAIS, bridge
from ncp_vae.prior import NoiseContrastivePrior, estimate_log_mean
from ncp_vae.proposals import Acceptance, PoolLoss, lars_density_ratio, lars_pool_weight
from ncp_vae.sampling import (HMC, ISIR, LARS, MALA, SIR, SMC, JointLangevin, JointMALA, Langevin, effective_sample_size, law_gap,
                              pareto_k_hat, proposal_budget)
from ncp_vae.walk import Trace, WithPriors, diagonal_normal, from_posterior, replay

SMALL = NVAEConfig((1, 8, 8), (1, 1), channels=2, blocks=0, cells_per_block=1, latent_channels=2, cells_per_group=1)
SIDES = {"flat": 4, "two groups": 4, "NVAE": 8, "mixture": 4, "vamp": 4, "two stages": 4}     # the models; pixels a side of their images


def vae_named(name):
    torch.manual_seed(0)
    if name in ("flat", "vamp", "two stages"):
        flat = DenseVAE((1, 4, 4), 2, (8,))
        over = {"flat": lambda: flat, "two stages": lambda: TwoStage(flat, LatentVAE((2,), hidden=(8,))),
                "vamp": lambda: WithPriors(flat, [VampPrior.from_images(flat, torch.rand(9, 1, 4, 4), 5)])}
        return over[name]()
    if name == "NVAE":
        return NVAE(SMALL)
    deep = DenseHierarchy((1, 4, 4), groups=2, latent_dim=2, hidden=8, width=8)
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), torch.randn(2, 2), torch.eye(2).repeat(2, 1, 1))
    return deep if name == "two groups" else WithPriors(deep, [mixture, None])


def ratios_of(vae):
    convolutional = len(vae.latent_shapes[0]) == 3
    kind, how = (ConvRatio, dict(width=2)) if convolutional else (MLPRatio, dict(hidden=(8,)))
    return [kind(z, c, **how) for z, c in zip(vae.latent_shapes, vae.context_shapes)]


def ncp_named(name):
    vae = vae_named(name)
    ncp = NoiseContrastivePrior(vae, ratios_of(vae)).eval()
    ncp.log_z.fill_(0.3)
    return ncp


def images_for(name, n=6):
    return torch.rand(n, 1, SIDES[name], SIDES[name], generator=rng(1)).bernoulli(generator=rng(2))


def numbers(found):
    "All tensors and floats of a result."
    if isinstance(found, Trace):
        return [*found.latents, found.likelihood.mean]
    if is_dataclass(found):
        return numbers(astuple(found))
    found = list(found.values()) if isinstance(found, dict) else found
    if isinstance(found, (list, tuple)):
        return [leaf for each in found for leaf in numbers(each)]
    return [x for x in tree_leaves(found) if isinstance(x, (torch.Tensor, float))]


# ---- the same numbers on either device ------------------------------------------------------------------------------

def posterior_and_replay(ncp, x):
    trace = ncp.vae.walk(from_posterior(rng()), evidence=ncp.vae.encode(x))
    return trace, ncp.vae.walk(replay(trace.latents), n=len(x)).log_prior(), ncp.log_prob(trace.latents)


def nce_step(*stage):
    "The gradients of a step of NCE: of the first stage, or beside a base and its sampler."
    def step(ncp, x):
        base, sampler = (ncp, stage[0]) if stage else (None, None)
        torch.manual_seed(0)
        trained = copy.deepcopy(ncp).train().ratios
        NCELoss(ncp.vae, trained, base, sampler)(x, 0)["loss"].backward()
        return [parameter.grad for parameter in trained.parameters()]
    return step


def accepting(ncp):
    "The prior with acceptances of its ratios, few of which accept."
    return NoiseContrastivePrior(ncp.vae, [Acceptance(ratio, 4.0) for ratio in ncp.ratios])


def sampled(sampler):
    return lambda ncp, x: (accepting(ncp) if isinstance(sampler, LARS) else ncp).sample(2, sampler, generator=rng())


def pool_step(joint, **weigh):
    "The gradients of a step by the bound of the sampler's own density."
    def step(ncp, x):
        torch.manual_seed(0)
        trained = accepting(copy.deepcopy(ncp))
        PoolLoss(trained.vae, trained.ratios, 4, joint, **weigh)(x, 0)["loss"].backward()
        return [p.grad for p in (trained if joint else trained.ratios).parameters() if p.grad is not None]
    return step


def by_lars(ncp, x):
    "The likelihood of LARS, log Z and all; of one group."
    if len(ncp.ratios) > 1:
        return ()
    lars = accepting(ncp)
    lars.log_partition(20, rng())
    return iwae(lars.vae, x, 2, lars_density_ratio(lars, 5), rng())


def partition(method=None):
    "log Z, and where it is kept; the images of a method are on the device."
    def estimate(ncp, x):
        found = ncp.log_partition(20, rng(), method and method(x))
        return found.value, ncp.log_z, ncp.log_z_std_error
    return estimate


def compared(ncp, x, **more):
    "The base and the NCP: likelihoods and gains; but not the seconds, which no two calls have in common."
    found = compare({"base": ncp.vae, "ncp": ncp}, x, num_samples=2, log_z_samples=30, proposals=3, seed=0, **more)
    return [value for row in found.values() for name, value in row.items() if name != "seconds"]


SAMPLERS = [SIR(5), SIR(70, chunk=64), Langevin(1, 0.01), MALA(1, 0.01), HMC(1, 0.01, leapfrog=2), HMC(1, leapfrog=1), ISIR(1, 3),
            ISIR(1, 3, 0.01), SMC(3), JointLangevin(1, 0.01), JointMALA(1, 0.01), LARS(5)]
CALLS = {
    "a walk of the prior": lambda ncp, x: ncp.vae.sample(2, generator=rng()),
    "a walk of the posterior, and its replay": posterior_and_replay,
    "elbo": lambda ncp, x: tuple(elbo(ncp.vae, x, rng())),
    "L>k": lambda ncp, x: bounds_above(ncp, x, 2, rng()),
    "iwae under log Z": lambda ncp, x: iwae(ncp.vae, x, 2, ncp.normalised_log_ratio, rng()),
    "iwae under SIR's density": lambda ncp, x: iwae(ncp.vae, x, 2, ncp.sir_log_ratio(3, rng()), rng()),
    "iwae under LARS": by_lars,
    "a step of SNIS": pool_step(False), "a step of SNIS, joint": pool_step(True),
    "a step of LARS": pool_step(False, weigh=lambda *pool: lars_pool_weight(*pool, 5)),
    "a step of NCE": nce_step(),
    "a step of a later stage, SIR": nce_step(SIR(3)),
    "a step of a later stage, MALA": nce_step(MALA(1, 0.01)),
    **{f"{type(each).__name__}, {vars(each)}": sampled(each) for each in SAMPLERS},
    "log Z": partition(), "log Z by SMC": partition(lambda x: SMC(2)), "log Z by AIS": partition(lambda x: AIS(2, 0.1)),
    "log Z by AIS backwards": partition(lambda x: ReverseAIS(x, 2, 0.1)), "log Z by a bridge": partition(Bridge),
    "both likelihoods": lambda ncp, x: compared(ncp, x),
    "reports of the groups": lambda ncp, x: group_reports(ncp, x, 0),
    "ESS of SIR": lambda ncp, x: sir_ess(ncp, 3, 5, 0),
    "budgets": lambda ncp, x: [float(M) for images in (None, x) for M in proposal_budget(ncp, 8, 2.0, rng(), images)],
    "the gap between the laws": lambda ncp, x: law_gap(ncp, 4, 3, rng()).value,
}
NORMAL_PRIORS_ONLY = ("JointLangevin", "JointMALA", "log Z by AIS")
REFUSED = {"vamp": "a step of SNIS, joint", "mixture": NORMAL_PRIORS_ONLY}     # a VampPrior is trained, and its draws have no gradient
PAIRS = [(name, call) for name in SIDES for call in CALLS if not call.startswith(REFUSED.get(name, ()))]


def same_there(call, model, x):
    "The call gives the numbers of the CPU, in tensors that lie with the model."
    expected = numbers(call(copy.deepcopy(model), x))
    with elsewhere():
        found = numbers(call(copy.deepcopy(model).to(THERE), x.to(THERE)))
        assert all(each.device == THERE for each in found if isinstance(each, torch.Tensor))
        found = [each.host if isinstance(each, torch.Tensor) else each for each in found]
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, call", PAIRS, ids=[f"{name}: {call}" for name, call in PAIRS])
def test_a_model_elsewhere_does_what_it_does_on_the_cpu(name, call, monkeypatch):
    monkeypatch.setattr(chains, "_WARM_UP", 2)             # of an HMC that tunes its step
    monkeypatch.setattr(hierarchy, "_RUNS", 2)             # of SMC, for log Z
    same_there(CALLS[call], ncp_named(name), images_for(name))


def test_latents_elsewhere_are_compared():
    same_there(lambda ncp, x: compared(ncp, x, draws=20, samplers={"ncp": SIR(3)}), ncp_named("flat"), images_for("flat"))


def test_no_sampler_is_left_out():
    public = [getattr(sampling, name) for name in sampling.__all__]
    assert {each for each in public if isinstance(each, type)} - {sampling.Sampler} == {type(each) for each in SAMPLERS}


def trained(name):
    "Both stages: all weights."
    x, how = images_for(name, 8), dict(steps=1 if name == "NVAE" else 3, batch_size=4, lr=1e-2, seed=0)
    special = dict(kl_warmup=2, kl_balance=True, spectral=0.1) if name == "NVAE" else {}
    vae = fit_vae(vae_named(name), x, **special, **how)
    torch.manual_seed(1)
    return fit_ncp(vae, x, ratios=ratios_of(vae), held_out=x, **how)


@pytest.mark.parametrize("name", SIDES)
def test_both_trainings_end_in_the_weights_of_the_cpu(name, monkeypatch):
    "To the bit, with one Adam for both: the fused one, which a pretended device has not, rounds otherwise."
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *given, fused, **settings: adam(*given, **settings))
    expected = trained(name).state_dict()
    with elsewhere():
        found = trained(name).state_dict()
        assert all(value.device == THERE for value in found.values())
        found = {key: value.host for key, value in found.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key].nan_to_num(), value.nan_to_num()), key


def test_trainings_take_images_from_the_cpu_and_a_mixture_is_fitted():
    with elsewhere():
        law = GaussianMixture.fit(vae_named("flat").to(THERE), torch.rand(60, 1, 4, 4), components=2)
        assert law.means.device == law.roots.device == THERE


# ---- what is given draws instead of a model -------------------------------------------------------------------------

def hole(measure):
    def call(vae, x):
        q, z = holes.AggregatePosterior(vae, x), torch.randn(9, 2, generator=rng(5)).to(x.device)
        return measure(q, z)
    return call


def of_draws(measure):
    "Of two sets of 60 rows on the device."
    def call(_, x):
        a, b = torch.randn(2, 60, 2, generator=rng(6)).to(x.device)
        return measure(a, b)
    return call


MEASURES = {
    "k-hat": of_draws(lambda a, b: pareto_k_hat(a[:, 0])), "ESS": of_draws(lambda a, b: effective_sample_size(a, 0)),
    "log of a mean": of_draws(lambda a, b: estimate_log_mean(a[:, 0])), "bridge": of_draws(lambda a, b: bridge(a[:, 0], b[:, 0])),
    "diagnose": of_draws(lambda a, b: nce.diagnose(a, b)), "log of a mean ratio": of_draws(lambda a, b: nce.log_mean_ratio(a)),
    "density of the aggregate": hole(lambda q, z: q.log_prob(z)), "score": hole(lambda q, z: q.score(z)),
    "draws of the aggregate": hole(lambda q, z: q.sample(9, rng())),
    "scored draws": hole(lambda q, z: holes.scored_prior_draws(q, 9, rng())),
    "hole mass": hole(lambda q, z: holes.hole_mass(q, z, 1.0)), "MMD": of_draws(holes.mmd2), "kernel": of_draws(lambda a, b: holes._rbf(a, b, [1.0])),
    "MMD in blocks": of_draws(block_mmd2),
    "p-value of MMD": of_draws(lambda a, b: holes.mmd_p_value(a, b, 9, generator=rng())),
    "a classifier": of_draws(lambda a, b: holes.c2st(a, b, rng())),
    "closest pairs": hole(lambda q, z: overlap.closest_pairs(q)), "active units": hole(lambda q, z: overlap.active_units(q)),
    "weights of the best decoder": hole(overlap.decoder_weights), "four terms": lambda vae, x: overlap.four_terms(vae, x, 2, generator=rng()),
    "KL of the aggregate": hole(lambda q, z: overlap.marginal_kl(q, 1, generator=rng())),
    "active units of groups": lambda vae, x: overlap.active_units_by_group(vae, x, 2),
    "neighbours": of_draws(lambda a, b: nearest(a, b, 2)), "precision": of_draws(precision_recall),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_draws_elsewhere(name):
    same_there(MEASURES[name], vae_named("flat").eval(), images_for("flat", 17))


def test_samples_elsewhere_are_compared_with_images_on_the_cpu():
    torch.manual_seed(0)
    net, a, b = FeatureNet((1, 8, 8), 3).eval(), *torch.rand(2, 140, 1, 8, 8)
    expected = nearest_in(a, b, 2)[0], feature_distance(net, a, b, 2).value
    with elsewhere():
        assert torch.equal(nearest_in(a.to(THERE), b, 2)[0], expected[0])
        assert feature_distance(net.to(THERE), a.to(THERE), b, 2).value == pytest.approx(expected[1], rel=1e-9)


# ---- it can fail ----------------------------------------------------------------------------------------------------

def test_what_a_gpu_refuses_is_refused():
    with elsewhere():
        there, here = torch.arange(3.0, device=THERE), torch.arange(3.0)
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.where(there > 1, there, here),
                      lambda: here[there.long()], lambda: here.gather(0, there.long()), lambda: there.add_(here)):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            torch.rand(3, device=THERE, generator=rng())
        with pytest.raises(TypeError, match="array"):
            there.numpy()


def test_what_a_gpu_takes_is_taken():
    with elsewhere():
        there = torch.arange(3.0, device=THERE)
        allowed = [there + torch.tensor(1.0), there[torch.tensor([2, 0, 1])] + 2, there.clone().copy_(torch.ones(3)),
                   torch.where(there > 1, there, torch.tensor(0.0)), torch.tensor([1.0, 2.0, 3.0], device=THERE), there.cpu().to(THERE)]
        assert all(each.device == THERE for each in allowed) and there.cpu().device == torch.device("cpu")
        assert [each.tolist() for each in allowed[:3]] == [[1, 2, 3], [4, 2, 3], [1, 1, 1]]


def test_waits_are_seen():
    "One each: reading a number in four ways, both copies, a mask, a size, an index from the CPU, deviations; and what is none."
    with elsewhere():
        x, host = torch.arange(4.0, device=THERE), torch.ones(4)
        for wait in (lambda: x[0].item(), lambda: bool(x[0] > 1), lambda: float(x[1]), lambda: x.tolist(), lambda: x.cpu(),
                     lambda: host.to(THERE), lambda: x[x > 1], lambda: x.nonzero(), lambda: x[torch.tensor([1])],
                     lambda: torch.tensor([1.0], device=THERE), lambda: torch.normal(x, x.abs())):
            waits.clear()
            wait()
            assert waits.total() == 1, inspect.getsource(wait)
        waits.clear()
        for none in (lambda: x + 1, lambda: x.sum(), lambda: torch.randn(3, device=THERE), lambda: x[x.long()], lambda: x.double(),
                     lambda: torch.where(x > 1, x, 0), lambda: host.to(THERE, non_blocking=True), lambda: x.max(0)):
            none()
        assert not waits


def planted(monkeypatch, module, name, text, instead=""):
    "A function of the library with some of its text replaced."
    source = inspect.getsource(getattr(module, name))
    assert text in source, f"{name} of {module.__name__} has no {text} any more: plant the fault elsewhere"
    scope = dict(vars(module))
    exec(source.replace(text, instead), scope)
    monkeypatch.setattr(module, name, scope[name])


@pytest.mark.parametrize("module, name, text, instead, call", [
    (resampling, "pareto_k_hat", ".cpu()", "", of_draws(lambda a, b: resampling.pareto_k_hat(a[:, 0]))),
    (resampling, "_propose", "device=z[-1].device", "", sampled(SIR(5))),
    (nce, "_logit_rows", ".cpu()", "", MEASURES["diagnose"]),
    (holes, "c2st", "device=x.device", "", of_draws(lambda a, b: holes.c2st(a, b, rng()))),
    (holes, "mmd_p_value", ".to(kernel)", ".double()", of_draws(lambda a, b: holes.mmd_p_value(a, b, 9, generator=rng()))),
    (hierarchy, "_systematic", ".to(edges)", ".double()", sampled(SMC(2))),
    (hierarchy, "_Particles", "device=z.device", "", sampled(SMC(2))),
    (chains, "evaluate", "z.detach()", "z.detach().cpu()", sampled(Langevin(2, 0.01))),
    (prior, "log_sir_weight", "logsigmoid(log_r - log_rest)", "logsigmoid(log_r - log_rest).cpu()",
     lambda ncp, x: iwae(ncp.vae, x, 2, ncp.sir_log_ratio(3)))])
def test_a_planted_mixture_is_found(monkeypatch, module, name, text, instead, call):
    ncp, x = ncp_named("two groups"), images_for("two groups")
    planted(monkeypatch, module, name, text, instead)
    call(ncp, x)                                        # on the CPU nobody notices
    with elsewhere(), pytest.raises(RuntimeError, match="two devices|same device"):
        call(ncp.to(THERE), x.to(THERE))


class Forgotten(DenseVAE):
    "A user's mistake: a prior of its own, made on the CPU."
    def prior(self, n):
        return diagonal_normal(torch.zeros(n, 2), torch.ones(n, 2))


def test_a_users_mixture_is_found():
    vae, x = Forgotten((1, 4, 4), 2, (8,)), images_for("flat")
    elbo(vae, x)
    with elsewhere(), pytest.raises(RuntimeError, match="two devices"):
        elbo(vae.to(THERE), x.to(THERE))


# ---- where the host waits -------------------------------------------------------------------------------------------

def waits_of_a_step(run, few=2, many=4):
    "By place: what `run` waits for more often with `many` steps than with `few`, a step."
    found = []
    for steps in (few, many):
        waits.clear()
        run(steps)
        found.append(Counter(waits))
    return {place: n / (many - few) for place, n in (found[1] - found[0]).items()}


def drawing(sampler_of):
    return lambda ncp, x: lambda steps: ncp.sample(2, sampler_of(steps), generator=rng())


def annealing(method_of):
    return lambda ncp, x: lambda steps: method_of(x, steps).log_weights(ncp, 4, rng())


def bounding(log_ratio_of):
    return lambda ncp, x: lambda samples: iwae(ncp.vae, x, samples, log_ratio_of(ncp), rng())


def with_rate(ncp):
    "Acceptances whose log Z is said to be -3."
    lars = accepting(ncp)
    lars.log_z.fill_(-3.0)
    return lars


RACE = {"resampling.check_log_weights": 1}                                # no NaN and no +inf
LARS_WAITS = {"proposals.draw": 2, "proposals.check_acceptance": 1}       # deviations not negative; is anybody left; at most 0
INNER_LOOPS = {
    "SIR, a block of 64 proposals": (drawing(lambda n: SIR(64 * n, chunk=64)), RACE),
    "Langevin, a step": (drawing(lambda n: Langevin(n, 0.01)), {"chains._finite": 1}),
    "MALA, a step": (drawing(lambda n: MALA(n, 0.01)), {}),
    "HMC, a path": (drawing(lambda n: HMC(n, 0.01, leapfrog=2)), {}),
    "i-SIR, a step": (drawing(lambda n: ISIR(n, 3)), RACE),
    "i-SIR with MALA, a step": (drawing(lambda n: ISIR(n, 3, 0.01)), RACE),
    "JointLangevin, a step": (drawing(lambda n: JointLangevin(n, 0.01)), {"chains._finite": 1}),
    "JointMALA, a step": (drawing(lambda n: JointMALA(n, 0.01)), {}),
    "LARS, a draw": (lambda ncp, x: drawing(LARS)(accepting(ncp), x), LARS_WAITS),
    "AIS, a step": (annealing(lambda x, n: AIS(n, 0.1)), {}),
    "AIS backwards, a step": (annealing(lambda x, n: ReverseAIS(x, n, 0.1)), {}),
    "iwae, a sample": (bounding(lambda ncp: None), {}),
    "iwae under log Z, a sample": (bounding(lambda ncp: ncp.normalised_log_ratio), {"prior.normalised_log_ratio": 1}),
    "iwae under LARS, a sample": (bounding(lambda ncp: lars_density_ratio(with_rate(ncp), 5)), {"proposals.check_acceptance": 1}),
    "iwae under SIR's density, a sample": (bounding(lambda ncp: ncp.sir_log_ratio(3)), {}),
}


@pytest.mark.parametrize("name", INNER_LOOPS)
def test_an_inner_loop_waits_where_it_is_listed(name):
    runs, expected = INNER_LOOPS[name]
    ncp, x = ncp_named("flat"), images_for("flat")
    with elsewhere():
        assert waits_of_a_step(runs(ncp.to(THERE), x.to(THERE))) == expected


def test_the_warm_up_of_hmc_waits_once_a_path(monkeypatch):
    "For the acceptance that the next step size depends on."
    ncp = ncp_named("flat")
    with elsewhere():
        def warmed(paths):
            monkeypatch.setattr(chains, "_WARM_UP", paths)
            ncp.to(THERE).sample(2, HMC(1, leapfrog=2), generator=rng())
        assert waits_of_a_step(warmed) == {"chains._dual_averaging": 1}


def test_a_group_waits_where_it_is_listed():
    "Beside the race: SIR whether a row has no weight; SMC whether all have none, for its ESS and log Z; a chain for its start and whether it moved."
    ncp = ncp_named("two groups")
    races = {place: 2 * n for place, n in RACE.items()}
    of_smc = {"hierarchy.add": 4, "hierarchy.resample": 1, "hierarchy._systematic": 3}    # resampled once, at the end
    for sampler, listed in ((SIR(5), races | {"resampling.resample": 2}), (SMC(5, resample_below=0.0), races | of_smc),
                            (MALA(2, 0.01), {"chains.evolve": 2, "chains._finite": 2, "chains._warn_if_stuck": 2})):
        with elsewhere():
            ncp.to(THERE)
            waits.clear()
            ncp.sample(2, sampler, generator=rng())
            assert waits == listed


def of_training(places):
    "All waits inside the training loop's own module are one number."
    total = Counter()
    for place, n in places.items():
        total["the training loop" if place.startswith("engine.") else place] += n
    return dict(total)


# Of the three the loop's own: the batch goes over, its numbers are looked at, and so are the loss and its gradient.
STEPS = {"flat": ({"bound._check_support": 1}, {}), "two groups": ({"bound._check_support": 1}, {}),
         "NVAE": ({"bound._check_support": 1}, {}),
         "mixture": ({"bound._check_support": 1, "models.priors.__init__": 1}, {"models.priors.__init__": 1, "models.priors.sample": 5}),
         "vamp": ({"bound._check_support": 1}, {"holes.draw_of_densities": 4}), "two stages": ({"bound._check_support": 1}, {})}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_either_training_waits_as_listed(name):
    x, how = images_for(name, 8), dict(batch_size=4, lr=1e-3, seed=0)
    special = dict(spectral=0.1) if name == "NVAE" else {}
    vae = vae_named(name)
    with elsewhere():
        first = waits_of_a_step(lambda steps: fit_vae(vae, x, steps=steps, **special, **how), 1, 2)
        second = waits_of_a_step(lambda steps: fit_ncp(vae, x, ratios=ratios_of(vae), steps=steps, **how), 1, 2)
    assert (of_training(first), of_training(second)) == tuple({"the training loop": 3, **each} for each in STEPS[name]), (first, second)


def test_a_step_of_a_later_stage_waits_as_listed():
    "SIR(3) runs two races a group, of one proposal and of the two companions, and looks at the positives' weights."
    ncp, x = ncp_named("two groups"), images_for("two groups", 8)
    with elsewhere():
        def run(steps):
            fit_ncp(ncp.vae, x, ratios=ratios_of(ncp.vae), base=ncp.to(THERE), sampler=SIR(3), steps=steps, batch_size=4, lr=1e-3, seed=0)
        found = of_training(waits_of_a_step(run, 1, 2))
    assert found == {"the training loop": 3, "resampling.check_log_weights": 6, "stages._raced": 4}


@pytest.mark.parametrize("module, name, text, instead, loop, place", [
    (resampling, "race", "device=z.device", "", "SIR, a block of 64 proposals", "resampling.race"),
    (chains, "_kinetic", "0.5 *", "0.5 * float(momentum.isfinite().all()) *", "MALA, a step", "chains._kinetic")])
def test_a_planted_wait_is_found(monkeypatch, module, name, text, instead, loop, place):
    planted(monkeypatch, module, name, text, instead)
    runs, expected = INNER_LOOPS[loop]
    ncp, x = ncp_named("flat"), images_for("flat")
    with elsewhere():
        found = waits_of_a_step(runs(ncp.to(THERE), x.to(THERE)))
    assert found.pop(place) >= 1 and found == expected
