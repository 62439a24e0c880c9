"""Image scores: against closed forms, scipy and torchmetrics, over processes, and what is refused."""
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sklearn.neighbors import KDTree
from torch import nn
from torch.distributions import Independent, Normal
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from ncp_vae.engine.data import Rows
from ncp_vae.engine.features import (FeatureNet, frechet_distance, gaussian_distance, gaussian_fit, jackknife_error,
                                     left_out)
from ncp_vae.engine.fid import (NVAE_50K_TRAIN, PROTOCOLS, RAE_10K_TEST, ImageScorer, ImageScores, Protocol, _claimed_name,
                                _ClassifierFeatures, _features, _reference_indices, drawn_from, excess_left, features_for,
                                kernel_distance, lower_by, published_distance, reconstructions, to_bytes)
from ncp_vae.engine.neighbours import _neighbour_view, nearest, nearest_in
from ncp_vae.measured import Measured
from ncp_vae.models.flat import DenseVAE
from ncp_vae.walk import FlatVAE


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Blocks(nn.Module):
    "Bytes of any shape -> the means of 8 equal parts, times 4."
    num_features, is_standard, name = 8, False, "means of parts"

    def forward(self, images):
        return images.float().flatten(1).unflatten(1, (8, -1)).mean(-1) / 64


def score_images(protocol, reference, draw, network, **settings):
    return ImageScorer(protocol, reference, network, **settings).score(draw)


def noise(n, generator):
    return torch.rand(n, 1, 4, 4, generator=generator)


REAL = torch.rand(330, 1, 4, 4, generator=torch.Generator().manual_seed(1)) ** 2


# ---- bytes ----------------------------------------------------------------------------------------------------------

def test_bytes_are_rounded_and_cut_off():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 127.6 / 255, 1.0, -0.1, 1.1, float("inf")])
    assert to_bytes(values).tolist() == [0, 0, 1, 127, 128, 255, 0, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_bytes_come_back(dtype):
    levels = torch.arange(256)
    assert torch.equal(to_bytes(levels.to(dtype) / 255), levels.byte())


@pytest.mark.parametrize("images, words", [(torch.zeros(2, 1, 4, 4).byte(), "torch.uint8"),
                                           (torch.tensor([0.0, float("nan")]), "1 of 2 values are NaN")])
def test_what_cannot_become_bytes_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        to_bytes(images)


# ---- the distance ---------------------------------------------------------------------------------------------------

def by_sums(real, fake):
    "Torchmetrics' FID of features that are given."
    given = nn.Identity()
    given.num_features = real.shape[1]
    fid = FrechetInceptionDistance(given, antialias=False)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    return fid.compute().item()


def distance(real, fake):
    return gaussian_distance(gaussian_fit(real), gaussian_fit(fake))


@pytest.mark.parametrize("n, m, dim", [(500, 300, 12), (30, 40, 100)])
def test_the_distance_agrees_with_torchmetrics(n, m, dim):
    "Also of fewer images than features; torchmetrics sums in float64 what was float32."
    real, fake = randn(n, dim) @ randn(dim, dim, seed=1), randn(m, dim, seed=2) @ randn(dim, dim, seed=3) + 1
    assert distance(real, fake) == pytest.approx(by_sums(real, fake), rel=4e-6)


def test_the_distance_of_known_gaussians():
    """N(0, s^2) and N(d, t^2) along the axes: |d|^2 + |s - t|^2. The sets are whitened first, so that their moments are these
    to rounding, and there is nothing to sample."""
    s, t, d = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, 1.0, 0.1]), torch.tensor([0.0, 1.0, -2.0])
    def white(seed):
        x = randn(400, 3, seed=seed).double()
        x = x - x.mean(0)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    exact = (d.square().sum() + (s - t).square().sum()).item()
    assert distance(white(0) * s, white(1) * t + d) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("rows", [2, 20, 500])
def test_identical_sets_are_at_distance_zero(rows):
    "Also singular ones, in another order, and far from the origin, where sums would cancel."
    x = randn(rows, 40)
    assert distance(x, x.flip(0)) < 1e-6
    assert distance(x + 100, x.flip(0) + 100) < 1e-6


