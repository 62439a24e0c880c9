"""VampPrior, the mixture of the VAE's own posteriors: its density, its draws, what is trained, kept and refused."""
import copy

import pytest
import torch
from exact import chi_square_p, rng
from torch.distributions import Categorical, MixtureSameFamily

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine import store
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.holes import AggregatePosterior
from ncp_vae.models.flat import DenseVAE, RaeVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.priors import PosteriorMixture, VampPrior
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.sampling import SIR, Langevin
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal

IMAGES = torch.rand(64, 1, 4, 4, generator=rng(0))


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseVAE((1, 4, 4), 2, (8,), sigma=0.1).eval()


def on(vae, components=5):
    return WithPriors(vae, [VampPrior.from_images(vae, IMAGES, components)])


class Inverse(FlatVAE):
    "q(z | x) = N(x, width^2)."
    def __init__(self, width):
        super().__init__(2)
        self.width = width

    def posterior(self, x):
        return diagonal_normal(x, torch.full_like(x, self.width))

    likelihood = posterior


def test_with_all_images_it_is_the_aggregate_posterior():
    "1,500 images, more than are encoded in one piece there; only the sigmoid's rounding is between the two. Half of them are not it."
    x = 0.1 + 0.8 * torch.rand(1500, 2, generator=rng(1)).double()
    vae = Inverse(0.01).double()
    aggregate = AggregatePosterior(vae, x)
    z = aggregate.sample(200, rng(2))
    with torch.no_grad():
        whole, half = (VampPrior.from_images(vae, x, n)(None, 200).log_prob(z) for n in (1500, 750))
    assert (whole - aggregate.log_prob(z)).abs().max() < 1e-9 < 0.1 < (half - aggregate.log_prob(z)).abs().max()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_the_density_is_torchs_own(lead):
    law = VampPrior.from_images(small(), IMAGES, 5)(None, 4)
    theirs = MixtureSameFamily(Categorical(torch.ones(4, 5)), law.rows.expand([4, 5]))
    z = torch.randn(*lead, 4, 2)
    assert law.log_prob(z).shape == (*lead, 4) and torch.allclose(law.log_prob(z), theirs.log_prob(z), atol=1e-5)
    assert law.sample(lead).shape == (*lead, 4, 2) and law.support.check(z).shape == (*lead, 4)


def met(draw):
    "Which of 20 narrow components 4,000 draws came from, ten a call."
    return torch.cdist(torch.cat([draw() for _ in range(400)]), centres()).argmin(1)


def centres():
    return torch.stack([torch.arange(20.0), torch.zeros(20)], 1)


def test_each_component_is_drawn_equally_often():
    "Pearson's test of 4,000 draws at a fixed seed: a sound sampler is refused at one seed in a thousand. The twin takes the first ten."
    law = PosteriorMixture(10, diagonal_normal(centres(), torch.full((20, 2), 0.01)), torch.device("cpu"))
    even = torch.full((20,), 1 / 20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert chi_square_p(met(law.sample), even) > 1e-3
        assert chi_square_p(met(lambda: law.rows.sample()[:10]), even) < 1e-9


def test_the_vae_is_borrowed():
    "Its weights are listed once, and a copy of the whole has one VAE."
    prior = on(small())
    assert [name for name in prior.state_dict() if name.startswith("laws")] == ["laws.0.logits"]
    again = copy.deepcopy(prior)
    assert again.laws[0].vae is again.vae is not prior.vae


def trained(prior, **how):
    return fit_vae(prior, IMAGES, steps=20, batch_size=32, lr=1e-2, seed=0, **how)


def moved(prior, before):
    "The names of the weights that differ."
    return {name for name, value in prior.state_dict().items() if not torch.equal(value, before[name])}


def test_post_hoc_only_the_pseudo_inputs_move_and_the_bound_rises():
    prior = on(small())
    prior.vae.requires_grad_(False)
    before = copy.deepcopy(prior.state_dict())
    first = elbo(prior, IMAGES, rng(1)).elbo.mean()
    trained(prior)
    assert moved(prior, before) == {"laws.0.logits"}
    assert elbo(prior, IMAGES, rng(1)).elbo.mean() > first
    assert (prior.laws[0].logits.sigmoid() - 0.5).abs().max() < 0.5


def test_jointly_the_gradient_of_the_prior_reaches_the_encoder():
    prior = on(small())
    before = copy.deepcopy(prior.state_dict())
    prior.walk(lambda step: torch.zeros(3, 2), n=3).log_prior().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in prior.vae.encoder.parameters())
    trained(prior)
    assert {"laws.0.logits", "vae.encoder.0.weight", "vae.decoder.0.weight"} <= moved(prior, before)


