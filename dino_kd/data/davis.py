"""DAVIS in its official folders: frames, object masks as palette PNGs, lists of sequences.

Pont-Tuset et al. 2017, "The 2017 DAVIS Challenge on Video Object Segmentation" (arXiv 1704.00675).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_kd.data.image_files import contents
from dino_kd.errors import DataError, unknown_name
from dino_kd.files import write_atomic

VOID = 255
_SHORTEST = 3  # frames; the first and the last are not scored
_LAYOUT = (
    "Expected: ROOT/ImageSets/2017/val.txt, ROOT/JPEGImages/480p/SEQUENCE/00000.jpg and "
    "ROOT/Annotations/480p/SEQUENCE/00000.png."
)


@dataclass
class Video:
    """One sequence.

    Attributes:
        name: such as "bike-packing".
        frames: its pictures in order.
        masks: the annotation of every frame.
        size: (height, width) of all of them, in pixels.
        objects: how many the first annotation holds; they are numbered from 1.
    """

    name: str
    frames: list[Path]
    masks: list[Path]
    size: tuple[int, int]
    objects: int


def read_davis(
    root: str | Path,
    where: str,
    *,
    split: str = "val",
    resolution: str = "480p",
    names: Sequence[str] | None = None,
) -> list[Video]:
    """The sequences of ``ImageSets/2017/SPLIT.txt``, or those of them in `names`.

    Checked completely except for the pixels: of all but the first annotation only the size is read.

    Raises:
        DataError: not DAVIS's layout, a frame without annotation, another size, too few frames,
            no object in the first one.
        ConfigError: an unknown split or sequence.
    """
    root = Path(root).expanduser()
    lists, pictures = root / "ImageSets" / "2017", root / "JPEGImages" / resolution
    annotations = root / "Annotations" / resolution
    for folder in (lists, pictures, annotations):
        if not folder.is_dir():
            raise DataError(f"{where}: there is no {folder} ({_nearest(folder, root)}). {_LAYOUT}")
    known = _read_list(lists, split, where)
    for name in names or ():
        if name not in known:
            raise unknown_name("sequence", name, known, "sequences")
    return [
        _open_video(name, pictures / name, annotations / name, where)
        for name in known
        if names is None or name in names
    ]


def read_mask(path: str | Path) -> tuple[np.ndarray, list[int] | None]:
    """An annotation: object numbers uint8 ``[H, W]`` (0 background, 255 void), and its palette.

    A grey picture without palette counts as numbers, too. Raises DataError for anything else.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise DataError(
                    f"{path} holds colours ({picture.mode}), and an annotation holds the numbers "
                    "of objects: a PNG with a palette. Was it saved by another program?"
                )
            return np.array(picture), picture.getpalette() if picture.mode == "P" else None
    except UnidentifiedImageError:
        raise DataError(f"{path} is no picture, and an annotation is expected there.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def write_mask(path: str | Path, mask: np.ndarray, palette: list[int] | None = None) -> None:
    """Write object numbers uint8 ``[H, W]`` as a palette PNG. Raises UserError for a full disk.

    `palette` holds red, green, blue of every number; None: the colours of PASCAL VOC and DAVIS.
    """
    picture = Image.fromarray(mask)
    picture.putpalette(default_palette() if palette is None else palette)  # turns "L" into "P"
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))


def default_palette() -> list[int]:
    """The colours of PASCAL VOC and DAVIS, 256 times red, green, blue.

    Bits 0, 1, 2 of a number are the highest bits of red, green, blue; bits 3, 4, 5 the next, ...
    """
    numbers = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * place + channel)) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours.reshape(-1).tolist()


def _read_list(lists: Path, split: str, where: str) -> list[str]:
    file = lists / f"{split}.txt"
    if not file.is_file():
        raise unknown_name("split", split, [f.stem for f in lists.glob("*.txt")], "split")
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    strange = [name for name in names if Path(name).name != name]
    if strange or not names:
        raise DataError(
            f"{where}: {file} should hold the name of one sequence in each line; found "
            f"{strange[0] if strange else 'none'!r}."
        )
    return names


def _open_video(name: str, pictures: Path, annotations: Path, where: str) -> Video:
    for folder, kind in ((pictures, "frames"), (annotations, "annotations")):
        if not folder.is_dir():
            raise DataError(
                f"{where}: the {kind} of {name} are missing: there is no {folder}. {_LAYOUT}"
            )
    frames = sorted(pictures.glob("*.jpg"))
    if len(frames) < _SHORTEST:
        raise DataError(
            f"{where}: {pictures} holds {len(frames)} frames (*.jpg). The first is given and the "
            f"last is not scored, so that {_SHORTEST} are the least; take {name} off the list."
        )
    masks = [annotations / f"{frame.stem}.png" for frame in frames]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(masks)} frames of {name} have no annotation, the "
            f"first is {missing[0]}. Sets without public annotations, such as test-dev, cannot be "
            "scored here."
        )
    sizes = {file: _size(file, where) for file in (*frames, *masks)}
    height, width = sizes[frames[0]]
    for file, size in sizes.items():
        if size != (height, width):
            raise DataError(
                f"{where}: {file} is {size[1]} x {size[0]} px, and {frames[0].name} of {name} is "
                f"{width} x {height} px; frames and annotations need one size."
            )
    first, _ = read_mask(masks[0])
    objects = int(first[first != VOID].max(initial=0))
    if not objects:
        raise DataError(
            f"{where}: {masks[0]} holds no object, and the first frame says what to follow."
        )
    return Video(name, frames, masks, (height, width), objects)


def _size(file: Path, where: str) -> tuple[int, int]:
    try:
        with Image.open(file) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: {file} cannot be read: {error}.") from error


def _nearest(folder: Path, root: Path) -> str:
    """What is in the last part of a path that exists."""
    while folder != root and not folder.is_dir():
        folder = folder.parent
    return f"{folder}: {contents(folder)}" if folder.is_dir() else f"{root} is no folder"