@pytest.mark.parametrize("features, words", [(torch.full((4, 3), float("nan")), "12 features that are NaN"),
                                             (torch.full((4, 3), float("inf")), "NaN or infinite"),
                                             (torch.zeros(4, 2), r"\(4, 2\) of 4 images, expected \(4, 3\)")])
def test_bad_features_join_no_others(features, words):
    given = nn.Identity()
    given.num_features = 3
    with pytest.raises(ValueError, match=words):
        _features(given, features)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 20 images of each kind, got 19 real and 0 generated"):
        kernel_distance(randn(19, 3), randn(0, 3))


# ---- the kernel distance --------------------------------------------------------------------------------------------

def test_the_kernel_distance_is_the_mean_over_disjoint_subsets():
    "With ten subsets of all rows, by torchmetrics' formula; the seed draws the subsets, and every row is in one."
    x, y = randn(200, 5), randn(200, 5, seed=1) + 0.5
    generator = torch.Generator().manual_seed(3)
    real, fake = (rows[torch.randperm(200, generator=generator)].double() for rows in (x, y))
    values = torch.stack([poly_mmd(real[i:i + 20], fake[i:i + 20]) for i in range(0, 200, 20)])
    found = kernel_distance(x, y, 3)
    assert found.value == pytest.approx(values.mean().item(), rel=1e-9) and found.n == 200
    assert found.std_error == pytest.approx(values.std().item() / 10**0.5, rel=1e-9)
    assert kernel_distance(x, y, 4).value != found.value


def test_the_kernel_distance_is_unbiased_and_its_error_is_honest():
    """60 pairs of 200 draws of one law: the mean is within 5 standard errors of 0 (false alarm in two million); the spread
    (known to 9 %) over the root mean square error bar is within 50 % of 1, over five times that."""
    generator = torch.Generator().manual_seed(0)
    scores = [kernel_distance(*torch.randn(2, 200, 4, generator=generator)) for _ in range(60)]
    values, errors = (torch.tensor([getattr(s, name) for s in scores]) for name in ("value", "std_error"))
    assert abs(values.mean()) < 5 * values.std() / 60**0.5
    assert 0.5 < values.std() / errors.square().mean().sqrt() < 1.5


