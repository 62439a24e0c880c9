"""VAEs of pythae and diffusers as ours: the loss is the likelihood, the store brings them back, and our priors answer as its samplers.

The networks are tiny and untrained: nothing here depends on what they have learned."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exact import rng
from pythae.models import AE, VAE, VAMP, AEConfig, BetaTCVAE, BetaTCVAEConfig, VAEConfig, VAMPConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST
from pythae.pipelines import GenerationPipeline
from torch import nn

from ncp_vae.bound import elbo
from ncp_vae.engine import store
from ncp_vae.engine.train import fit_ncp
from ncp_vae.models.adapters import DiffusersVAE, PythaeSampler, PythaeVAE, from_pythae
from ncp_vae.models.config import configured
from ncp_vae.models.priors import GaussianMixture
from ncp_vae.models.ratios import ConvRatio, MLPRatio
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.sampling import MALA, SIR
from ncp_vae.walk import WithPriors

SHAPE, IMAGES = (1, 4, 4), torch.rand(64, 1, 4, 4, generator=rng(0))


def pythae_vae(loss="bce", kind=VAE, config=VAEConfig, **nets):
    torch.manual_seed(0)
    return kind(config(input_dim=SHAPE, latent_dim=2, reconstruction_loss=loss), **nets).eval()


def ncp_on(vae):
    torch.manual_seed(1)
    mixed = WithPriors(vae, [GaussianMixture.fit(vae, IMAGES, components=2)])
    return NoiseContrastivePrior(mixed, [MLPRatio(2, hidden=(8,))]).eval()


@configured
class OwnEncoder(BaseEncoder):
    def __init__(self, latents: int):
        super().__init__()
        self.net = nn.Linear(16, 2 * latents)

    def forward(self, x):
        mean, log_variance = self.net(x.flatten(1)).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


@configured
class OwnDecoder(BaseDecoder):
    def __init__(self, latents: int):
        super().__init__()
        self.net = nn.Linear(latents, 16)

    def forward(self, z):
        return ModelOutput(reconstruction=self.net(z).sigmoid().view(-1, *SHAPE))


@pytest.mark.parametrize("kind, config", [(VAE, VAEConfig), (BetaTCVAE, BetaTCVAEConfig)])
@pytest.mark.parametrize("loss, constant", [("mse", 8 * torch.tensor(2 * torch.pi).log().item()), ("bce", 0.0)])
def test_minus_the_elbo_is_pythaes_loss(kind, config, loss, constant):
    "In the mean over draws of the same 64 images; 400 each, so that both means are within five standard errors of each other."
    model = pythae_vae(loss, kind, config)
    vae, x = from_pythae(model), (IMAGES if loss == "mse" else IMAGES.round()).repeat(400, 1, 1, 1)
    with torch.no_grad():
        bound = elbo(vae, x, rng(1))
        mean, log_variance = (model.encoder(x)[key] for key in ("embedding", "log_covariance"))
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=rng(2))
        theirs = torch.stack(pythae_vae(loss).loss_function(model.decoder(z)["reconstruction"], x, mean, log_variance, z)[:2])
    kl = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
    assert abs(-bound.reconstruction.mean() - constant - theirs[1]) < 5 * bound.reconstruction.std() * (2 / len(x)) ** 0.5
    assert abs(theirs[0] - theirs[1] - kl) < 1e-4 and abs(bound.kl.mean() - kl) < 1e-4


def test_a_saturated_decoder_has_a_finite_likelihood_and_gradient():
    class Saturated(OwnDecoder):
        def forward(self, z):
            return ModelOutput(reconstruction=(200 * self.net(z)).sigmoid().view(-1, *SHAPE))
    vae = PythaeVAE(OwnEncoder(2), Saturated(2), SHAPE, 2, "bce")
    z = torch.randn(50, 2, generator=rng(0)).requires_grad_()
    p = vae.decoder(z)["reconstruction"]
    assert (p == 1).any() and (p == 0).any()
    value = vae.likelihood(z).log_prob((IMAGES[:50] > 0.5).float())
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()
    torch.testing.assert_close(vae.likelihood(z).mean, p)


def test_other_models_and_images_are_refused():
    autoencoder = AE(AEConfig(input_dim=SHAPE, latent_dim=2))
    vamp = VAMP(VAMPConfig(input_dim=SHAPE, latent_dim=2, number_components=3))
    mine = type("Mine", (VAE,), {})(VAEConfig(input_dim=SHAPE, latent_dim=2))
    for model, name in [(autoencoder, "AE"), (vamp, "VAMP"), (mine, "Mine"), (nn.Linear(2, 2), "Linear")]:
        with pytest.raises(ValueError, match=rf"{name} is not one of pythae's models with a Gaussian posterior .* VAE, BetaVAE, "):
            from_pythae(model)
    shapeless = VAE(VAEConfig(latent_dim=2), encoder=OwnEncoder(2), decoder=OwnDecoder(2))
    with pytest.raises(ValueError, match="input_dim None"):
        from_pythae(shapeless)
    vae = from_pythae(pythae_vae())
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\); this VAE was built for \(1, 4, 4\)"):
        vae.encode(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="'mse' or 'bce', got 'l1'"):
        PythaeVAE(OwnEncoder(2), OwnDecoder(2), SHAPE, 2, "l1")
    with pytest.raises(ValueError, match="got 'os:system'"):
        PythaeVAE("os:system", OwnDecoder(2), SHAPE, 2)


def test_a_stored_prior_is_the_same_in_a_new_process(tmp_path):
    "Log ratios and images to the bit, of pythae's own networks, whose class the store knows by name."
    ncp = ncp_on(from_pythae(pythae_vae()))
    store.save(ncp, tmp_path / "kept")
    z = torch.randn(20, 2, generator=rng(3))
    with torch.no_grad():
        expected = dict(log_r=ncp.log_ratio([z]), log_p=ncp.vae.walk(lambda step: z, n=20).log_prior(), images=ncp.vae.vae.likelihood(z).mean)
    code = f"""
