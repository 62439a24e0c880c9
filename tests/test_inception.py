"""The FID Inception: against torchvision's network with the pools of 2015, the resize against numpy, and bad weight files."""
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import digest, fill
from torch.nn import functional as F

from ncp_vae.engine.features import frechet_distance
from ncp_vae.models.inception import FIDInception, load_inception, _read_checked, _stretch


with torch.device("meta"):
    SHAPES = {name: value.shape for name, value in FIDInception().state_dict().items()}


@pytest.fixture(scope="module")
def reference():
    "torchvision's network of the same layout, its pools replaced by those of 2015 from outside, with random weights."
    from torchvision.models import inception
    network = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    fill(network.state_dict())
    last = []
    network.Mixed_7c.register_forward_pre_hook(lambda *_: last.append(True))
    network.Mixed_7c.register_forward_hook(lambda *_: last.clear())
    def pool(x, kernel_size, stride, padding):
        if last:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)
    pools = SimpleNamespace(avg_pool2d=pool, max_pool2d=F.max_pool2d, relu=F.relu)
    network.fc, weights = torch.nn.Identity(), network.state_dict() | {f"fc.{k}": v for k, v in network.fc.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "F", pools)
        yield network, weights


@pytest.fixture(scope="module")
def stub(reference, tmp_path_factory):
    "A file in the form of the public one."
    path = tmp_path_factory.mktemp("weights") / "stub.pth"
    torch.save(reference[1], path)
    return path


@pytest.fixture(scope="module")
def network(stub):
    return load_inception(stub, digest(stub))


# ---- the features ---------------------------------------------------------------------------------------------------

def test_layout_is_the_one_of_566_tensors(reference):
    assert len(SHAPES) == 566 and SHAPES == {name: value.shape for name, value in reference[1].items()}


@torch.no_grad()
def test_features_are_torchvisions_with_the_pools_of_2015(reference, network):
    "At 299 pixels nothing is resized. Agreement to float32 rounding; torchvision's own pools, the broken twin, are off."
    images = torch.randint(256, (2, 3, 299, 299), dtype=torch.uint8)
    features, expected = network(images), reference[0]((images.float() - 128) / 128)
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and not features.requires_grad
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert expected.std() > 0.1                                              # no dead network
    from torchvision.models import inception
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "F", F)
        assert (reference[0]((images[:1].float() - 128) / 128) - features[:1]).norm() > 1e-2 * expected[:1].norm()


@torch.no_grad()
def test_small_images_are_stretched_by_the_rule_of_2015(reference, network):
    "Against numpy's interpolation at i * n / 299, which repeats the edge; grey is three equal channels."
    images = torch.randint(256, (1, 1, 20, 31), dtype=torch.uint8)
    rows, columns = np.arange(299) * 20 / 299, np.arange(299) * 31 / 299
    wide = np.stack([np.interp(columns, np.arange(31), line) for line in images[0, 0].double().numpy()])
    large = np.stack([np.interp(rows, np.arange(20), line) for line in wide.T], axis=1)
    expected = reference[0](((torch.from_numpy(large).float() - 128) / 128).expand(1, 3, -1, -1))
    assert (network(images) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("n", [1, 2, 28, 299, 598, 1000])
def test_stretch_is_numpys_interpolation(n):
    line = torch.rand(n)
    assert np.allclose(_stretch(line, 0).numpy(), np.interp(np.arange(299) * n / 299, np.arange(n), line.numpy()), atol=1e-6)


def test_large_images_are_sampled_not_averaged():
    "Every second pixel of 598 is one of the 299: no hidden antialias."
    x = torch.rand(1, 3, 598, 598)
    assert torch.equal(_stretch(_stretch(x, -1), -2), x[..., ::2, ::2])


@torch.no_grad()
@pytest.mark.parametrize("size", [(20, 31), (299, 299), (598, 320)])
def test_the_resize_of_pytorch_fid_is_a_choice(reference, stub, size):
    """Bytes over 255, bilinear about the pixels' centres without smoothing, then to [-1, 1]: torchvision's own resize of a Tensor without
    antialias. The name says so, and the features are others."""
    from torchvision.transforms.functional import InterpolationMode, resize
    images = torch.randint(256, (1, 3, *size), dtype=torch.uint8)
    chosen, other = load_inception(stub, digest(stub), "pytorch-fid"), load_inception(stub, digest(stub))
    x = resize(images / 255, [299, 299], InterpolationMode.BILINEAR, antialias=False)
    expected = reference[0](2 * x - 1)
    assert (chosen(images) - expected).norm() < 1e-5 * expected.norm() < (chosen(images) - other(images)).norm()
    assert chosen.name == f"{other.name}, images resized as by pytorch-fid"


def test_an_unknown_resize_is_refused(stub):
    with pytest.raises(ValueError, match="resize must be one of 2015, pytorch-fid; got 'antialias'"):
        load_inception(stub, digest(stub), "antialias")


def test_network_has_no_training_mode(network):
    outer = torch.nn.Sequential(network).train()
    assert not any(module.training for module in outer[0].modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 8, 8).byte(), torch.zeros(3, 8, 8).byte(),
                                    torch.zeros(1, 3, 8, 8).long()])
