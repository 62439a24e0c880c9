"""Scores against closed forms and against scikit-learn."""
import math
import warnings

import pytest
import torch
from sklearn.neighbors import KDTree
from torch import nn

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.evaluate import block_mmd2, compare, log_likelihoods, table_of, walks_of
from ncp_vae.engine.features import frechet_distance, jackknife_error, left_out, precision_recall
from ncp_vae.engine.fid import ImageScorer, Protocol
from ncp_vae.engine.groups import group_logits, group_reports, record_groups, sir_ess
from ncp_vae.engine.neighbours import nearest
from ncp_vae.holes import mmd2
from ncp_vae.measured import Measured
from ncp_vae.models.priors import GaussianMixture
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.likelihoods import normal
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior, ReweightedPrior
from ncp_vae.sampling import SIR, Langevin
from ncp_vae.walk import FlatVAE, WithPriors, diagonal_normal, from_prior


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
    vae = Linear()
    tilts = {"right": Tilt(a, b=7.0), "wrong": Tilt(-a)}
    found = compare({"base": vae, **{name: NoiseContrastivePrior(vae, [tilt]) for name, tilt in tilts.items()}}, x, **settings)
    right, wrong = found["right"], found["wrong"]
    base = found["base"]["log_likelihood"]
    assert abs(base.value - log_normal(x, 0.0, variance).mean()) < 1e-4 and base.kind == "lower bound"   # an exact posterior
    assert abs(right["log_z"].value - (a**2 / 2 + 7.0)) < 5 * right["log_z"].std_error
    assert abs(right["gain"].value - exact) < 5 * right["gain"].std_error
    assert right["gain_bound"].value < right["gain"].value + 5 * right["log_z"].std_error
    assert abs(wrong["gain"].value - exact) > 5 * wrong["gain"].std_error
    assert (right["log_likelihood"].kind, right["bound"].kind) == ("estimate", "lower bound")
    assert list(found["base"]) == ["log_likelihood"]


def test_a_gain_over_an_estimate_holds_the_errors_of_both_log_z():
    """Against an NCP as the first prior: the shared errors add in quadrature. Equal ratios gain nothing, to float32."""
    vae, x = Linear(), torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    first, second = (NoiseContrastivePrior(vae, [Tilt(0.8)]) for _ in range(2))
    found = compare({"first": first, "second": second}, x, num_samples=2, log_z_samples=500, seed=0)
    gain = found["second"]["gain"]
    assert gain.value == pytest.approx(0, abs=1e-6) and gain.std_error == pytest.approx(2**0.5 * found["first"]["log_z"].std_error)


def test_another_law_is_compared_on_the_same_posterior_draws():
    """N(m, 1) in the prior's place against the ratio that makes the same law of N(0, 1): the same values image by image, to
    the error of log Z, although one is walked and the other weighed; and the base's own law gains exactly nothing."""
    vae, m = Linear(), 0.6
    class Shifted(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, context, n):
            return diagonal_normal(torch.full((n, 1), self.m), torch.ones(n, 1))
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    priors = {"base": vae, "itself": WithPriors(vae, [Shifted(0.0)]), "law": WithPriors(vae, [Shifted(m)]),
              "ratio": NoiseContrastivePrior(vae, [Tilt(m)])}
    found = compare(priors, x, num_samples=5, log_z_samples=50_000, seed=0)
    assert found["itself"]["gain"].value == pytest.approx(0, abs=1e-6)
    law, ratio = found["law"]["gain"], found["ratio"]["gain"]
    assert abs(law.value - ratio.value) < 5 * found["ratio"]["log_z"].std_error
    assert found["law"]["log_likelihood"].kind == "lower bound"


def test_thirteen_priors_in_one_table_without_a_special_case():
    """Every kind: a VAE's own, other laws, mixtures, ratios on each, staged and not, by several samplers; every prior is in
    every column that its kind has, and the thirteenth is one more entry of the dict."""
    vae, x = Linear(), torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    mixed = WithPriors(vae, [GaussianMixture.fit(vae, x, 2, 0)])
    bases = {"own": vae, "mixture": mixed, "kept": WithPriors(vae, [None])}
    tilted = {f"{name} tilted {a}": NoiseContrastivePrior(base, [Tilt(a)]) for name, base in bases.items() for a in (0.3, -0.3)}
    unnormalised = {f"{name} energy": NoiseContrastivePrior(base, [Tilt(0.1, 2.0)]) for name, base in bases.items()}
    priors = {**bases, **tilted, **unnormalised, "by Langevin": NoiseContrastivePrior(vae, [Tilt(0.3)])}
    assert len(priors) == 13
    found = compare(priors, x, num_samples=2, log_z_samples=100, proposals=4, draws=40, seed=0,
                    samplers={"by Langevin": Langevin(3, 0.1)})
    assert list(found) == list(priors) and len(table_of(found).splitlines()) == 14
    for i, (name, row) in enumerate(found.items()):
        reweighted = isinstance(priors[name], ReweightedPrior)
        wanted = {"log_likelihood", "mmd2", "told_apart", "seconds"} | ({"gain"} if i else set())
        assert set(row) == wanted | ({"bound", "gain_bound", "log_z"} if reweighted else set())
        assert all(isinstance(value, Measured) for value in row.values())


