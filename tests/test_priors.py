"""Other base priors, a Gaussian mixture among them, alone and under a noise contrastive prior; and the RAE net."""
import math

import pytest
import torch
from exact import Function
from torch import nn
from torch.distributions import (Categorical, Distribution, Exponential, Independent, MixtureSameFamily, MultivariateNormal, Normal,
                                 Poisson, Uniform)

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.evaluate import compare
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE, RaeVAE
from ncp_vae.models.hierarchical import DenseHierarchy
from ncp_vae.models.priors import GaussianMixture, NormalMixture
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.partition import AIS, Bridge, ReverseAIS
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import HMC, ISIR, MALA, SIR, SMC, JointLangevin, JointMALA, Langevin, proposal_budget
from ncp_vae.walk import Step, TopDownVAE, Trace, WithPriors, diagonal_normal, from_posterior, from_prior, replay


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseVAE((1, 4, 4), 3, (16,), sigma=0.1).eval()


@pytest.fixture(scope="module")
def mixed(vae):
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return WithPriors(vae, [GaussianMixture.fit(vae, images, components=2, seed=0)])


def parameters(components=3, dim=4):
    roots = torch.tril(torch.randn(components, dim, dim)) * 0.3
    roots.diagonal(dim1=1, dim2=2).copy_(0.5 + torch.rand(components, dim))
    return torch.rand(components).softmax(0), torch.randn(components, dim), roots


def test_the_density_is_torchs_own():
    weights, means, roots = parameters()
    theirs = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, scale_tril=roots))
    z = 2 * torch.randn(7, 2, 4)
    assert torch.allclose(NormalMixture(2, weights, means, roots).log_prob(z), theirs.log_prob(z), atol=1e-4)


def test_one_component_is_a_normal_whose_draws_have_its_moments():
    """Five standard errors on each of 4 means and, relative to 1/sqrt(n), on the 16 covariances: a sound one fails once in 10^5."""
    _, means, roots = parameters(components=1)
    z = NormalMixture(1, torch.ones(1), means, roots).sample((40_000,)).squeeze(1)
    covariance = roots[0] @ roots[0].T
    scale = covariance.diagonal().sqrt()
    assert ((z.mean(0) - means[0]) / scale * 200).abs().max() < 5
    assert ((z.T.cov() - covariance) / scale.outer(scale) * 200).abs().max() < 5 * 2**0.5


def test_a_draw_picks_components_by_their_weights():
    """Components far apart: counts of 20,000 draws within five binomial standard errors."""
    weights = torch.tensor([0.1, 0.6, 0.3])
    z = NormalMixture(1, weights, torch.tensor([[-50.0], [0.0], [50.0]]), torch.ones(3, 1, 1)).sample((20_000,)).flatten()
    counts = torch.stack([(z < -25).sum(), (z.abs() < 25).sum(), (z > 25).sum()])
    assert ((counts - 20_000 * weights).abs() < 5 * (20_000 * weights * (1 - weights)).sqrt()).all()


def test_the_fit_is_a_function_of_the_seed_and_leaves_the_global_numbers_alone(vae):
    images = torch.rand(100, 1, 4, 4)
    before = torch.get_rng_state()
    first, again = (GaussianMixture.fit(vae, images, components=2, seed=3) for _ in range(2))
    assert torch.equal(first.means, again.means) and torch.equal(torch.get_rng_state(), before)
    assert first.weights.sum().item() == pytest.approx(1, abs=1e-6) and (first.roots.triu(1) == 0).all()


def test_encoder_and_decoder_are_the_vaes_own(vae, mixed):
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(mixed.encode(x).mean, vae.posterior(x).mean)
    one, other = (m.walk(from_posterior(torch.Generator().manual_seed(0)), evidence=m.encode(x)) for m in (vae, mixed))
    assert torch.equal(one.likelihood.mean, other.likelihood.mean)
    assert elbo(mixed, x).kl.shape == (5, 1) and iwae(mixed, x, 3).shape == (5,)


