"""The feature distance: against scipy, closed forms and brute force, and what a kept network must agree with."""
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F

from ncp_vae.engine import loop
from ncp_vae.engine.data import load, load_labels
from ncp_vae.engine.features import (FeatureNet, _TurnLoss, _all_turns, embed, feature_distance, fit_features, frechet_distance, gaussian_fit,
                                     precision_recall, turns_told)

SETTINGS = dict(steps=60, batch_size=64, lr=2e-3, seed=0)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def digits():
    return load("digits").images[:600], load_labels("digits")[:600]


@pytest.fixture(scope="module")
def net(digits):
    return fit_features(*digits, **SETTINGS).cpu()


# ---- the distance ---------------------------------------------------------------------------------------------------

def test_frechet_distance_is_the_formula_with_scipys_matrix_root():
    a = draws(300, 12) @ draws(12, 12, seed=1)
    b = draws(200, 12, seed=2) @ draws(12, 12, seed=3) + 1
    cov_a, cov_b = a.T.cov().numpy(), b.T.cov().numpy()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [13, 500])
def test_equal_sets_are_at_distance_zero_also_where_singular(rows):
    """A constant feature, a copied one, very different scales, a far mean; also in another order of the rows."""
    x = draws(rows, 10) * 10.0 ** torch.arange(-5, 5).double() + 3
    x = torch.cat([x, x[:, :1], torch.ones(rows, 1)], dim=1)
    scale = x.var(0).sum().item()
    assert frechet_distance(x, x) <= 1e-9 * scale and frechet_distance(x, x.flip(0)) <= 1e-9 * scale
    assert frechet_distance(x[:, 5:] / 1e4, x[:, 5:] / 1e4) <= 1e-9


def test_a_point_mass_is_at_the_total_variance():
    x = draws(100, 6)
    assert frechet_distance(x, x.mean(0).expand(50, 6)) == pytest.approx(x.var(0).sum().item(), rel=1e-9)


