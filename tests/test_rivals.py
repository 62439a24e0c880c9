"""Priors with samplers of their own, in one loop: what draws, what is scored, what is stored, and what a training costs."""
import pytest
import torch
from torch import nn

from ncp_vae.engine import store
from ncp_vae.engine.evaluate import compare, table_of
from ncp_vae.engine.experiment import Run
from ncp_vae.engine.rivals import Rival, fit_matching, fit_mixture, flops, network_of, train_in_run
from ncp_vae.engine.train import fit_ebm, fit_lars, fit_ncp, fit_snis, fit_vae
from ncp_vae.flows import FlowMatching
from ncp_vae.hierarchy import JointMALA
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.models.two_stage import LatentVAE, TwoStage
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.proposals import Acceptance, lars_density_ratio
from ncp_vae.sampling import LARS, SIR
from ncp_vae.walk import WithPriors, diagonal_normal

POINTS = torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(0)).round()
COMMON = dict(steps=2, batch_size=32, lr=1e-3, seed=0)


def frozen_vae():
    torch.manual_seed(0)
    return DenseVAE((1, 2, 2), 2, (8,)).requires_grad_(False).eval()


def ratio():
    torch.manual_seed(1)
    return MLPRatio(2, hidden=(8,))


# ---- a prior's own sampler --------------------------------------------------------------------------------------------------

def test_a_prior_draws_by_the_sampler_that_it_was_trained_with():
    vae, chain = frozen_vae(), JointMALA(2, 0.1)
    ncp = fit_ncp(vae, POINTS, ratios=[ratio()], **COMMON)
    ebm = fit_ebm(vae, POINTS, ratios=[ratio()], sampler=chain, **COMMON)
    snis = fit_snis(vae, POINTS, ratios=[ratio()], proposals=7, **COMMON)
    lars = fit_lars(vae, POINTS, ratios=[ratio()], proposals=7, truncation=3, **COMMON)
    assert [vars(prior.sampler) for prior in (ncp, snis, lars)] == [vars(SIR(500)), vars(SIR(7)), vars(LARS(3))]
    assert ebm.sampler is chain
    for prior in (ncp, ebm, snis, lars):
        own, named = (prior.sample(5, sampler, generator=torch.Generator().manual_seed(0)).latents[0] for sampler in (None, prior.sampler))
        assert torch.equal(own, named)


@pytest.mark.parametrize("sampler", [SIR([3, 5], chunk=2), SIR(7), LARS(4), JointMALA(3, 0.2)])
def test_the_store_keeps_the_sampler(sampler, tmp_path):
    store.save(NoiseContrastivePrior(frozen_vae(), [ratio()], sampler), tmp_path / "model")
    back = store.load(tmp_path / "model").sampler
    assert type(back) is type(sampler) and vars(back) == vars(sampler)


def test_a_stored_prior_without_a_sampler_has_the_usual_one(tmp_path, monkeypatch):
    "As those that were stored before samplers were kept."
    monkeypatch.setattr(NoiseContrastivePrior, "__init__", lambda self, vae, ratios: init(self, vae, ratios), raising=True)
    store.save(NoiseContrastivePrior(frozen_vae(), [ratio()]), tmp_path / "model")
    monkeypatch.undo()
    assert '"sampler"' not in (tmp_path / "model" / "manifest.json").read_text()
    assert vars(store.load(tmp_path / "model").sampler) == vars(SIR(500))


init = NoiseContrastivePrior.__init__