def test_without_likelihoods_no_log_z_is_looked_for():
    "num_samples 0: the columns of samples alone, the same as beside likelihoods."
    vae, x = Linear(), torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    priors = {"own": vae, "tilted": NoiseContrastivePrior(vae, [Tilt(0.3)])}
    alone = compare(priors, x, num_samples=0, draws=40, seed=0)
    beside = compare(priors, x, num_samples=2, log_z_samples=100, draws=40, seed=0)
    for name, row in alone.items():
        assert list(row) == ["mmd2", "told_apart", "seconds"]
        assert all(row[key] == beside[name][key] for key in ("mmd2", "told_apart"))


def test_images_are_scored_beside_and_paired():
    "The first prior has no difference; the others' is `lower_by`, with the paired error and the distance's unit."
    images = torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = DenseVAE((1, 4, 4), 2, (8,)).eval()
    scorer = ImageScorer(Protocol("p", 60, None, "test", ""), images, Pixel(), batch_size=30, seed=0)
    found = compare({"base": vae, "ncp": NoiseContrastivePrior(vae, [MLPRatio(2)])}, images.round(), num_samples=1,
                    log_z_samples=10, seed=0, scorer=scorer)
    assert "lower_by" not in found["base"] and found["ncp"]["lower_by"].std_error > 0
    difference = found["base"]["distance"].value - found["ncp"]["distance"].value
    assert found["ncp"]["lower_by"].value == difference and found["ncp"]["distance"].unit == "raw feature distance"


@pytest.mark.parametrize("priors, words", [({}, "dict of names and priors"), (Linear(), "dict of names and priors, .* got Linear"),
                                           ({"a": Tilt(1.0)}, "a prior is a TopDownVAE, or a NoiseContrastivePrior, .*; got a: Tilt"),
                                           ({"a": ReweightedPrior(Linear(), [Tilt(1.0)])}, "which has a log Z; got a: ReweightedPrior")])
def test_what_is_no_dict_of_priors_is_refused(priors, words):
    with pytest.raises(ValueError, match=words):
        compare(priors, torch.zeros(3, 1), num_samples=1, seed=0)


@pytest.mark.parametrize("settings, words", [(dict(draws=19), "got 19"), (dict(draws=20, samplers={"ncp": SIR(3)}), "got ncp"),
                                             (dict(copies=2), "copies = 2"), (dict(bound_images=4), "between 1 and 3, got 4")])
def test_numbers_that_do_not_fit_are_refused_before_anything_is_computed(settings, words):
    with pytest.raises(ValueError, match=words):
        compare({"base": Linear()}, torch.zeros(3, 1), num_samples=1, seed=0, **settings)


def test_what_was_computed_is_kept_under_the_priors_names():
    names, vae = [], Linear()
    def keep(name, compute):
        names.append(name)
        return compute()
    compare({"base": vae, "ncp": NoiseContrastivePrior(vae, [Tilt(0.1)]), "other": WithPriors(vae, [None])}, torch.zeros(8, 1),
            num_samples=1, log_z_samples=10, copies=2, draws=20, seed=0, keep=keep)
    assert names == ["likelihoods-base-ncp-0", "likelihoods-base-ncp-1", "likelihoods-other-0", "likelihoods-other-1",
                     "posterior-0", "posterior-1", "latents-base", "latents-ncp", "latents-other"]


class Pixel(nn.Module):
    "Bytes of any shape -> the mean and the standard deviation of an image."
    num_features, is_standard, name = 2, False, "mean and deviation"

    def forward(self, images):
        flat = images.float().flatten(1) / 255
        return torch.stack([flat.mean(1), flat.std(1) if flat.shape[1] > 1 else flat[:, 0].square()], 1)


def test_the_table_of_the_groups_is_printed_and_recorded(capsys):
    "By the groups' numbers, or by the names that are given; the sum takes the groups as independent."
    class Record(dict):
        def metric(self, name, value):
            self[name] = value
            return value
    x, vae = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)), Linear()
    ncp = NoiseContrastivePrior(vae, [Tilt(0.4)])
    reports, ess = group_reports(ncp, x, 0) * 2, sir_ess(ncp, 5, 8, 0) * 2
    run = Record()
    total = record_groups(run, reports, ess, 100)
    assert set(run) == {f"{name}_{k}" for name in ("loss", "kl_bound", "log_mean_ratio", "ess") for k in (1, 2)} | {"kl_bound"}
    assert total.value == pytest.approx(2 * reports[0].kl_bound) and run["kl_bound"] == total and total.kind == "lower bound"
    assert total.std_error == pytest.approx(2**0.5 * reports[0].kl_bound_std_error)
    assert run["loss_1"] == Measured(reports[0].loss, reports[0].loss_std_error, n=100) and run["ess_2"] == ess[1]
    named = Record()
    record_groups(named, reports[:1], ess[:1], 100, labels=["ncp"])
    assert set(named) == {"loss_ncp", "kl_bound_ncp", "log_mean_ratio_ncp", "ess_ncp"}
    assert "all groups: at least" in capsys.readouterr().out


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
    def base(images, **more):
        found = compare({"base": ncp.vae, "ncp": ncp}, images, **settings, **more)
        return found["base"]["log_likelihood"], found["ncp"]["bound"]
    (once, _), (copied, bound), (naive, _) = base(x), base(x.repeat(5, 1), copies=5), base(x.repeat(5, 1))
    assert copied.n == 200 and bound.n == 100
    assert copied.value == pytest.approx(once.value, abs=1e-4)
    assert copied.std_error == pytest.approx(once.std_error, rel=1e-3)
    assert naive.std_error == pytest.approx(once.std_error / 5**0.5, rel=0.01)


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


