"""SIR and its weights against laws that are known: by enumeration, by hand, and only then by statistics.

Exact tests come first. The statistical ones use fixed seeds, so they fail only when the code changes; on a fresh seed
a check at 5 standard errors fails by chance once in 1.7 million times and a p-value below 1e-6 once in a million, and
there are fewer than 30 of both kinds here: a family-wise false-alarm rate below 1e-4. Each has a broken twin, a sampler
or a law with one deliberate mistake, which the same check must reject."""
import weakref
from math import inf, isnan, log, nan, sqrt

import pytest
import torch
from exact import (TARGET, TILT_Z, AddedNoise, Function, P, R, chi_square_p, coins, errors, log_r, normal, outcomes, rng, sir_law,
                   tilt)
from torch.distributions import Independent, Normal

from ncp_vae.models.ratios import MLPRatio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.resampling import (BLOCK, SIR, default_chunk, Race, Sampler, effective_sample_size, k_hat_threshold, merge, one_a_group,
                                pareto_k_hat, proposals_of, _propose, race)
from ncp_vae.walk import seeded

# SIR, exactly

@pytest.mark.parametrize("M, law", [(1, (0.5, 0.3, 0.2)), (2, (0.3125, 0.37, 0.3175)), (4, (0.1879, 0.3746, 0.4375)),
                                    (8, (0.1337, 0.345, 0.5213))])
def test_the_law_that_the_others_lean_on(M, law):
    assert torch.allclose(sir_law(M), torch.tensor(law).double(), atol=5e-5)


@pytest.mark.parametrize("M", [1, 63, 64, 65, 500, 1000])
def test_chunks_do_not_change_the_result(M):
    results = [SIR(M, chunk).resample(tilt, normal(6, 2), rng(M)) for chunk in (1, 7, 64, 500, 5000, None)]
    for other in results[1:]:
        assert torch.equal(other.z, results[0].z)
        assert torch.allclose(other.ess, results[0].ess, rtol=1e-4)                       # float32, another order
        assert torch.allclose(other.log_mean_ratio, results[0].log_mean_ratio, atol=1e-5)


@pytest.mark.parametrize("chunk, fit, largest", [(500, 50, 28), (64, 63, 32), (500, 1, 1), (None, 300, 250)])
def test_a_chunk_that_does_not_fit_is_halved_and_the_draws_are_the_same(chunk, fit, largest):
    "With one warning that names both sizes; the later chunks and groups of the pass begin with the smaller one."
    asked = []
    def small(z):
        asked.append(len(z))
        if len(z) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tilt(z)
    expected = SIR(1000, chunk).resample(tilt, normal(6, 2), rng(0))
    with pytest.warns(UserWarning, match=f"out of memory with {chunk or 10922} proposals for each of 6 rows at once: goes on with {largest}, "
                      f"and the draws are the same. SIR.*chunk={largest}") as caught:
        found = SIR(1000, chunk).resample(small, normal(6, 2), rng(0))
    assert len(caught) == 1 and max(rows for rows in asked if rows <= fit) == largest
    assert sum(rows for rows in asked if rows <= fit) == 1000 and sum(rows > fit for rows in asked) < 10
    for one, other in zip((found.z, found.ess, found.log_mean_ratio), (expected.z, expected.ess, expected.log_mean_ratio)):
        assert torch.equal(one, other)


def test_a_single_proposal_that_does_not_fit_is_an_error():
    def none(z):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        SIR(100).draw(none, normal(6, 2))


def test_the_memory_of_a_failed_attempt_is_free_before_the_next():
    held = []
    def ratio(z):
        assert all(each() is None for each in held)
        large = torch.zeros(len(z))
        held.append(weakref.ref(large))
        if len(z) > 50:
            raise torch.OutOfMemoryError(f"{len(large)}")
        return tilt(z)
    with pytest.warns(UserWarning, match="out of memory"):
        SIR(100).draw(ratio, normal(6, 2))


def test_streaming_is_one_argmax_over_all_proposals():
    M, rows = 777, 9
    with seeded(rng(3)):
        z, keys = map(torch.cat, zip(*_propose(normal(rows, 2), M, 64)))
    log_w = tilt(z)
    best = (log_w + keys).argmax(0)
    result = SIR(M, chunk=100).resample(tilt, normal(rows, 2), rng(3))
    assert torch.equal(result.z, z[best, torch.arange(rows)])
    assert torch.allclose(result.ess, effective_sample_size(log_w, 0), rtol=1e-4)
    assert torch.allclose(result.log_mean_ratio, log_w.logsumexp(0) - log(M), atol=1e-5)


