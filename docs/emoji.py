"""Unpack the emoji pictures of an npm package into FOLDER/train and FOLDER/test, near-duplicates on one side. From the clone:

    npm pack emoji-datasource-google@15.1.2
    python docs/emoji.py emoji-datasource-google-15.1.2.tgz data/emoji
    ncp-vae run images -p dataset=folder -p data_root=data/emoji -p side=32 -p model=nvae:colour32

Licence, as the package states it: its code is MIT (LICENSE, Copyright (c) 2013 Cal Henderson); the pictures are those of Noto Emoji,
v2.042, and "Android/Google/Noto images, are available under the Apache License 2.0" (README.md). Neither is part of this repository.

A picture's name is its Unicode code points, such as 1f469-1f3fd-200d-1f680.png: woman, medium skin, joined to a rocket. 1,880 of the 3,778
names hold a skin tone, five of which make one drawing, and most people come as a man, a woman and a person. So the split is one of
*base pictures* (`base_picture`): every tenth of them, in the order of their names, goes to FOLDER/test with all its variants.
What remains alike on both sides is what different pictures share: the round yellow face, a hand, the colours of two flags."""
import re
import sys
import tarfile
from pathlib import Path, PurePosixPath

INSIDE = "package/img/google/64"                    # the 64 x 64 PNG files, with alpha
DROPPED = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff",      # skin tones
           "1f9b0", "1f9b1", "1f9b2", "1f9b3",      # hair: red, curly, none, white
           "2640", "2642", "27a1", "fe0f"}          # female, male, facing right (a mirror image), the mark of an emoji
ALIKE = {code: codes[0] for codes in (              # one drawing, or nearly so, under several names
    ["1f468", "1f469", "1f9d1"], ["1f466", "1f467", "1f9d2"], ["1f474", "1f475", "1f9d3"],      # adults, children, the old
    ["1f385", "1f936", "1f468-1f384"], ["1f478", "1f934", "1fac5"], ["1f470", "1f935"],         # Santa, royals, wedding clothes
    ["1f46b", "1f46c", "1f46d", "1f468-1f91d-1f468"], ["1f48f", "1f468-2764-1f48b-1f468"], ["1f491", "1f468-2764-1f468"],
    ["1f46a", "1f468-1f466"], ["1f1f3-1f1f4", "1f1e7-1f1fb", "1f1f8-1f1ef"], ["1f1eb-1f1f7", "1f1e8-1f1f5", "1f1f2-1f1eb"],
    ["1f1ea-1f1f8", "1f1ea-1f1e6"], ["1f1fa-1f1f8", "1f1fa-1f1f2"], ["1f1ee-1f1f4", "1f1e9-1f1ec"],
    ["1f1e6-1f1fa", "1f1ed-1f1f2"], [f"{code:x}" for code in range(0x1F550, 0x1F568)]) for code in codes}     # flags, clock faces


def base_picture(name: str) -> str:
    "What a file's name is without skin, sex, hair and direction; families, couples, keycaps and the like under one name."
    codes = name.removesuffix(".png").split("-")
    codes = [ALIKE.get(code, code) for code in codes if code not in DROPPED and code != "200d"] or codes
    base = "-".join(codes)
    base = re.sub(r"^1f468(-1f468)?(-1f466)+$", "1f468-1f466", base)       # a family of any size
    return "20e3" if base.endswith("-20e3") else ALIKE.get(base, base)


def split(names: list[str]) -> dict[str, list[str]]:
    "The file names of both sides."
    test = set(sorted({base_picture(name) for name in names})[::10])
    return {side: [name for name in sorted(names) if (base_picture(name) in test) == (side == "test")] for side in ("train", "test")}


def unpack(package: Path, folder: Path) -> None:
    "Write both folders and say how many; ValueError where the package is not that one or the folder is not empty."
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; name a new one")
    try:
        with tarfile.open(package) as archive:
            pictures = {PurePosixPath(entry.name).name: archive.extractfile(entry).read() for entry in archive
                        if entry.isfile() and str(PurePosixPath(entry.name).parent) == INSIDE and entry.name.endswith(".png")}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{package} cannot be read ({error}); get it by `npm pack emoji-datasource-google@15.1.2`") from error
    if not pictures:
        raise ValueError(f"{package} holds no {INSIDE}/*.png; get it by `npm pack emoji-datasource-google@15.1.2`")
    for side, names in split(list(pictures)).items():
        (folder / side).mkdir(parents=True)
        for name in names:
            (folder / side / name).write_bytes(pictures[name])
        print(f"{side:5s} {len(names):5d} images of {len({base_picture(name) for name in names})} base pictures")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"emoji.py: {error}")
