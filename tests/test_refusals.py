"""What a user can get wrong with a VAE, data or ratios of their own: refused, by name, before any work."""
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.data import Binarized
from ncp_vae.engine.evaluate import compare
from ncp_vae.engine.train import Recipe, fit_ebm, fit_lars, fit_ncp, fit_snis, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import HMC, MALA, SIR, SMC, JointMALA, proposal_budget
from ncp_vae.walk import FlatVAE, WithPriors, from_prior

FEW = dict(steps=2, batch_size=8, lr=1e-3, seed=0)
IMAGES = torch.bernoulli(torch.full((8, 1, 4, 4), 0.5), generator=torch.Generator().manual_seed(0))


class Own(FlatVAE):
    """A stranger's VAE: 4x4 images, as many latents as rows in a batch, so that what is missing broadcasts."""
    events = (1, 3)

    def __init__(self):
        super().__init__(8)
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(8, 16)

    def posterior(self, x):
        loc, log_scale = self.encoder(x.flatten(1)).chunk(2, -1)
        return Independent(Normal(loc, log_scale.exp()), self.events[0])

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.decoder(z).view(-1, 1, 4, 4), validate_args=False), self.events[1])


class NoEventInPosterior(Own):
    events = (0, 3)


class NoEventInLikelihood(Own):
    events = (1, 0)


class Column(RatioEstimator):
    """Forgets the last squeeze: [B, 1] for [B]."""
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def condition(self, context):
        return self.net


def small_ratios():
    return [MLPRatio(8, hidden=(4,))]


def small_ncp(vae=None):
    return NoiseContrastivePrior(vae or Own(), small_ratios())


TRAININGS = {"vae": fit_vae, "ncp": lambda vae, x, **how: fit_ncp(vae, x, ratios=small_ratios(), **how),
             "ebm": lambda vae, x, **how: fit_ebm(vae, x, ratios=small_ratios(), sampler=SIR(3), **how),
             "snis": lambda vae, x, **how: fit_snis(vae, x, ratios=small_ratios(), proposals=3, **how)}
SCORES = {"elbo": elbo, "iwae": lambda vae, x: iwae(vae, x, 2),
          **{name: lambda vae, x, fit=fit: fit(vae, x, **FEW) for name, fit in TRAININGS.items()}}


@pytest.mark.parametrize("score", [elbo, lambda vae, x: iwae(vae, x, 2)])
def test_shapes_that_would_broadcast(score):
    assert score(Own(), IMAGES) is not None
    for broken, words in [(NoEventInPosterior, "posterior of group 0"), (NoEventInLikelihood, "likelihood")]:
        with pytest.raises(ValueError, match=words):
            score(broken(), IMAGES)
        with pytest.raises(ValueError, match=words):
            fit_vae(broken(), IMAGES, **FEW)


@pytest.mark.parametrize("images, words", [(IMAGES * 255, "outside"), (IMAGES + 0.5, "outside"), (IMAGES * float("nan"), "outside"),
                                           (IMAGES[:, 0], "images of shape")])
def test_images_that_the_likelihood_cannot_produce(images, words):
    vae = DenseVAE((1, 4, 4), 8)
    for score in (elbo, lambda vae, x: iwae(vae, x, 2)):
        with pytest.raises(ValueError, match=words):
            score(vae, images)


def test_a_ratio_that_does_not_give_one_number_a_row():
    vae = Own()
    with pytest.raises(ValueError, match="log_ratio must map"):
        fit_ncp(vae, IMAGES, ratios=[Column()], **FEW)
    with pytest.raises(ValueError, match="one number a row"):
        NoiseContrastivePrior(vae, [Column()]).log_ratio([torch.zeros(8, 8)])
    with pytest.raises(ValueError, match="0 ratios for a VAE of 1"):
        NoiseContrastivePrior(vae, [])


def test_the_frozen_vae_stays_in_eval_mode():
    ncp = NoiseContrastivePrior(Own(), [MLPRatio(8)])
    ncp.train()
    assert ncp.ratios.training and not ncp.vae.training


def test_a_loader_without_batches_does_not_hang():
    with pytest.raises(ValueError, match="no batch"):
        fit_vae(Own(), DataLoader(IMAGES[:4], 8, drop_last=True), **FEW)


