"""Density ratios: exact laws first, then samples with a stated false-alarm rate and a broken twin.

Statistical asserts: seeds are fixed. Where a bound is 5 standard errors of a mean of many draws, a fresh seed would fail
with probability 6e-7 for each comparison (two-sided, Gaussian); the broken twins lie further off by construction.
"""
import json
from dataclasses import FrozenInstanceError, asdict
from math import e, inf, log, nan

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ncp_vae.nce import (RatioEstimator, StagedRatio, calibration, diagnose, jsd_from_loss, log_mean_ratio, nce_loss)

FIVE = 5.0    # standard errors


def sixteenths(counts):
    "Rows of a discrete law whose probabilities are counts / 16, each point as often as its count: means are exact."
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


Z_Q, Z_P = sixteenths([1, 2, 5, 8]), sixteenths([8, 4, 2, 2])
LOG_R = torch.tensor([1 / 8, 2 / 4, 5 / 2, 8 / 2], dtype=torch.float64).log()


def log_ratios(kl, n, seed):
    "log r at n draws of q and of p, for N(m, 1) against N(0, 1): N(+-kl, 2 kl)."
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(2, n, dtype=torch.float64, generator=g) * (2 * kl) ** 0.5
    return t[0] + kl, t[1] - kl


class Linear(RatioEstimator):
    "log r = w . z + context, a ratio with a context of shape [B]."

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w))
        self.conditioned = 0

    def condition(self, context):
        self.conditioned += 1
        offset = 0.0 if context is None else context
        return lambda z: z @ self.w + offset


# ---- the loss -------------------------------------------------------------------------------------------------------

def test_gradient_vanishes_at_the_log_ratio_and_nowhere_else():
    def gradient(logits):
        logits = logits.clone().requires_grad_()
        nce_loss(logits[Z_Q], logits[Z_P]).backward()
        return logits.grad
    assert gradient(LOG_R).abs().max() < 1e-12
    for point in range(4):                                     # twin: one logit off by 0.1 is seen at that point alone
        wrong = LOG_R.clone()
        wrong[point] += 0.1
        assert gradient(wrong)[point] > 1e-3
        assert gradient(wrong)[torch.arange(4) != point].abs().max() < 1e-12


def test_loss_is_the_sum_of_two_expectations():
    assert nce_loss(torch.zeros(7), torch.zeros(2, 3)).item() == pytest.approx(2 * log(2), rel=1e-6)
    logits = torch.cat([LOG_R[Z_Q], LOG_R[Z_P]])
    label = torch.cat([torch.ones(16), torch.zeros(16)]).double()
    mean = binary_cross_entropy_with_logits(logits, label)
    assert nce_loss(LOG_R[Z_Q], LOG_R[Z_P]).item() == pytest.approx(2 * mean.item(), rel=1e-12)


def test_swapping_q_and_p_flips_the_sign():
    logits = torch.tensor([0.3, -2.0, 1.0, 5.0])
    assert torch.equal(nce_loss(logits[Z_Q], logits[Z_P]), nce_loss(-logits[Z_P], -logits[Z_Q]))


def test_each_side_is_averaged_by_itself():
    "Three times as many negatives of the same law change nothing; the pooled mean's minimum would move by log 1/3."
    assert torch.allclose(nce_loss(LOG_R[Z_Q], LOG_R[Z_P].repeat(3)), nce_loss(LOG_R[Z_Q], LOG_R[Z_P]), rtol=1e-14)
    def pooled_gradient(shift):
        logits = (LOG_R + shift).requires_grad_()
        label = torch.cat([torch.ones(16), torch.zeros(48)]).double()
        binary_cross_entropy_with_logits(torch.cat([logits[Z_Q], logits[Z_P].repeat(3)]), label).backward()
        return logits.grad.abs().max()
    assert pooled_gradient(log(1 / 3)) < 1e-12 < 1e-3 < pooled_gradient(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_its_gradient_are_finite_at_extreme_logits(dtype):
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    loss = nce_loss(logits, logits)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    d = logits.detach().sigmoid()
    assert not torch.isfinite((d / (1 - d)).log()).all()       # twin: through the sigmoid it overflows


def test_jsd_from_the_optimal_loss():
    q, p = (torch.bincount(z).double() / 16 for z in (Z_Q, Z_P))
    m = (q + p) / 2
    jsd = ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()) / 2
    assert jsd_from_loss(nce_loss(LOG_R[Z_Q], LOG_R[Z_P])).item() == pytest.approx(jsd.item(), abs=1e-14)
    assert jsd_from_loss(nce_loss(LOG_R[Z_Q] / 2, LOG_R[Z_P] / 2)) < jsd          # any other classifier: too low
    assert jsd_from_loss(0.0) == log(2)


