"""Images in tar files, as the webdataset convention lays them out, read in any order.

Files of one sample share the name up to its first dot: ``000.jpg``, ``000.cls``, ``000.json``.
Where every member begins is found once and kept; then a read costs what a plain file costs.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_kd.cache_entries import cache_folder
from dino_kd.data.fingerprint import files_fingerprint
from dino_kd.data.folder import PackedPaths
from dino_kd.data.images import EXTENSIONS, BrokenImage, decode_image
from dino_kd.distributed import on_main
from dino_kd.errors import ConfigError, DataError, UserError
from dino_kd.files import write_atomic

_FORMAT = 1  # raise it when the same files would be indexed in another way
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABEL_KEYS = ("cls", "label")  # of a .json
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


@dataclass
class _Index:
    """Where each of N images lies.

    Attributes:
        shard: int64 [N], number of the tar file.
        begin, size: int64 [N], bytes in it.
        names: of the members.
        labels: int64 [N]; None unless every image has one.
        class_names: the name of each class; None without labels.
    """

    shard: np.ndarray
    begin: np.ndarray
    size: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None


class ShardImages:
    """The images of some tar files, in the order of the files and of their members.

    Labels come from ``.cls`` (a whole number) or from "cls" or "label" in ``.json`` (a whole
    number, or the class's name); a set in which an image has none is unlabelled.

    Raises:
        ConfigError: a pattern that names no file.
        DataError: a file is missing, compressed, damaged, no tar file, or all hold no images.
    """

    def __init__(
        self, pattern: str, *, channels: int = 3, spec: str = "", where: str = "data.train"
    ) -> None:
        self.spec = spec or f"webdataset:{pattern}"
        self.channels = channels
        self.shards = expand(pattern, where)
        index = _load_or_make(self.shards, where)
        if not len(index.shard):
            raise DataError(
                f"{where}: no images in {len(self.shards)} tar files ({self.shards[0]} ...); read "
                f"are members named like {' '.join(sorted(EXTENSIONS))}."
            )
        self.labels, self.class_names = index.labels, index.class_names
        self._shard, self._begin, self._size = index.shard, index.begin, index.size
        self._names = PackedPaths(index.names)

    def __len__(self) -> int:
        return len(self._shard)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        try:
            return decode_image(self.encoded(index), self.channels)
        except BrokenImage as error:
            raise BrokenImage(self.path(index), error.reason) from error

    def encoded(self, index: int) -> bytes:
        """The member of image `index` as it is. Raises BrokenImage."""
        try:
            # Opened for each read: threads share no position, and thousands of shards no limit.
            with open(self.shards[self._shard[index]], "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(int(self._begin[index]))
                return file.read(int(self._size[index]))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BrokenImage(self.path(index), reason) from error

    def encoded_size(self, index: int) -> int:
        """Bytes of that member."""
        return int(self._size[index])

    def path(self, index: int) -> str:
        """The tar file and the member in it."""
        return f"{self.shards[self._shard[index]]}/{self._names[index]}"

    def fingerprint(self) -> str:
        """Path, size and time of change of every tar file, and the channels."""
        return files_fingerprint(self.shards, "shards", self.channels)


def expand(pattern: str, where: str = "data.train") -> list[str]:
    """The tar files that a pattern names: ``{000..099}`` counts, ``*`` and ``?`` match; sorted.

    Raises ConfigError when nothing matches, DataError when a counted file is missing.
    """
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - braces and stars are no path yet
    pieces = _RANGE.split(pattern)
    choices = [
        [f"{n:0{len(low)}}" for n in range(int(low), int(high) + 1)]
        for low, high in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    named = [
        "".join(itertools.chain.from_iterable(zip(pieces[::3], [*numbers, ""], strict=True)))
        for numbers in itertools.product(*choices)
    ]
    shards: list[str] = []
    for name in named:
        if Path(name).is_dir():
            name = f"{glob.escape(name.rstrip('/'))}/*.tar"
        shards += sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
    if not shards:
        raise ConfigError(
            f"{where}: {pattern} matches no file; write webdataset:/data/{{000..099}}.tar, "
            "webdataset:'/data/*.tar' or the folder of the tar files"
        )
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(shards)} tar files do not exist; the first is "
            f"{missing[0]}."
        )
    return shards


def _load_or_make(shards: list[str], where: str) -> _Index:
    """The index from the cache; made, and kept when the cache can be written, where it is not."""
    folder = cache_folder("auto", "shards")
    assert folder is not None  # only for "off"
    file = folder / f"{files_fingerprint(shards, 'index', _FORMAT)[:32]}.npz"
    on_main(functools.partial(_make_if_absent, shards, file, where))
    index = _load(file)
    return index if index is not None else _make(shards, where)


def _make_if_absent(shards: list[str], file: Path, where: str) -> None:
    if _load(file) is None:
        index = _make(shards, where)
        try:
            write_atomic(file, functools.partial(_save, index), setting="XDG_CACHE_HOME")
        except UserError:  # read-only or full: then every process makes its own
            return


def _save(index: _Index, path: Path) -> None:
    about = {"names": index.names, "class_names": index.class_names}
    arrays = {"shard": index.shard, "begin": index.begin, "size": index.size}
    if index.labels is not None:
        arrays["labels"] = index.labels
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays, about=text)  # type: ignore[arg-type]


def _load(file: Path) -> _Index | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            return _Index(
                kept["shard"], kept["begin"], kept["size"],
                about["names"], kept.get("labels"), about["class_names"],
            )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, or damaged
        return None


def _make(shards: list[str], where: str) -> _Index:
    """Walk through all tar files; about 40 microseconds a member."""
    places: list[tuple[int, int, int]] = []
    names: list[str] = []
    labels: list[int | str | None] = []
    for number, shard in enumerate(shards):
        for image, label in _samples(shard, where):
            places.append((number, image.offset_data, image.size))
            names.append(image.name)
            labels.append(label)
    shard_, begin, size = np.array(places, dtype=np.int64).reshape(-1, 3).T.copy()
    return _Index(shard_, begin, size, names, *_classes(labels))


def _samples(shard: str, where: str) -> Iterator[tuple[tarfile.TarInfo, int | str | None]]:
    """The first image of each sample, and its label. Raises DataError."""
    if shard.lower().endswith(_COMPRESSED):
        raise DataError(f"{where}: {shard} is compressed; unpack it to .tar: gunzip {shard}")
    try:
        with tarfile.open(shard, "r:") as archive:
            members = (m for m in archive if m.isfile() and not _file_name(m.name).startswith("."))
            for _, sample in itertools.groupby(members, key=lambda m: _split(m.name)[0]):
                image, label = None, None
                for member in sample:
                    extension = _split(member.name)[1]
                    if image is None and os.path.splitext(f"x{extension}")[1] in EXTENSIONS:  # noqa: PTH122
                        image = member
                    elif extension in (".cls", ".json") and label is None:
                        label = _label(archive, member, extension)
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every member of the file
                if image is not None:
                    yield image, label
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{where}: {shard} cannot be read as a tar file: {error}") from error


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _split(name: str) -> tuple[str, str]:
    """A member's sample and its extension, in small letters: from the first dot of the name on."""
    stem, dot, extension = _file_name(name).partition(".")
    return f"{name.rpartition('/')[0]}/{stem}", f"{dot}{extension}".lower()


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> int | str | None:
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    text = file.read()
    try:
        value: Any = int(text) if extension == ".cls" else json.loads(text)
    except ValueError:
        return None
    if extension == ".json":
        if not isinstance(value, dict):
            return None
        value = next((value[key] for key in _LABEL_KEYS if key in value), None)
    is_label = isinstance(value, (int, str)) and not isinstance(value, bool)
    return value if is_label else None


def _classes(labels: list[int | str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """Class indices int64 [N] and names; (None, None) unless all are numbers, or all names."""
    if labels and all(isinstance(label, int) and label >= 0 for label in labels):
        numbers = np.array(labels, dtype=np.int64)
        return numbers, [str(number) for number in range(int(numbers.max()) + 1)]
    if labels and all(isinstance(label, str) for label in labels):
        names, indices = np.unique(np.array(labels, dtype=str), return_inverse=True)
        return indices.astype(np.int64), names.tolist()
    return None, None
