"""What a run will cost: the count of a step on shapes alone against the same step on real tensors, and the page for every full preset.

The nets of the large presets stand in for each other: of NVAE's, which take seconds each, one family with three scales is counted."""
from collections import Counter

import pytest
import torch
from torch import nn

from ncp_vae.engine import predict
from ncp_vae.engine.data import load
from ncp_vae.engine.parameters import find_experiment, notebooks, params_for
from ncp_vae.engine.predict import DEVICES, IMAGES, Cost, Counting, Device, Draws, Stage, counted, draw_cost, forecast, parts_for, plan, step_cost
from ncp_vae.engine.train import NCELoss, VAELoss
from ncp_vae.models.flat import RaeVAE
from ncp_vae.models.nvae import NVAE, NVAEConfig
from ncp_vae.models.ratios import ConvRatio
from ncp_vae.prior import NoiseContrastivePrior

SMALL = NVAEConfig((3, 16, 16), (1, 2), channels=8, blocks=1, cells_per_block=1, latent_channels=4, cells_per_group=1, likelihood="normal")


class Real(Counting):
    "The same count of calls on real tensors, whose results PyTorch makes itself."
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        if not op.is_view and op.namespace != "prim" and op is not torch.ops.aten._local_scalar_dense.default:
            self.count(op, args, found)
        return found


def nvae_loss():
    loss = VAELoss(NVAE(SMALL).train(), 0, spectral=0.1)
    loss.vae.spectral_norms.known = True
    return loss


def nce_loss():
    vae = NVAE(SMALL).eval()
    return NCELoss(vae, nn.ModuleList([ConvRatio(z, c, 8) for z, c in zip(vae.latent_shapes, vae.context_shapes)]), None, None)


LOSSES = {"NVAE": (nvae_loss, (3, 16, 16)), "ratios": (nce_loss, (3, 16, 16)),
          "transposed convolutions": (lambda: VAELoss(RaeVAE((1, 32, 32), 4, 4, 0.3).train(), 0), (1, 32, 32))}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_shapes_alone_give_the_count_of_a_real_step(name, bf16):
    """Operations to a hundredth, memory to 15 % and mostly far less: kernels of a CPU hand out other helpers than those of shapes, such
    as masks, and its autocast has a few types of its own."""
    make, shape = LOSSES[name]
    with Real() as real:
        loss = make()
        real.cost = Cost(peak=real.bytes)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(torch.full((16, *shape), 0.5), 3)["loss"]
        value.backward()
    with counted() as shapes, torch.device("meta"):
        loss = make()
        shapes.cost = Cost(peak=shapes.bytes)
        with torch.autocast("meta", torch.bfloat16, enabled=bf16):
            value = loss(torch.full((16, *shape), 0.5), 3)["loss"]
        value.backward()
    assert shapes.cost.total(0) == pytest.approx(real.cost.total(0), rel=0.01) and shapes.cost.total(0) > 1e7
    assert shapes.cost.peak == pytest.approx(real.cost.peak, rel=0.15)
    assert shapes.cost.calls.total() == pytest.approx(real.cost.calls.total(), rel=0.15)


def test_nothing_is_alive_at_the_end():
    with counted() as counting, torch.device("meta"):
        loss = nvae_loss()
        loss(torch.empty(4, 3, 16, 16), 3)["loss"].backward()
        del loss
    assert counting.bytes < 0.01 * counting.cost.peak


def test_parts_share_the_memory_that_is_not_fixed():
    "Twice as many parts halve the rest. The price on the weights counts once, everything else as often."
    with counted(), torch.device("meta"):
        loss = nvae_loss()
    costs = [step_cost(Stage("VAE", loss, (3, 16, 16), 64, 10, parts)) for parts in (1, 2, 4)]
    moving = [cost.peak - cost.fixed for cost in costs]
    assert costs[0].fixed == costs[1].fixed and moving[1] == pytest.approx(moving[0] / 2, rel=0.1)
    calls = [cost.calls.total() for cost in costs]
    assert calls[2] - calls[1] == pytest.approx(2 * (calls[1] - calls[0]), rel=0.01)
    assert costs[2].total(0) == pytest.approx(costs[0].total(0), rel=0.01)
    stage = Stage("VAE", loss, (3, 16, 16), 64, 10)
    gigabytes = (costs[0].fixed + 0.4 * moving[0]) / 1e9 / 0.95
    def device(memory):
        return Device("a device", memory, 1, 1, 1, 1, "")
    assert parts_for(stage, costs[0], device(1.0)) == 1
    assert parts_for(stage, costs[0], device(gigabytes)) == 3 and parts_for(stage, costs[0], device(1e-6)) is None


def test_a_sample_costs_its_proposals():
    "Four times the proposals, all but four times the operations: the walk itself stays."
    with counted(), torch.device("meta"):
        loss = nce_loss()
        ncp = NoiseContrastivePrior(loss.frozen[0], loss.ratios)
    few, many = (draw_cost(Draws(ncp, M, 4, 100)) for M in (100_000, 400_000))
    assert 3.9 < many.total(0) / few.total(0) < 4 and many.waits == pytest.approx(4 * few.waits)
    assert many.peak == few.peak                                             # one chunk at a time


def test_what_bounds_a_call_is_its_longest_time():
    "At half of one TFLOP/s and of one GB/s: two seconds of compute, four of traffic, and a launch."
    cost = Cost(Counter({(10**12, 10, "bfloat16"): 1, (1, 2 * 10**9, ""): 1, (1, 1, ""): 1}))
    found = cost.seconds(Device("a device", 1, 1, 1, 1, 1, ""))
    assert found == pytest.approx({"compute": 2, "memory traffic": 4, "launches": predict.LAUNCH})


@pytest.mark.parametrize("name", ["digits", "mnist5k", "photos32", "gaussians25"])
def test_image_sets_have_the_size_that_is_counted_with(name):
    data = load(name)
    assert IMAGES[name] == (tuple(data[[0]].shape[1:]), len(data))


LARGE = {"images": dict(model="nvae:celeba64-6"), "hierarchical": dict(model="dense"),
         "joint_ebm": dict(model="nvae:colour32"), "ood": dict(model="nvae:photos32")}


@pytest.mark.parametrize("name", [name for name in notebooks() if "full" in find_experiment(name).presets()])
def test_every_full_preset_has_its_page(name):
    params = params_for(find_experiment(name), "full", LARGE.get(name))
    if name == "hierarchical":
        params |= dict(vae_steps=10)
    page = forecast(name, params)
    if "vae_steps" not in params and "epochs" not in params:
        assert page == f"{name} trains no network: it takes the model of a finished run."
        return
    assert all(device.name in page for device in DEVICES) and "a step of the VAE" in page and " h, " in page
    assert ("a step of the ratio" in page) == bool({"ncp_steps", "steps"} & params.keys())


def test_a_folder_is_not_looked_at():
    with pytest.raises(ValueError, match="dataset folder: how many images"):
        plan("images", params_for(find_experiment("images"), "full", dict(dataset="folder")))