def test_a_checkpoint_gives_the_same_weights_to_the_bit(tmp_path):
    first = trained(on(small()), checkpoint=tmp_path / "vae.pt")
    again = trained(on(small()), checkpoint=tmp_path / "vae.pt")
    assert not moved(again, first.state_dict())


def test_it_is_stored_with_its_vae_and_comes_back_with_one(tmp_path):
    prior = trained(on(small()))
    again = store.load(store.save(prior, tmp_path / "prior"))
    assert again.laws[0].vae is again.vae and not moved(again, prior.state_dict())
    z = torch.randn(4, 2)
    assert torch.equal(again.laws[0](None, 4).log_prob(z), prior.laws[0](None, 4).log_prob(z))


def test_alone_it_is_not_stored(tmp_path):
    "Without the guard the VAE would come back with fresh weights."
    with pytest.raises(ValueError, match="VampPrior cannot be stored alone: it uses a DenseVAE that is no part of it"):
        store.save(VampPrior.from_images(small(), IMAGES, 5), tmp_path / "law")
    assert not (tmp_path / "law").exists()


def test_pseudo_inputs_do_not_move_the_running_statistics():
    "Nor does the density depend on the mode; torch's warning is ours."
    vae = RaeVAE((1, 8, 8), 2, 2).eval()
    law = VampPrior.from_images(vae, torch.rand(9, 1, 8, 8, generator=rng(3)), 4)
    z, before = torch.zeros(1, 2), copy.deepcopy(vae.state_dict())
    expected = law(None, 1).log_prob(z)
    vae.train()
    with pytest.warns(UserWarning, match="batch norm"):
        assert torch.equal(law(None, 1).log_prob(z), expected)
    assert vae.training and all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_ratio_on_it_does_what_any_ncp_does():
    prior = on(small())
    ncp = fit_ncp(prior, IMAGES, ratios=[MLPRatio(2, hidden=(8,))], steps=5, batch_size=32, lr=1e-3, seed=0)
    for sampler in (SIR(10), Langevin(3, 0.01)):
        assert ncp.sample(6, sampler).likelihood.mean.shape == (6, 1, 4, 4)
    log_z = ncp.log_partition(200, rng(0))
    assert abs(log_z.value) < 1 and log_z.std_error > 0
    assert iwae(prior, IMAGES[:5], 3, ncp.normalised_log_ratio, rng(1)).isfinite().all()


def test_the_start_is_a_function_of_the_seed():
    before = torch.get_rng_state()
    first, again, other = (VampPrior.from_images(small(), IMAGES, 5, seed).logits for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("images, components, words", [
    (IMAGES, 0, "components must be 1 to the 64 images, got 0"), (IMAGES, 65, "components must be 1 to the 64 images, got 65"),
    (2 * IMAGES, 5, r"images must lie in \[0, 1\], got values from"), (IMAGES * float("nan"), 5, "got values from nan"),
    (torch.rand(9, 1, 5, 5), 5, r"images of shape \(1, 5, 5\); this VAE was built for \(1, 4, 4\)")])
def test_images_that_are_refused(images, components, words):
    with pytest.raises(ValueError, match=words):
        VampPrior.from_images(small(), images, components)


def test_vaes_that_are_refused():
    deep = DenseHierarchy((1, 4, 4), groups=2, latent_dim=2, hidden=8, width=8)
    with pytest.raises(ValueError, match="1 latent group and at least 1 pseudo-input are needed, got 2 groups and 5"):
        VampPrior.from_images(deep, IMAGES, 5)
    with pytest.raises(ValueError, match="got 1 groups and 0 pseudo-inputs"):
        VampPrior(small(), torch.empty(0, 1, 4, 4))