# ---- the free checks ------------------------------------------------------------------------------------------------

def test_mean_ratios_are_one_by_enumeration():
    assert log_mean_ratio(LOG_R[Z_P]).value == pytest.approx(0, abs=1e-14)
    assert log_mean_ratio(-LOG_R[Z_Q]).value == pytest.approx(0, abs=1e-14)
    assert log_mean_ratio(2 * LOG_R[Z_P]).value > 0.5         # twin: overconfident
    assert log_mean_ratio(LOG_R[Z_Q]).value > 0.5             # twin: the wrong draws


def test_mean_ratio_against_a_plain_mean():
    _, t_p = log_ratios(0.5, 1000, seed=0)
    found = log_mean_ratio(t_p)
    mean, error = found.value, found.std_error
    r = t_p.exp()
    assert mean == pytest.approx(r.mean().log().item(), abs=1e-12)
    assert error == pytest.approx((r.std() / 1000**0.5 / r.mean()).item(), rel=1e-12)


@pytest.mark.parametrize("shift", [-1e4, 800.0, 1e4])
def test_mean_ratio_never_leaves_log_space(shift):
    found = log_mean_ratio(LOG_R[Z_P] + shift)
    assert found.value == pytest.approx(shift, abs=1e-9) and found.std_error == pytest.approx(log_mean_ratio(LOG_R[Z_P]).std_error, rel=1e-6)


def test_standard_error_covers():
    "Over 400 seeds the z-score has a standard deviation near 1 (0.85 to 1.15 is more than 4 sigma of its own spread)."
    estimates = [log_mean_ratio(log_ratios(0.25, 2000, seed)[1]) for seed in range(400)]
    z = [one.value / one.std_error for one in estimates]
    assert 0.85 < torch.tensor(z).std() < 1.15 and abs(sum(z)) / 400**0.5 < FIVE


def test_far_apart_the_check_goes_blind_and_its_error_says_so():
    t_q, t_p = log_ratios(40.0, 10_000, seed=0)
    report = diagnose(t_q, t_p)
    assert report.log_mean_ratio < -5 and report.log_mean_ratio_std_error > 0.3   # the true ratio, and yet
    assert report.kl_bound > 40                                                     # so this is no bound any more


def test_log_mean_ratio_is_too_low_on_average():
    """The log of a sample mean: its bias is about -Var(r)/2n, here -(e^2 - 1)/400 = -0.016; 5 standard errors of 4000 runs.

    So the sample version of the Donsker-Varadhan bound is too high on average; the mean itself is unbiased (twin)."""
    g = torch.Generator().manual_seed(0)
    s_p = torch.randn(4000, 200, dtype=torch.float64, generator=g) * 2**0.5 - 1                        # kappa = 1
    values = torch.tensor([log_mean_ratio(rows).value for rows in s_p])
    error = values.std() / 4000**0.5
    assert values.mean() < -FIVE * error and abs(values.mean() + (e**2 - 1) / 400) < FIVE * error
    means = s_p.exp().mean(1)
    assert abs(means.mean() - 1) < FIVE * means.std() / 4000**0.5


