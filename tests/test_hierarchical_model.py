"""The dense hierarchy: what it refuses, and that a checkpoint of another model is not taken."""
import json
import signal

import pytest
import torch

from ncp_vae.bound import elbo
from ncp_vae.engine.train import Machine, Recipe, fit, fit_ncp, fit_vae
from ncp_vae.models.hierarchical import DenseHierarchy, hidden_for
from ncp_vae.models.ratios import MLPRatio
from ncp_vae.sampling import SIR
from ncp_vae.walk import from_prior

IMAGES = torch.bernoulli(torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
FEW = dict(steps=3, batch_size=16, lr=1e-3, seed=0)


def small(groups=2, **kwargs):
    torch.manual_seed(0)
    return DenseHierarchy((1, 4, 4), **{**dict(groups=groups, latent_dim=2, hidden=8, width=8), **kwargs})


def test_every_parameter_learns():
    vae = small(3).train()
    (-elbo(vae, IMAGES).elbo.mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


@pytest.mark.parametrize("wrong", [dict(groups=0), dict(latent_dim=0), dict(hidden=0), dict(width=0)])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        small(**wrong)


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least .* parameters, more than 100"):
        hidden_for(100, (1, 4, 4), 2, 2, 8)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images of shape \(1, 5, 5\)"):
        small().encode(torch.zeros(2, 1, 5, 5))


def test_a_checkpoint_of_another_model_is_refused_before_any_step(tmp_path):
    "The message names what differs, and only that."
    fit_vae(small(2), IMAGES, checkpoint=tmp_path / "vae.ckpt", **FEW)
    with pytest.raises(ValueError, match="is of another training: model is .*DenseHierarchy.* there and") as error:
        fit_vae(small(3), IMAGES, checkpoint=tmp_path / "vae.ckpt", **FEW)
    assert "batch_size" not in str(error.value)


def test_held_out_diagnosis_changes_no_bit_of_the_training(tmp_path):
    vae = fit_vae(small(2), IMAGES, **FEW)
    def ratios():
        torch.manual_seed(1)
        return [MLPRatio(z, c, hidden=(8,)) for z, c in zip(vae.latent_shapes, vae.context_shapes)]
    plain = fit_ncp(vae, IMAGES, ratios=ratios(), **FEW)
    watched = fit_ncp(vae, IMAGES, ratios=ratios(), held_out=IMAGES[:32], history=tmp_path / "history.jsonl", **FEW)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values())
               if not a.isnan().any())
    text = (tmp_path / "history.jsonl").read_text()
    assert text.count("ncp held-out") == 3 and "loss_1" in text and "calibration_error_0" in text


@pytest.mark.parametrize("switch", ["bf16", "channels_last"])
def test_a_switch_changes_the_result_by_rounding_only(switch):
    "Ten steps of both trainings: the walk's prior means agree to 2 % of their size (bf16 has 8 bits), logits to 0.05 nats."
    results = []
    for machine in (Machine(), Machine(**{switch: True})):
        vae = fit_vae(small(2), IMAGES, machine=machine, **{**FEW, "steps": 10})
        ncp = fit_ncp(vae, IMAGES, machine=machine, **{**FEW, "steps": 10})
        trace = vae.walk(from_prior(generator=torch.Generator().manual_seed(3)), n=16)
        results.append((trace.likelihood.mean.detach(), ncp.log_ratio(trace).detach()))
    (mean, log_r), (other_mean, other_log_r) = results
    assert torch.allclose(mean, other_mean, atol=0.02) and torch.allclose(log_r, other_log_r, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in ncp.parameters())


def test_a_second_stage_multiplies_a_ratio_on_in_every_group():
    vae = fit_vae(small(2), IMAGES, **FEW)
    first = fit_ncp(vae, IMAGES, **FEW)
    second = fit_ncp(vae, IMAGES, base=first, sampler=SIR([4, 8]), **{**FEW, "seed": 1})
    trace = vae.walk(from_prior(generator=torch.Generator().manual_seed(3)), n=16)
    for ratio, step, z in zip(second.ratios, trace.steps, trace.latents):
        one, two = (stage(z, step.context) for stage in ratio.stages)
        assert torch.allclose(ratio(z, step.context), one + two) and two.std() > 0
    assert second.sample(3, SIR([4, 8])).latents[1].shape == (3, 2)


def test_recipes_are_checked():
    with pytest.raises(ValueError, match="adam or adamax, got 'sgd'"):
        Recipe("sgd")
    with pytest.raises(ValueError, match="at least 0"):
        Recipe(lr_warm_up=-1)


def test_spectral_and_balance_need_a_model_that_has_them():
    with pytest.raises(ValueError, match="DenseHierarchy has no regularisation"):
        fit_vae(small(), IMAGES, spectral=0.1, **FEW)
    with pytest.raises(ValueError, match="DenseHierarchy has no kl_weights"):
        fit_vae(small(), IMAGES, kl_balance=True, **FEW)


class Interrupting(torch.nn.Module):
    "A batch norm whose forward sends Ctrl-C to its own process in the third step: the statistics have moved, the weights not."
    def __init__(self, at):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.at = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4)), at

    def forward(self, x, step):
        loss = self.net(x.flatten(1)).square().mean() + self.net[0].weight.square().sum()
        if step == self.at:
            signal.raise_signal(signal.SIGINT)
        return dict(loss=loss)


def test_ctrl_c_inside_a_step_waits_for_its_end(tmp_path):
    "Resumed, the training ends in the same bits, batch norm's statistics included, as one that nobody disturbed."
    settings = dict(steps=6, batch_size=16, lr=1e-2, seed=0, name="net")
    undisturbed, disturbed, resumed = Interrupting(None), Interrupting(2), Interrupting(None)
    fit(undisturbed, IMAGES, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(disturbed, IMAGES, checkpoint=tmp_path / "net.ckpt", **settings)
    fit(resumed, IMAGES, checkpoint=tmp_path / "net.ckpt", **settings)
    state = resumed.state_dict()
    assert torch.load(tmp_path / "net.ckpt", weights_only=True)["step"] == 6
    assert all(torch.equal(value, state[name]) for name, value in undisturbed.state_dict().items())


def test_held_out_numbers_of_a_second_stage_are_against_the_first(tmp_path):
    """The second ratio is diagnosed on what it was trained against: where the first stage's draws are shifted by 5, a fresh
    second ratio sees them; against the base prior its mean logits would be other numbers."""
    vae = fit_vae(small(1), IMAGES, **FEW)
    first = fit_ncp(vae, IMAGES, **FEW)
    class Shifted(SIR):
        def draw(self, log_ratio, prior, generator=None):
            return prior.sample() + 5.0
    fit_ncp(vae, IMAGES, base=first, sampler=Shifted(2), held_out=IMAGES[:32], history=tmp_path / "shifted.jsonl",
            **{**FEW, "steps": 60, "lr": 1e-2})
    last = json.loads((tmp_path / "shifted.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "ncp-2 held-out" and last["loss_0"] < 0.3      # told apart easily: 1.386 if they were alike