def test_bias_is_the_second_order_one():
    """60 pairs of 800 draws of N(0, I_8): within 5 standard errors (false alarm in two million) and the next order, 2 D / N,
    of (2 D + (D^2 + D) / 2) / N; the broken twin, half the rows, is far outside."""
    generator, dim, n = torch.Generator().manual_seed(0), 8, 800
    def found(rows):
        values = torch.tensor([frechet_distance(*torch.randn(2, rows, dim, generator=generator).double()) for _ in range(60)])
        return values.mean().item(), values.std().item() / 60**0.5
    expected = (2 * dim + (dim**2 + dim) / 2) / n
    mean, error = found(n)
    assert abs(mean - expected) < 5 * error + 2 * dim / n * expected
    mean, error = found(n // 2)
    assert abs(mean - expected) > 10 * error


@pytest.mark.parametrize("a, b, words", [
    (draws(12, 12), draws(50, 12), "12 features needs at least 13 rows, got 12"),
    (draws(1, 2), draws(50, 2), "at least 3 rows, got 1"),
    (draws(50, 3), draws(50, 2), r"got \(50, 3\) and \(50, 2\)"),
    (draws(50), draws(50), r"\[N, D\] and \[M, D\], got \(50,\)"),
    (draws(50, 2), draws(50, 2) / 0, "100 NaN or infinite values of 100"),
    (draws(50, 2).long(), draws(50, 2), "floating point, got torch.int64"),
])
def test_what_has_no_distance_is_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


# ---- images ---------------------------------------------------------------------------------------------------------

class Pixels(FeatureNet):
    """Its features are the pixels of 8×8 images."""
    def __init__(self):
        super().__init__((1, 8, 8), 2)
        self.body = nn.Flatten()


def test_error_bar_is_the_spread_over_fresh_images():
    """40 pairs of 150 images: the root mean square error bar over the standard deviation of the distances (known to 11 %)
    is near 1.1, as in other simulations of the jackknife; five times 11 % to either side."""
    generator = torch.Generator().manual_seed(0)
    def pair():
        a, b = torch.rand(2, 150, 1, 8, 8, generator=generator)
        return feature_distance(Pixels(), a, 0.2 + 0.6 * b)
    scores = [pair() for _ in range(40)]
    spread = torch.tensor([score.value for score in scores]).std()
    claimed = torch.tensor([score.std_error for score in scores]).square().mean().sqrt()
    assert 1.1 / 1.55 < claimed / spread < 1.1 * 1.55
    assert scores[0].kind == "estimate" and scores[0].n == 150


def test_features_of_the_training_images_are_white(net, digits):
    assert torch.allclose(64 * embed(net, digits[0]).T.cov(), torch.eye(64).double(), atol=1e-3)
    point = embed(net, digits[0]).mean(0).expand(100, 64)
    assert frechet_distance(embed(net, digits[0]), point) == pytest.approx(1.0, abs=1e-3)


def test_an_image_is_measured_alone(net):
    """In whatever company and whichever part of a thousand it comes."""
    images = torch.rand(1203, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = embed(net, images)
    assert whole.shape == (1203, 64) and whole.dtype == torch.float64 and not whole.requires_grad
    for i in (0, 999, 1202):
        assert torch.allclose(embed(net, images[i:i + 1])[0], whole[i], rtol=1e-3, atol=1e-3)


def test_a_linear_remix_of_the_features_changes_no_distance(digits):
    """The whitened distance does not know the network's axes; without whitening, the broken twin, it does."""
    a, b = digits[0][:300], (digits[0][300:] + 0.1).clamp(0, 1)
    net = fit_features(*digits, **SETTINGS).cpu()
    before = feature_distance(net, a, b).value
    with torch.no_grad():
        mix = torch.eye(64) + 0.3 * draws(64, 64).float() / 8
        net.body[-1].weight.copy_(mix @ net.body[-1].weight)
        net.body[-1].bias.copy_(mix @ net.body[-1].bias)
    assert feature_distance(net, a, b).value != pytest.approx(before, rel=0.02)
    net.spread.copy_(torch.eye(64))
    net.spread.copy_(gaussian_fit(8 * embed(net, digits[0]))[1])
    assert feature_distance(net, a, b).value == pytest.approx(before, rel=1e-3)


def test_what_cannot_be_measured_is_refused(net):
    images = torch.rand(100, 1, 8, 8)
    for a, b, blocks, words in [(images, images[..., 1:], 20, r"shape \(1, 8, 8\), got \(1, 8, 7\)"), (images, images + 1, 20, r"expected \[0, 1\]"),
                                (images, images / 0, 20, "NaN or infinite"), (images, images, 1, "blocks must lie between 2 and .* 100, got 1"),
                                (images, images[:66], 20, "at least 65 rows, got 62"), (images[:, 0], images, 20, r"got \(8, 8\)")]:
        with pytest.raises(ValueError, match=words):
            feature_distance(net, a, b, blocks)


# ---- the network ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_sizes(shape):
    net = FeatureNet(shape, 10)
    assert net(torch.rand(5, *shape)).shape == (5, 10) and embed(net, torch.rand(5, *shape)).shape == (5, 64)
    assert 10_000 < sum(p.numel() for p in net.parameters()) < 100_000


def test_training_is_a_function_of_its_seed(net, digits):
    torch.manual_seed(5)
    again, other = fit_features(*digits, **SETTINGS), fit_features(*digits, **{**SETTINGS, "seed": 1})
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))                       # the caller's random numbers are as they were
    assert torch.equal(embed(net, digits[0]), embed(again, digits[0]))
    assert not torch.equal(embed(net, digits[0]), embed(other, digits[0]))
    assert (net(digits[0]).argmax(1) == digits[1]).float().mean() > 0.7 and not net.training


