"""log Z from both sides against values that are known: by identity, in closed form, and only then by statistics.

Seeds are fixed, so a failure means that the code has changed. On a fresh seed a score beyond 5 standard errors comes by
chance once in 1.7 million times; there are about 20 of them. Where a reported error is held against a spread over repeats,
the tolerance is said beside it. The broken twins must fail the same check."""
import json
import re
from collections import Counter
from math import inf, isinf, isnan, log, nan, sqrt
from pathlib import Path

import pytest
import torch
from exact import SLOPE, WIDTH, AddedNoise, Function, Ladder, Rung, rng, two_coins, z_scores
from torch.distributions import Normal

from ncp_vae import partition, sampling
from ncp_vae.chains import evaluate, _leapfrog
from ncp_vae.hierarchy import SMC, NoiseWalk
from ncp_vae.partition import AIS, Bridge, ReverseAIS, _at_power, bridge, _posterior_walks
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.walk import diagonal_normal

ROOT = Path(__file__).resolve().parents[1]
LOG_Z = 1.5
IMAGES = torch.zeros(30, 1)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    "These models are tiny: more walks at a time than the library dares, which is faster."
    monkeypatch.setattr(partition, "PIECE", 50_000)


def ladder(groups=3, d=1, level=LOG_Z, **kind):
    "Rungs 0.8 sigma above the slope, of deviation 0.8 sigma, sigma that of the prior; the posterior is their law."
    widths = [0.8] + [0.8 * WIDTH] * (groups - 1)
    ratios = [Rung(width, width, level=0.0 if k else level, **kind) for k, width in enumerate(widths)]
    return NoiseContrastivePrior(Ladder(groups, (d,), ratios), ratios)


def flat(event, ratio):
    "An NCP of one group of any event; its posterior is N(0.5, 0.7^2) for every image."
    def posterior(x):
        return diagonal_normal(torch.full((len(x), *event), 0.5), torch.full((len(x), *event), 0.7))
    return NoiseContrastivePrior(AddedNoise(event, posterior=posterior), [Function(ratio)])


def score(log_ratio):
    "By how many standard errors the mean of exp(log_ratio) over independent rows is off 1."
    return z_scores(log_ratio.exp(), 1).item()


# ---- AIS, forward and backward ------------------------------------------------------------------------------------------

class NoTest(AIS):
    "Broken: Langevin steps, which leave another law as it is."
    def move(self, target, state):
        return _leapfrog(target, state, torch.randn_like(state.z), sqrt(self.step_size), 1)[0]