def test_the_kernel_distance_draws_nothing_from_the_global_random_numbers():
    before = torch.random.get_rng_state()
    kernel_distance(randn(50, 3), randn(50, 3, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())


# ---- protocols ------------------------------------------------------------------------------------------------------

def test_the_named_protocols():
    assert [(p.name, p.generated, p.reference, p.split) for p in PROTOCOLS.values()] == [
        ("nvae-50k-train", 50_000, 50_000, "train"), ("rae-10k-test", 10_000, 10_000, "test"),
        ("joint-ebm-30k", 30_000, None, "train")]


def test_which_real_images_are_taken():
    chosen = _reference_indices(NVAE_50K_TRAIN, 162_770, None)
    assert len(chosen) == len(set(chosen)) == 50_000 and chosen == _reference_indices(NVAE_50K_TRAIN, 162_770, None)
    assert max(chosen) > 160_000
    assert _reference_indices(RAE_10K_TEST, 19_962, None) == list(range(10_000))
    assert len(_reference_indices(PROTOCOLS["joint-ebm-30k"], 29_000, None)) == 29_000
    assert len(_reference_indices(NVAE_50K_TRAIN, 4000, 100)) == 100


@pytest.mark.parametrize("protocol, counts, name", [
    ("nvae-50k-train", (50_000, 50_000, 162_770), "nvae-50k-train"),
    ("nvae-50k-train", (50_000, 4000, 4000), "nvae-50k-train"),
    ("nvae-50k-train", (1000, 1000, 60_000), "nvae-50k-train (1,000 of 50,000 generated, 1,000 of 50,000 real)"),
    ("rae-10k-test", (10_000, 10_000, 19_962), "rae-10k-test"),
    ("rae-10k-test", (10_000, 1000, 1000), "rae-10k-test (10,000 of 10,000 generated, 1,000 of 10,000 real)"),
    ("joint-ebm-30k", (30_000, 27_000, 27_000), "joint-ebm-30k"),
])
def test_a_name_is_claimed_only_where_the_protocol_was_followed(protocol, counts, name):
    assert _claimed_name(PROTOCOLS[protocol], *counts) == name


def test_scores_say_what_they_are():
    scores = score_images(Protocol("small", 300, 200, "train", ""), REAL, noise, Blocks(), batch_size=64, seed=0)
    assert (scores.generated, scores.reference, scores.protocol, scores.features) == (300, 200, "small", "means of parts")
    assert scores.distance.n == scores.kernel.n == 200 and scores.distance.std_error > 0
    assert (scores.distance.unit, scores.kernel.unit) == ("raw feature distance", "raw kernel distance")
    limited = score_images(NVAE_50K_TRAIN, REAL, noise, Blocks(), batch_size=64, seed=0, limit=70)
    assert limited.generated == limited.reference == 70 and "(70 of 50,000 generated, 70 of 330 real)" in limited.protocol


def test_only_the_standard_inception_makes_a_fid():
    network = Blocks()
    network.is_standard = True              # as load_inception sets it after the hash of the standard file
    scores = score_images(Protocol("small", 60, 60, "train", ""), REAL, noise, network, batch_size=64, seed=0)
    assert (scores.distance.unit, scores.kernel.unit) == ("FID", "KID")


def test_a_score_is_a_function_of_the_seed():
    scorer = ImageScorer(Protocol("small", 300, None, "train", ""), REAL, Blocks(), batch_size=64, seed=0)
    first = scorer.score(noise)
    torch.rand(5)
    assert scorer.score(noise) == first
    assert scorer.score(lambda n, generator: torch.rand(n, 1, 4, 4)) == scorer.score(lambda n, generator: torch.rand(n, 1, 4, 4))
    other = score_images(Protocol("small", 300, None, "train", ""), REAL, noise, Blocks(), batch_size=64, seed=1)
    assert other != first


def test_the_errors_bar_needs_more_images_than_features():
    "8 features: 20 images leave 19 without a block, which is enough; of 64 features they are too few."
    few = Protocol("few", 20, 20, "train", "")
    assert score_images(few, REAL, noise, Blocks(), batch_size=64, seed=0).distance.std_error > 0
    class Wide(Blocks):
        num_features = 16
        def forward(self, images):
            return images.float().flatten(1)
    wide = Protocol("wide", 16 + 1 + 3, 20, "train", "")
    assert score_images(wide, REAL, noise, Wide(), batch_size=64, seed=0).distance.std_error > 0
    Wide.num_features, Wide.forward = 19, lambda self, images: images.float().flatten(1).repeat(1, 2)[:, :19]
    assert score_images(wide, REAL, noise, Wide(), batch_size=64, seed=0).distance.std_error is None


class Many(Blocks):
    "Sixteen features of 1 x 4 x 4 images, their pixels, and as many again, in other words."
    num_features = 32

    def forward(self, images):
        pixels = images.float().flatten(1) / 255
        return torch.cat([pixels, pixels**2], 1)


def test_no_more_images_than_features_are_refused():
    """The covariance is singular. At the start, before an image is read; where a limit asks for a trial of so few, there is a warning, and a
    score without an error."""
    class Unread(torch.utils.data.Dataset):
        def __len__(self):
            return 32
    words = "a Gaussian of 32 features wants at least 33 images of each kind, got {} generated and {} real"
    for counts, reference, limit in (((60, 32), Unread(), None), ((32, 60), REAL, None), ((60, 32), Unread(), 50)):
        with pytest.raises(ValueError, match=words.format(*counts if limit is None else (limit, counts[1]))):
            ImageScorer(Protocol("few", counts[0], 60, "train", ""), reference, Many(), batch_size=64, seed=0, limit=limit)
    with pytest.warns(UserWarning, match=words.format(30, 30) + ", as limit=30 asks"):
        scores = score_images(Protocol("few", 60, 60, "train", ""), REAL, noise, Many(), batch_size=64, seed=0, limit=30)
    assert scores.distance.std_error is None and scores.protocol == "few (30 of 60 generated, 30 of 60 real)"
    assert score_images(Protocol("enough", 33, 60, "train", ""), REAL, noise, Many(), batch_size=64, seed=0).distance.value > 0


@pytest.mark.parametrize("draw, words", [(lambda n, g: torch.zeros(n, 1, 5, 4), r"expected \(64, 1, 4, 4\)"),
                                         (lambda n, g: torch.zeros(n - 1, 1, 4, 4), r"gave images \(63, 1, 4, 4\)"),
                                         (lambda n, g: torch.zeros(n, 1, 4, 4) / 0, "NaN"),
                                         (lambda n, g: torch.zeros(n, 1, 4, 4).long(), "floating-point")])
def test_bad_samples_are_refused(draw, words):
    with pytest.raises(ValueError, match=words):
        score_images(Protocol("small", 300, None, "train", ""), REAL, draw, Blocks(), batch_size=64, seed=0)


@pytest.mark.parametrize("settings, words", [(dict(batch_size=0), "batch_size must be at least 1, got 0"), (dict(batch_size=64, limit=10), "at least 20")])
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ImageScorer(NVAE_50K_TRAIN, REAL, Blocks(), seed=0, **settings)


# ---- the classifier's features --------------------------------------------------------------------------------------

def test_classifier_scores_are_the_distance_of_its_features_as_they_are():
    "Of the same images, in bytes: a stream and the whole sets give one number."
    images = (torch.rand(400, 1, 8, 8) * 255).round() / 255
    network = _ClassifierFeatures(FeatureNet((1, 8, 8), 2))
    fixed = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(5)) ** 1.2
    stream = iter(fixed.split(100))
    scores = score_images(Protocol("p", 400, None, "train", ""), images, lambda n, g: next(stream), network, batch_size=100, seed=0)
    with torch.no_grad():
        expected = frechet_distance(*(network.net.body(to_bytes(x).float() / 255).double() for x in (images, fixed)))
    assert scores.distance.value == pytest.approx(expected, rel=1e-4) and not scores.is_fid