def test_other_than_bytes_of_one_or_three_channels_is_refused(network, images):
    with pytest.raises(ValueError, match=r"wants bytes \[B, 1 or 3, H, W\]"):
        network(images)


# ---- the file -------------------------------------------------------------------------------------------------------

def test_only_the_standard_file_makes_the_standard_network(network):
    assert not network.is_standard and "the file" in network.name


def test_loading_draws_no_random_numbers(stub):
    before = torch.random.get_rng_state()
    load_inception(stub, digest(stub))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_missing_file_tells_where_it_is_to_be_had(tmp_path):
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth of pytorch-fid"):
        load_inception(tmp_path / "weights.pth")


def test_another_hash_is_refused_before_anything_is_read(stub):
    with pytest.raises(ValueError, match="expected 6726825d.* was not opened"):
        load_inception(stub)
    with pytest.raises(ValueError, match="expected 00000000"):
        load_inception(stub, "00000000")


def test_a_cut_file_is_refused(stub, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(stub.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        load_inception(cut, digest(stub))
    with pytest.raises(ValueError, match="not a file of tensors"):
        load_inception(cut, digest(cut))


@pytest.mark.parametrize("wrong", ["", "6726825", "6726825D", "not a hash at all"])
def test_what_is_no_hash_is_refused(stub, wrong):
    with pytest.raises(ValueError, match="first 8 of 64"):
        _read_checked(stub, wrong)


def test_the_first_digits_suffice(stub):
    assert _read_checked(stub, digest(stub)[:8])[1] == digest(stub)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("own_hash", [False, True])
def test_a_poisoned_file_does_not_run(tmp_path, write, own_hash):
    "With another hash it is not opened; with its own it is refused by the loader. The payload itself is a live one."
    marker, path = tmp_path / "marker", tmp_path / "poisoned.pth"
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch '{marker}'",)
    write({"fc.weight": Poison()}, path)
    with pytest.raises(ValueError, match="nothing in it was run" if own_hash else "was not opened"):
        load_inception(path, **({"sha256": digest(path)} if own_hash else {}))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Poison()))
    assert marker.exists()


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("fc.bias"), r"1 tensors differ, the first: fc.bias is missing, expected \(1008,\)"),
    (lambda state: state.update(extra=torch.zeros(3)), r"extra is \(3,\), expected no such tensor"),
    (lambda state: state.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}),
     r"Conv2d_1a_3x3.conv.weight is \(32, 1, 3, 3\), expected \(32, 3, 3, 3\)"),
    (lambda state: [state.pop(name) for name in list(state)[:9]], "8 tensors differ, the first: Conv2d_1a_3x3.conv.weight is missing"),
])
def test_other_names_and_shapes_are_refused(tmp_path, change, words):
    state, path = {name: torch.zeros(()).expand(shape) for name, shape in SHAPES.items()}, tmp_path / "other.pth"
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=words):
        load_inception(path, digest(path))