@pytest.mark.parametrize("wide, known", [(1.6, 0.0624), (3.0, 0.3900)])
def test_one_bandwidth_measures_every_prior(wide, known):
    """N(0, wide^2 I) against N(0, I) in 8 dimensions under the reference's bandwidth, in closed form and within 5 standard
    errors; a bandwidth from the pooled samples of each prior, the negative control, finds a wide one near: 0.036 for 0.062."""
    g = torch.Generator().manual_seed(0)
    x, y = wide * torch.randn(1000, 8, generator=g), torch.randn(1000, 8, generator=g)
    b = torch.pdist(y).median().item()
    kernel = [(1 + variance / b**2) ** -4 for variance in (2 * wide**2, 2, 1 + wide**2)]
    exact = kernel[0] + kernel[1] - 2 * kernel[2]
    found = block_mmd2(x, y)
    assert abs(found.value - exact) < 5 * found.std_error and exact == pytest.approx(known, rel=0.03) and found.n == 1000
    pooled = sum(mmd2(a, c) for a, c in zip(x.chunk(10), y.chunk(10))) / 10
    assert pooled < exact - 5 * found.std_error


def fresh_errors(measure):
    "The mean error that is reported over the deviation of the values, of 200 data sets; known to 5 %."
    found = torch.tensor([measure(torch.Generator().manual_seed(i)) for i in range(200)]).double()
    return (found[:, 1].mean() / found[:, 0].std()).item()


def difference_of_distances(generator):
    real, worse, better = torch.randn(3, 200, 4, generator=generator).double()
    lefts = [left_out(real, fake) for fake in (1.4 * worse, 1.2 * better)]
    values = [frechet_distance(real, fake) for fake in (1.4 * worse, 1.2 * better)]
    return values[0] - values[1], jackknife_error(lefts[0] - lefts[1])


def share_near(generator):
    real, fake = torch.randn(2, 200, 4, generator=generator).double()
    share = precision_recall(real, 1.2 * fake)[0]
    return share.value, share.std_error


def gain_of_a_tilt(generator):
    x = 1 + 1.25**0.5 * torch.randn(60, 1, generator=generator)
    vae = Linear()
    row = compare({"base": vae, "ncp": NoiseContrastivePrior(vae, [Tilt(0.8)])}, x, num_samples=1, log_z_samples=300,
                  seed=int(torch.randint(2**31, (), generator=generator)))["ncp"]
    return row["gain"].value, row["gain"].std_error


@pytest.mark.parametrize("measure", [difference_of_distances, share_near, gain_of_a_tilt])
def test_a_reported_error_is_the_deviation_over_fresh_data_sets(measure):
    "Between 0.9 and 1.3 of it, seeds fixed, with a standard error of 0.05 to either side. Binomial, the share's would be 0.8."
    assert 0.85 < fresh_errors(measure) < 1.35


def test_a_bound_of_fewer_images_says_so_in_the_table():
    "Never two numbers of different images under heads that do not tell them apart; equal numbers need no word."
    vae, x = Linear(), torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    def head(bound_images):
        rows = compare({"base": vae, "ncp": NoiseContrastivePrior(vae, [Tilt(0.1)])}, x, num_samples=1, log_z_samples=500,
                       proposals=4, bound_images=bound_images, seed=0)
        return table_of(rows).splitlines()[0]
    assert "bound (n = 200)" in head(101) and "gain_bound (n = 200)" in head(101) and "log_z (n" not in head(101)
    assert "(n =" not in head(None)


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
        values += [vae.sample(5, generator=generator()).likelihood.mean, walks_of(vae, 5, 0, images=x)[1]]
        values += [torch.tensor([report.loss for report in group_reports(ncp, x, 0)]),
                   torch.tensor([score.value for score in sir_ess(ncp, 5, 4, 0)])]
        rows = compare({"base": vae, "ncp": ncp}, x, num_samples=2, log_z_samples=20, proposals=4, seed=0)
        return [*values, torch.tensor([value.value for row in rows.values() for value in row.values()])]
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
