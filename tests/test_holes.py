"""The aggregate posterior and the measures of a hole, against brute force, closed forms and their own nulls."""

import math
import warnings

import pytest
import torch
from exact import AddedNoise, rng
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ncp_vae import holes
from ncp_vae.holes import (AggregatePosterior, c2st, hole_mass, mmd2, mmd_p_value, _rbf,
                           scored_prior_draws)
from ncp_vae.walk import diagonal_normal


def spread(event):
    "q(z | x) = N(x, s(x)^2), s(x) = 0.3 + |x| / 3, for x of any shape."
    return AddedNoise(event, posterior=lambda x: diagonal_normal(x, 0.3 + x.abs() / 3))


def mixture(x):
    parts = Independent(Normal(x, 0.3 + x.abs() / 3), x.dim() - 1)
    return MixtureSameFamily(Categorical(torch.ones(len(x))), parts)


@pytest.mark.parametrize("event", [(1,), (3,), (2, 2, 3)])
def test_density_is_torchs_mixture(event):
    x, z = torch.randn(17, *event, generator=rng(0)), torch.randn(23, *event, generator=rng(1))
    assert torch.allclose(AggregatePosterior(spread(event), x).log_prob(z), mixture(x).log_prob(z), atol=1e-4)


def test_pieces_do_not_change_the_density_or_the_law(monkeypatch):
    x, z = torch.randn(17, 2, generator=rng(0)), torch.randn(23, 2, generator=rng(1))
    whole = AggregatePosterior(spread(2), x)
    monkeypatch.setattr(holes, "_PIECE", 5)
    monkeypatch.setattr(holes, "_ELEMENTS", 40)
    parts = AggregatePosterior(spread(2), x)
    assert [q.batch_shape[0] for q in parts.posteriors] == [5, 5, 5, 2]
    assert torch.allclose(whole.log_prob(z), parts.log_prob(z), atol=1e-5)
    assert len(parts.sample(101, rng(0))) == 101 and len(parts.sample(1, rng(0))) == 1


def test_gradient_reaches_z():
    x, z = torch.randn(5, 1, generator=rng(0)), torch.randn(4, 1, generator=rng(1)).requires_grad_()
    AggregatePosterior(spread(1), x).score(z).sum().backward()
    by_hand = z.detach().clone().requires_grad_()
    (mixture(x).log_prob(by_hand) - Normal(0.0, 1.0).log_prob(by_hand[:, 0])).sum().backward()
    assert torch.allclose(z.grad, by_hand.grad, atol=1e-4)


def test_each_image_is_drawn_equally_often_and_rows_are_exchangeable():
    "Posteriors too narrow to be confused: counts by image against the multinomial, 5 standard errors each."
    x = torch.arange(4.0)[:, None] * 100
    vae = spread(1)
    vae.posterior = lambda x: diagonal_normal(x, torch.ones_like(x))
    draws = AggregatePosterior(vae, x).sample(8000, rng(0))[:, 0]
    image = (draws / 100).round()
    for rows in (image, image[:4000], image[4000:]):     # the halves too: order must not tell the image
        counts = torch.stack([(rows == k).sum() for k in range(4)])
        assert ((counts - len(rows) / 4).abs() < 5 * (len(rows) * 3 / 16) ** 0.5).all()
    residual = draws - image * 100
    assert abs(residual.mean()) < 5 / 8000**0.5
    assert abs(residual.square().mean() - 1) < 5 * (2 / 8000) ** 0.5


def test_generator_fixes_the_draws():
    q = AggregatePosterior(spread(2), torch.randn(9, 2, generator=rng(0)))
    assert torch.equal(q.sample(50, rng(3)), q.sample(50, rng(3)))
    assert not torch.equal(q.sample(50, rng(3)), q.sample(50, rng(4)))
    state = torch.get_rng_state()
    q.sample(5, rng(0)), scored_prior_draws(q, 5, rng(0))
    assert torch.equal(state, torch.get_rng_state())