def test_data_of_other_kinds():
    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, index):
            return dict(image=IMAGES[index])
    with pytest.raises(ValueError, match="it gave dict"):
        fit_vae(Own(), Dicts(), **FEW)
    for how in (dict(), dict(ratios=small_ratios())):
        with pytest.raises(ValueError, match="a DataLoader must give each batch as a Tensor, alone or before its labels; it gave a dict"):
            (fit_ncp if how else fit_vae)(Own(), DataLoader(Dicts(), 8), **how, **FEW)
    with pytest.raises(TypeError, match=r"images must be a Tensor \[B, \*image\], got a dict"):
        elbo(Own(), dict(image=IMAGES))
    with pytest.raises(ValueError, match="torch.uint8"):
        fit_vae(Own(), IMAGES.byte(), **FEW)


def test_an_unwritable_checkpoint_is_noticed_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    class Counted(Own):
        def likelihood(self, z):
            steps.append(self.training)
            return super().likelihood(z)
    for place in (dict(checkpoint=tmp_path / "file" / "vae.ckpt"), dict(history=tmp_path / "file" / "history.jsonl"),
                  dict(checkpoint=tmp_path)):
        with pytest.raises(ValueError, match="cannot write"):
            fit_vae(Counted(), IMAGES, **FEW, **place)
    assert len(steps) <= 6                        # each try scored one batch, twice, and trained on none


def test_a_resumed_training_must_be_the_same(tmp_path):
    fit_vae(Own(), IMAGES, checkpoint=tmp_path / "vae.ckpt", kl_warmup=1, **FEW)
    with pytest.raises(ValueError, match="kl_warmup"):
        fit_vae(Own(), IMAGES, checkpoint=tmp_path / "vae.ckpt", kl_warmup=2, **FEW)


def test_a_further_stage_needs_its_own_vae_and_a_sampler():
    vae = Own()
    ncp = fit_ncp(vae, IMAGES, ratios=[MLPRatio(8, hidden=(4,))], **FEW)
    with pytest.raises(ValueError, match="another VAE"):
        fit_ncp(Own(), IMAGES, base=ncp, sampler=SIR(8), **FEW)
    with pytest.raises(ValueError, match="give both"):
        fit_ncp(vae, IMAGES, base=ncp, **FEW)
    assert fit_ncp(vae, IMAGES, base=ncp, sampler=SIR([8]), ratios=[MLPRatio(8, hidden=(4,))], **FEW) is not None


def test_training_leaves_the_callers_random_numbers_alone():
    vae, data = Own(), Binarized(torch.full((16, 1, 4, 4), 0.5))
    before = torch.random.get_rng_state()
    fit_ncp(fit_vae(vae, data, **FEW), DataLoader(data, 8, shuffle=True, generator=torch.Generator()), **FEW)
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_to_train():
    class Fixed(DenseVAE):
        def __init__(self):
            super().__init__((2,), 2, hidden=(4,), sigma=1.0)
            self.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        fit_vae(Fixed(), torch.rand(8, 2), **FEW)
    assert Fixed().walk(from_prior(), n=1).latents[0].shape == (1, 2)


@pytest.mark.parametrize("change", [dict(steps=2.5), dict(steps=-1), dict(kl_warmup=-1), dict(lr=0.0), dict(lr=float("nan"))])
def test_settings_that_cannot_be(change):
    with pytest.raises(ValueError):
        fit_vae(Own(), IMAGES, **{**FEW, **change})


# ---- not what it should be: a sentence, and none of torch's ----------------------------------------------------------

class PairForPosterior(Own):
    def posterior(self, x):
        return self.encoder(x.flatten(1)).chunk(2, -1)


class ImageForLikelihood(Own):
    def likelihood(self, z):
        return self.decoder(z).view(-1, 1, 4, 4).sigmoid()


class Autoencoder(nn.Module):
    """No TopDownVAE."""
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 8), nn.Linear(8, 16)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("vae, images, error, words", [
    (Own, IMAGES.double(), ValueError, "cannot encode images of torch.float64, its weights are torch.float32: convert"),
    (Own, 255 * IMAGES + 1, ValueError, r"posterior of images in \[1, 256\] is not finite: bring them to the range|lie outside"),
    (Own, 2 * IMAGES - 1, ValueError, r"images in \[-1, 1\] lie outside the likelihood's support"),
    (PairForPosterior, IMAGES, TypeError, "the posterior must be a Distribution of torch with one row an image, got a tuple: return one"),
    (ImageForLikelihood, IMAGES, TypeError, r"the likelihood must be a Distribution .* got a Tensor: return one, like normal\(mean, sigma\)"),
    (Autoencoder, IMAGES, TypeError, "a VAE must be a TopDownVAE, got a Autoencoder: subclass FlatVAE, which needs")])
def test_a_model_or_images_of_another_kind(name, vae, images, error, words):
    with pytest.raises(error, match=words):
        SCORES[name](vae(), images)