def test_features_are_chosen_in_one_place(tmp_path):
    images, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 2
    assert isinstance(features_for(None, images, labels, steps=2, batch_size=10, lr=1e-3, seed=0), _ClassifierFeatures)
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        features_for(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="a net is trained, which needs images"):
        features_for(None)
    with pytest.raises(ValueError, match="wants bytes"):
        _ClassifierFeatures(FeatureNet((1, 8, 8), 2))(images)


def test_features_without_labels_are_named_so_and_never_compared_with_others():
    """The name survives in every score, however the features were made; scores under two names have no difference."""
    images, labels, few = torch.rand(100, 1, 8, 8), torch.arange(100) % 2, dict(steps=2, batch_size=12, lr=1e-3, seed=0)
    protocol, draw = Protocol("p", 100, None, "train", ""), lambda n, generator: torch.rand(n, 1, 8, 8, generator=generator)
    networks = [features_for(None, images, labels, **few), features_for(None, images, None, **few), features_for("", images, **few)]
    names = ["64 features of a classifier of 1 x 8 x 8 images"] + 2 * [
        "64 features of a net trained without labels, to tell quarter turns of 1 x 8 x 8 images apart"]
    scores = [score_images(protocol, images, draw, network, batch_size=50, seed=0) for network in networks]
    assert [network.name for network in networks] == [score.features for score in scores] == names
    assert [_ClassifierFeatures(network.net).name for network in networks] == names and not any(score.is_fid for score in scores)
    assert lower_by(scores[1], scores[2]).value == 0
    with pytest.raises(ValueError, match="compares like with like"):
        lower_by(scores[0], scores[1])


