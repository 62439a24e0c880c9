"""Flows as laws of a walk: trained by the library's own loop, stored, sampled, and with a ratio on top. The layers are checked in the chapter."""
import pytest
import torch
from exact import AddedNoise, rng
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine import store
from ncp_vae.engine.evaluate import compare
from ncp_vae.engine.train import fit, fit_ncp, fit_vae
from ncp_vae.flows import FlowLaw, FlowMatching, MatchingLoss, RealNVP
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.shallow import ShallowConfig, ShallowVAE
from ncp_vae.sampling import HMC, MALA, SIR, JointMALA
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal

MEAN, VARIANCE = torch.tensor([1.5, -1.0]), torch.tensor([2.0, 0.6])      # of the data; the noise of the decoder is 0.5
IMAGES = MEAN + VARIANCE.sqrt() * torch.randn(4000, 2, generator=rng(0))


class Learned(FlatVAE):
    "x = z + 0.5 eps, with an affine posterior that is trained: its family holds the exact one where the prior is a diagonal Normal."
    def __init__(self):
        super().__init__(2)
        self.slope, self.shift, self.log_scale = (nn.Parameter(value * torch.ones(2)) for value in (0.5, 0.0, 0.0))

    def posterior(self, x):
        return diagonal_normal(self.slope * x + self.shift, self.log_scale.exp().expand_as(x))

    def likelihood(self, z):
        return diagonal_normal(z, torch.full_like(z, 0.5))


def frozen():
    "A VAE with nothing to train whose aggregate posterior is known: of x ~ N(m, v), N(m / 1.25, v / 1.25^2 + .2)."
    return AddedNoise(2, noise=0.5), Independent(Normal(MEAN / 1.25, (VARIANCE / 1.25**2 + 0.2).sqrt()), 1)


def divergence(q, law, n=20_000):
    with torch.no_grad():
        z = q.sample((n,))
        return (q.log_prob(z) - law(None, n).log_prob(z)).mean().item()


def test_post_hoc_it_reaches_a_known_aggregate_posterior():
    "Below .02 nats, ten times the sampling error of 20,000 draws; of N(0, I) it is more than half a nat. The data's own error is part of it."
    vae, q = frozen()
    torch.manual_seed(0)
    law = RealNVP(2, blocks=3, hidden=16)
    with torch.no_grad():
        z = q.sample((20_000,))
        assert (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(1)).mean() > 0.5
    fit_vae(WithPriors(vae, [law]), IMAGES, steps=400, batch_size=256, lr=3e-3, seed=0)
    assert divergence(q, law) < 0.02


def test_jointly_it_reaches_the_optimum_of_the_model():
    """The best bound is the data's own log density, which the model can express: within .03 nats of it on fresh data, five times the error
    of their paired difference."""
    torch.manual_seed(0)
    model = fit_vae(WithPriors(Learned(), [RealNVP(2, blocks=3, hidden=16)]), IMAGES, steps=800, batch_size=256, lr=5e-3, seed=0)
    x = MEAN + VARIANCE.sqrt() * torch.randn(20_000, 2, generator=rng(1))
    truth = Normal(MEAN, VARIANCE.sqrt()).log_prob(x).sum(1)
    with torch.no_grad():
        assert -0.01 < (truth - elbo(model, x, rng()).elbo).mean() < 0.03


def test_flow_matching_is_trained_by_the_librarys_loop():
    vae, q = frozen()
    torch.manual_seed(0)
    law = FlowMatching(2, hidden=32)
    fit(MatchingLoss(vae, law), IMAGES, steps=800, batch_size=256, lr=4e-3, seed=0, name="prior")
    assert divergence(q, law.eval(), 2000) < 0.03
    z = law(None, 4000).sample()
    assert (z.mean(0) - MEAN / 1.25).abs().max() < 0.1          # five errors of a mean of 4,000 draws, and the fit's own


