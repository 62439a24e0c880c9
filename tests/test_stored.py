"""Sets on the disk: decoded as torchvision does, read as needed, and never half a set."""
import json
import pickle
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digest, picture, write_folder

from ncp_vae.engine import data, stored
from ncp_vae.engine.batches import batches
from ncp_vae.engine.data import Rows
from ncp_vae.engine.stored import Augmented, Picture, Stored, open_image, prepare, reduce_bits
from ncp_vae.engine.train import fit, fit_vae, VAELoss
from ncp_vae.models.flat import DenseVAE

EIGHT = Picture(8)


@pytest.fixture
def files(tmp_path):
    return sorted(write_folder(tmp_path / "originals", 20, (16, 16)).iterdir())


@pytest.fixture
def small(files, tmp_path):
    return prepare(tmp_path / "small-train.npy", files, EIGHT, "small train")


# ---- one picture ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, size", [(Picture(64, (15, 40, 163, 188), (178, 218)), (178, 218)),
                                          (Picture(64, (19, 39, 159, 179), (178, 218)), (178, 218)),
                                          (Picture(256), (300, 300)), (Picture(256), (256, 256)), (Picture(256), (100, 100))])
def test_the_same_bytes_as_torchvision(recipe, size, tmp_path):
    """Decoding, crop and resize, on three JPEGs: torchvision's transforms of Pillow images, which resize with antialiasing."""
    from torchvision import transforms
    from torchvision.transforms.functional import center_crop, crop
    cut = {15: lambda image: crop(image, 40, 15, 148, 148), 19: lambda image: center_crop(image, [140, 140])}
    pipeline = transforms.Compose([cut.get((recipe.crop or [0])[0], lambda image: image), transforms.Resize(recipe.side),
                                   transforms.PILToTensor()])
    rng = np.random.default_rng(1)
    for i in range(3):
        noisy = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) if i else picture(rng, *size)
        noisy.save(tmp_path / "a.jpg")
        assert torch.equal(torch.tensor(recipe(tmp_path / "a.jpg")), pipeline(Image.open(tmp_path / "a.jpg")))


def test_grey_and_palette_files_become_colour(tmp_path):
    for mode in ("L", "P", "RGBA"):
        Image.new("L", (8, 8), 100).convert(mode).save(tmp_path / "a.png")
        assert (EIGHT(tmp_path / "a.png") == 100).all()


INK, OPACITY = np.array([200, 10, 90]), np.arange(256, dtype=np.uint8).reshape(16, 16)