def test_the_share_of_the_excess_is_known_where_the_distances_are():
    """Means shifted by 0, 1, 2 and 3 in one feature, with the same rows: squared distances 0, 1, 4, 9, so a shift of 2 leaves
    (4 - 1) / (9 - 1). The error is the jackknife's, and there is none to speak of where all blocks are alike."""
    rows = randn(400, 8)
    def scored(shift):
        generated = rows.clone()
        generated[:, 0] += shift
        left = left_out(rows.double(), generated.double())
        found = Measured(frechet_distance(rows, generated), jackknife_error(left), "estimate", 400, "raw feature distance")
        return ImageScores(found, 400, 400, "given", "one", "these", left=left)
    found = excess_left(scored(3.0), scored(2.0), scored(1.0))
    assert found.value == pytest.approx(3 / 8, abs=1e-5) and found.std_error < 1e-3 and found.n == 400
    assert excess_left(scored(3.0), scored(1.0), scored(1.0)).value == pytest.approx(0, abs=1e-6)
    assert excess_left(scored(3.0), scored(3.5), scored(1.0)).value > 1                  # a prior may make things worse
    with pytest.raises(ValueError, match="the base must lie above the reconstructions"):
        excess_left(scored(1.0), scored(2.0), scored(3.0))
    few = replace(scored(3.0), left=None)
    assert excess_left(few, scored(2.0), scored(1.0)).std_error is None


def test_differences_are_of_the_same_real_images():
    """Other ones of the same number and the same law, and the same ones in another order, under which other blocks are left out."""
    protocol, settings = Protocol("p", 100, None, "train", "", shuffled=False), dict(batch_size=32, seed=0)
    first, again, turned, others = (score_images(protocol, images, noise, Blocks(), **settings)
                                    for images in (REAL[:150], REAL[:150].clone(), REAL[:150].flip(0), REAL[150:300]))
    assert lower_by(first, again).value == 0 and first.real == again.real and len({first.real, turned.real, others.real}) == 3
    for other in (turned, others):
        with pytest.raises(ValueError, match=f"like with like, got .*{first.real}.* and .*{other.real}"):
            lower_by(first, other)
    with pytest.raises(ValueError, match="like with like"):
        excess_left(first, first, others)


# ---- reconstructions ------------------------------------------------------------------------------------------------

def test_reconstructions_are_a_sampler():
    vae, images, settings = DenseVAE((1, 4, 4), 2, (8,)).eval(), (REAL > 0.3).float(), dict(batch_size=32, seed=0)
    scorer = ImageScorer(Protocol("small", 60, 100, "train", "", shuffled=False), images, Blocks(), **settings)
    draw = reconstructions(vae, REAL, scorer, seen=torch.bernoulli)
    assert draw(7, torch.Generator().manual_seed(0)).shape == (7, 1, 4, 4)
    assert scorer.score(draw).generated == 60


@pytest.mark.parametrize("wrap", [lambda x: x, Rows, lambda x: torch.utils.data.Subset(Rows(x), range(60)), lambda x: x.double(), lambda x: x.clone().flip(0)])
def test_images_of_the_reference_make_no_floor(wrap):
    """The reference is the first 100 images: they are known by their bytes, however they are handed over. The other 230 are welcome, also where
    one in a hundred is a twin, as happens in published sets; of 230 three are more."""
    class Whole(torch.utils.data.Dataset):              # torch's own Subset gives no batch at a list
        def __init__(self, rows):
            self.rows = rows
        def __len__(self):
            return len(self.rows)
        def __getitem__(self, index):
            return torch.stack([self.rows[i] for i in index])
    vae, scorer = DenseVAE((1, 4, 4), 2, (8,)).eval(), ImageScorer(Protocol("small", 60, 100, "train", "", shuffled=False), REAL, Blocks(), batch_size=32, seed=0)
    wrapped = wrap(REAL[:100])
    with pytest.raises(ValueError, match="are among the real ones that samples are held against; take the other split"):
        reconstructions(vae, wrapped if isinstance(wrapped, torch.Tensor) else Whole(wrapped), scorer)
    reconstructions(vae, REAL[100:], scorer)
    reconstructions(vae, torch.cat([REAL[98:100], REAL[102:]]), scorer)
    with pytest.raises(ValueError, match="of 230 images 3 are among"):
        reconstructions(vae, torch.cat([REAL[97:100], REAL[103:]]), scorer)