@pytest.mark.parametrize("law", [lambda: RealNVP(3, 2, 8), lambda: RealNVP(3, 2, 8, pure=True), lambda: FlowMatching(3, 8)])
def test_a_hierarchy_with_flows_is_stored_and_read_to_the_bit(tmp_path, law):
    torch.manual_seed(0)
    vae = DenseHierarchy((1, 4, 4), groups=2, latent_dim=3, hidden=8, width=8)
    model = WithPriors(vae, [law(), None])
    x = torch.rand(40, 1, 4, 4).round()
    with torch.no_grad():
        model.train().walk(lambda step: step.prior.sample(), n=20)
        model.laws[0](None, 20).log_prob(torch.randn(20, 3))     # sets the actnorms, where there are any
    loaded = store.load(store.save(model.eval(), tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(elbo(loaded, x, rng()).elbo, elbo(model, x, rng()).elbo)
        z = torch.randn(20, 3)
        before = [p.clone() for p in loaded.laws[0].parameters()]
        loaded.train().laws[0](None, 20).log_prob(z)             # a loaded actnorm is never set again
    assert all(map(torch.equal, before, loaded.laws[0].parameters()))


@pytest.mark.parametrize("law", [lambda: RealNVP(3, 2, 8), lambda: FlowMatching(3, 8)])
def test_an_ncp_stands_on_it_in_a_hierarchy(law):
    torch.manual_seed(0)
    vae = DenseHierarchy((1, 4, 4), groups=2, latent_dim=3, hidden=8, width=8)
    x = torch.rand(64, 1, 4, 4).round()
    base = WithPriors(vae, [law(), None])
    ncp = fit_ncp(base, x, steps=3, batch_size=16, lr=1e-3, seed=0)
    for sampler in (SIR(8), MALA(2, 0.01), HMC(2, 0.01), JointMALA(2, 0.01)):
        assert torch.isfinite(ncp.sample(4, sampler, generator=rng()).latents[0]).all()
    rows = compare({"VAE": vae, "flow": base, "NCP on it": ncp}, x[:20], num_samples=2, log_z_samples=100, draws=20, seed=0)
    assert list(rows) == ["VAE", "flow", "NCP on it"]


@pytest.mark.parametrize("make", [lambda: RealNVP((4, 3, 3), blocks=3, hidden=6), lambda: FlowMatching((2, 4, 4), hidden=6),
                                  lambda: FlowMatching((8, 4, 4), hidden=6)], ids=["RealNVP", "exact divergence", "Hutchinson"])
def test_latents_may_be_maps(make):
    "Draws, densities of draws of several pools, and their gradients."
    torch.manual_seed(0)
    law = make()
    z = law(None, 5).sample((3,)).requires_grad_()
    value = law(None, 5).log_prob(z)
    slope, = torch.autograd.grad(value.sum(), z)
    assert value.shape == (3, 5) and slope.shape == z.shape and torch.isfinite(slope).all()


def test_hutchinsons_estimate_is_unbiased(monkeypatch):
    "Against the exact divergence, four errors of the mean of 4,000 estimates. The velocity is perturbed, so that its Jacobian is not diagonal."
    from ncp_vae import flows
    torch.manual_seed(0)
    law = FlowMatching(5, hidden=8)
    z = torch.randn(1, 5)
    with torch.no_grad():
        exact = law(None, 1).log_prob(z).item()
        monkeypatch.setattr(flows, "_EXACT", 0)
        found = law(None, 4000).log_prob(z.expand(4000, 5))
    assert found.std() > 0.01 and abs(found.mean() - exact) < 4 * found.std() / 4000**0.5


def test_a_posterior_may_be_a_flow():
    "The bound of a VAE whose posterior is bent rises with the flow, and no second pass is taken for log q of a draw."
    class Bent(Learned):
        def __init__(self):
            super().__init__()
            self.flow = RealNVP(2, blocks=2, hidden=16)

        def posterior(self, x):
            return FlowLaw(super().posterior(x), self.flow)

    torch.manual_seed(0)
    vae = Bent()
    calls = []
    transform = vae.flow.transform
    vae.flow.transform = lambda z: calls.append(len(z)) or transform(z)
    elbo(vae, IMAGES[:50])
    assert calls == []
    before = elbo(vae.eval(), IMAGES, rng()).elbo.mean()
    vae = fit_vae(vae, IMAGES, steps=150, batch_size=256, lr=5e-3, seed=0)
    with torch.no_grad():
        assert elbo(vae, IMAGES, rng()).elbo.mean() > before + 0.1
        assert (iwae(vae, IMAGES[:500], 20, generator=rng()) - elbo(vae, IMAGES[:500], rng()).elbo).mean() > -0.01


def test_a_law_with_the_wrong_shape_and_data_that_is_not_finite_are_refused():
    vae = AddedNoise(2, noise=0.5)
    with pytest.raises(ValueError, match="event"):
        elbo(WithPriors(vae, [RealNVP(3, 1, 4)]), IMAGES[:5])
    with pytest.raises(ValueError, match="NaN"):
        fit_vae(WithPriors(vae, [RealNVP(2, 1, 4)]), torch.full((100, 2), torch.nan), steps=3, batch_size=10, lr=1e-3, seed=0)
    with pytest.raises(ValueError, match="at least 1 numbers"):
        FlowMatching(0)


def test_correlated_latents_need_the_dense_layer():
    "A covariance far from the axes; within .02 nats."
    q = MultivariateNormal(torch.zeros(3), torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.5], [0.0, 0.5, 1.0]]) + 0.1 * torch.eye(3))
    torch.manual_seed(0)
    law = RealNVP(3, blocks=2, hidden=8).train()
    optimizer = torch.optim.Adam(law.parameters(), 1e-2)
    for _ in range(300):
        (-law(None, 256).log_prob(q.sample((256,))).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert divergence(q, law.eval()) < 0.02


@pytest.mark.parametrize("shape, blocks", [((5,), 3), ((4, 3, 3), 2)])
def test_couplings_alone_are_a_law_too(shape, blocks):
    """Table B.4: nothing but couplings that meet the halves in turn, so that two of them move every number. Both directions agree, and log |det|
    with autograd; in float64."""
    torch.manual_seed(0)
    law = RealNVP(shape, blocks, 8, pure=True).double()
    assert {type(layer).__name__ for layer in law.layers} == {"Reversed", "Coupling"}
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    z = torch.randn(4, *shape, dtype=torch.float64)
    w, log_det = law.transform(z)
    back, same = law.inverse(w)
    jacobian = torch.autograd.functional.jacobian(lambda z: law.transform(z[None])[0][0], z[0]).reshape(z[0].numel(), -1)
    assert torch.allclose(back, z, atol=1e-10) and torch.allclose(log_det, same, atol=1e-10)
    assert abs(log_det[0] - torch.linalg.slogdet(jacobian)[1]) < 1e-10
    assert not ((jacobian == 0) | (jacobian == 1)).all(1).any()


def test_couplings_alone_in_a_posterior_are_stored(tmp_path):
    torch.manual_seed(0)
    vae = ShallowVAE(ShallowConfig("dense", (1, 8, 8), 4, posterior_blocks=2, posterior_hidden=4, posterior_pure=True, width=0.05)).eval()
    assert len(vae.flow.layers) == 4
    x = torch.rand(10, 1, 8, 8).round()
    loaded = store.load(store.save(vae, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(elbo(loaded, x, rng()).elbo, elbo(vae, x, rng()).elbo)