def palette_file(path, transparency):
    "Sixteen colours k, drawn in a 16 x 16 square; which of them are transparent, and how much, stands in the file's header."
    image = Image.new("P", (16, 16))
    image.putpalette([channel for k in range(16) for channel in (k, 2 * k, 3 * k)])
    image.putdata(list(range(16)) * 16)
    image.save(path, transparency=transparency)
    return np.array([[k, 2 * k, 3 * k] for k in range(16)] * 16).reshape(16, 16, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparent_pixels_are_laid_on_white(mode, tmp_path):
    """Every opacity, of one ink, within half a level of a c + (1 - a) 255; what lies under full transparency is of no account."""
    ink = INK if mode == "RGBA" else INK[:1]
    pixels = np.concatenate([np.broadcast_to(ink, (16, 16, len(ink))), OPACITY[..., None]], -1).astype(np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(tmp_path / "a.png")
    seen = open_image(tmp_path / "a.png")
    share = OPACITY[..., None] / 255
    expected = (share * ink + (1 - share) * 255).squeeze()
    assert seen.mode == ("RGB" if mode == "RGBA" else "L") and abs(np.asarray(seen) - expected).max() <= 0.5 + 1e-9
    assert abs(np.asarray(Image.open(tmp_path / "a.png").convert(seen.mode)) - expected).max() > 50       # dropped, the broken twin
    assert abs(Picture(16)(tmp_path / "a.png").transpose(1, 2, 0) - expected.reshape(16, 16, -1)).max() <= 0.5 + 1e-9


def test_transparent_colours_of_a_palette_are_laid_on_white(tmp_path):
    colours = palette_file(tmp_path / "a.png", bytes([0, 128] + [255] * 14))
    seen, which = np.asarray(open_image(tmp_path / "a.png")), np.tile(np.arange(16), (16, 1))
    assert (seen[which == 0] == 255).all() and (seen[which > 1] == colours[which > 1]).all()
    assert abs(seen[which == 1] - (128 * colours[which == 1] + 127 * 255) / 255).max() <= 0.5 + 1e-9
    colours = palette_file(tmp_path / "b.gif", 3)
    seen = np.asarray(open_image(tmp_path / "b.gif"))
    assert (seen[which == 3] == 255).all() and (seen[which != 3] == colours[which != 3]).all()


@pytest.mark.parametrize("mode, key, mode_after", [("RGB", (10, 20, 30), "RGB"), ("L", 10, "L")])
def test_a_key_colour_is_laid_on_white(mode, key, mode_after, tmp_path):
    image = Image.new(mode, (8, 8), key)
    image.paste(77 if mode == "L" else (77, 77, 77), (0, 0, 8, 4))
    image.save(tmp_path / "a.png", transparency=key)
    seen = open_image(tmp_path / "a.png")
    pixels = np.asarray(seen).reshape(8, 8, -1)
    assert seen.mode == mode_after and (pixels[:4] == 77).all() and (pixels[4:] == 255).all()


@pytest.mark.parametrize("recipe, image, words", [
    (Picture(64, (15, 40, 163, 188), (178, 218)), Image.new("RGB", (178, 178)), "a.png has .178, 178. pixels"),
    (EIGHT, Image.new("RGB", (9, 8)), "a.png has .9, 8. pixels .*square"),
    (EIGHT, Image.new("I;16", (8, 8)), "a.png is not an 8-bit image.*more than 8 bits")])
def test_pictures_of_another_kind_are_refused(recipe, image, words, tmp_path):
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=words):
        recipe(tmp_path / "a.png")


# ---- reading --------------------------------------------------------------------------------------------------------

def test_every_kind_of_index(small, files):
    truth = torch.stack([torch.tensor(EIGHT(file)) for file in files])
    assert len(small) == 20 and small.image_shape == (3, 8, 8)
    for index in (3, -1, slice(2, 9), slice(None), [5, 0, 5], torch.tensor([1, 2]), np.array([7])):
        assert torch.equal(small.read(index), truth[index]) and torch.equal(small[index], truth[index].float() / 255)
    assert torch.equal(torch.stack(small.__getitems__([4, 2])), small[[4, 2]])
    with pytest.raises(IndexError):
        small[[20]]


def test_images_stay_on_the_disk(tmp_path):
    """A map, not a copy: rows of a sparse file of 8 GiB are read where they are wanted, and as the file is at that moment. How
    much memory that takes, benchmarks/process.py measures."""
    path, count = tmp_path / "big-train.npy", 2**33 // (3 * 64 * 64)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(count, 3, 64, 64)))
        file.truncate(file.tell() + count * 3 * 64 * 64)
    path.with_suffix(".json").write_text(json.dumps(dict(shape=[count, 3, 64, 64])))
    rows = Stored(path)
    assert len(rows) == count and isinstance(rows.rows, np.memmap)
    asked = [0, count // 2, count - 1]
    assert not rows[asked].any()
    for index, value in zip(asked, (51, 102, 255)):    # after the set was opened, and read
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size - (count - index) * 3 * 64 * 64)
            file.write(bytes([value]) * 3 * 64 * 64)
    assert [image.unique().tolist() for image in rows.read(asked)] == [[51], [102], [255]]
    assert not rows[[1, count // 2 - 1, count - 2]].any()


def test_a_worker_is_sent_the_path_and_not_the_images(small):
    assert len(pickle.dumps(small)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(small))[:], small[:])
    loader = torch.utils.data.DataLoader(small, batch_size=10, num_workers=1)
    assert torch.equal(torch.cat(list(loader)), small[:])


# ---- preparing ------------------------------------------------------------------------------------------------------

def test_a_second_start_decodes_nothing(small, files, monkeypatch):
    monkeypatch.setattr(stored, "_write", None)
    assert torch.equal(prepare(small.path, files, EIGHT, "small train")[:], small[:])
    for file in files:
        file.unlink()
    assert torch.equal(prepare(small.path, [], EIGHT, "small train")[:], small[:])


def test_the_manifest_says_what_it_is(small):
    about = json.loads(small.path.with_suffix(".json").read_text())
    assert about["name"] == "small train" and about["count"] == 20 and about["shape"] == [20, 3, 8, 8]
    assert about["preprocessing"] == "Picture(side=8, crop=None, original=None)"
    assert about["sha256"] == digest(small.path)


def test_blocks_are_put_together_in_order(small, files, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_BLOCK", 3)
    assert torch.equal(prepare(tmp_path / "again-train.npy", files, EIGHT, "again")[:], small[:])


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-1], lambda raw: raw + b"0", lambda raw: b"", lambda raw: b"x" + raw[1:],
                                   lambda raw: raw.replace(b"(20, 3", b"(19, 3")])