def test_where_no_image_is_scored():
    for make in (lambda: small_ncp(Autoencoder()), lambda: WithPriors(Autoencoder(), [None])):
        with pytest.raises(TypeError, match="a VAE must be a TopDownVAE, got a Autoencoder"):
            make()
    with pytest.raises(TypeError, match="the likelihood must be a Distribution"):
        small_ncp(ImageForLikelihood()).sample(4)
    with pytest.raises(ValueError, match="cannot encode images of torch.float64"):
        proposal_budget(small_ncp(), 8, 2.0, images=IMAGES.double())


def test_a_vae_that_converts_its_images_is_left_alone():
    class Converting(Own):
        def posterior(self, x):
            return super().posterior(x.float())
    assert elbo(Converting(), IMAGES.double()) is not None


@pytest.mark.parametrize("ratios, words", [(nn.Linear(8, 1), "a list of RatioEstimators, one a group; got a Linear$"),
                                           ([nn.Linear(8, 1)], "got a Linear in it: MLPRatio is one, and a subclass"),
                                           (MLPRatio(8), "one a group; got a MLPRatio$")])
def test_ratios_that_are_none(ratios, words):
    calls = [lambda: NoiseContrastivePrior(Own(), ratios), lambda: fit_ncp(Own(), IMAGES, ratios=ratios, **FEW),
             lambda: fit_ebm(Own(), IMAGES, ratios=ratios, sampler=SIR(3), **FEW),
             lambda: fit_lars(Own(), IMAGES, ratios=ratios, proposals=3, **FEW)]
    for call in calls:
        with pytest.raises(TypeError, match=words):
            call()


class Probability(Column):
    """The classifier's D where its logit is meant."""
    def condition(self, context):
        return lambda z: self.net(z).sigmoid().squeeze(-1)


def test_a_sigmoid_for_a_logit():
    calls = [fit_ncp, partial(fit_ebm, sampler=SIR(3)), partial(fit_snis, proposals=3)]
    calls = [partial(fit, Own(), IMAGES, ratios=[Probability()], **FEW) for fit in calls]
    for call in [*calls, lambda: NoiseContrastivePrior(Own(), [Probability()]).sample(4, MALA(1, 0.1))]:
        with pytest.raises(ValueError, match="ends in a sigmoid, whose output is never below 0 or above 1: log r is the logit"):
            call()
    with pytest.warns(UserWarning, match="at all 200 draws of the prior, like the output of a sigmoid"):
        NoiseContrastivePrior(Own(), [Probability()]).log_partition(200)


@pytest.mark.parametrize("wrong", ["hmc", 4, SIR, {}])
def test_a_sampler_that_is_none(wrong):
    ncp = small_ncp()
    calls = [lambda: ncp.sample(4, wrong), lambda: NoiseContrastivePrior(Own(), small_ratios(), wrong),
             lambda: fit_ncp(ncp.vae, IMAGES, ratios=small_ratios(), base=ncp, sampler=wrong, **FEW),
             lambda: fit_ebm(Own(), IMAGES, ratios=small_ratios(), sampler=wrong, **FEW),
             lambda: compare({"ncp": ncp}, IMAGES, num_samples=2, log_z_samples=30, proposals=3, seed=0, draws=20, samplers={"ncp": wrong})]
    for call in calls:
        with pytest.raises(TypeError, match=r"a sampler must be an object like SIR\(500\) or HMC\(100\), got"):
            call()
    with pytest.raises(TypeError, match="temperature must be a number, got"):
        ncp.vae.sample(4, wrong if wrong != 4 else "4")
    with pytest.raises(TypeError, match=r"a method is an object like SMC\(100\)"):
        ncp.log_partition(10, method="smc")


def told(call):
    "The warnings of a call, without those about one seed's training."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return " ".join(str(each.message) for each in caught)


class InUnit(DenseVAE):
    """A Normal likelihood whose means a sigmoid keeps in (0, 1)."""
    def likelihood(self, z):
        law = super().likelihood(z)
        return Independent(Normal(law.base_dist.loc.sigmoid(), law.base_dist.scale), 3)