def test_the_state_at_another_power_is_what_an_evaluation_gives():
    ncp = ladder()
    walk = NoiseWalk(ncp, 50)
    eps = walk.base.sample()
    one = evaluate(walk.log_ratio, walk.base, eps)
    for power in (0.3, 1.0, 2.0):
        found, wanted = _at_power(one, walk.base, power), evaluate(lambda at: power * walk.log_ratio(at), walk.base, eps)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    there_and_back = _at_power(_at_power(one, walk.base, 0.3), walk.base, 1 / 0.3)
    torch.testing.assert_close(there_and_back.log_target, one.log_target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps, step_size", [(2, 0.7), (15, 0.7), (15, 2.0)])
def test_z_hat_is_unbiased_forward_and_its_inverse_backward(steps, step_size):
    ncp = ladder()
    assert abs(score(AIS(steps, step_size).log_weights(ncp, 20_000, rng(1)) - LOG_Z)) < 5
    assert abs(score(ReverseAIS(IMAGES, steps, step_size).log_weights(ncp, 20_000, rng(2)) + LOG_Z)) < 5


def test_without_the_metropolis_test_z_hat_is_biased():
    log_w = NoTest(15, 1.5).log_weights(ladder(1), 20_000, rng(3)) - LOG_Z
    assert score(log_w) < -10


def test_one_step_is_the_plain_estimate_and_its_reverse():
    "No move is made: the weights are r at the starts, and 1/r. Held against log r of the same starts, in z."
    ncp = ladder()
    starts = []

    class Watched(AIS):
        def starts(self, ncp, n):
            for walk, eps in super().starts(ncp, n):
                starts.append(walk.trace(eps))
                yield walk, eps
    found = Watched(1, 0.1).log_weights(ncp, 40, rng(4))
    torch.testing.assert_close(found, ncp.log_ratio(starts[0]).double(), rtol=1e-4, atol=1e-4)

    class WatchedBack(ReverseAIS):
        def starts(self, ncp, n):
            for walk, eps in super().starts(ncp, n):
                starts.append(walk.trace(eps))
                yield walk, eps
    found = WatchedBack(IMAGES, 1, 0.1).log_weights(ncp, 40, rng(5))
    torch.testing.assert_close(found, -ncp.log_ratio(starts[1]).double(), rtol=1e-4, atol=1e-4)


def test_one_group_of_any_shape_has_the_flat_closed_form():
    "log r = a sum z - b |z|^2 / 2 over an event [2, 3]: log Z = 6 (a^2 / (2 (1 + b)) - log(1 + b) / 2)."
    b = 1 / 0.7**2 - 1
    a = 0.5 * (1 + b)                                                      # r p / Z is N(0.5, 0.7^2), the posterior
    log_z = 6 * (a**2 / (2 * (1 + b)) - log(1 + b) / 2)
    ncp = flat((2, 3), lambda z: (a * z - b * z**2 / 2).sum((-2, -1)))
    assert abs(score(AIS(10, 0.5).log_weights(ncp, 20_000, rng(6)) - log_z)) < 5
    assert abs(score(ReverseAIS(IMAGES, 10, 0.5).log_weights(ncp, 20_000, rng(7)) + log_z)) < 5
    found = ncp.log_partition(20_000, rng(8), Bridge(IMAGES))
    assert abs(found.value - log_z) < 5 * found.std_error < 0.5


def test_the_same_noise_cut_into_groups_or_not_gives_the_same_numbers():
    chain, large = ladder(4, slope=SLOPE), ladder(1, 4)
    found = [AIS(5, 0.7).log_weights(ncp, 100, rng(9)) for ncp in (chain, large)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [AIS(7, 0.5), ReverseAIS(IMAGES, 7, 0.5)])
def test_a_chain_costs_as_many_evaluations_as_steps(method):
    ncp = ladder()
    method.log_weights(ncp, 20, rng())
    assert [ratio.seen for ratio in ncp.ratios] == [7 * 20] * 3


def test_more_steps_bring_both_sides_closer():
    "Sixteen numbers, 30 runs of 100 chains. The distance at 1 step is many times its error; a tenth of it is allowed at 25."
    ncp = ladder(16, slope=SLOPE)

    def distance(steps):
        low, high = (method.log_weights(ncp, 3000, rng(10)).view(30, 100).logsumexp(1) - log(100)
                     for method in (AIS(steps, 0.7), ReverseAIS(IMAGES, steps, 0.7)))
        return (-high - low).mean().item(), ((high.var() + low.var()) / 30).sqrt().item()
    (far, far_error), (near, near_error) = distance(1), distance(25)
    assert far > 5 * far_error and abs(near) < far / 10 + 5 * near_error and near_error < far_error


def test_weights_of_zero_are_allowed_forward_and_refused_backward():
    "r = 0 on half of the line: Z is a half. A posterior draw there is no draw of r p / Z."
    ncp = flat((1,), lambda z: torch.where(z > 0, 0.0, -inf).sum(-1))
    log_w = AIS(4, 0.3).log_weights(ncp, 4000, rng(11))
    assert abs((log_w.exp().mean() - 0.5) / (log_w.exp().std() / 4000**0.5)) < 5
    with pytest.raises(ValueError):
        ReverseAIS(IMAGES, 4, 0.3).log_partition(ncp, 200, rng(11))


def test_where_the_posterior_is_not_p_ncp_the_upper_side_is_shifted_as_derived():
    """Tilt 0.3: -log E_q[1/r] = level - u' Sigma_p u / 2, with the prior's variances 1 and covariance 0.8 of z_1, z_2; it lies
    below the lower side. The bridge is off too, by many of its errors."""
    ncp = ladder(slope=SLOPE, tilt=0.3)
    limit = LOG_Z - 0.3**2 * (1 + 1 + 2 * 0.8) / 2
    log_z = LOG_Z + 0.3 * (0.8 + 0.8 * 0.8 + 0.48) + 0.3**2 / 2 * (0.64 + (0.64 * 0.64 + 0.48**2) + 2 * 0.8 * 0.64)
    assert abs(score(ReverseAIS(IMAGES, 1, 0.7).log_weights(ncp, 50_000, rng(12)) + limit)) < 5
    lower, upper = (ncp.log_partition(20_000, rng(13), m) for m in (AIS(5, 0.7), ReverseAIS(IMAGES, 5, 0.7)))
    assert abs(lower.value - log_z) < 5 * lower.std_error and upper.value < lower.value - 0.1
    crossed = ncp.log_partition(20_000, rng(14), Bridge(IMAGES))
    assert abs(crossed.value - log_z) > 10 * crossed.std_error


# ---- pieces, images -----------------------------------------------------------------------------------------------------

def test_posterior_walks_take_turns_through_the_images(monkeypatch):
    monkeypatch.setattr(partition, "PIECE", 7)
    images, orders = torch.arange(5.0)[:, None], []
    for seed in range(6):
        ncp = ladder()
        torch.manual_seed(seed)
        traces = list(_posterior_walks(ncp, images, 17))
        assert [len(trace.latents[0]) for trace in traces] == [7, 7, 3]
        shown = torch.cat(ncp.vae.seen)[:, 0].tolist()
        assert sorted(Counter(shown).values()) == [3, 3, 3, 4, 4]
        orders.append(tuple(shown[:5]))
        torch.manual_seed(seed)
        ncp.vae.seen.clear()
        list(_posterior_walks(ncp, images, 3))
        assert len(set(torch.cat(ncp.vae.seen)[:, 0].tolist())) == 3           # none twice while others wait
    assert len(set(orders)) > 1                                                # not always the first images


@pytest.mark.parametrize("make", [lambda: AIS(4, 0.7), lambda: ReverseAIS(IMAGES, 4, 0.7)])
def test_pieces_change_the_numbers_and_not_the_law(monkeypatch, make):
    ncp, sign = ladder(2), -1 if isinstance(make(), ReverseAIS) else 1
    monkeypatch.setattr(partition, "PIECE", 700)
    log_w = make().log_weights(ncp, 5000, rng(15))
    assert log_w.shape == (5000,) and log_w.dtype == torch.float64
    assert log_w.unique().numel() > 4950                # no piece is another's copy; a few may coincide in float32
    assert abs(score(log_w - sign * LOG_Z)) < 5


# ---- the bridge ---------------------------------------------------------------------------------------------------------

def both_sides(D, repeats, n, m, seed):
    "log r at draws of p = N(0, I) and of q = N(0.8, 0.8^2 I) in D dimensions: [repeats, n], [repeats, m]."
    g, q, p = rng(seed), Normal(0.8, 0.8), Normal(0.0, 1.0)
    of_p, of_q = torch.randn(repeats, n, D, generator=g), 0.8 + 0.8 * torch.randn(repeats, m, D, generator=g)
    return [(q.log_prob(z) - p.log_prob(z)).sum(-1) + LOG_Z for z in (of_p, of_q)]


@pytest.mark.parametrize("n, m", [(300, 300), (1000, 100), (50, 400)])
def test_bridge_has_the_value_and_the_error_it_reports(n, m):
    """200 repeats: the mean within 5 standard errors of the truth, and half a variance for the bias of order 1/n; the spread to
    25%, four of its own errors (5%) and the next order of the delta method."""
    found = [bridge(*pair) for pair in zip(*both_sides(4, 200, n, m, 16))]
    value, reported = torch.tensor([(one.value - LOG_Z, one.std_error) for one in found]).T
    spread = value.std()
    assert abs(value.mean()) < 5 * spread / 200**0.5 + spread**2 / 2
    assert abs(reported.median() / spread - 1) < 0.25
    assert (value.abs() < 2 * reported).double().mean() > 0.9
    assert all(one.num_samples == n + m and one.bias == 0 and 1 <= one.ess <= max(n, m) for one in found)


def test_bridge_solves_its_equation_also_with_weights_of_zero():
    (p,), (q,) = both_sides(4, 1, 200, 80, 17)
    p[:50] = -inf
    value = bridge(p, q).value
    D_p, D_q = ((x.double() - value + log(80 / 200)).sigmoid() for x in (p, q))
    assert abs(D_p.sum() - (1 - D_q).sum()) < 1e-9 * 80
    assert abs(bridge(p + 700, q + 700).value - value - 700) < 1e-3            # exp(700) in float32 is infinite


def test_bridge_between_equal_laws_has_no_error_and_between_distant_ones_no_limit():
    same = bridge(torch.full((100,), 3.0), torch.full((40,), 3.0))
    assert abs(same.value - 3) < 1e-9 and same.std_error < 1e-6 and isnan(same.k_hat)
    apart = bridge(torch.full((100,), -40.0), torch.full((100,), 40.0))
    assert abs(apart.value) < 1e-6 and apart.std_error > 1e6
    beyond = bridge(torch.full((100,), -4000.0), torch.full((100,), 4000.0))
    assert abs(beyond.value) < 1e-6 and isinf(beyond.std_error)


def test_bridge_takes_tensors_with_gradients_and_of_low_precision():
    (p,), (q,) = both_sides(4, 1, 200, 200, 18)
    wanted = bridge(p, q).value
    assert bridge(p.requires_grad_(), q.requires_grad_()).value == wanted
    assert abs(bridge(p.bfloat16(), q.bfloat16()).value - wanted) < 0.05


# ---- through log_partition ----------------------------------------------------------------------------------------------

METHODS = {"plain": None, "SMC": SMC(4), "AIS": AIS(10, 0.7), "reverse": ReverseAIS(IMAGES, 10, 0.7), "bridge": Bridge(IMAGES)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("groups", [1, 4])
def test_log_partition_with_any_method_is_stored_and_repeats_itself(name, groups):
    ncp = ladder(groups)
    before = torch.random.get_rng_state()
    found = ncp.log_partition(4000, rng(19), METHODS[name])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ncp.log_z.item() == pytest.approx(found.value) and ncp.log_z_std_error.item() == pytest.approx(found.std_error)
    assert abs(found.value - LOG_Z) < 6 * found.std_error < 1.2                # SMC's error is that of ten runs
    z = ncp.vae.walk(lambda step: step.prior.sample(), n=5)
    torch.testing.assert_close(ncp.log_prob(z), ncp.log_ratio(z) + z.log_prior() - found.value, rtol=1e-4, atol=1e-4)
    again = ladder(groups).log_partition(4000, rng(19), METHODS[name])
    assert again.value == found.value
    assert ladder(groups).log_partition(4000, rng(20), METHODS[name]).value != found.value


def test_the_bias_has_the_sign_of_its_side():
    ncp = ladder()
    low, high, middle = (ncp.log_partition(400, rng(21), METHODS[name]) for name in ("AIS", "reverse", "bridge"))
    assert low.bias == -low.std_error**2 / 2 < 0 and high.bias == high.std_error**2 / 2 > 0 and middle.bias == 0
    assert (low.num_samples, high.num_samples, middle.num_samples) == (400, 400, 400)


# ---- refusals -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [AIS, lambda steps, size: ReverseAIS(IMAGES, steps, size)])
@pytest.mark.parametrize("steps, step_size, named", [
    (0, 0.1, "0"), (-3, 0.1, "-3"), (2.5, 0.1, "2.5"), (True, 0.1, "True"), (5, 0.0, "0"), (5, -0.1, "-0.1"), (5, inf, "inf"),
    (5, nan, "nan"), (5, "0.1", "0.1")])
def test_settings_are_refused_by_name(make, steps, step_size, named):
    with pytest.raises(ValueError, match=rf"AIS.*got '?{named}"):
        make(steps, step_size)


@pytest.mark.parametrize("method", [AIS(2, 0.1), ReverseAIS(torch.zeros(3, 1), 2, 0.1)])
def test_discrete_priors_are_refused_by_name(method):
    ncp = NoiseContrastivePrior(two_coins(), [Function(lambda z: 0.0 * z)] * 2)
    with pytest.raises(ValueError, match="Normal priors, or others whose `support` is all numbers, not Categorical"):
        ncp.log_partition(10, rng(), method)
    assert isnan(ncp.log_z)


def test_a_bridge_needs_no_normal_prior():
    ncp = NoiseContrastivePrior(two_coins(), [Function(lambda z: 0.0 * z + 0.5)] * 2)
    assert ncp.log_partition(100, rng(), Bridge(IMAGES)).value == pytest.approx(1.0)


@pytest.mark.parametrize("method", [AIS(2, 0.1), ReverseAIS(IMAGES, 2, 0.1), Bridge(IMAGES)])
def test_bad_ratios_and_too_few_samples_are_refused(method):
    for value in (nan, inf):
        ncp = flat((1,), lambda z: z.sum(-1) * 0 + value)
        with pytest.raises(ValueError):
            ncp.log_partition(100, rng(), method)
        assert isnan(ncp.log_z)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ladder().log_partition(1, rng(), method)
    with pytest.raises(ValueError):
        method.log_partition(ladder(), 1, rng()) if isinstance(method, AIS) else bridge(torch.zeros(1), torch.zeros(5))


def test_no_images_and_sides_without_weight_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        ladder().log_partition(10, rng(), Bridge(torch.zeros(0, 1)))
    for p, q in ((torch.full((5,), -inf), torch.zeros(5)), (torch.zeros(5), torch.tensor([0.0, -inf])), (torch.zeros(5), torch.zeros(0))):
        with pytest.raises(ValueError, match="bridge needs at least 2"):
            bridge(p, q)


# ---- the guide to the samplers ------------------------------------------------------------------------------------------

def test_every_sampler_of_the_guide_can_be_had_from_one_place():
    "The first column of the tables in the chapter on all samplers, and none is left out that has both methods."
    pages = json.loads((ROOT / "nbs" / "theory" / "11_samplers.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in pages if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).split("\n")]
    named = {name for line in lines if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    public = {name: getattr(sampling, name) for name in sampling.__all__}
    samplers = {name for name, value in public.items()
                if isinstance(value, type) and callable(getattr(value, "draw", None)) and callable(getattr(value, "sample", None))}
    assert named == samplers - {"Sampler"} and len(named) == 9
