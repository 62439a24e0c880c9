"""ConvRatio, the classifier of Appendix E: shapes, the shared context, what is refused. That it learns a known ratio, and
the trap of batch norm with its broken twin, are in its notebook. Nothing here is statistical."""
import copy

import pytest
import torch
from torch import nn

from ncp_vae.models.ratios import ConvRatio, _FactorizedReduction, _ResidualBlock
from ncp_vae.nce import nce_loss


def small(latent=(3, 8, 4), context=(2, 8, 4), width=4, dtype=torch.float64):
    "A narrow network in eval mode whose batch norms are no identity."
    ratio = ConvRatio(latent, context, width)
    with torch.no_grad():
        for name, tensor in [*ratio.named_parameters(), *ratio.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return ratio.to(dtype).eval()


@pytest.mark.parametrize("latent", [(1, 4, 4), (3, 4, 12), (20, 16, 16)])
@pytest.mark.parametrize("leading", [(2,), (5, 2), (2, 3, 2)])
@pytest.mark.parametrize("channels", [None, 7])
def test_one_number_a_row(latent, leading, channels):
    context = None if channels is None else torch.randn(2, channels, *latent[1:])
    ratio = ConvRatio(latent, None if channels is None else (channels, *latent[1:]), 4).eval()
    log_r = ratio.condition(context)(torch.randn(*leading, *latent))
    assert log_r.shape == leading and log_r.isfinite().all()


def test_forward_is_condition_then_call():
    ratio, z, context = small(), torch.randn(6, 3, 8, 4).double(), torch.randn(6, 2, 8, 4).double()
    assert torch.equal(ratio(z, context), ratio.condition(context)(z))


def test_logit_is_linear_in_the_last_bias():
    "Nothing squashes it."
    ratio, z, context = small(), torch.randn(6, 3, 8, 4).double(), torch.randn(6, 2, 8, 4).double()
    before = ratio(z, context)
    nn.init.constant_(ratio.trunk[-1].linear.bias, ratio.trunk[-1].linear.bias.item() + 50)
    assert torch.allclose(ratio(z, context), before + 50, atol=1e-9)


def test_split_convolution_is_that_of_the_concatenation():
    ratio, z, context = small(), torch.randn(5, 6, 3, 8, 4).double(), torch.randn(6, 2, 8, 4).double()
    weight = torch.cat([ratio.from_z.weight, ratio.from_context.weight], 1)
    pairs = torch.cat([z, context.expand(5, -1, -1, -1, -1)], 2).flatten(0, 1)
    plain = ratio.trunk(nn.functional.conv2d(pairs, weight, ratio.from_z.bias, padding=1)).view(5, 6)
    assert torch.allclose(ratio.condition(context)(z), plain, atol=1e-12)
    wrong = ratio.condition(context.flip(0))(z)                               # twin: another row's context is seen
    assert (wrong - plain).abs().min() > 1e-6


def test_context_is_computed_once():
    ratio, calls = small(), []
    ratio.from_context.register_forward_hook(lambda *_: calls.append(1))
    log_ratio = ratio.condition(torch.randn(6, 2, 8, 4).double())
    for proposals in (1, 10, 100):
        log_ratio(torch.randn(proposals, 6, 3, 8, 4).double())
    assert len(calls) == 1


def test_rows_do_not_see_each_other_in_eval_mode_and_do_in_training():
    ratio, z, context = small(), torch.randn(6, 3, 8, 4).double(), torch.randn(6, 2, 8, 4).double()
    alone = torch.cat([ratio(z[i:i + 1], context[i:i + 1]) for i in range(6)])
    assert torch.allclose(ratio(z, context), alone, atol=1e-12)
    ratio.train()
    assert not torch.allclose(ratio(z, context)[:3], ratio(z[:3], context[:3]), atol=1e-3)


def test_gradient_with_respect_to_the_latent():
    "Langevin and HMC need it; finite differences in float64."
    ratio, context = small((2, 4, 4), (1, 4, 4), 2), torch.randn(2, 1, 4, 4).double()
    z = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ratio.condition(context), z)