def test_lars_is_scored_by_the_density_of_its_truncated_draws():
    "Its own sampler's, and that of a sampler that `compare` is given; the law without truncation is another."
    vae = frozen_vae()
    untold, own = (NoiseContrastivePrior(vae, [Acceptance(ratio(), 3.0)], sampler) for sampler in (SIR(500), LARS(3)))
    priors = {"base": vae, "own": own, "given": untold, "without": NoiseContrastivePrior(vae, [Acceptance(ratio(), 3.0)])}
    rows = compare(priors, POINTS[:20], num_samples=4, log_z_samples=500, seed=0, samplers={"given": LARS(3)})
    assert rows["own"]["gain"] == rows["given"]["gain"] and rows["own"]["gain"].value != rows["without"]["gain"].value
    z = [torch.randn(6, 2, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(LARS(3).density_ratio(own)(z), lars_density_ratio(own, 3)(z))
    assert torch.equal(SIR(9).density_ratio(own)(z), own.normalised_log_ratio(z))


# ---- what a training costs --------------------------------------------------------------------------------------------------

def test_operations_are_counted_forwards_and_backwards():
    net, x = nn.Conv2d(2, 3, 3, bias=False), torch.zeros(4, 2, 6, 6)
    forwards = 2 * 4 * 3 * 4 * 4 * 2 * 9                # outputs times multiply-adds of each
    assert flops(lambda: net(x)) == forwards and flops(lambda: net(x).sum().backward()) == 2 * forwards


def test_a_trainings_operations_are_those_of_its_steps_alone():
    "In proportion to steps and to the batch; the looks at held-out images, and what is done once, are not in them."
    def cost(**changed):
        settings = COMMON | dict(held_out=POINTS[:50]) | changed
        return Rival(fit_ncp, frozen_vae, lambda: dict(settings, ratios=[ratio()])).training_flops(POINTS)
    assert cost() > 0 and cost(steps=20) == 10 * cost() and cost(batch_size=64) == 2 * cost() and cost(held_out=None) == cost()
    assert Rival(fit_mixture, frozen_vae, lambda: dict(components=2, seed=0)).training_flops(POINTS) is None


def test_a_thirteenth_prior_is_one_entry_and_in_every_column(tmp_path):
    vae = frozen_vae()
    rivals = {f"ncp {width}": Rival(fit_ncp, lambda: vae, lambda width=width: dict(COMMON, ratios=[MLPRatio(2, hidden=(width,))]))
              for width in range(1, 12)}
    class Wide(nn.Module):                              # the thirteenth, from here
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
        def forward(self, context, n):
            return diagonal_normal(torch.zeros(n, 2), self.scale.expand(n, 2))
    rivals["wide"] = Rival(fit_vae, lambda: WithPriors(vae, [Wide()]), lambda: COMMON)      # to here
    run, priors = Run.open(str(tmp_path / "run"), "rivals"), {"base": vae}
    for name, rival in rivals.items():
        priors[name] = train_in_run(run, name, rival, POINTS)
    rows = compare(priors, POINTS[:40], num_samples=2, log_z_samples=100, draws=20, seed=0)
    assert len(rows) == 13 and len(table_of(rows).splitlines()) == 14
    assert set(rows["wide"]) == {"log_likelihood", "gain", "mmd2", "told_apart", "seconds"}
    for name in rivals:
        costs = [run.metrics[f"{column}_{name}"] for column in ("train_seconds", "train_flops", "parameters")]
        assert [cost.unit for cost in costs] == ["s", "TFLOP", "numbers"] and min(cost.value for cost in costs[1:]) > 0
    assert run.metrics["parameters_wide"].value == 1


def test_what_was_trained_is_read_when_it_is_asked_for_again(tmp_path, monkeypatch):
    "Also the mixture, and flow matching; the numbers are those of the first time."
    vae, run = frozen_vae(), Run.open(str(tmp_path / "run"), "rivals")
    matching = lambda: (torch.manual_seed(0), WithPriors(vae, [FlowMatching(2, 8)]))[1]
    rivals = {"mixture": Rival(fit_mixture, lambda: vae, lambda: dict(components=2, seed=0)), "matching": Rival(fit_matching, matching, lambda: COMMON)}
    first = {name: train_in_run(run, name, rival, POINTS) for name, rival in rivals.items()}
    monkeypatch.setattr("ncp_vae.models.priors.GaussianMixture.fit", lambda *given: pytest.fail("fitted again"))
    for name, rival in rivals.items():
        prior = train_in_run(run, name, rival, POINTS)
        assert all(torch.equal(value, first[name].state_dict()[key]) for key, value in prior.state_dict().items())
        assert not any(p.requires_grad for p in prior.parameters())


def test_the_network_under_all_priors():
    vae = frozen_vae()
    law = WithPriors(vae, [None])
    assert all(network_of(prior) is vae for prior in (vae, law, WithPriors(law, [None]), NoiseContrastivePrior(law, [ratio()]),
                                                      TwoStage(vae, LatentVAE((2,), 2, (8,)))))