class Pixels(Blocks):
    "The sixteen pixels of 1 x 4 x 4 images."
    num_features = 16

    def forward(self, images):
        return images.float().flatten(1)


class Keeping(FlatVAE):
    """z is the image, standardised; its posterior keeps 0.7 of it and draws the rest anew. Of images from N(1/2, 0.1^2) the aggregate posterior
    is the prior, exactly, and reconstructions have the images' own law."""
    def __init__(self):
        super().__init__(16)

    def posterior(self, x):
        return Independent(Normal(7 * (x.flatten(1) - 0.5), 0.51**0.5), 1)

    def likelihood(self, z):
        return Independent(Normal(0.5 + 0.1 * z.view(-1, 1, 4, 4), 0.01), 3)


def test_a_perfect_prior_leaves_nothing_of_the_excess():
    """D = 16, n = 400, known answer 0: within 5 standard errors of 12 repeats where the floor is of other images, ten times as many as are
    drawn. A floor of the reference's own images, which has to be smuggled in through a scorer of others, is more than 5 errors off: it lies
    at 0.6 of where independent draws of the same law lie."""
    def images(n, scale=0.1):
        return (0.5 + scale * torch.randn(n, 1, 4, 4)).clamp(0, 1)
    vae = Keeping()
    protocol, shares, floors = Protocol("p", 400, None, "train", ""), [], []
    for seed in range(12):
        real, others = images(400), images(4000)
        settings = dict(batch_size=400, seed=seed)
        scorer, elsewhere = ImageScorer(protocol, real, Pixels(), **settings), ImageScorer(protocol, others, Pixels(), **settings)
        perfect, base, outside, inside = (scorer.score(draw) for draw in (
            drawn_from(vae), lambda n, generator: images(n, 0.13), reconstructions(vae, others, scorer), reconstructions(vae, real, elsewhere)))
        shares.append([excess_left(base, perfect, floor).value for floor in (outside, inside)])
        floors.append([score.distance.value for score in (inside, perfect)])
    mean, error = torch.tensor(shares).mean(0), torch.tensor(shares).std(0) / 12**0.5
    assert abs(mean[0]) < 5 * error[0] and mean[1] > 5 * error[1] and mean[1] > 0.05
    floor, independent = torch.tensor(floors).mean(0)
    assert floor < 0.75 * independent


# ---- files of statistics --------------------------------------------------------------------------------------------

def test_a_file_of_statistics_stands_for_the_images(tmp_path):
    """The same distance to rounding, under a name that says so; nothing that needs the features, and no error."""
    settings, protocol = dict(batch_size=64, seed=0), Protocol("p", 300, 200, "train", "")
    scorer = ImageScorer(protocol, REAL, Blocks(), **settings)
    scorer.save_statistics(tmp_path / "real.npz")
    by_file, scores = score_images(protocol, tmp_path / "real.npz", noise, Blocks(), **settings), scorer.score(noise)
    assert by_file.distance.value == pytest.approx(scores.distance.value, rel=1e-9) and by_file.distance.n == 200
    assert by_file.protocol == "p (300 of 300 generated, real ones by real.npz)" and by_file.reference == 200 and by_file.real == scores.real
    assert by_file.distance.std_error is by_file.kernel is by_file.precision is by_file.recall is by_file.left is None
    assert list(by_file.metrics("x")) == ["frechet_x"] and lower_by(by_file, by_file).std_error is None
    again = ImageScorer(protocol, str(tmp_path / "real.npz"), Blocks(), **settings)
    again.save_statistics(tmp_path / "copy.npz")
    copied = score_images(protocol, tmp_path / "copy.npz", noise, Blocks(), **settings)
    assert copied.distance.value == pytest.approx(scores.distance.value, rel=1e-9) and copied.real == scores.real