import torch
from ncp_vae.engine import store
from ncp_vae.models.adapters import PythaeSampler
ncp = store.load({str(tmp_path / "kept")!r})
z = torch.randn(20, 2, generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    found = dict(log_r=ncp.log_ratio([z]), log_p=ncp.vae.walk(lambda step: z, n=20).log_prior(), images=ncp.vae.vae.likelihood(z).mean)
assert PythaeSampler(ncp).sample(3).shape == (3, 1, 4, 4)
torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_networks_of_ones_own_are_stored_with_their_classes(tmp_path):
    vae = from_pythae(pythae_vae(encoder=OwnEncoder(2), decoder=OwnDecoder(2)))
    store.save(vae, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"classes=\[OwnEncoder\]"):
        store.load(tmp_path / "kept")
    again = store.load(tmp_path / "kept", classes=[OwnEncoder, OwnDecoder])
    assert torch.equal(again.encode(IMAGES).mean, vae.encode(IMAGES).mean)


def test_pythaes_convolutions_are_stored_by_name():
    "Described, not written: they have millions of weights."
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=2)
    vae = from_pythae(VAE(config, encoder=Encoder_Conv_VAE_MNIST(config), decoder=Decoder_Conv_AE_MNIST(config)))
    again = PythaeVAE(**json.loads(json.dumps(vae.config)))
    assert vae.config["encoder"].endswith(":Encoder_Conv_VAE_MNIST") and type(again.decoder) is Decoder_Conv_AE_MNIST
    again.load_state_dict(vae.state_dict())
    x = torch.rand(2, 1, 28, 28, generator=rng(0))
    assert torch.equal(again.eval().encode(x).mean, vae.encode(x).mean)


def test_a_ratio_is_trained_on_it_and_sampled_by_every_sampler():
    vae = from_pythae(pythae_vae("mse"))
    ncp = fit_ncp(vae, IMAGES, steps=2, batch_size=16, lr=1e-3, seed=0)
    for prior, sampler in [(vae, None), (ncp, None), (ncp, SIR(5)), (ncp, MALA(2, 0.1))]:
        images = PythaeSampler(prior, sampler).sample(num_samples=5, batch_size=2)
        assert images.shape == (5, *SHAPE) and 0 <= images.min() <= images.max() <= 1 and not images.requires_grad