def test_a_file_that_is_no_dict_of_tensors_is_refused(tmp_path):
    for i, content in enumerate([[1, 2], {"fc.weight": "text"}, torch.zeros(3)]):
        path = tmp_path / f"{i}.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match="not a file of tensors by name"):
            load_inception(path, digest(path))


# ---- the weights themselves ------------------------------------------------------------------------------------------

WEIGHTS = Path(os.environ.get("NCP_VAE_INCEPTION", ROOT / "data" / "pt_inception-2015-12-05-6726825d.pth"))


@pytest.fixture(scope="module")
def standard():
    """The network with the standard file, which is not part of this repository: the variable NCP_VAE_INCEPTION names it, or it lies in data/."""
    if not WEIGHTS.is_file():
        pytest.skip(f"needs the standard weight file, at {WEIGHTS} or where NCP_VAE_INCEPTION says")
    return load_inception(WEIGHTS)


@torch.no_grad()
def test_golden_values_of_the_standard_weights(standard):
    """The examples in torchmetrics' documentation of FrechetInceptionDistance (64 features, those of the first pool) and of
    KernelInceptionDistance (2,048), which run torch-fidelity's network with this file: two sets of 100 noise images, of levels 0 to 199 and
    100 to 254. Printed there are 12.7202 (0.x) and 12.6388 (1.9), and 0.0337 (0.x) and 0.0312 (1.9): the same laws, other random numbers.
    The tolerances, 3 % and 20 %, are several times the spread between the versions; another scale of the pixels, another pool or another order
    of the layers is far off. At 299 pixels nothing is resized."""
    from torchmetrics.image.kid import KernelInceptionDistance
    first = []
    hook = standard.maxpool1.register_forward_hook(lambda module, args, out: first.append(out.mean((2, 3))))
    torch.manual_seed(123)
    kid = KernelInceptionDistance(feature=standard, subset_size=50)
    for low, high, real in ((0, 200, True), (100, 255, False)):
        for images in torch.randint(low, high, (100, 3, 299, 299), dtype=torch.uint8).split(10):
            kid.update(images, real=real)
    hook.remove()
    assert frechet_distance(*torch.cat(first).chunk(2)) == pytest.approx(12.68, rel=0.03)
    assert kid.compute()[0].item() == pytest.approx(0.0325, rel=0.2)


@torch.no_grad()
def test_invariants_of_the_standard_weights(standard):
    """No value of them is published: features are means of rectified maps, grey is three equal channels, the batch plays no part, and a photograph
    is nearer to itself mirrored than to noise."""
    from sklearn.datasets import load_sample_image
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None, :, :299, :299]
    noise = torch.randint(256, photograph.shape, dtype=torch.uint8)
    features = standard(torch.cat([photograph, photograph.flip(-1), noise]))
    assert standard.is_standard and standard.name == "Inception-v3 of 2015-12-05" and (features >= 0).all()
    assert torch.allclose(standard(photograph), features[:1], atol=1e-4)
    assert torch.allclose(standard(noise[:, :1]), standard(noise[:, :1].expand(-1, 3, -1, -1)), atol=1e-5)
    assert (features[0] - features[1]).norm() < (features[0] - features[2]).norm()


def test_the_counters_may_be_absent(reference, network, tmp_path):
    "Files of before their time have 472 tensors and give the same features."
    path = tmp_path / "old.pth"
    torch.save({name: value for name, value in reference[1].items() if not name.endswith("num_batches_tracked")}, path)
    images = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(load_inception(path, digest(path))(images), network(images))