def test_statistics_are_exchanged_with_pytorch_fid(tmp_path):
    """Its files hold np.mean and np.cov of the features; its distance is by scipy's square root of the product. Ours are read the same way."""
    from scipy.linalg import sqrtm
    settings, protocol = dict(batch_size=64, seed=0), Protocol("p", 300, None, "train", "")
    scorer = ImageScorer(protocol, REAL, Blocks(), **settings)
    rows = scorer.real.rows.double().numpy()
    np.savez(tmp_path / "theirs.npz", mu=np.mean(rows, axis=0), sigma=np.cov(rows, rowvar=False))
    scorer.save_statistics(tmp_path / "ours.npz")
    kept = []
    class Kept(Blocks):
        def forward(self, images):
            kept.append(super().forward(images))
            return kept[-1]
    theirs = score_images(protocol, tmp_path / "theirs.npz", noise, Kept(), **settings)
    fake = torch.cat(kept).double().numpy()
    with np.load(tmp_path / "ours.npz") as ours, np.load(tmp_path / "theirs.npz") as file:
        assert np.allclose(ours["mu"], file["mu"]) and np.allclose(ours["sigma"], file["sigma"]) and ours["n"] == 330
        mean, covariance = ours["mu"], ours["sigma"]
    difference = mean - fake.mean(0)
    theirs_by_scipy = difference @ difference + np.trace(covariance + np.cov(fake, rowvar=False) - 2 * sqrtm(covariance @ np.cov(fake, rowvar=False)).real)
    assert theirs.distance.value == pytest.approx(theirs_by_scipy, rel=1e-6) and theirs.reference is None and theirs.distance.n == 300
    assert theirs.real != scorer.real.identity


@pytest.mark.parametrize("spoil, words", [
    (lambda arrays: arrays.pop("mu"), "does not give mu and sigma of 8 features: .*mu"),
    (lambda arrays: arrays.update(mu=arrays["mu"][:7]), "must be finite, .8,. and .8, 8."),
    (lambda arrays: arrays.update(mu=arrays["mu"] / 0), "must be finite"), (lambda arrays: arrays.update(sigma=arrays["sigma"] * float("nan")), "real.npz does not give"),
    (lambda arrays: arrays.update(sigma=np.triu(arrays["sigma"])), "sigma symmetric"),
    (lambda arrays: arrays.update(mu=np.array([{}], dtype=object)), "real.npz does not give"),
    (lambda arrays: arrays.update(features="another net"), "it is of another net, and what measures is means of parts"),
    (lambda arrays: arrays.update(n=8), "wants at least 20 images of each kind, got 300 generated and 8 real"),
])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_files_of_statistics_are_refused(spoil, words, tmp_path):
    path, settings, protocol = tmp_path / "real.npz", dict(batch_size=64, seed=0), Protocol("p", 300, None, "train", "")
    ImageScorer(protocol, REAL, Blocks(), **settings).save_statistics(path)
    with np.load(path) as file:
        arrays = dict(file)
    spoil(arrays)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words):
        ImageScorer(protocol, path, Blocks(), **settings)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="real.npz does not give mu and sigma"):
        ImageScorer(protocol, path, Blocks(), **settings)
    with pytest.raises(ValueError, match="none.npz does not give mu and sigma .*No such file"):
        ImageScorer(protocol, tmp_path / "none.npz", Blocks(), **settings)


# ---- several processes ----------------------------------------------------------------------------------------------