def test_a_hierarchy_and_an_empty_set_are_refused():
    two = spread(1)
    two.latent_shapes = two.latent_shapes * 2
    with pytest.raises(ValueError, match="2 latent groups"):
        AggregatePosterior(two, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one image"):
        AggregatePosterior(spread(1), torch.zeros(0, 1))


def test_the_vae_is_put_in_eval_mode():
    vae = spread(1).train()
    AggregatePosterior(vae, torch.zeros(3, 1))
    assert not vae.training


def test_scored_prior_draws_are_sorted_and_scored():
    q = AggregatePosterior(spread(2), torch.randn(9, 2, generator=rng(0)))
    z, scores = scored_prior_draws(q, 300, rng(1))
    assert (scores.diff() >= 0).all() and torch.allclose(q.score(z), scores, atol=1e-5)
    radius = z.square().sum(1)                            # chi-square with 2 degrees of freedom
    assert abs(radius.mean() - 2) < 5 * (4 / 300) ** 0.5


def shifted(shift, n=100):
    "q(z) = N(shift, 1), of n equal images: s(z) = shift z - shift^2 / 2."
    vae = spread(1)
    vae.posterior = lambda x: diagonal_normal(x, torch.ones_like(x))
    return AggregatePosterior(vae, torch.full((n, 1), shift))


def test_hole_mass_counts_and_knows_that_zero_hits_is_not_certainty(monkeypatch):
    q, scores = shifted(1.0), torch.tensor([-5.0, -2.0, -1.0, 0.0])
    monkeypatch.setattr(q, "score", lambda z: z)
    monkeypatch.setattr(holes, "_warn_if_shallow", lambda q, threshold: None)
    assert hole_mass(q, scores, 2.0).value == 0.25           # strictly below -tau
    assert hole_mass(q, scores, 10.0).value == 0 and hole_mass(q, scores, 10.0).std_error > 0.1


@pytest.mark.parametrize("shift", [-2.0, 0.3, 1.0])
def test_hole_mass_of_a_shifted_normal(shift):
    "s(z) = shift z - shift^2 / 2, so h_tau is a Normal probability. 9 numbers, 5 standard errors each."
    q = shifted(shift)
    z, _ = scored_prior_draws(q, 10_000, rng(0))
    for tau in (0.0, 0.5, 2.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")                # this q is exact
            mass = hole_mass(q, z, tau)
        truth = Normal(0.0, 1.0).cdf(torch.tensor((shift**2 / 2 - tau) / abs(shift))).item()
        assert abs(mass.value - truth) < 5 * mass.std_error


def noisy_copies(n, dims):
    "x = z + eps / 2 with its exact posterior, n images of its own: q = p, but for n."
    vae = spread(dims)
    vae.posterior = lambda x: diagonal_normal(0.8 * x, torch.full_like(x, 0.2**0.5))
    return AggregatePosterior(vae, 1.25**0.5 * torch.randn(n, dims, generator=rng(0)))


@pytest.mark.parametrize("n, dims, told", [(1000, 2, False), (100, 8, True), (3000, 8, True), (1000, 16, True)])
def test_holes_of_a_few_images_in_many_dimensions_are_told(n, dims, told):
    """q = p, so that all of the mass is the mixture's own. It is small where there is no warning, and where there is one
    it has the numbers; a draw of the caller's random numbers is not taken."""
    q, z, state = noisy_copies(n, dims), torch.randn(1000, dims, generator=rng(1)), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mass = hole_mass(q, z, 2.0)
    assert len(caught) == told and (mass.value > 0.05) == told and torch.equal(state, torch.get_rng_state())
    if told:
        assert f"N = {n:,} images in {dims} dimensions" in str(caught[0].message) and caught[0].filename == __file__


def test_a_draw_is_scored_without_the_image_that_it_came_from(monkeypatch):
    "Against the sum written out, in pieces of every size."
    x, z = torch.randn(17, 2, generator=rng(0)), torch.randn(17, 2, generator=rng(1))
    out = torch.randperm(17, generator=rng(2))
    table = Independent(Normal(x, 0.3 + x.abs() / 3), 1).log_prob(z[:, None])
    wanted = table.scatter(1, out[:, None], -math.inf).logsumexp(1)
    monkeypatch.setattr(holes, "_PIECE", 5)
    monkeypatch.setattr(holes, "_ELEMENTS", 40)
    found = holes.log_sum_of_densities(AggregatePosterior(spread(2), x).posteriors, z, out)
    assert torch.allclose(found, wanted, atol=1e-5)


def brute_mmd2(x, y, bandwidths):
    k = _rbf(torch.cat([x, y]), torch.cat([x, y]), bandwidths)
    n = len(x)
    pairs = lambda block: (block.sum() - block.trace()) / (len(block) * (len(block) - 1))
    return (pairs(k[:n, :n]) + pairs(k[n:, n:]) - 2 * k[:n, n:].mean()).item()


def test_mmd2_is_the_u_statistic_in_any_block_size(monkeypatch):
    x = torch.randn(31, 3, generator=rng(0)).double()
    y = 1 + torch.randn(47, 3, generator=rng(1)).double()
    truth = brute_mmd2(x, y, [0.5, 2.0])
    assert math.isclose(mmd2(x, y, [0.5, 2.0]), truth, rel_tol=1e-10)
    monkeypatch.setattr(holes, "_ELEMENTS", 100)
    assert math.isclose(mmd2(x, y, [0.5, 2.0]), truth, rel_tol=1e-10)
    assert math.isclose(mmd2(x, y), brute_mmd2(x, y, [torch.pdist(torch.cat([x, y])).median().item()]))


def test_mmd2_takes_events_of_any_shape_and_is_symmetric():
    x, y = torch.randn(20, 2, 2, 3, generator=rng(0)), torch.randn(30, 2, 2, 3, generator=rng(1))
    assert mmd2(x, y, [1.0]) == mmd2(x.flatten(1), y.flatten(1), [1.0])
    assert math.isclose(mmd2(x, y, [1.0]), mmd2(y, x, [1.0]), abs_tol=1e-12)


def test_mmd2_is_unbiased_and_a_biased_one_would_be_seen():
    "Equal laws: the mean over 500 samples within 5 standard errors of 0; the V-statistic (negative control) is not."
    noise = torch.randn(500, 2, 20, 2, generator=rng(0)).double()
    values = torch.tensor([mmd2(x, y, [1.0]) for x, y in noise])
    biased = torch.tensor([(_rbf(x, x, [1.0]).mean() + _rbf(y, y, [1.0]).mean() - 2 * _rbf(x, y, [1.0]).mean())
                           for x, y in noise])
    error = values.std() / 500**0.5
    assert values.mean().abs() < 5 * error < biased.mean()


def test_p_values_are_valid_under_the_null_and_small_off_it():
    """400 p-values of equal laws: at levels 0.05, 0.2, 0.5 the rate is at most the level plus 5 binomial standard
    errors, and (the test is not dull) at least the level minus as much. Off the null the smallest p is reached."""
    noise = torch.randn(400, 2, 40, 2, generator=rng(0))
    p = torch.tensor([mmd_p_value(x, y, permutations=99, generator=rng(i)) for i, (x, y) in enumerate(noise)])
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level + 1e-9).double().mean() - level) < 5 * (level * (1 - level) / 400) ** 0.5
    x, y = noise[0]
    assert mmd_p_value(x, y + 2, permutations=99, generator=rng(0)) == pytest.approx(1 / 100)
    assert mmd_p_value(x, 0.2 * y, permutations=99, generator=rng(0)) == pytest.approx(1 / 100)