def test_the_state_holds_vae_and_mixture(vae, mixed):
    law = GaussianMixture(torch.zeros(2), torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1))
    twin = WithPriors(DenseVAE((1, 4, 4), 3, (16,), sigma=0.1), [law])
    twin.load_state_dict(mixed.state_dict())
    z = torch.randn(4, 3)
    assert torch.equal(twin.walk(replay([z]), n=4).log_prior(), mixed.walk(replay([z]), n=4).log_prior())


def test_a_ratio_is_trained_on_it_and_sampled(mixed):
    ncp = fit_ncp(mixed, torch.rand(200, 1, 4, 4), ratios=[MLPRatio(3, hidden=(8,))], steps=5, batch_size=50, lr=1e-3, seed=0)
    for sampler in (SIR(10), Langevin(3, 0.01)):
        assert ncp.sample(6, sampler).likelihood.mean.shape == (6, 1, 4, 4)
    assert torch.isfinite(torch.tensor(ncp.log_partition(100).value))


def test_sir_on_it_reaches_the_reweighted_law():
    """Weights (1/2, 1/2) far apart, log r = log 3 on the right: three draws of four there, within five standard errors of 4,000."""
    right = Function(lambda z: (z[..., 0] > 0) * torch.tensor(3.0).log())
    law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1, 1))
    base = WithPriors(DenseVAE((1, 2, 2), 1, (4,), sigma=0.1), [law])
    z = NoiseContrastivePrior(base, [right]).sample(4000, SIR(200)).latents[0]
    assert abs((z > 0).double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5 + 0.005     # SIR's own bias at M = 200


def test_what_it_refuses(vae, mixed):
    images = torch.rand(100, 1, 4, 4)
    for wrong in [dict(components=0), dict(components=20)]:
        with pytest.raises(ValueError, match="GaussianMixture.fit: images must be at least 2 D a component, got latents of D = 3"):
            GaussianMixture.fit(vae, images, **wrong)
    with pytest.raises(TypeError, match="Normal priors"):
        mixed.walk(from_prior(temperature=0.7), n=2)
    with pytest.raises(ValueError, match="2 laws for a VAE of 1 latent groups"):
        WithPriors(vae, [None, None])


IMAGES = torch.bernoulli(torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
FEW = dict(steps=40, batch_size=64, lr=1e-2, seed=0)


def hierarchy():
    torch.manual_seed(0)
    return fit_vae(DenseHierarchy((1, 4, 4), groups=2, latent_dim=2, hidden=8, width=8), IMAGES, **FEW)


class Conditional(nn.Module):
    "A law that looks at the context: N(A c, I)."
    def __init__(self, context, dim):
        super().__init__()
        self.linear = nn.Linear(context, dim)

    def forward(self, context, n):
        loc = self.linear(context)
        return diagonal_normal(loc, torch.ones_like(loc))


def test_a_conditional_law_in_a_hierarchy_is_trained_post_hoc():
    "The VAE stays as it is, to the bit; the bound rises, since the law starts far off."
    vae = hierarchy().requires_grad_(False)
    before = [value.clone() for value in vae.state_dict().values()]
    torch.manual_seed(1)
    model = WithPriors(vae, [None, Conditional(*vae.context_shapes[1], 2)])
    def bound():
        return elbo(model, IMAGES, torch.Generator().manual_seed(0)).elbo.mean().item()
    start = bound()
    model = fit_vae(model, IMAGES, **FEW)
    assert bound() > start and all(torch.equal(a, b) for a, b in zip(before, vae.state_dict().values()))


def test_a_law_is_trained_jointly():
    vae = hierarchy()
    model = WithPriors(vae, [None, Conditional(*vae.context_shapes[1], 2)])
    before = [parameter.clone() for parameter in model.parameters()]
    fit_vae(model, IMAGES, **FEW)
    moved = [name for (name, parameter), old in zip(model.named_parameters(), before) if not torch.equal(parameter, old)]
    assert "laws.1.linear.weight" in moved and any(name.startswith("vae.") for name in moved)


@pytest.fixture(scope="module")
def on_a_mixture():
    "An NCP on a hierarchy whose first law is a fitted mixture."
    vae = hierarchy()
    base = WithPriors(vae, [GaussianMixture.fit(vae, IMAGES, components=2), None])
    return fit_ncp(base, IMAGES, **FEW)


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("sampler", [
    SIR(8), SIR([4, 8]), SMC(4), ISIR(2, 4), ISIR(2, 4, 0.01), Langevin(3, 0.01), MALA(3, 0.01), HMC(3, 0.01),
    JointLangevin(3, 0.01), JointMALA(3, 0.01)], ids=lambda sampler: type(sampler).__name__)
def test_every_sampler_draws_from_an_ncp_on_a_mixture(sampler, on_a_mixture):
    on_a_mixture.log_partition(200, seed(), SMC(4))
    before = torch.get_rng_state()
    walk, again = (on_a_mixture.sample(6, sampler, generator=seed()) for _ in range(2))
    assert walk.likelihood.mean.shape == (6, 1, 4, 4) and torch.isfinite(on_a_mixture.log_prob(walk)).all()
    assert all(map(torch.equal, walk.latents, again.latents)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [None, SMC(4), AIS(20, 0.3), ReverseAIS(IMAGES, 20, 0.3), Bridge(IMAGES)],
                         ids=lambda method: type(method).__name__)
def test_every_way_to_log_z_of_an_ncp_on_a_mixture(method, on_a_mixture):
    "Within five standard errors, and a tenth of a nat of bias, of many draws; the two that posterior walks bias, half a nat."
    exact = on_a_mixture.log_partition(20_000, seed(1))
    found = on_a_mixture.log_partition(1000, seed(), method)
    slack = 0.5 if isinstance(method, (ReverseAIS, Bridge)) else 0.1
    assert abs(found.value - exact.value) < 5 * (found.std_error**2 + exact.std_error**2) ** 0.5 + slack


def test_an_ncp_on_a_mixture_is_measured_and_trained_on(on_a_mixture):
    base = on_a_mixture.vae
    table = compare({"VAE": base.vae, "mixture": base, "NCP on it": on_a_mixture}, IMAGES[:20], num_samples=3, seed=0,
                    log_z_samples=200, proposals=8, draws=100, samplers={"NCP on it": JointMALA(3, 0.01)})
    assert list(table) == ["VAE", "mixture", "NCP on it"]
    for log_ratio in (on_a_mixture.normalised_log_ratio, on_a_mixture.sir_log_ratio(8)):
        assert torch.isfinite(iwae(base, IMAGES[:5], 3, log_ratio)).all()
    assert len(proposal_budget(on_a_mixture, 16, 4.0, images=IMAGES[:50])) == 2
    again = fit_ncp(base, IMAGES, base=on_a_mixture, sampler=SIR(4), **FEW)
    assert again.sample(3, SIR(4)).latents[1].shape == (3, 2)


class Two(TopDownVAE):
    "Two numbers; the second one's context is the first. Both priors are N(0, 1)."
    latent_shapes = [torch.Size([1])] * 2
    context_shapes = [None, torch.Size([1])]

    def walk(self, choose, *, n=None, evidence=None):
        priors = [diagonal_normal(torch.zeros(n, 1), torch.ones(n, 1)) for _ in range(2)]
        first = Step(0, None, priors[0], None)
        second = Step(1, choose(first), priors[1], None)
        z = choose(second)
        return Trace([second.context, z], [first, second], diagonal_normal(z, torch.ones_like(z)))


class Around(nn.Module):
    "A conditional law that is no Normal: half N(c - 1, 0.8^2), half N(c + 1, 0.8^2)."
    def forward(self, context, n):
        means = torch.stack([context - 1, context + 1], 1)
        return MixtureSameFamily(Categorical(torch.ones(n, 2)), Independent(Normal(means, 0.8), 1))


class Slope(RatioEstimator):
    "log r = b z."
    def __init__(self, b):
        super().__init__()
        self.b = b

    def condition(self, context):
        return lambda z: self.b * z.sum(-1)


B = 0.8
TILTED = NoiseContrastivePrior(WithPriors(Two(), [None, Around()]), [Slope(0.0), Slope(B)])
E = math.tanh(B) + 0.64 * B                       # the mean of z_2 - z_1 under r p, whatever z_1
LOG_Z = B**2 / 2 + 0.64 * B**2 / 2 + math.log(math.cosh(B))


@pytest.mark.parametrize("sampler, means", [(JointMALA(200, 0.3), (B, B + E)), (MALA(60, 0.3), (0.0, E))])
def test_chains_on_a_conditional_mixture_reach_their_law(sampler, means):
    """Under r p the first number is tilted by b, as z_2 = z_1 + e; group by group it is not. Five standard errors of 10,000 rows;
    the other law is 80 of them away."""
    z = torch.cat(TILTED.sample(10_000, sampler, generator=seed(1)).latents, 1)
    off = (z.mean(0) - torch.tensor(means)) / z.std(0) * 100
    assert off.abs().max() < 5


def test_annealing_on_a_conditional_mixture():
    "Within five standard errors; the second group starts from N(0, 1), which is not its prior."
    found = TILTED.log_partition(5000, seed(2), AIS(30, 0.3))
    assert abs(found.value - LOG_Z) < 5 * found.std_error < 0.5


def test_one_group_that_is_no_normal_is_moved_itself():
    law = Around()(torch.zeros(500, 1), 500)
    one, other = (sampler.draw(lambda z: z.sum(-1), law, seed(3)) for sampler in (JointMALA(5, 0.1), MALA(5, 0.1)))
    assert torch.equal(one, other)


class Only(nn.Module):
    "One distribution as a law."
    def __init__(self, distribution):
        super().__init__()
        self.distribution = distribution

    def forward(self, context, n):
        return Independent(self.distribution.expand((n, 1)), 1)


class Silent(Distribution):
    "A distribution that does not say where it lives."
    arg_constraints = {}

    def expand(self, shape):
        return Silent(shape, validate_args=False)

    def sample(self, shape=()):
        return torch.zeros(torch.Size(shape) + self.batch_shape)


@pytest.mark.parametrize("law", [Uniform(0.0, 1.0), Exponential(1.0), Poisson(2.0), Silent(validate_args=False)],
                         ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("group", [0, 1])
def test_joint_chains_name_the_law_that_they_cannot_move(law, group):
    laws = [None, None]
    laws[group] = Only(law)
    ncp = NoiseContrastivePrior(WithPriors(Two(), laws), [Slope(0.1)] * 2)
    for draw in (lambda: ncp.sample(4, JointLangevin(2, 0.1)), lambda: ncp.sample(4, JointMALA(2, 0.1)),
                 lambda: ncp.log_partition(10, method=AIS(2, 0.1))):
        with pytest.raises(ValueError, match=f"Normal priors, or others whose `support` is all numbers.*{type(law).__name__}"):
            draw()


def test_a_mixture_may_be_of_maps():
    "Latents [2, 1, 2]: the density is that of the four numbers."
    weights, means, roots = parameters()
    law = GaussianMixture(weights, means, roots, torch.Size([2, 1, 2]))
    z = law(None, 5).sample((3,))
    assert z.shape == (3, 5, 2, 1, 2)
    assert torch.equal(law(None, 5).log_prob(z), NormalMixture(5, weights, means, roots).log_prob(z.flatten(2)))
    assert law(None, 5).support.check(z).shape == (3, 5)


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