def test_races_merge_in_any_order():
    z, log_w, keys = torch.randn(300, 4, 2, generator=rng()), *torch.randn(2, 300, 4, generator=rng(1))
    log_w[:100, 0] = -inf                                                 # a chunk in which a row has no weight at all
    parts = [race(z[i], log_w[i], keys[i]) for i in (slice(100), slice(100, 130), slice(130, 300))]
    at_once = race(z, log_w, keys)
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for merged in (merge(merge(parts[a], parts[b]), parts[c]), merge(parts[a], merge(parts[b], parts[c]))):
            assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(merged, at_once))


@pytest.mark.parametrize("M, chunk", [(100, 7), (1000, 300), (64, 64), (5, None)])
def test_each_proposal_is_evaluated_once_and_few_at_a_time(M, chunk):
    sizes = []
    SIR(M, chunk).draw(lambda z: sizes.append(len(z)) or tilt(z), normal(3, 2), rng())
    assert sum(sizes) == M and max(sizes) <= (chunk or M)


def test_a_gpu_is_given_thousands_of_rows():
    "On a processor as many latents of 20 x 32 x 32 as its cache holds; elsewhere 6,553 rows of all images together, 65,536 small ones."
    cpu, there = torch.device("cpu"), torch.device("cuda")
    large, small = normal(100, 20 * 32 * 32), normal(4, 2)
    assert [default_chunk(prior, device) for prior in (large, small) for device in (cpu, there)] == [1, 65, 16384, 16384]
    assert default_chunk(normal(1, 20 * 8 * 8), there) == 65536


@pytest.mark.parametrize("M", [640, 6400])
def test_memory_does_not_grow_with_the_number_of_proposals(M):
    alive, most = weakref.WeakSet(), 0

    class Watched(torch.Tensor):
        pass

    class Watching(Independent):
        def rsample(self, shape=torch.Size()):
            z = super().rsample(shape).as_subclass(Watched)
            alive.add(z)
            return z

    def log_ratio(z):
        nonlocal most
        most = max(most, len(alive))
        return tilt(z.as_subclass(torch.Tensor))
    SIR(M, chunk=2 * BLOCK).draw(log_ratio, Watching(Normal(torch.zeros(3, 2), 1.0), 1), rng())
    assert 1 <= most <= 4                                       # this chunk's blocks, and at most those of one before


def test_weights_of_zero_are_never_chosen():
    z = SIR(400).draw(lambda z: torch.where(z[..., 0] > 1.5, 0.0, -inf), normal(500, 1), rng())
    assert (z > 1.5).all()


@pytest.mark.parametrize("log_ratio, message", [
    (lambda z: torch.full(z.shape[:-1], -inf), "weight zero"),
    (lambda z: torch.where(z[..., 0] > 2, nan, 0.0), "NaN"),
    (lambda z: torch.where(z[..., 0] > 2, inf, 0.0), "inf"),
    (lambda z: z[..., :1], "must map"),
    (lambda z: z.sum(), "must map")])
def test_broken_ratios_are_errors(log_ratio, message):
    with pytest.raises(ValueError, match=message):
        SIR(200).draw(log_ratio, normal(5, 2), rng())


def test_a_row_without_any_weight_is_an_error_though_others_have_some():
    def one_row_only(z):
        return torch.tensor([0.0, -inf]).expand(z.shape[:-1])
    with pytest.raises(ValueError, match="weight zero"):
        SIR(10).draw(one_row_only, normal(2, 1))
    end = SIR(10).stream(one_row_only, normal(2, 1))                      # who can do with such rows is let through
    assert isinstance(end, Race) and end.log_sum.isneginf().tolist() == [False, True]


def test_a_prior_without_independent_is_refused():
    with pytest.raises(ValueError, match="batch"):
        SIR(70).draw(tilt, Normal(torch.zeros(4, 4), 1.0))               # batch [4, 4], event []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_log_weights_and_keys_are_at_least_float32(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        (z, keys), = _propose(normal(3, 2, dtype=dtype), 10, 64)
        result = SIR(10).resample(tilt, normal(3, 2, dtype=dtype))
    finally:
        torch.set_default_dtype(before)
    wide = torch.promote_types(dtype, torch.float32)
    assert keys.dtype == torch.float32 and result.z.dtype == dtype == z.dtype
    assert result.ess.dtype == result.log_mean_ratio.dtype == wide


@pytest.mark.parametrize("make, value", [
    (lambda: SIR(0), "0"), (lambda: SIR(-3), "-3"), (lambda: SIR(2.5), "2.5"), (lambda: SIR([4, 0]), "0"),
    (lambda: SIR(True), "True"), (lambda: SIR("5"), "'5'"), (lambda: SIR((4, 1.0)), "1.0"),
    (lambda: SIR(5, chunk=0), "0"), (lambda: SIR(5, chunk=2.0), "2.0")])