def test_a_range_that_only_looks_wrong():
    "A Normal likelihood has a density everywhere: a warning. Where its means reach as far as the images there is none."
    grey = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for fit in (TRAININGS["vae"], lambda vae, x, **how: fit_ncp(vae, x, ratios=[MLPRatio(2, hidden=(4,))], **how)):
        def trained(kind, images):
            return told(lambda: fit(kind((1, 4, 4), 2, hidden=(4,), sigma=0.3), images, **FEW))
        assert "in [0, 255], are whole numbers, like bytes: divide them by 255" in trained(DenseVAE, 255 * IMAGES)
        assert "lie outside [0, 1], where all means of the likelihood are, like those of a sigmoid" in trained(InUnit, 2 * grey - 1)
        assert "the images" not in trained(DenseVAE, 2 * grey - 1) + trained(InUnit, grey) + trained(DenseVAE, IMAGES)


def test_a_frozen_vae_may_have_been_trained_by_the_cross_entropy_of_grey_pixels():
    "Its likelihood is not used; what is outside [0, 1] it cannot mean."
    grey = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("ncp", "ebm", "snis"):
        assert TRAININGS[name](Own(), grey, **FEW) is not None
        for wrong in (grey - 0.5, 2 * grey):
            with pytest.raises(ValueError, match="lie outside the likelihood's support"):
                TRAININGS[name](Own(), wrong, **FEW)
    with pytest.raises(ValueError, match="lie outside the likelihood's support"):
        fit_vae(Own(), grey, **FEW)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_loader_brings_its_own_batch_size(name):
    loader = DataLoader(TensorDataset(IMAGES), 4)
    with pytest.raises(ValueError, match="batch_size is 8 on a process, and the DataLoader's 4; a DataLoader is used as it is"):
        TRAININGS[name](Own(), loader, **FEW)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got None"):
        TRAININGS[name](Own(), loader, **{**FEW, "batch_size": None})
    assert TRAININGS[name](Own(), loader, **{**FEW, "batch_size": 4}) is not None


@pytest.mark.parametrize("name", TRAININGS)
def test_inference_mode_has_no_gradients(name):
    vae = Own()
    with torch.inference_mode(), pytest.raises(ValueError, match="under torch.inference_mode there are no gradients"):
        TRAININGS[name](vae, IMAGES, **FEW)
    assert TRAININGS[name](vae, IMAGES, **FEW) is not None


def test_what_inference_mode_leaves():
    with torch.inference_mode():
        made_inside = Own()
    with pytest.raises(ValueError, match="under torch.inference_mode there are no gradients, and none for weights that were made under it"):
        fit_vae(made_inside, IMAGES, **FEW)
    ncp = small_ncp()
    with torch.inference_mode():
        for sampler in (MALA(1, 0.1), HMC(1, 0.1), JointMALA(1, 0.1)):
            with pytest.raises(ValueError, match="a chain needs gradients, and torch.inference_mode has none: sample under torch.no_grad"):
                ncp.sample(4, sampler)
        ncp.log_partition(10)
        ncp.normalised_log_ratio(ncp.sample(4, SIR(3)).latents)
    ncp.load_state_dict(ncp.state_dict())                      # its log Z is a tensor like any other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_none(value):
    for name in ("lr_end", "lr_warm_up", "weight_decay", "clip"):
        with pytest.raises(ValueError, match=f"Recipe: .*{name}.* must be finite and at least 0, got .*{value}"):
            Recipe(**{name: value})
    for name in ("beta", "kl_warmup", "spectral", "spectral_start", "moments"):
        with pytest.raises(ValueError, match=f"fit_vae: .*{name}.* must be finite and at least 0, got .*{value}"):
            fit_vae(Own(), IMAGES, **FEW, **{name: value})
    with pytest.raises(ValueError, match=f"lr positive and finite, got 2 and {value}"):
        fit_vae(Own(), IMAGES, **{**FEW, "lr": value})


class WithNorm(Own):
    """Batch norm in the decoder: a walk in training mode moves its running statistics."""
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def likelihood(self, z):
        return super().likelihood(self.norm(z))


@pytest.mark.filterwarnings("ignore:a model with batch norm")
@pytest.mark.parametrize("draw", [lambda ncp: ncp.sample(4), lambda ncp: ncp.vae.sample(4), lambda ncp: SIR(3).sample(ncp, 4),
                                  lambda ncp: SMC(3).sample(ncp, 4), lambda ncp: JointMALA(1, 0.1).sample(ncp, 4),
                                  lambda ncp: HMC(1, 0.1).sample(ncp, 4), lambda ncp: proposal_budget(ncp, 8, 2.0)])
def test_sampling_is_in_eval_mode_and_leaves_the_mode_as_it_was(draw):
    ncp = small_ncp(WithNorm())
    ncp.vae.train()
    draw(ncp)
    assert ncp.vae.training and ncp.vae.norm.training and ncp.vae.norm.num_batches_tracked == 0
