"""Scores against closed forms and against scikit-learn."""
import math
import warnings

import pytest
import torch
from sklearn.neighbors import KDTree
from torch import nn

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.evaluate import block_mmd2, compare, group_logits, group_reports, log_likelihoods, nearest, sir_ess
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.likelihoods import normal
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import SIR
from ncp_vae.walk import FlatVAE, diagonal_normal, from_prior


class Linear(FlatVAE):
    """z ~ N(0, 1), x | z ~ N(z, s^2), with the exact posterior: log p(x) = log N(x; 0, 1 + s^2)."""
    s = 0.5
    def __init__(self):
        super().__init__(1)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def posterior(self, x):
        variance = self.s**2 / (1 + self.s**2)
        return diagonal_normal(x / (1 + self.s**2), torch.full_like(x, variance**0.5))

    def likelihood(self, z):
        return normal(z, self.s)


class Tilt(RatioEstimator):
    """log r(z) = a z + b: p_NCP = N(a, 1), log Z = a^2 / 2 + b."""
    def __init__(self, a, b=0.0):
        super().__init__()
        self.a, self.b = a, b

    def condition(self, context):
        return lambda z: self.a * z[..., 0] + self.b


def log_normal(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)


def test_the_gain_is_the_closed_form():
    """Data from the tilted model. The estimate's gain is within 5 standard errors of the exact one (false alarm in two
    million) and a tilt to the wrong side, the broken twin, is not."""
    a, variance = 0.8, 1 + Linear.s**2
    x = a + variance**0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    exact = (log_normal(x, a, variance) - log_normal(x, 0.0, variance)).mean().item()
    settings = dict(num_samples=50, log_z_samples=20_000, proposals=512, seed=0)
    scores, log_z = compare(NoiseContrastivePrior(Linear(), [Tilt(a, b=7.0)]), x, **settings)
    assert abs(scores.base.value - log_normal(x, 0.0, variance).mean()) < 1e-4      # exact posterior: IWAE is exact
    assert abs(log_z.value - (a**2 / 2 + 7.0)) < 5 * log_z.std_error
    assert abs(scores.gain.value - exact) < 5 * scores.gain.std_error
    assert scores.gain_bound.value < scores.gain.value + 5 * log_z.std_error
    wrong, _ = compare(NoiseContrastivePrior(Linear(), [Tilt(-a)]), x, **settings)
    assert abs(wrong.gain.value - exact) > 5 * wrong.gain.std_error


def test_the_ratios_never_ask_for_an_image():
    "Neither their training's logits nor their reports decode: of NVAE that is half of a walk."
    class Blind(Linear):
        def likelihood(self, z):
            raise AssertionError("the likelihood was visited")
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    [(logits_q, logits_p)] = group_logits(Blind(), [Tilt(1.0)], x)
    assert logits_q.shape == logits_p.shape == (40,)
    with pytest.raises(AssertionError, match="visited"):
        Blind().walk(from_prior(), n=2)


def test_the_same_seed_gives_the_same_draws():
    """Paired by seed: the ratio r = 1 changes no image's value by more than float32's rounding, another seed does."""
    vae, x = Linear(), torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    vae.s = 0.7                                      # the posterior is no longer exact, so the draws matter
    vae.posterior = lambda x: diagonal_normal(x / 2, torch.full_like(x, 0.9))
    plain, with_one = log_likelihoods(vae, x, 3, seed=0, log_ratios=[None, lambda trace: torch.zeros(30)])
    again, = log_likelihoods(vae, x, 3, seed=0)
    assert torch.allclose(plain, with_one, atol=1e-6) and torch.allclose(plain, again, atol=1e-6)
    assert not torch.allclose(plain, log_likelihoods(vae, x, 3, seed=1)[0], atol=1e-3)


def test_copies_of_an_image_are_not_independent_images():
    """Five equal copies of each image: the same scores with the same errors, to rounding, as without copies; counted as
    five times as many images, the error would be smaller by the square root of five."""
    x, ncp = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)), NoiseContrastivePrior(Linear(), [Tilt(0.8)])
    settings = dict(num_samples=2, log_z_samples=100_000, proposals=16, seed=0, bound_images=100)
    once, _ = compare(ncp, x, **settings)
    copied, _ = compare(ncp, x.repeat(5, 1), copies=5, **settings)
    naive, _ = compare(ncp, x.repeat(5, 1), **settings)
    assert copied.base.n == 200 and copied.ncp_bound.n == 100
    assert copied.base.value == pytest.approx(once.base.value, abs=1e-4)
    assert copied.base.std_error == pytest.approx(once.base.std_error, rel=1e-3)
    assert naive.base.std_error == pytest.approx(once.base.std_error / 5**0.5, rel=0.01)


