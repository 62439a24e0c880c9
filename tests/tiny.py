"""Tiny data sets in the true formats of the large ones, for tests of loaders and of whole runs."""
import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from ncp_vae.engine import data
from ncp_vae.models.inception import FIDInception


def picture(rng, width, height):
    "A smooth random colour image: 5x5 random pixels, enlarged."
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_celeba(root, n, n_test=None):
    "torchvision's layout under root/celeba: n images for training (split 0), one for validation (1), n or n_test for testing (2)."
    folder = Path(root) / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rng, splits = np.random.default_rng(0), [0] * n + [1] + [2] * (n_test or n)
    for i in range(len(splits)):
        picture(rng, 178, 218).save(folder / "img_align_celeba" / f"{i + 1:06d}.jpg", quality=95)
    (folder / "list_eval_partition.txt").write_text("".join(f"{i + 1:06d}.jpg {split}\n" for i, split in enumerate(splits)))
    return folder


def write_celebahq(root, n, side=256):
    "root/celebahq256/train and root/celebahq256/valid, n square PNG files in each."
    return [write_folder(Path(root) / "celebahq256" / split, n, (side, side), seed=i) for i, split in enumerate(["train", "valid"])]


def write_folder(folder, n, size=(8, 8), seed=0):
    "n PNG files of one size (width, height)."
    Path(folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        picture(rng, *size).save(Path(folder) / f"{i:05d}.png")
    return Path(folder)


def write_cifar10(root, n, monkeypatch):
    """torchvision's layout, n images in each of the six files, whose checksums this process accepts until the test ends.

    Other processes, the kernel of a notebook among them, go on refusing them."""
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = dict(data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=rng.integers(0, 10, n).tolist())
        raw = pickle.dumps(batch, protocol=2)
        (folder / file).write_bytes(raw)
        monkeypatch.setitem(data._PUBLISHED, f"cifar10/{file}", (None, hashlib.md5(raw).hexdigest()))
    return folder


def write_svhn(root, n_train, n_test):
    "The published layout, root/train_32x32.mat and root/test_32x32.mat: n smooth colour images, labelled 10, 1, 2, ..., 9, 10, ..."
    for split, n in (("train", n_train), ("test", n_test)):
        rng = np.random.default_rng(n)
        images = np.stack([np.asarray(picture(rng, 32, 32)) for _ in range(n)], axis=-1)
        labels = (np.arange(n)[:, None] + 9) % 10 + 1
        savemat(Path(root) / f"{split}_32x32.mat", dict(X=images, y=labels.astype(np.uint8)), do_compression=True)
    return Path(root)


def idx(array):
    "The contents of an IDX file of bytes."
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_fashion_mnist(root, n):
    "torchvision's layout under root/FashionMNIST/raw: the four IDX files, n smooth grey images and their labels in either split."
    folder = Path(root) / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = np.stack([np.asarray(picture(rng, 28, 28).convert("L")) for _ in range(n)])
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8) % 10))
    return folder


def fill(state, seed=0):
    "Random values under which signals of all layers of an Inception keep their size, batch norm does something, no branch is idle."
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.2, generator=generator)
    return state


def digest(path):
    "The SHA-256 of a file."
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_inception(path):
    "A file in the form of the public weight file of the FID network, 566 tensors, with random values; its SHA-256."
    torch.save(fill(FIDInception().state_dict()), path)
    return digest(path)
