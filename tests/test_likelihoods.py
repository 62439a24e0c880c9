"""p(x | z): probabilities that add up, samples that follow them, temperatures the right way round, and images refused."""
from math import log, sqrt

import pytest
import torch
from torch.distributions import Poisson

from ncp_vae.bound import _check_support, elbo
from ncp_vae.models.likelihoods import (DiscretisedLogistics, bernoulli, discretised_logistics, _log_mass, normal,
                                        tempered_likelihood)
from ncp_vae.walk import FlatVAE, diagonal_normal


def all_images(bits, colours):
    "Every image of one pixel: [n, 1, colours, 1, 1]."
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    return torch.cartesian_prod(*[levels] * colours).reshape(-1, 1, colours, 1, 1)


def one_pixel(colours, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(1, 5, {1: 3, 3: 10}[colours], 1, 1, dtype=dtype)


@pytest.mark.parametrize("bits, colours", [(1, 1), (5, 1), (8, 1), (1, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_mass_of_all_images_is_one(bits, colours, scale):
    mass = discretised_logistics(one_pixel(colours, scale), bits).log_prob(all_images(bits, colours)).exp()
    assert (mass >= 0).all() and abs(mass.sum().item() - 1) < 1e-9


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_the_mass_is_still_one_at_a_temperature(temperature):
    tempered = tempered_likelihood(discretised_logistics(one_pixel(3), 3), temperature)
    assert abs(tempered.log_prob(all_images(3, 3)).exp().sum().item() - 1) < 1e-9


def test_a_mass_is_a_difference_of_sigmoids():
    y = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    location, log_scale = torch.tensor(-0.3, dtype=torch.float64), torch.tensor(-2.5, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-torch.inf]), y[:-1] + 1 / 255, torch.tensor([torch.inf])]).double()
    exact = ((edges - location) / log_scale.exp()).sigmoid().diff()
    assert torch.allclose(_log_mass(y, location, log_scale, 8).exp(), exact, atol=1e-13)


@pytest.mark.parametrize("log_scale", [-1e30, -40.0, -7.0, 0.0, 15.0, 90.0, 104.0, 1e30])
def test_log_prob_and_its_gradient_are_finite_in_the_tails(log_scale):
    parameters = torch.tensor([0.0, 4.9, log_scale]).view(1, 1, 3, 1, 1).requires_grad_()
    value = discretised_logistics(parameters).log_prob(torch.full((1, 1, 1, 1), 17 / 255))
    value.sum().backward()
    assert value.isfinite().all() and parameters.grad.isfinite().all()


@pytest.mark.parametrize("centre, spread", [(0.0, 1.0), (0.9, 0.3)])
def test_the_mean_in_colour_at_eight_bits_is_that_of_samples(centre, spread):
    """Four pixels, 100,000 samples: within 6 standard errors and one level of 256, which is what its quadrature may miss. The
    second case is near white. The broken twin forgets that green and blue move with the colours before."""
    raw = torch.randn(1, 3, 10, 1, 4)
    raw[:, :, 1:4] = centre + spread * raw[:, :, 1:4]
    raw[:, :, 4:7] -= 2
    law = discretised_logistics(raw)
    draws = law.sample((100_000,))
    error = 6 * draws.std(0) / len(draws) ** 0.5 + 1 / 255
    assert ((law.mean - draws.mean(0)).abs() < error).all()
    apart = DiscretisedLogistics(law.logits, law.locations, law.log_scales, 0 * law.coefficients, 8)
    assert ((apart.mean - draws.mean(0)).abs() > error).any()


def test_the_mean_of_many_images_is_the_mean_of_each():
    "They go through in parts."
    raw = torch.randn(7, 5, 10, 32, 32)
    together, alone = discretised_logistics(raw).mean, discretised_logistics(raw[5:6]).mean
    assert together.shape == (7, 3, 32, 32) and torch.equal(together[5:6], alone)


@pytest.mark.parametrize("colours, bits", [(1, 4), (3, 2)])
def test_samples_follow_the_mass(colours, bits):
    """Chi-square of 20,000 draws. The threshold, mean + 6 standard deviations, is passed by a right sampler less than once in
    100,000 seeds; the broken twin draws its colours, or its levels, a step too high."""
    likelihood, values = discretised_logistics(one_pixel(colours), bits), all_images(bits, colours)
    probabilities, top = likelihood.log_prob(values).exp().flatten(), 2**bits - 1
    place = (2**bits) ** torch.arange(colours - 1, -1, -1)
    def chi_square(draws):
        counts = torch.bincount((draws.flatten(1) * top).round().long() @ place, minlength=len(probabilities))
        return ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum().item()
    draws, freedom = likelihood.sample((20_000,))[:, 0], len(probabilities) - 1
    limit = freedom + 6 * sqrt(2 * freedom)
    assert chi_square(draws) < limit < chi_square((draws + 1 / top).clamp(max=1))


def test_samples_lie_on_the_grid_and_have_the_shape_of_an_image():
    likelihood = discretised_logistics(torch.randn(2, 4, 10, 5, 5), 5)
    assert likelihood.sample((3,)).shape == (3, 2, 3, 5, 5) and likelihood.mean.shape == (2, 3, 5, 5)
    _check_support(likelihood, likelihood.sample())


def test_the_mean_is_the_samples_mean():
    "Within half a step of the grid, the bound on what rounding changes, and 6 standard errors of 4,000 draws."
    likelihood = discretised_logistics(one_pixel(1).expand(1, 5, 3, 4, 4).clone().normal_(), 5)
    draws = likelihood.sample((4000,))
    assert ((draws.mean(0) - likelihood.mean).abs() < 0.5 / 31 + 6 * draws.std(0) / sqrt(4000)).all()


def test_green_and_blue_depend_on_the_colours_before():
    zeros = torch.zeros(1, 1, 3, 1, 1)
    apart = DiscretisedLogistics(torch.zeros(1, 1, 1, 1), zeros, zeros - 3, zeros, 8)
    tied = DiscretisedLogistics(torch.zeros(1, 1, 1, 1), zeros, zeros - 3, zeros + 0.9, 8)
    def correlation(likelihood):
        return torch.corrcoef(likelihood.sample((2000,)).flatten(1).T)[0, 1].item()
    assert abs(correlation(apart)) < 6 / sqrt(2000) and correlation(tied) > 0.5


THREE = dict(bernoulli=lambda: bernoulli(torch.randn(1, 1, 6, 6)), normal=lambda: normal(torch.zeros(1, 1, 6, 6), torch.full((1, 1, 6, 6), 0.1)),
             logistics=lambda: discretised_logistics(torch.randn(1, 4, 10, 6, 6)))


@pytest.mark.parametrize("name", THREE)
def test_colder_is_less_noisy(name):
    "Standard deviations over 1,000 draws, averaged over 36 pixels and more: known to a per cent, and at least 5 % apart."
    likelihood = THREE[name]()
    noise = [tempered_likelihood(likelihood, t).sample((1000,)).std(0).mean().item() for t in (0.1, 0.4, 1.0, 2.5)]
    assert all(colder < 0.97 * hotter for colder, hotter in zip(noise, noise[1:]))


@pytest.mark.parametrize("name", THREE)
def test_temperature_one_changes_nothing_and_no_temperature_changes_a_shape(name):
    likelihood = THREE[name]()
    assert tempered_likelihood(likelihood, 1.0) is likelihood
    cold = tempered_likelihood(likelihood, 0.5)
    assert (cold.batch_shape, cold.event_shape) == (likelihood.batch_shape, likelihood.event_shape)
    with pytest.raises(ValueError, match="positive, got 0"):
        tempered_likelihood(likelihood, 0)


def test_a_temperature_for_another_likelihood():
    with pytest.raises(TypeError, match="Poisson"):
        tempered_likelihood(Poisson(torch.ones(2)), 0.5)


def test_a_normal_with_a_sigma_for_each_pixel():
    mean, sigma, x = torch.zeros(2, 1, 3, 3), torch.rand(2, 1, 3, 3) + 0.1, torch.randn(2, 1, 3, 3)
    by_hand = -(x / sigma).square().sum((1, 2, 3)) / 2 - sigma.log().sum((1, 2, 3)) - 4.5 * log(2 * torch.pi)
    assert torch.allclose(normal(mean, sigma).log_prob(x), by_hand, atol=1e-4)


@pytest.mark.parametrize("shape, bits, words", [((1, 2, 7, 4, 4), 8, "3 or 10"), ((1, 30, 4, 4), 8, "3 or 10"),
                                                ((1, 2, 3, 4, 4), 0, "1 to 8"), ((1, 2, 3, 4, 4), 16, "1 to 8")])
def test_parameters_that_are_no_mixture(shape, bits, words):
    with pytest.raises(ValueError, match=words):
        discretised_logistics(torch.zeros(shape), bits)


class Painter(FlatVAE):
    """Two latents, images of 4x4 bytes."""
    def __init__(self):
        super().__init__(2)
        self.weight = torch.nn.Parameter(torch.zeros(5, 3, 1, 1))

    def posterior(self, x):
        return diagonal_normal(x.flatten(1)[:, :2], torch.ones(len(x), 2))

    def likelihood(self, z):
        return discretised_logistics(self.weight.expand(len(z), 5, 3, 4, 4))


def test_images_off_the_grid_are_refused_by_the_bound():
    bytes_ = torch.randint(0, 256, (8, 1, 4, 4)) / 255
    assert elbo(Painter(), bytes_).elbo.isfinite().all()
    for wrong in (bytes_ + 0.5 / 255, torch.rand(8, 1, 4, 4), bytes_ * 255, torch.full((8, 1, 4, 4), torch.nan)):
        with pytest.raises(ValueError, match="j/255"):
            elbo(Painter(), wrong)