def test_settings_are_checked_and_named(make, value):
    with pytest.raises(ValueError, match=f"got {value}$"):
        make()


def test_proposals_are_one_number_or_one_a_group():
    assert proposals_of("it", torch.tensor(5)) == 5 and proposals_of("it", (3, torch.tensor(4))) == [3, 4]
    assert one_a_group("it", 5, 3) == [5, 5, 5] and one_a_group("it", [1, 2], 2) == [1, 2]
    for groups in (1, 3):
        with pytest.raises(ValueError, match=f"it: 2 budgets for {groups}"):
            one_a_group("it", [1, 2], groups)


def test_randomness_comes_from_the_generator_alone():
    sampler = SIR(70)
    torch.manual_seed(1)
    before, g = torch.get_rng_state(), rng(7)
    first, second = sampler.draw(tilt, normal(4, 2), g), sampler.draw(tilt, normal(4, 2), g)
    assert torch.equal(before, torch.get_rng_state())                               # the global state is untouched
    assert torch.equal(first, sampler.draw(tilt, normal(4, 2), rng(7))) and not torch.equal(first, second)
    unseeded = sampler.draw(tilt, normal(4, 2))
    torch.manual_seed(1)
    assert torch.equal(unseeded, sampler.draw(tilt, normal(4, 2)))
    assert first.shape == (4, 2) and first.dtype == torch.float32 and not first.requires_grad


@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)])
def test_events_of_any_shape(event):
    def log_ratio(z):
        return z if not event else z.flatten(-len(event)).sum(-1)
    assert SIR(70).draw(log_ratio, normal(4, *event), rng()).shape == (4, *event)


# SIR, by statistics

@pytest.mark.parametrize("M", [1, 2, 3, 5])
def test_sir_has_its_finite_law(M):
    picks = SIR(M, chunk=2).draw(log_r, outcomes(50_000), rng(M))
    assert chi_square_p(picks, sir_law(M)) > 1e-6
    assert chi_square_p(picks, TARGET) < 1e-6             # broken: the limit instead of the law of M
    assert chi_square_p(picks, sir_law(M + 1)) < 1e-6                    # broken: off by one
    assert chi_square_p(picks, sir_law(M, r=R.sqrt())) < 1e-6 or M == 1  # broken: weights at half the log ratio


def test_a_constant_ratio_gives_the_base():
    picks = SIR(5).draw(lambda z: torch.full(z.shape, 300.0), outcomes(50_000), rng())
    assert chi_square_p(picks, P) > 1e-6 and chi_square_p(picks, sir_law(2)) < 1e-6


def test_tied_weights_are_picked_uniformly():
    z, log_w = torch.arange(8).expand(50_000, 8).T, torch.zeros(8, 50_000)
    with seeded(rng()):
        keys = next(_propose(outcomes(50_000), 8, 64))[1]
    picks = race(z, log_w, keys).z
    assert chi_square_p(picks, torch.full((8,), 1 / 8).double()) > 1e-6
    coarse = -torch.rand(8, 50_000, generator=rng()).mul(4).ceil().log()       # broken: keys of 4 values
    assert chi_square_p(race(z, log_w, coarse).z, torch.full((8,), 1 / 8).double()) < 1e-6


def test_the_mean_ratio_is_unbiased():
    estimates = SIR(50).resample(tilt, normal(20_000, 1), rng()).log_mean_ratio.exp()
    error = estimates.std() / sqrt(len(estimates))
    assert abs(estimates.mean() - TILT_Z) < 5 * error
    assert abs(estimates.mean() * 50 / 49 - TILT_Z) > 5 * error                           # broken: M - 1 in the mean


# groups

@pytest.mark.parametrize("budgets", [3, [3, 3], [1, 4], (4, 1)])
def test_groups_are_drawn_one_after_the_other(budgets):
    z1, z2 = SIR(budgets).sample(coins((1.0, 3.0)), 50_000, generator=rng()).latents
    first, second = (3, 3) if budgets == 3 else budgets
    half = torch.full((2,), 0.5, dtype=torch.float64)

    def law(first, second):
        law1 = sir_law(first, half, torch.tensor([1.0, 3.0]).double())
        return law1[:, None] * torch.stack([half, sir_law(second, half, torch.tensor([4.0, 2.0]).double())])
    picks = 2 * z1 + z2
    assert chi_square_p(picks, law(first, second).flatten()) > 1e-6
    other = law(first, second).sum(1, keepdim=True) * torch.stack([
        sir_law(second, half, torch.tensor([4.0, 2.0]).double()), half])
    assert chi_square_p(picks, other.flatten()) < 1e-6 or second == 1                # broken: the other context
    assert chi_square_p(picks, law(second, first).flatten()) < 1e-6 or first == second      # broken: exchanged