def test_a_kept_network_comes_back_without_training(net, digits, tmp_path, monkeypatch):
    kept = fit_features(*digits, **SETTINGS, checkpoint=tmp_path / "net.pt")
    def no_step(*args):
        raise AssertionError("a finished training took a step")
    monkeypatch.setattr(loop, "_take_step", no_step)
    back = fit_features(*digits, **SETTINGS, checkpoint=tmp_path / "net.pt")
    for found in (kept, back):
        assert torch.equal(embed(net, digits[0]), embed(found, digits[0]))


def test_a_network_of_other_data_is_not_taken_for_ones_own(digits, tmp_path):
    few = dict(SETTINGS, steps=1)
    fit_features(*digits, **few, checkpoint=tmp_path / "net.pt")
    for images, labels in [(digits[0], digits[1].flip(0)), (digits[0].flip(0), digits[1]), (digits[0][:500], digits[1][:500])]:
        with pytest.raises(ValueError, match="net.pt"):
            fit_features(images, labels, **few, checkpoint=tmp_path / "net.pt")


def test_training_refuses_bad_images_and_labels(digits):
    images, labels = digits
    for x, y, words in [(images, labels[1:], r"600 of torch.int64.*shape \(599,\)"), (images, labels.float(), "torch.float32"),
                        (images, labels - 1, r"\[-1, 0, 1\]"), (images, labels * 0, "two classes"), (images, labels[:0], r"shape \(0,\)"),
                        (images.flatten(1), labels, r"\[N, C, H, W\]"), (images[:64], labels[:64], "N above 64"),
                        (images * 16, labels, r"expected \[0, 1\]")]:
        with pytest.raises(ValueError, match=words):
            fit_features(x, y, **SETTINGS)


# ---- without labels -------------------------------------------------------------------------------------------------