def test_an_array_that_is_not_whole_is_refused(spoil, small):
    small.path.write_bytes(spoil(small.path.read_bytes()))
    with pytest.raises(ValueError, match="small-train.npy is not as it was prepared.*delete it and start again"):
        Stored(small.path)


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"shape": [20, 3, 8, 9]}'])
def test_a_manifest_that_does_not_fit_is_refused(manifest, small):
    path = small.path.with_suffix(".json")
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(ValueError, match="small-train.npy is not as it was prepared"):
        Stored(small.path)


def test_a_pickled_array_is_refused(small):
    np.save(small.path, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is not as it was prepared"):
        Stored(small.path)


@pytest.mark.parametrize("side", [6_000, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore:Image size")               # Pillow's own word on the second
def test_an_image_that_claims_too_many_pixels_is_not_unpacked(side, tmp_path):
    "97 kB of PNG took 0.8 GB. Here are 68 bytes that claim so, with a right checksum; of the third Pillow itself says no."
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is not an 8-bit image.* pixels"):
        open_image(tmp_path / "a.png")


def test_no_program_is_asked_to_draw_an_image(tmp_path, monkeypatch):
    "PostScript under the name of a PNG: Pillow would hand it to Ghostscript."
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(ValueError, match="a.png is not an 8-bit image"):
        open_image(tmp_path / "a.png")


def test_an_altered_byte_is_found_where_the_set_is_first_used(small, files):
    raw = bytearray(small.path.read_bytes())
    raw[-100] ^= 1
    small.path.write_bytes(raw)
    with pytest.raises(ValueError, match="small.*altered.*delete"):
        prepare(small.path, files, EIGHT, "small train")


def test_an_altered_byte_is_found_by_verify(small):
    small.verify()
    raw = bytearray(small.path.read_bytes())
    raw[-100] ^= 1
    small.path.write_bytes(raw)
    with pytest.raises(ValueError, match="altered.*delete"):
        Stored(small.path).verify()


@pytest.mark.parametrize("change, words", [(dict(picture=Picture(4)), "preprocessing"), (dict(name="other"), "name"),
                                           (dict(drop=1), "files")])
def test_a_set_prepared_otherwise_is_refused(change, words, small, files):
    with pytest.raises(ValueError, match=f"was prepared for {words}.*delete"):
        prepare(small.path, files[change.get("drop", 0):], change.get("picture", EIGHT), change.get("name", "small train"))


def test_nothing_is_left_of_an_interrupted_preparation(files, tmp_path, monkeypatch):
    """By an exception after some blocks (Ctrl-C, a full disk, a bad file): no set, no space taken; the next start succeeds."""
    path, seen = tmp_path / "set-train.npy", []
    class Interrupting(Picture):
        def __call__(self, file):
            seen.append(file)
            if len(seen) == 15:
                raise KeyboardInterrupt
            return super().__call__(file)
    monkeypatch.setattr(stored, "_BLOCK", 5)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, files, Interrupting(8), "set")
    assert not path.exists() and sum(file.stat().st_size for file in tmp_path.glob("*.part")) == 0
    prepare(path, files, EIGHT, "set").verify()
    assert not list(tmp_path.glob("*.part"))


def test_killed_while_preparing(files, tmp_path):
    """SIGKILL leaves half a file under another name; the next start takes it over."""
    path = tmp_path / "set-train.npy"
    code = ("import os, signal; from pathlib import Path; from ncp_vae.engine import stored; stored._BLOCK = 5; "
            f"files = sorted(Path({str(files[0].parent)!r}).iterdir()); real = stored.np.stack; rounds = []\n"
            "def stack(rows):\n    rounds.append(1)\n    if len(rounds) == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return real(rows)\n"
            f"stored.np.stack = stack\nstored.prepare({str(path)!r}, files, stored.Picture(8), 'set')")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert not path.exists() and (tmp_path / "set-train.npy.part").exists()
    found = prepare(path, files, EIGHT, "set")
    found.verify()
    assert len(found) == 20


def test_the_second_process_waits_for_the_first(files, tmp_path):
    """Several at once: each gets the whole set, and one made it."""
    path = tmp_path / "set-train.npy"
    code = ("from pathlib import Path; from ncp_vae.engine import stored; real = stored._write\n"
            "def write(*args):\n    print('made it')\n    return real(*args)\n"
            f"stored._write = write\nfiles = sorted(Path({str(files[0].parent)!r}).iterdir())\n"
            f"stored.prepare({str(path)!r}, files, stored.Picture(8), 'set').verify()")
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and "".join(printed) == "made it\n"


def test_a_disk_that_fails(files, tmp_path, monkeypatch):
    """What the system says when the bytes cannot be brought to the disk: no set, no manifest, no space taken."""
    def fail(number):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        prepare(tmp_path / "set-train.npy", files, EIGHT, "set")
    assert [(file.name, file.stat().st_size) for file in tmp_path.glob("set-*")] == [("set-train.npy.part", 0)]


def test_a_disk_that_is_full(files, tmp_path):
    """A limit on the size of files stands for it: an error, not a signal that ends the process, and no space taken."""
    path = tmp_path / "set-train.npy"
    code = ("import resource; from pathlib import Path; from ncp_vae.engine import stored\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); files = sorted(Path({str(files[0].parent)!r}).iterdir())\n"
            f"try: stored.prepare({str(path)!r}, files, stored.Picture(8), 'set')\n"
            "except OSError as error: print(error.strerror)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "File too large\n"
    assert [(file.name, file.stat().st_size) for file in tmp_path.glob("set-*")] == [("set-train.npy.part", 0)]


def test_missing_and_damaged_originals_are_named(files, tmp_path):
    files[3].write_bytes(files[3].read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{files[3].name} is not an 8-bit image"):
        prepare(tmp_path / "set-train.npy", files, EIGHT, "set")
    files[5].unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of the 20 images of set are missing, .*{files[5].name}"):
        prepare(tmp_path / "set-train.npy", files, EIGHT, "set")
    with pytest.raises(FileNotFoundError, match="no prepared set at .*none.npy"):
        Stored(tmp_path / "none.npy")


# ---- on the device --------------------------------------------------------------------------------------------------

def test_five_bits_are_32_levels():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    found = reduce_bits(bytes_ / 255, 5)
    assert torch.equal(found.unique(), torch.arange(32) / 31)
    assert torch.equal(found, (255 * (bytes_ / 255) / 8).floor() / 31) and torch.equal(found, reduce_bits(bytes_, 5))
    assert torch.equal(reduce_bits(bytes_, 8), bytes_ / 255)


@pytest.mark.parametrize("bits", [0, 9, 2.5, "5"])
def test_bits_that_there_are_not(bits, small):
    for call in (lambda: reduce_bits(torch.zeros(2), bits), lambda: Augmented(small, bits=bits)):
        with pytest.raises(ValueError, match="bits must be a whole number from 1 to 8"):
            call()


def test_flips_are_whole_images_and_a_function_of_the_seed(small):
    """Of 20 images none or all flipped: one seed in half a million."""
    augmented = Augmented(small, flip=True)
    torch.manual_seed(3)
    first = augmented.on_device(augmented[:])
    torch.manual_seed(3)
    assert torch.equal(first, augmented.on_device(augmented[:])) and not torch.equal(first, augmented.on_device(augmented[:]))
    flipped = [torch.equal(one, image.flip(-1)) for one, image in zip(first, small[:])]
    assert all(torch.equal(one, image.flip(-1) if turned else image) for one, image, turned in zip(first, small[:], flipped))
    assert any(flipped) and not all(flipped)


def test_bytes_of_rows_in_memory_are_theirs(small):
    """CIFAR-10's rows are floats in memory: they travel as the bytes that they were."""
    assert torch.equal(Augmented(small[:])[:], small.read(slice(None))) and Augmented(small[:])[3].dtype == torch.uint8
    assert torch.equal(Augmented(torch.arange(256).view(-1, 1, 1, 1) / 255)[:].flatten(), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("wrap", [lambda x: x, Rows, lambda x: torch.utils.data.Subset(x, [0, 1]), lambda x: torch.utils.data.Subset(Rows(x), [1])])
@pytest.mark.parametrize("spoil, words", [(lambda x: x + 0.01, r"\[0.01, 1.01\]; expected \[0, 1\]"), (lambda x: x - 0.01, r"\[-0.01, 0.99\]"),
                                          (lambda x: x / 0, r"\[nan, nan\].* NaN or infinite"), (lambda x: (255 * x).byte(), "torch.uint8"),
                                          (lambda x: x.long(), "torch.int64"), (lambda x: x[:0], "empty")])
def test_intensities_that_bytes_cannot_hold_are_refused_at_once(wrap, spoil, words):
    """Where 1.01 would be the byte 2, without a word."""
    ramp = torch.linspace(0, 1, 32).view(2, 1, 4, 4)
    assert Augmented(wrap(ramp))[[0]].dtype == torch.uint8
    with pytest.raises(ValueError, match=words):
        Augmented(wrap(spoil(ramp)))


def test_other_data_sets_are_checked_as_they_are_read():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return torch.full((1, 2, 2), 1.01) if index == 3 else torch.ones(1, 2, 2)
    assert Augmented(Own())[2].unique().tolist() == [255]
    with pytest.raises(ValueError, match=r"\[1.01, 1.01\]; expected"):
        Augmented(Own())[3]


class Pairs(torch.utils.data.Dataset):
    """A stranger's data set: one row at a time, an image and its label."""
    def __init__(self, images, make=lambda image, index: (image, index)):
        self.images, self.make = images.unbind(), make      # not a Tensor: no list of indices, no slice

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.make(self.images[index], index)


@pytest.mark.parametrize("wrap", [Pairs, lambda x: Pairs(x, lambda image, index: image), lambda x: Pairs(x, lambda image, index: [image, 7]),
                                  lambda x: torch.utils.data.TensorDataset(x, torch.arange(20)),
                                  lambda x: torch.utils.data.ConcatDataset([Pairs(x[:8]), Pairs(x[8:])])])
def test_any_map_style_data_set_is_augmented(wrap, small):
    """Rows are images or pairs; by an index, a list and a slice, through a Subset, and in the training loop."""
    data = wrap(small[:])
    augmented, part = Augmented(data, flip=True, bits=5), Augmented(torch.utils.data.Subset(data, [7, 3, 11]))
    assert len(augmented) == 20 and augmented.image_shape == (3, 8, 8)
    assert torch.equal(augmented[:], small.read(slice(None))) and torch.equal(augmented[4], small.read(4))
    assert torch.equal(part[[2, 0]], small.read([11, 7])) and torch.equal(part[1], small.read(3))
    batch = next(batches(Augmented(data), 20, seed=0))
    assert torch.equal(batch.flatten(1).sum(1).sort().values, small[:].flatten(1).sum(1).sort().values)


@pytest.mark.parametrize("make, words", [(lambda image, index: (image.numpy(), index), "each image as a Tensor, alone or before its label; it gave ndarray"),
                                         (lambda image, index: dict(image=image), "it gave dict"), (lambda image, index: 2 * image + 1, "expected .0, 1."),
                                         (lambda image, index: (255 * image).byte(), "torch.uint8"), (lambda image, index: image[0], r"an image is \[C, H, W\], got \(8, 8\)")])
def test_rows_that_are_no_images_are_refused_at_once(make, words, small):
    with pytest.raises(ValueError, match=words):
        Augmented(Pairs(small[:], make))


def test_a_stream_is_no_map_style_data_set():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="Stream has no length; expected a map-style Dataset"):
        Augmented(Stream())


def test_a_subset_is_read_like_the_whole(small):
    chosen = [7, 3, 3, 11]
    for whole in (small, small[:], Rows(small[:])):
        part = Augmented(torch.utils.data.Subset(whole, chosen), flip=True)
        assert len(part) == 4 and part.image_shape == (3, 8, 8)
        assert torch.equal(part[[0, 3, 1]], small.read([7, 11, 3])) and torch.equal(part[2], small.read(3))
        assert torch.equal(torch.stack(part.__getitems__([3, 0])), small.read([11, 7]))
    twice = torch.utils.data.Subset(torch.utils.data.Subset(small, chosen), [3, 0])
    assert torch.equal(Augmented(twice)[[0, 1]], small.read([11, 7]))
    batch = next(batches(Augmented(torch.utils.data.Subset(small, chosen), bits=2), 4, seed=0))
    assert torch.equal(batch.flatten(1).sum(1).sort().values, reduce_bits(small.read(chosen), 2).flatten(1).sum(1).sort().values)


def test_one_check_under_both_names():
    assert data.check_images is stored.check_images


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: torch.utils.data.DataLoader(data, batch_size=5),
                                  lambda data: torch.utils.data.Subset(data, range(10)),
                                  lambda data: torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(10)), batch_size=5)])