def test_every_parameter_learns():
    ratio, z = ConvRatio((3, 4, 4), (2, 4, 4), 4), torch.randn(2, 8, 3, 4, 4)
    nce_loss(*ratio.condition(torch.randn(8, 2, 4, 4))(z)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for name, parameter in ratio.named_parameters()
               if "gate" not in name)                                          # a gate's ReLU may be shut for all rows
    assert all(parameter.grad is not None for parameter in ratio.parameters())


def test_blocks_change_shapes_as_in_figure_5():
    x = torch.randn(2, 4, 8, 12)
    assert _ResidualBlock(4)(x).shape == x.shape
    assert _ResidualBlock(4, halve=True)(x).shape == _FactorizedReduction(4)(x).shape == (2, 8, 4, 6)
    assert [type(part).__name__ for part in ConvRatio((1, 4, 4)).trunk] == ["ReLU"] + 8 * ["_ResidualBlock"] + ["PooledLogit"]
    halved = [isinstance(part.skip, nn.Sequential) for part in ConvRatio((1, 4, 4)).trunk[1:-1]]
    assert halved == [kind == "B" for kind in "AAABAAAB"]


def test_state_survives_a_copy():
    ratio, other = small(), small()
    other.load_state_dict(copy.deepcopy(ratio.state_dict()))
    z, context = torch.randn(6, 3, 8, 4).double(), torch.randn(6, 2, 8, 4).double()
    assert torch.equal(ratio(z, context), other(z, context))


@pytest.mark.parametrize("latent, context, width, says", [
    ((3, 5, 8), None, 4, r"\(3, 5, 8\)"), ((3, 8, 7), None, 4, r"\(3, 8, 7\)"), ((3, 2, 2), None, 4, r"\(3, 2, 2\)"),
    ((3, 6, 6), None, 4, "divisible by 4"), ((3, 0, 4), None, 4, r"\(3, 0, 4\)"), (16, None, 4, r"\(16,\)"),
    ((8, 8), None, 4, r"\(8, 8\)"), ((3, 8, 8), (2, 4, 4), 4, r"\(2, 4, 4\)"), ((3, 8, 8), (8, 8), 4, r"\[C, 8, 8\]"),
    ((3, 8, 8), None, 3, "got 3"), ((3, 8, 8), None, 0, "got 0"), ((3, 8, 8), None, -2, "got -2")])
def test_refused_when_built(latent, context, width, says):
    with pytest.raises(ValueError, match=says):
        ConvRatio(latent, context, width)


@pytest.mark.parametrize("z, context, says", [
    ((6, 3, 8, 8), (6, 2, 8, 4), r"\(6, 3, 8, 8\)"), ((3, 8, 4), (6, 2, 8, 4), r"\(3, 8, 4\)"),
    ((6, 3, 8, 4), None, "None"), ((6, 3, 8, 4), (6, 3, 8, 4), r"\[3, 8, 4\]"),
    ((1, 3, 8, 4), (6, 2, 8, 4), "6 rows"), ((6, 3, 8, 4), (1, 2, 8, 4), "got 6")])
def test_refused_when_called(z, context, says):
    ratio = small(dtype=torch.float32)
    with pytest.raises(ValueError, match=says):
        ratio(torch.zeros(z), None if context is None else torch.zeros(context))


def test_a_batch_of_one_is_refused_in_training_and_only_there():
    ratio = ConvRatio((3, 4, 4), width=4)
    with pytest.raises(ValueError, match="at least 2 rows"):
        ratio(torch.randn(1, 3, 4, 4))
    assert ratio.condition(None)(torch.randn(2, 1, 3, 4, 4)).shape == (2, 1)   # one row of q and one of p are two
    assert ratio.eval()(torch.randn(1, 3, 4, 4)).shape == (1,)