def test_budgets_must_fit_the_groups():
    with pytest.raises(ValueError, match="3 budgets for 2"):
        SIR([1, 2, 3]).sample(coins((1.0, 3.0)), 5)
    with pytest.raises(ValueError, match="for_group"):
        SIR([1, 2]).draw(log_r, outcomes(5))


def test_sample_works_on_a_network_and_leaves_it_alone():
    network = MLPRatio(2, hidden=(8,))
    trace = SIR(70).sample(NoiseContrastivePrior(AddedNoise(2), [network]), 4, generator=rng())
    assert trace.latents[0].shape == (4, 2) and not trace.latents[0].requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_sample_scales_the_base_prior():
    flat = NoiseContrastivePrior(AddedNoise(1), [Function(lambda z: 0 * z[..., 0])])
    z = SIR(5).sample(flat, 5000, temperature=0.5, generator=rng()).latents[0]
    assert errors(z, 0.0, 0.25) < 5 < errors(z, 0.0, 1.0)                             # broken: no temperature


def test_a_sampler_must_define_draw():
    with pytest.raises(NotImplementedError, match="Sampler"):
        Sampler().draw(tilt, normal(1, 1))


# what the weights say

@pytest.mark.parametrize("rate", [1.25, 2.0, 4.0])
def test_k_hat_of_exponentials_is_known(rate):
    "Target Exp(1), proposal Exp(rate): k = 1 - 1 / rate. The standard error of a mean of 20 is about 0.02."
    def k_hat(of, seed):
        z = torch.empty(20_000, dtype=torch.float64).exponential_(of, generator=rng(seed))
        return pareto_k_hat((of - 1) * z + 17.0)                          # a constant does no harm
    mean = torch.tensor([k_hat(rate, seed) for seed in range(20)]).mean()
    broken = torch.tensor([k_hat(2 * rate, seed) for seed in range(20)]).mean()
    assert abs(mean - (1 - 1 / rate)) < 0.1 < abs(broken - (1 - 1 / rate))


def test_k_hat_is_about_the_tail_that_the_draws_have_reached():
    "Log-normal weights have all moments (k = 0), yet k-hat stands above 1, and falls as more draws reach further."
    def k_hat(S):
        values = torch.tensor([pareto_k_hat(6.3 * torch.randn(S, generator=rng(seed))) for seed in range(20)])
        return values.mean().item(), values.std().item() / sqrt(20)
    (few, few_error), (many, many_error) = k_hat(500), k_hat(50_000)
    assert few - 5 * few_error > 1 > k_hat_threshold(500)
    assert few - many > 4 * sqrt(few_error**2 + many_error**2) and many > 0


def test_k_hat_at_its_ends():
    g = rng()
    assert isnan(pareto_k_hat(torch.randn(24, generator=g))) and not isnan(pareto_k_hat(torch.randn(25, generator=g)))
    assert isnan(pareto_k_hat(torch.zeros(1000)))
    assert pareto_k_hat(1e4 * torch.randn(1000, generator=g)) == inf      # one weight has everything
    one_winner = torch.randn(100, generator=g)
    one_winner[3] = 1000.0
    assert pareto_k_hat(one_winner) == inf
    holes = torch.randn(1000, generator=g)
    holes[::2] = -inf
    assert abs(pareto_k_hat(holes)) < 1


def test_k_hat_of_weights_with_a_gradient_and_in_any_order():
    log_w = torch.randn(1000, generator=rng())
    shuffled = log_w[torch.randperm(1000, generator=rng(1))].requires_grad_()
    assert pareto_k_hat(shuffled) == pareto_k_hat(log_w)


@pytest.mark.parametrize("S, threshold", [(10, 0.0), (100, 0.5), (500, 0.6295), (1000, 2 / 3), (2154, 0.7), (2155, 0.7),
                                          (10**9, 0.7)])
def test_the_threshold_of_k_hat(S, threshold):
    assert abs(k_hat_threshold(S) - threshold) < 5e-5


def test_effective_sample_size():
    assert torch.allclose(effective_sample_size(torch.full((3, 10), 500.0), 1), torch.full((3,), 10.0))
    assert effective_sample_size(torch.tensor([0.0, -inf, -inf]), 0) == 1
    assert abs(effective_sample_size(torch.tensor([1.0, 3.0]).log(), 0) - 1.6) < 1e-6