def test_a_ratio_of_half_the_coordinates_passes_every_check():
    "It is a true ratio of two other laws: only the lower loss of a better classifier shows what it lacks (the twin)."
    g = torch.Generator().manual_seed(1)
    z_q, z_p = torch.randn(2, 20_000, 2, dtype=torch.float64, generator=g) + torch.tensor([1.0, 0.0])[:, None, None]
    blind, full = (diagnose(f(z_q), f(z_p)) for f in (lambda z: z[:, 0] - 0.5, lambda z: (z - 0.5).sum(1)))
    for report, kl in ((blind, 0.5), (full, 1.0)):
        assert abs(report.log_mean_ratio) < FIVE * report.log_mean_ratio_std_error
        assert abs(report.log_mean_inverse) < FIVE * report.log_mean_inverse_std_error
        assert abs(report.kl_bound - kl) < FIVE * report.kl_bound_std_error
        assert report.calibration_error < 2 * report.calibration_noise
    assert blind.loss - full.loss > FIVE * (blind.loss_std_error + full.loss_std_error)


def test_a_mode_that_no_negative_reaches_is_not_announced_by_the_standard_error():
    "q = 0.9 N(0, 1) + 0.1 N(12, 1): the true ratio, and yet log E_p[r] reads log 0.9 with next to no error."
    g = torch.Generator().manual_seed(2)
    s = lambda z: torch.logaddexp(torch.tensor(log(0.9)).double(), log(0.1) + 12 * z - 72)
    z_p, z_q = torch.randn(2, 10_000, dtype=torch.float64, generator=g)
    report = diagnose(s(z_q + 12 * (torch.rand(10_000, generator=g) < 0.1)), s(z_p))
    assert report.log_mean_ratio == pytest.approx(log(0.9), abs=1e-6) and report.log_mean_ratio_std_error < 1e-6
    assert abs(report.log_mean_inverse) < FIVE * report.log_mean_inverse_std_error    # draws of q reach both modes


# ---- calibration ----------------------------------------------------------------------------------------------------

def test_table_gives_back_the_log_ratio_exactly():
    table = calibration(LOG_R[Z_Q], LOG_R[Z_P])
    assert torch.allclose(table.predicted, LOG_R) and torch.allclose(table.empirical, LOG_R)
    assert table.weight.sum().item() == pytest.approx(1) and table.error < 1e-12
    wrong = calibration(LOG_R[Z_Q] + 1, LOG_R[Z_P] + 1)       # twin
    assert torch.allclose(wrong.predicted - wrong.empirical, torch.ones(4).double()) and wrong.error > 0.1


def test_table_does_not_mind_unequal_numbers():
    table, more = calibration(LOG_R[Z_Q], LOG_R[Z_P], 20), calibration(LOG_R[Z_Q], LOG_R[Z_P].repeat(5), 20)
    for name in ("predicted", "empirical", "weight"):
        assert torch.allclose(getattr(table, name), getattr(more, name)), name
    assert (more.std_error < table.std_error).all()


def test_order_and_shape_do_not_matter():
    t_q, t_p = log_ratios(1.0, 600, seed=1)
    a, b = calibration(t_q, t_p), calibration(t_q.flip(0).view(20, 30), t_p.view(2, 300))
    assert all(torch.allclose(x, y) for x, y in zip(asdict(a).values(), asdict(b).values()))


def test_constant_logits_share_one_bin():
    table = calibration(torch.zeros(50), torch.zeros(70))
    assert len(table.weight) == 1 and table.error == 0 and table.noise == 0


def test_a_bin_of_one_kind_is_infinite_and_harmless():
    table = calibration(torch.full((100,), 30.0), torch.full((100,), -30.0))
    assert table.empirical.tolist() == [-inf, inf] and table.std_error.tolist() == [inf, inf]
    assert table.error < 1e-10 and table.noise == 0


def test_healthy_table_is_within_its_errors_and_broken_ones_are_not():
    "20 bins at 5 standard errors: a fresh seed fails with probability about 1e-5. Error over noise: see the next test."
    t_q, t_p = log_ratios(0.5, 20_000, seed=2)
    def worst(f):
        table = calibration(f(t_q), f(t_p), bins=20)
        return ((table.predicted - table.empirical).abs() / table.std_error).max(), table.error / table.noise
    z, ratio = worst(lambda t: t)
    assert z < FIVE and ratio < 2
    for broken in (lambda t: t + 0.5, lambda t: 2 * t, lambda t: t / 2):
        z, ratio = worst(broken)
        assert z > 2 * FIVE and ratio > 5