def test_training_gets_floats_however_the_set_is_wrapped(wrap, small):
    batch = next(batches(wrap(Augmented(small, flip=True, bits=2)), 5, seed=0))
    assert batch.shape == (5, 3, 8, 8) and set((3 * batch).unique().tolist()) <= {0, 1, 2, 3}


def test_bytes_without_on_device_are_still_refused():
    with pytest.raises(ValueError, match="must be floating point, got torch.uint8"):
        next(batches(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), 4, seed=0))


def test_what_on_device_makes_is_checked(small):
    class Broken(Augmented):
        def on_device(self, x):
            return super().on_device(x) / 0
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(batches(Broken(small), 4, seed=0))


def test_training_resumes_with_the_same_flips_to_the_bit(small, tmp_path):
    """Stopped in the middle by an error and resumed, against one that ran through; another seed gives other weights."""
    class Failing(Augmented):
        reads = 0
        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 8:
                raise RuntimeError("the disk is gone")
            return super().__getitem__(index)

    def train(data, checkpoint=None, seed=3):
        torch.manual_seed(0)
        loss = VAELoss(DenseVAE((3, 8, 8), 2, hidden=(8,), sigma=0.5), kl_warmup=0)
        fit(loss, data, steps=12, batch_size=6, lr=1e-2, seed=seed, name="vae", checkpoint=checkpoint)
        return loss.state_dict()

    whole, path = train(Augmented(small, flip=True, bits=5)), tmp_path / "vae.ckpt"
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(Failing(small, flip=True, bits=5), path)
    assert torch.load(path, weights_only=True)["step"] > 0
    resumed = train(Augmented(small, flip=True, bits=5), path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    plain = train(Augmented(small, bits=5))
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)           # the flips did something


def test_both_loops_take_it(small):
    from ncp_vae.engine.train import fit_ncp
    data = Augmented(small, flip=True)
    vae = fit_vae(DenseVAE((3, 8, 8), 2, hidden=(8,), sigma=0.5), data, steps=2, batch_size=6, lr=1e-3, seed=0)
    ncp = fit_ncp(vae, data, steps=2, batch_size=6, lr=1e-3, seed=0)
    assert ncp.sample(2).likelihood.mean.shape == (2, 3, 8, 8)
