"""What a user can get wrong with a VAE, data or ratios of their own: refused, by name, before any work."""
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.data import DataLoader

from ncp_vae.bound import elbo, iwae
from ncp_vae.engine.data import Binarized
from ncp_vae.engine.train import fit_ncp, fit_vae
from ncp_vae.models.flat import DenseVAE
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import SIR
from ncp_vae.walk import FlatVAE, from_prior

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