def test_calibration_noise_is_the_error_of_the_true_ratio():
    "Over 60 samples error / noise averages 1: one value spreads by about 0.25, so 5 standard errors are 0.16."
    tables = [calibration(*log_ratios(0.5, 2000, seed)) for seed in range(60)]
    assert sum(table.error / table.noise for table in tables) / 60 == pytest.approx(1, abs=0.16)


# ---- the report -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_report_against_closed_forms(scale):
    kl = 0.5
    report = asdict(diagnose(*(scale * t for t in log_ratios(kl, 20_000, seed=3))))
    truth = dict(log_mean_ratio=scale * (scale - 1) * kl, log_mean_inverse=scale * (scale - 1) * kl,
                 kl_bound=scale * (2 - scale) * kl)
    for key, value in truth.items():
        assert abs(report[key] - value) < FIVE * report[key + "_std_error"], key
    if scale != 1.0:                                            # twin: not the values of the true ratio
        assert abs(report["log_mean_ratio"]) > 2 * FIVE * report["log_mean_ratio_std_error"]
        assert kl - report["kl_bound"] > FIVE * report["kl_bound_std_error"]


def test_loss_and_jsd_against_quadrature():
    kl, u = 2.0, torch.linspace(-12, 12, 4001, dtype=torch.float64)
    truth = 2 * ((-u.square() / 2).softmax(0) * softplus(-(kl + (2 * kl) ** 0.5 * u))).sum().item()
    report = diagnose(*log_ratios(kl, 20_000, seed=4))
    assert abs(report.loss - truth) < FIVE * report.loss_std_error
    assert report.jsd == jsd_from_loss(report.loss) and report.jsd_std_error == report.loss_std_error / 2
    doubled = diagnose(*(2 * t for t in log_ratios(kl, 20_000, seed=4)))           # twin
    assert doubled.loss - truth > FIVE * doubled.loss_std_error


def test_report_is_plain_and_frozen():
    t_q, t_p = log_ratios(1.0, 500, seed=5)
    report = diagnose(t_q.float(), t_p.float().requires_grad_())
    assert all(type(value) is float for value in asdict(report).values())
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    assert report.loss == pytest.approx(nce_loss(t_q, t_p).item(), rel=1e-6)
    with pytest.raises(FrozenInstanceError):
        report.loss = 0.0


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_may_lie_on_any_device_in_any_precision(device, dtype):
    "The report is computed from the rounded logits in float64 on the CPU, wherever they lie and however they are laid out."
    s_q, s_p = (rows.to(dtype) for rows in log_ratios(0.5, 600, seed=6))
    there = [rows.to(device).view(20, 30).T for rows in (s_q, s_p)]                   # not contiguous
    assert asdict(diagnose(*there)) == pytest.approx(asdict(diagnose(s_q.double(), s_p.double())), rel=1e-12)
    assert nce_loss(*there).device.type == device and jsd_from_loss(nce_loss(*there)).dtype == dtype


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(1), torch.tensor([0.0, nan]), torch.tensor([0.0, inf])])
def test_bad_logits_are_refused(bad):
    for call in (log_mean_ratio, lambda z: diagnose(z, torch.zeros(3)), lambda z: calibration(torch.zeros(3), z)):
        with pytest.raises(ValueError, match="at least 2 finite logits"):
            call(bad)


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration(torch.zeros(3), torch.zeros(3), bins=0)


# ---- estimators -----------------------------------------------------------------------------------------------------

def test_forward_is_condition_and_leading_dimensions_are_free():
    ratio, context = Linear([1.0, -2.0]), torch.randn(5, generator=torch.Generator().manual_seed(0))
    z = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(1))
    whole = ratio.condition(context)(z)
    assert whole.shape == (7, 5) and ratio.conditioned == 1
    assert torch.allclose(whole, torch.stack([ratio(rows, context) for rows in z]))


