"""AUROC, AUPRC and FPR80 of scores, their bootstrap errors, and the paired difference of two scores.

That the errors cover the truth is checked on the page, for one size of set; here for another, and with sets of unequal size."""
from math import erf

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from ncp_vae.engine.detection import auroc_gain, detection


def normals(seed, n=60, m=40, shift=1.0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=n), shift + draw.normal(size=m)


def test_a_set_that_is_counted():
    "Ranks from the top: s o s o, and precision at the two s: 1, 2/3."
    found = detection([1.0, 3.0], [2.0, 4.0])
    assert found["auroc"].value == 0.75 and found["auprc"].value == pytest.approx((1 + 2 / 3) / 2)
    assert found["fpr80"].value == 0.5 and set(found) == {"auroc", "auprc", "fpr80"}
    for name, measured in found.items():
        assert (measured.kind, measured.n, measured.unit) == ("estimate", 4, name.upper())


def test_higher_means_stranger():
    "Perfect scores, and the same turned round."
    inside, outside = np.arange(10.0), np.arange(10.0, 20)
    perfect, wrong = detection(inside, outside), detection(-inside, -outside)
    assert [perfect[name].value for name in ("auroc", "auprc", "fpr80")] == [1, 1, 0]
    assert wrong["auroc"].value == 0 and wrong["fpr80"].value == 1 and wrong["auprc"].value < 0.5
    assert perfect["auroc"].std_error == 0


@pytest.mark.parametrize("seed", range(5))
def test_as_scikit_learn_has_them_with_ties_and_unequal_sets(seed):
    draw = np.random.default_rng(seed)
    inside, outside = draw.integers(9, size=37).astype(float), draw.integers(2, 12, size=23).astype(float)
    label, score = np.repeat([0, 1], [37, 23]), np.concatenate([inside, outside])
    found = detection(inside, outside, repeats=2)
    assert found["auroc"].value == pytest.approx(roc_auc_score(label, score), abs=1e-11)
    assert found["auprc"].value == pytest.approx(average_precision_score(label, score), abs=1e-11)
    cuts = sorted(set(score), reverse=True)
    first = next(cut for cut in cuts if (outside >= cut).mean() >= 0.8)
    assert found["fpr80"].value == pytest.approx((inside >= first).mean())


def test_fpr80_at_a_threshold_on_a_straight_piece():
    "Ties of both kinds make the curve a straight line: the first threshold that catches 8 of 10 lies in its middle."
    scores = np.arange(10.0)
    assert detection(scores, scores, repeats=2)["fpr80"].value == 0.8


def test_any_increasing_function_of_the_scores_changes_nothing():
    inside, outside = normals(1)
    assert detection(inside, outside, repeats=5) == detection(np.exp(inside), np.exp(outside), repeats=5)


def test_tensors_arrays_and_lists():
    inside, outside = normals(2)
    expected = detection(inside, outside, repeats=5)
    assert detection(torch.tensor(inside, requires_grad=True), torch.tensor(outside), repeats=5) == expected
    assert detection(inside.tolist(), outside.tolist(), repeats=5) == expected


def test_the_error_is_a_function_of_the_seed():
    inside, outside = normals(3)
    state = np.random.get_state()[1].copy()
    one, same, other = (detection(inside, outside, seed, 20)["auroc"] for seed in (1, 1, 2))
    assert one == same and one.value == other.value and one.std_error != other.std_error
    assert (np.random.get_state()[1] == state).all()


def test_the_error_is_that_of_unequal_sets():
    "20 ordinary and 200 strange images: the error is mostly that of the few. Sets are drawn 60 times; their scatter is known to a tenth."
    truth = (1 + erf(0.5)) / 2
    found = [detection(*normals(seed, 20, 200), seed, 30)["auroc"] for seed in range(60)]
    values, errors = (np.array([getattr(measured, name) for measured in found]) for name in ("value", "std_error"))
    assert abs(values.mean() - truth) < 4 * values.std() / 60**0.5
    assert 0.7 < errors.mean() / values.std(ddof=1) < 1.35
    assert (abs(values - truth) < 2 * errors).mean() > 0.95 - 3 * (0.95 * 0.05 / 60) ** 0.5


def test_a_paired_gain():
    "Of a score on itself nothing; of two that share their noise, far less than the errors apart."
    base = normals(4, 100, 100)
    assert auroc_gain(base, base).value == 0 and auroc_gain(base, base).std_error == 0
    better = base[0], base[1] + 0.3
    gain = auroc_gain(better, base, seed=1, repeats=60)
    found = [detection(*pair, seed=1, repeats=60)["auroc"] for pair in (better, base)]
    assert gain.value == pytest.approx(found[0].value - found[1].value, abs=1e-11) and gain.value > 0
    assert 0 < gain.std_error < 0.4 * np.hypot(found[0].std_error, found[1].std_error)
    assert auroc_gain(base, better, seed=1, repeats=60).value == -gain.value
    assert (gain.n, gain.unit, gain.kind) == (200, "AUROC", "estimate")


@pytest.mark.parametrize("inside, outside, message", [
    ([], [1.0], "scores inside .* got shape \\(0,\\)"), ([1.0], [], "scores outside .* got shape \\(0,\\)"),
    ([[1.0, 2.0]], [1.0], "scores inside .* got shape \\(1, 2\\)"), (1.0, [1.0], "got shape \\(\\)"),
    ([1.0, float("nan")], [1.0], "1 of the 2 scores inside are NaN"), ([1.0], torch.tensor([float("nan")]), "scores outside are NaN")])
def test_bad_scores_are_refused(inside, outside, message):
    with pytest.raises(ValueError, match=message):
        detection(inside, outside)
    with pytest.raises(ValueError, match=message):
        auroc_gain(([1.0], [1.0]), (inside, outside))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 2 repeats, got 1"):
        detection([1.0], [2.0], repeats=1)
    with pytest.raises(ValueError, match=r"same images, got \[2, 1\] and \[1, 1\]"):
        auroc_gain(([1.0, 2.0], [1.0]), ([1.0], [1.0]))


def test_infinite_scores_rank_last_or_first():
    "A likelihood of zero is a score too."
    assert detection([0.0, 1.0], [float("inf"), 2.0], repeats=2)["auroc"].value == 1