def test_it_answers_like_a_sampler_of_pythae(tmp_path):
    "In its pipeline too; the same seed gives the same images; files are numbered through, and the config says what it is."
    model = pythae_vae()
    pipeline = GenerationPipeline(model)
    pipeline.sampler = PythaeSampler(ncp_on(from_pythae(model)), SIR(5))
    def images(**how):
        torch.manual_seed(4)
        return pipeline(num_samples=5, batch_size=2, train_data=IMAGES, **how)
    found = images(output_dir=tmp_path / "images", save_sampler_config=True)
    assert torch.equal(found, images()) and images(return_gen=False) is None
    written = {path.name for path in (tmp_path / "images").iterdir()}
    assert written == {f"{i:08d}.png" for i in range(5)} | {"sampler_config.json"}
    told = json.loads((tmp_path / "images" / "sampler_config.json").read_text())
    assert told["prior"] == "NoiseContrastivePrior" and told["sampler"].startswith("SIR{'proposals': 5")
    for wrong, message in [(dict(num_samples=0), "got 0 and 500"), (dict(batch_size=0), "got 1 and 0"), (dict(save_sampler_config=True), "output_dir")]:
        with pytest.raises(ValueError, match=message):
            pipeline.sampler.sample(**wrong)


def test_the_install_hint_of_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythae.models", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ncp-vae\[pythae\]'"):
        PythaeVAE("pythae.models.nn.default_architectures:Encoder_VAE_MLP", OwnDecoder(2), SHAPE, 2)


@configured
class StandIn(nn.Module):
    "What `DiffusersVAE` uses of an AutoencoderKL: two levels, a factor and a shift."
    def __init__(self, in_channels=1, latent_channels=2, block_out_channels=(4, 4), scaling_factor=0.5, shift_factor=0.1):
        super().__init__()
        self.down = nn.Conv2d(in_channels, 2 * latent_channels, 2, stride=2)
        self.up = nn.ConvTranspose2d(latent_channels, in_channels, 2, stride=2)

    def encode(self, x):
        mean, log_variance = self.down(x).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=(log_variance / 2).exp()))

    def decode(self, z):
        return SimpleNamespace(sample=self.up(z))


def autoencoder():
    "The real one where diffusers is installed, with random weights."
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    return AutoencoderKL(in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(4, 4),
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=2, sample_size=8)


@pytest.mark.parametrize("make", [StandIn, autoencoder])
def test_an_autoencoder_of_diffusers(make, tmp_path):
    "Its latents are maps of unit scale, a ConvRatio is trained on them, and the whole is stored with its class."
    torch.manual_seed(0)
    model = make().eval()
    x = torch.rand(16, 1, 8, 8, generator=rng(0))
    vae = DiffusersVAE(model, (1, 8, 8), sigma=0.5)
    factor, shift = model.config["scaling_factor"], model.config["shift_factor"] or 0.0
    with torch.no_grad():
        law, z = vae.encode(x), torch.randn(16, 2, 4, 4, generator=rng(1))
        torch.testing.assert_close(law.mean, (model.encode(2 * x - 1).latent_dist.mean - shift) * factor)
        torch.testing.assert_close(law.stddev, model.encode(2 * x - 1).latent_dist.std * factor)
        torch.testing.assert_close(vae.likelihood(z).mean, (model.decode(z / factor + shift).sample + 1) / 2)
        assert (vae.likelihood(z).stddev == 0.5).all()
    ncp = fit_ncp(vae, x, ratios=[ConvRatio(vae.latent_shapes[0], width=4)], steps=1, batch_size=8, lr=1e-3, seed=0)
    assert PythaeSampler(ncp, SIR(3)).sample(2).shape == (2, 1, 8, 8)
    store.save(ncp, tmp_path / "kept")
    again = store.load(tmp_path / "kept", classes=[type(model)])
    assert torch.equal(again.log_ratio([z]), ncp.log_ratio([z]))
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 7\); this network takes 1 channels and sides divisible by 2"):
        DiffusersVAE(model, (1, 8, 7))