def worker(rank, world, port, folder):
    "One process of several: two scores, the second with less work than processes."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(reset_partial_state=True)        # of the parent, whose imports a fork need not repeat
    torch.manual_seed(rank)
    torch.save(both_scores(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def both_scores():
    uneven = Protocol("uneven", 300, None, "train", "")            # 5 and 6 batches of 64
    lonely = Protocol("lonely", 50, 50, "train", "")               # one batch each: the other process sees nothing
    return [vars_of(score_images(protocol, REAL, noise, Blocks(), batch_size=64, seed=0)) for protocol in (uneven, lonely)]


def vars_of(scores):
    "Plain values."
    return {**vars(scores), "distance": vars(scores.distance), "kernel": vars(scores.kernel),
            "precision": vars(scores.precision), "recall": vars(scores.recall), "left": None if scores.left is None else scores.left.tolist()}


def test_two_processes_are_one(tmp_path):
    "The same on both, and one process's to the rounding of sums; also where a process has no batch at all."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (2, port, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    for found, alone in zip(first, both_scores()):
        for kind in ("distance", "kernel"):
            for name in ("value", "std_error"):
                assert found[kind][name] == pytest.approx(alone[kind][name], rel=1e-6, abs=1e-12)
        assert found["left"] == (alone["left"] and pytest.approx(alone["left"], rel=1e-6, abs=1e-12))
        assert {**found, "distance": 0, "kernel": 0, "left": 0} == {**alone, "distance": 0, "kernel": 0, "left": 0}


# ---- nearest neighbours ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [8, 64, 100])
def test_nearest_in_a_stream_is_a_tree_over_the_views(size):
    images, samples = torch.rand(90, 3, size, size), torch.rand(4, 3, size, size)
    distances, indices = nearest_in(samples, Rows(images), k=3, chunk=20)
    tree = KDTree(_neighbour_view(images).flatten(1).double().numpy())
    expected, order = tree.query(_neighbour_view(samples).flatten(1).double().numpy(), k=3)
    assert (indices.numpy() == order).all() and torch.allclose(distances.double(), torch.from_numpy(expected), rtol=1e-5)


def test_the_view_is_the_middle_of_64_pixels():
    image = torch.zeros(1, 1, 128, 128)
    image[..., 24:104, 24:104] = 1                      # the middle 80 of 128 is the middle 40 of 64
    assert _neighbour_view(image).shape == (1, 1, 40, 40) and _neighbour_view(image).mean() > 0.98
    assert torch.equal(_neighbour_view(torch.ones(1, 3, 64, 64)), torch.ones(1, 3, 40, 40))
    small = torch.rand(1, 1, 28, 28)
    assert torch.equal(_neighbour_view(small), small)


def test_the_view_averages_what_it_leaves_out():
    "A checkerboard of single pixels becomes grey where it shrinks by four, and would be black or white if it were sampled."
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2
    assert (_neighbour_view(board.float()[None, None]) - 0.5).abs().max() < 0.05


def test_an_image_finds_itself():
    images = torch.rand(50, 1, 70, 70)
    values, indices = nearest_in(images[[3, 33]], Rows(images), k=1, chunk=7)
    assert indices.flatten().tolist() == [3, 33] and values.eq(0).all()
    assert nearest(images[[3]], images)[1].item() == 3


@pytest.mark.parametrize("k, shape, words", [(0, (1, 8, 8), "k must be between 1 and the number of images 5, got 0"),
                                             (6, (1, 8, 8), "got 6"), (1, (1, 9, 8), r"samples have shape \(1, 9, 8\)")])
def test_bad_neighbours_are_refused(k, shape, words):
    with pytest.raises(ValueError, match=words):
        nearest_in(torch.rand(2, *shape), Rows(torch.rand(5, 1, 8, 8)), k=k)


@pytest.mark.parametrize("model, name, unit, protocol, printed", [
    ("nvae:celeba64-30", "ncp", "FID", "nvae-50k-train", 5.25), ("nvae:cifar10", "base", "FID", "nvae-50k-train", 51.71),
    ("nvae:celeba64-6", "ncp", "FID", "nvae-50k-train", 18.68), ("nvae:celeba64-6", "reconstruction", "FID", "nvae-50k-train", None),
    ("nvae:celeba64-30", "ncp", "feature distance", "nvae-50k-train", None), ("nvae:celeba64-30", "ncp", "FID", "rae-10k-test", None),
    ("nvae:celeba64-30", "budgets", "FID", "nvae-50k-train", None), ("dense", "ncp", "FID", "nvae-50k-train", None)])
def test_the_papers_fid_stands_beside_its_own_experiment_alone(model, name, unit, protocol, printed):
    assert published_distance(model, name, ImageScores(Measured(9.0, unit=unit), 50_000, 162_770, "one", protocol, "these")) == printed