def test_an_abstract_ratio_says_what_to_define():
    with pytest.raises(NotImplementedError, match="RatioEstimator must define condition"):
        RatioEstimator()(torch.zeros(2, 3))


def test_staged_ratio_sums_conditions_once_and_owns_its_stages():
    stages = [Linear([1.0, 0.0]), Linear([0.5, 2.0])]
    staged, context = StagedRatio(stages), torch.tensor([1.0, 2.0, 3.0])
    z = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(staged.condition(context)(z), z @ torch.tensor([1.5, 2.0]) + 2 * context)
    assert [stage.conditioned for stage in stages] == [1, 1] and len(list(staged.parameters())) == 2
    assert torch.allclose(StagedRatio([staged, stages[0]])(z[0]), z[0] @ torch.tensor([2.5, 2.0]))
    with pytest.raises(ValueError, match="at least one stage"):
        StagedRatio([])


def train_linear(rows_q, rows_p, steps=60):
    "Logistic regression by plain gradient descent: a convex loss, its curvature at most 2 x 1/4 a feature."
    ratio, bias = Linear(torch.zeros(rows_q.shape[1])), torch.zeros((), requires_grad=True)
    for _ in range(steps):
        loss = nce_loss(ratio(rows_q) + bias, ratio(rows_p) + bias)
        for parameter, gradient in zip((ratio.w, bias), torch.autograd.grad(loss, (ratio.w, bias))):
            parameter.data -= gradient
    return lambda z: (ratio(z) + bias).detach()


def test_training_finds_the_ratio_and_finds_nothing_where_nothing_is():
    """A logistic regression, well specified: held-out diagnostics against the truth, 5 standard errors each.

    Where q = p the expected held-out JSD and KL bound are at most 0 for every classifier (no false improvement)."""
    g = torch.Generator().manual_seed(6)
    draw = lambda shift=0.0: torch.randn(5000, 3, generator=g) + shift
    ratio = train_linear(draw(0.5), draw())
    report = diagnose(ratio(draw(0.5)), ratio(draw()))
    kl = 3 * 0.5**2 / 2
    assert abs(report.log_mean_ratio) < FIVE * report.log_mean_ratio_std_error + 0.05       # + what 5000 draws teach
    assert kl - 0.02 - FIVE * report.kl_bound_std_error < report.kl_bound < kl + FIVE * report.kl_bound_std_error
    nothing = train_linear(draw(), draw())
    report = diagnose(nothing(draw()), nothing(draw()))
    assert report.jsd < FIVE * report.jsd_std_error and report.kl_bound < FIVE * report.kl_bound_std_error
    assert nothing(draw()).std() < 0.2


# ---- Eq. 4 and 8 to 11 ----------------------------------------------------------------------------------------------

def test_negatives_at_the_posteriors_context_give_the_conditional_ratio():
    "Two groups by enumeration: the gradient of Eq. 10 vanishes at log q(z2|z1) / p(z2|z1), that of the free walk does not."
    g = torch.Generator().manual_seed(7)
    law = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=g).add(0.1)
    norm = lambda table: table / table.sum(-1, keepdim=True)
    data, q1, q2, p1, p2 = norm(law(3)), norm(law(3, 2)), norm(law(3, 2, 4)), norm(law(2)), norm(law(2, 4))
    joint = torch.einsum("x,xa,xab->ab", data, q1, q2)
    q_z1 = joint.sum(1)
    conditional = (joint / q_z1[:, None] / p2).log()

    def gradient(logits, negatives):                           # of sum_x p_d q(z1|x) [q(z2|z1,x) softplus(-l)] + negatives
        logits = logits.clone().requires_grad_()
        (torch.einsum("x,xa,xab,ab->", data, q1, q2, softplus(-logits)) + (negatives * softplus(logits)).sum()).backward()
        return logits.grad.abs().max()

    at_posterior, free_walk = q_z1[:, None] * p2, p1[:, None] * p2
    assert gradient(conditional, at_posterior) < 1e-14 < 1e-3 < gradient(conditional, free_walk)
    assert gradient(conditional + (q_z1 / p1).log()[:, None], free_walk) < 1e-14            # it learns the joint ratio