def test_p_value_of_identical_labels_is_one():
    "Every relabelling of equal rows gives the same value: ties count, so p = 1."
    x = torch.ones(5, 2)
    assert mmd_p_value(x, x, permutations=20, bandwidths=[1.0], generator=rng(0)) == 1.0


def test_c2st_guesses_under_the_null_and_sees_what_a_line_cannot():
    "20 null runs of 200 held-out rows: the mean within 5 standard errors. Then laws that differ in scale alone."
    noise = torch.randn(20, 2, 200, 2, generator=rng(0))
    tests = [c2st(x, y, rng(i)) for i, (x, y) in enumerate(noise)]
    assert tests[0].std_error == pytest.approx(0.5 / 200**0.5)
    mean = sum(test.value for test in tests) / 20
    assert abs(mean - 0.5) < 5 * tests[0].std_error / 20**0.5
    x, y = noise[0]
    test = c2st(x, 0.3 * y, rng(0))
    assert test.value > 0.5 + 5 * test.std_error
    assert c2st(x, 0.3 * y, rng(0)) == test


def test_c2st_works_where_gradients_are_off():
    with torch.no_grad():
        assert c2st(torch.zeros(8, 2), torch.ones(9, 2), rng(0)).value == 1.0


@pytest.mark.parametrize("function", [mmd2, mmd_p_value, c2st])
def test_bad_samples_are_named(function):
    good = torch.randn(10, 2, generator=rng(0))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        function(good, torch.zeros(10, 3))
    with pytest.raises(ValueError, match="got 10 and 1"):
        function(good, good[:1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        function(good, torch.full((10, 2), math.nan))


def test_bad_bandwidths_are_named():
    x = torch.randn(10, 2, generator=rng(0))
    with pytest.raises(ValueError, match="must be positive"):
        mmd2(x, x, [1.0, 0.0])
    with pytest.raises(ValueError, match="give bandwidths"):
        mmd2(torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="at least 4 rows"):
        c2st(x[:3], x)


def test_an_exact_encoder_of_the_models_own_data_leaves_no_hole():
    """x = z + eps / 2 with its exact posterior: E_q[s] is at most its finite-N value, far below what a shift of one half
    costs (0.125 nats): the negative control."""
    vae = spread(2)
    vae.posterior = lambda x: diagonal_normal(0.8 * x, torch.full_like(x, 0.2**0.5))
    x = 1.25**0.5 * torch.randn(4000, 2, generator=rng(0))
    q = AggregatePosterior(vae, x)
    assert q.score(q.sample(4000, rng(1))).mean().abs() < 0.05
    assert hole_mass(q, scored_prior_draws(q, 4000, rng(2))[0], 2.0).value < 0.005
    moved = AggregatePosterior(vae, x + 0.5 / 0.8)
    assert moved.score(moved.sample(4000, rng(1))).mean() > 0.2


# ---- on a GPU -------------------------------------------------------------------------------------------------------

def every_measure(device):
    "Each function of the module, on data of one device; lazily, by name."
    q = AggregatePosterior(spread(2).to(device), torch.randn(17, 2, device=device))
    x, y = torch.randn(12, 2, device=device), torch.randn(14, 2, device=device)
    return {"log_prob": lambda: q.log_prob(x), "score": lambda: q.score(x), "sample": lambda: q.sample(9),
            "scored_prior_draws": lambda: scored_prior_draws(q, 9)[1], "_rbf": lambda: _rbf(x, y, [1.0]),
            "hole_mass": lambda: hole_mass(q, x, 1.0), "mmd2": lambda: mmd2(x, y, [1.0]),
            "mmd_p_value": lambda: mmd_p_value(x, y, 9, [1.0]), "c2st": lambda: c2st(x, y)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_measure_runs_on_a_gpu():
    for name, measure in every_measure("cuda").items():
        value = measure()
        assert not isinstance(value, torch.Tensor) or value.device.type == "cuda", name