def test_the_reports_of_known_ratios():
    """Data x ~ N(a, 1 + s^2) make q(z) = N(t, 1) with t = a / (1 + s^2), and the prior is N(0, 1): the tilt by t is the exact
    ratio. Its KL bound is within 5 standard errors of KL(q || p) = t^2 / 2 and both free checks within 5 of 0; the tilt to
    the wrong side is far off."""
    a, variance = 0.8, 1 + Linear.s**2
    t, x = a / variance, a + variance**0.5 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    exact, = group_reports(NoiseContrastivePrior(Linear(), [Tilt(t, b=-t**2 / 2)]), x, seed=0)
    assert abs(exact.kl_bound - t**2 / 2) < 5 * exact.kl_bound_std_error
    assert abs(exact.log_mean_ratio) < 5 * exact.log_mean_ratio_std_error
    assert abs(exact.log_mean_inverse) < 5 * exact.log_mean_inverse_std_error
    wrong, = group_reports(NoiseContrastivePrior(Linear(), [Tilt(-t)]), x, seed=0)
    assert wrong.kl_bound < -5 * wrong.kl_bound_std_error


def test_ess_of_equal_weights_is_m():
    ess = sir_ess(NoiseContrastivePrior(Linear(), [Tilt(0.0)]), n=5, proposals=77, seed=0)
    assert len(ess) == 1 and abs(ess[0].value - 77) < 1e-3 and ess[0].std_error < 1e-4


def test_mmd_is_zero_between_equals_and_not_between_others():
    """Two draws of N(0, I): within 5 standard errors of 0; shifted by 0.5 in each of 4 dimensions: not."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 4, generator=g), torch.randn(1000, 4, generator=g)
    same, shifted = block_mmd2(x, y), block_mmd2(x, y + 0.5)
    assert abs(same.value) < 5 * same.std_error < shifted.value


def test_nearest_agrees_with_a_kd_tree():
    g = torch.Generator().manual_seed(0)
    images, queries = torch.rand(300, 1, 4, 4, generator=g), torch.rand(20, 1, 4, 4, generator=g)
    distance, index = nearest(queries, images, k=3, chunk=7)
    expected, rows = KDTree(images.flatten(1).numpy()).query(queries.flatten(1).numpy(), k=3)
    assert (index.numpy() == rows).all() and torch.allclose(distance.double(), torch.from_numpy(expected), atol=1e-3)
    with pytest.raises(ValueError, match="between 1 and the number of images 300, got 301"):
        nearest(queries, images, k=301)


class Normed(DenseVAE):
    "Batch norm on both sides."
    def __init__(self):
        super().__init__((1, 4, 4), 2, (8,))
        self.encoder.insert(1, nn.BatchNorm1d(8))
        self.decoder.insert(1, nn.BatchNorm1d(8))


class NormedRatio(MLPRatio):
    "Batch norm in front."
    def __init__(self):
        super().__init__(2, hidden=(8,))
        self.norm = nn.BatchNorm1d(2)

    def condition(self, context):
        inner = super().condition(context)
        return lambda z: inner(self.norm(z.reshape(-1, 2)).view(z.shape))


def test_a_forgotten_eval_is_mended_and_told():
    """Numbers of a model in training mode are those of eval mode, to the bit, with a warning; the mode and the running
    statistics stay. With gradients, as in a training, the mode is the caller's."""
    torch.manual_seed(0)
    x, vae = torch.bernoulli(torch.rand(20, 1, 4, 4)), Normed()
    vae.walk(from_prior(), n=50)                                      # running statistics that are not a batch's
    ncp = NoiseContrastivePrior(vae, [NormedRatio()])
    def generator():
        return torch.Generator().manual_seed(0)
    def found():
        with torch.no_grad():
            values = [elbo(vae, x, generator()).elbo, iwae(vae, x, 3, generator=generator())]
        values += [torch.tensor(ncp.log_partition(50, generator()).value), ncp.sample(5, SIR(4), generator=generator()).latents[0]]
        values += [torch.tensor([report.loss for report in group_reports(ncp, x, 0)]),
                   torch.tensor([score.value for score in sir_ess(ncp, 5, 4, 0)])]
        scores, _ = compare(ncp, x, num_samples=2, log_z_samples=20, proposals=4, seed=0)
        return [*values, torch.tensor([scores.base.value, scores.ncp.value, scores.ncp_bound.value])]
    ncp.eval()
    right, state = found(), {name: value.clone() for name, value in ncp.state_dict().items() if "log_z" not in name}
    ncp.train(), vae.train()
    with pytest.warns(UserWarning, match="was in training mode: taken in eval mode"):
        again = found()
    assert all(torch.equal(a, b) for a, b in zip(right, again)) and vae.training and ncp.ratios[0].norm.training
    assert all(torch.equal(value, ncp.state_dict()[name]) for name, value in state.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(elbo(vae, x, generator()).elbo, right[0])