def test_the_turns_are_anticlockwise_and_keep_the_shape():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert [x.flatten().tolist() for x in _all_turns(image)] == [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
    wide = torch.arange(6.0).view(1, 1, 2, 3)
    assert [x.flatten().tolist() for x in _all_turns(wide)] == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("shape, count", [((2, 8, 8), 4), ((2, 8, 9), 2)])
def test_the_loss_of_turns_is_the_mean_over_all_of_them(shape, count):
    net, images = FeatureNet(shape, count, labelled=False), torch.rand(5, *shape)
    parts = [F.cross_entropy(net(torch.rot90(images, turn, (2, 3))), torch.full((5,), place))
             for place, turn in enumerate([0, 1, 2, 3] if count == 4 else [0, 2])]
    assert _TurnLoss(net)(images.flatten(1), 0)["loss"].item() == pytest.approx(sum(parts).item() / count, rel=1e-5)


@pytest.fixture(scope="module")
def turner(digits):
    return fit_features(digits[0], **SETTINGS).cpu()


def test_turns_are_learnt_and_the_features_are_white(turner, net, digits):
    """Of 1,200 held-out turned digits far more than a quarter are put right (standard error at most 0.015); untrained, about a quarter."""
    held_out, untrained = load("digits", "test").images[:300], FeatureNet((1, 8, 8), 4, labelled=False)
    right = torch.stack([turner(x).argmax(1) == turn for turn, x in enumerate(_all_turns(held_out))]).double()
    told = turns_told(turner, held_out)
    assert told.value == pytest.approx(right.mean().item()) and told.n == 300 and 0 < told.std_error < 0.03
    assert told.value > 0.5 and turns_told(untrained, held_out).value < 0.4
    with pytest.raises(ValueError, match="trained with labels"):
        turns_told(net, held_out)
    assert torch.allclose(64 * embed(turner, digits[0]).T.cov(), torch.eye(64).double(), atol=1e-3)
    assert not turner.labelled and not turner.training


def test_names_tell_the_features_apart(net, turner, digits):
    half = fit_features(digits[0][..., :6], **{**SETTINGS, "steps": 1})
    assert net.labelled and net.named() == "64 features of a classifier of 1 x 8 x 8 images"
    assert turner.named() == "64 features of a net trained without labels, to tell quarter turns of 1 x 8 x 8 images apart"
    assert half.named() == "64 features of a net trained without labels, to tell half turns of 1 x 8 x 6 images apart"


def test_a_kept_network_knows_its_task(digits, tmp_path):
    """A file of one kind is refused for the other, both ways, and comes back for its own."""
    few = dict(SETTINGS, steps=2)
    fit_features(*digits, **few, checkpoint=tmp_path / "with.pt")
    kept = fit_features(digits[0], **few, checkpoint=tmp_path / "without.pt")
    assert torch.equal(embed(kept, digits[0]), embed(fit_features(digits[0], **few, checkpoint=tmp_path / "without.pt"), digits[0]))
    with pytest.raises(ValueError, match="with.pt"):
        fit_features(digits[0], **few, checkpoint=tmp_path / "with.pt")
    with pytest.raises(ValueError, match="without.pt"):
        fit_features(*digits, **few, checkpoint=tmp_path / "without.pt")
    with pytest.raises(ValueError, match="without.pt"):
        fit_features(digits[0].flip(0), **few, checkpoint=tmp_path / "without.pt")


def test_training_without_labels_is_a_function_of_its_seed_and_refuses_bad_images(turner, digits):
    assert torch.equal(embed(turner, digits[0]), embed(fit_features(digits[0], **SETTINGS), digits[0]))
    for images, words in [(digits[0][:64], "N above 64"), (digits[0] * 2, r"expected \[0, 1\]"), (digits[0].flatten(1), r"\[N, C, H, W\]")]:
        with pytest.raises(ValueError, match=words):
            fit_features(images, **SETTINGS)


# ---- precision and recall -------------------------------------------------------------------------------------------

def test_precision_and_recall_agree_with_scikit_learn():
    real, fake = draws(1200, 5), 0.7 * draws(300, 5, seed=1) + 0.5
    def share(points, centres):
        reach = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, -1]
        return (np.linalg.norm(points.numpy()[:, None] - centres.numpy(), axis=-1) <= reach).any(1).mean()
    precision, recall = precision_recall(real, fake)
    assert (precision.value, recall.value) == pytest.approx((share(fake, real), share(real, fake)), abs=1e-12)
    assert (precision.n, recall.n) == (300, 1200) and precision.unit == "fraction"
    assert precision_recall(fake, real) == (recall, precision)
    blocks = [share(fake[j::10], real[j::10]) for j in range(10)]
    assert precision.std_error == pytest.approx(np.std(blocks, ddof=1) / 10**0.5)


def test_an_error_of_a_few_neighbours_is_not_given():
    "Blocks of ten rows have an error, blocks of nine have none, whichever set is the small one."
    rows = draws(100, 3)
    assert all(share.std_error > 0 for share in precision_recall(rows, draws(100, 3, seed=1)))
    for pair in [(rows, draws(99, 3, seed=1)), (draws(99, 3, seed=1), rows)]:
        assert all(share.std_error is None for share in precision_recall(*pair))


def test_dropped_modes_cost_recall_and_strays_cost_precision():
    """Ten clusters, far apart: the fake ones fill four of them, and a fifth of the fake rows lies nowhere."""
    clusters = [0.1 * draws(50, 3, seed=i) + 10 * i for i in range(10)]
    fake = torch.cat([0.05 * draws(50, 3, seed=99) + 10 * i for i in range(4)] + [draws(50, 3) - 100])
    precision, recall = precision_recall(torch.cat(clusters), fake)
    assert 0.78 < precision.value <= 0.8 and 0.2 < recall.value <= 0.4


@pytest.mark.parametrize("k", [0, 10, -1])
def test_precision_and_recall_need_k_neighbours(k):
    with pytest.raises(ValueError, match=rf"\(20 and 10\), got {k}"):
        precision_recall(draws(20, 2), draws(10, 2), k)
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(draws(20, 2), draws(10, 2) * float("nan"))
