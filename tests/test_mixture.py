"""The RAE net, and a Gaussian mixture as the base prior of a flat VAE."""
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.train import fit_ncp
from ncp_vae.models.flat import DenseVAE, RaeVAE
from ncp_vae.models.mixture import GaussianMixture, MixturePriorVAE, fit_mixture
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import SIR, Langevin
from ncp_vae.walk import from_posterior, from_prior


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseVAE((1, 4, 4), 3, (16,), sigma=0.1).eval()


@pytest.fixture(scope="module")
def mixed(vae):
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return fit_mixture(vae, images, components=2, seed=0)


def parameters(components=3, dim=4):
    roots = torch.tril(torch.randn(components, dim, dim)) * 0.3
    roots.diagonal(dim1=1, dim2=2).copy_(0.5 + torch.rand(components, dim))
    return torch.rand(components).softmax(0), torch.randn(components, dim), roots


def test_the_density_is_torchs_own():
    weights, means, roots = parameters()
    theirs = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, scale_tril=roots))
    z = 2 * torch.randn(7, 2, 4)
    assert torch.allclose(GaussianMixture(2, weights, means, roots).log_prob(z), theirs.log_prob(z), atol=1e-4)


def test_one_component_is_a_normal_whose_draws_have_its_moments():
    """Five standard errors on each of 4 means and, relative to 1/sqrt(n), on the 16 covariances: a sound one fails once in 10^5."""
    _, means, roots = parameters(components=1)
    z = GaussianMixture(1, torch.ones(1), means, roots).sample((40_000,)).squeeze(1)
    covariance = roots[0] @ roots[0].T
    scale = covariance.diagonal().sqrt()
    assert ((z.mean(0) - means[0]) / scale * 200).abs().max() < 5
    assert ((z.T.cov() - covariance) / scale.outer(scale) * 200).abs().max() < 5 * 2**0.5


def test_a_draw_picks_components_by_their_weights():
    """Components far apart: counts of 20,000 draws within five binomial standard errors."""
    weights = torch.tensor([0.1, 0.6, 0.3])
    z = GaussianMixture(1, weights, torch.tensor([[-50.0], [0.0], [50.0]]), torch.ones(3, 1, 1)).sample((20_000,)).flatten()
    counts = torch.stack([(z < -25).sum(), (z.abs() < 25).sum(), (z > 25).sum()])
    assert ((counts - 20_000 * weights).abs() < 5 * (20_000 * weights * (1 - weights)).sqrt()).all()


def test_the_fit_is_a_function_of_the_seed_and_leaves_the_global_numbers_alone(vae):
    images = torch.rand(100, 1, 4, 4)
    before = torch.get_rng_state()
    first, again = (fit_mixture(vae, images, components=2, seed=3) for _ in range(2))
    assert torch.equal(first.means, again.means) and torch.equal(torch.get_rng_state(), before)
    assert first.weights.sum().item() == pytest.approx(1, abs=1e-6) and (first.roots.triu(1) == 0).all()


def test_encoder_and_decoder_are_the_vaes_own(vae, mixed):
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(mixed.posterior(x).mean, vae.posterior(x).mean)
    one, other = (m.walk(from_posterior(torch.Generator().manual_seed(0)), evidence=m.encode(x)) for m in (vae, mixed))
    assert torch.equal(one.likelihood.mean, other.likelihood.mean)
    assert elbo(mixed, x).kl.shape == (5, 1) and iwae(mixed, x, 3).shape == (5,)


def test_the_state_holds_vae_and_mixture(vae, mixed):
    twin = MixturePriorVAE(DenseVAE((1, 4, 4), 3, (16,), sigma=0.1), *(torch.zeros_like(x) for x in (mixed.weights, mixed.means,
                                                                                                  torch.eye(3).expand(2, 3, 3))))
    twin.load_state_dict(mixed.state_dict())
    z = torch.randn(4, 3)
    assert torch.equal(twin.prior(4).log_prob(z), mixed.prior(4).log_prob(z))


def test_a_ratio_is_trained_on_it_and_sampled(mixed):
    ncp = fit_ncp(mixed, torch.rand(200, 1, 4, 4), ratios=[MLPRatio(3, hidden=(8,))], steps=5, batch_size=50, lr=1e-3, seed=0)
    for sampler in (SIR(10), Langevin(3, 0.01)):
        assert ncp.sample(6, sampler).likelihood.mean.shape == (6, 1, 4, 4)
    assert torch.isfinite(torch.tensor(ncp.log_partition(100).value))


def test_sir_on_it_reaches_the_reweighted_law():
    """Weights (1/2, 1/2) far apart, log r = log 3 on the right: three draws of four there, within five standard errors of 4,000."""
    class Step(MLPRatio):
        def condition(self, context):
            return lambda z: (z[..., 0] > 0) * torch.tensor(3.0).log()
    base = MixturePriorVAE(DenseVAE((1, 2, 2), 1, (4,), sigma=0.1), torch.tensor([0.5, 0.5]), torch.tensor([[-9.0], [9.0]]),
                           torch.ones(2, 1, 1))
    z = NoiseContrastivePrior(base, [Step(1, hidden=(2,))]).sample(4000, SIR(200)).latents[0]
    assert abs((z > 0).double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5 + 0.005     # SIR's own bias at M = 200


def test_what_it_refuses(vae, mixed):
    images = torch.rand(100, 1, 4, 4)
    for wrong in [dict(components=0), dict(components=20)]:
        with pytest.raises(ValueError, match="fit_mixture: latents must be vectors"):
            fit_mixture(vae, images, **wrong)
    with pytest.raises(TypeError, match="Normal priors"):
        mixed.walk(from_prior(temperature=0.7), n=2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_the_rae_net_takes_and_gives_images(shape):
    net, x = RaeVAE(shape, latent_dim=3, width=2).eval(), torch.rand(2, *shape)
    trace = net.walk(from_posterior(), evidence=net.encode(x))
    mean = trace.likelihood.mean
    assert mean.shape == x.shape and mean.min() >= 0 and mean.max() <= 1 and trace.likelihood.stddev.unique().tolist() == [pytest.approx(0.368)]
    assert (net.posterior(100 * x).stddev.log().abs() <= 5.0001).all()


def test_what_the_rae_net_refuses():
    for wrong, words in [(dict(image_shape=(1, 30, 30)), "side 5 to 8 times"), (dict(image_shape=(1, 28, 32)), "must be square"),
                         (dict(width=3), "power of two"), (dict(sigma=0.0), "sigma positive")]:
        with pytest.raises(ValueError, match=words):
            RaeVAE(**{"image_shape": (1, 28, 28), "width": 2, **wrong})
    with pytest.raises(ValueError, match="was built for"):
        RaeVAE((1, 28, 28), 2, 2).eval().encode(torch.rand(1, 1, 32, 32))
