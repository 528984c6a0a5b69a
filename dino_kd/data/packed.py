"""A data set in one file instead of one file per image, built once and then read by offset.

Small images of one size are kept as pixels: reading a batch of them costs a copy. Everything else
is kept as the files were, one behind the other, and decoded when read.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dino_kd.cache_entries import ABOUT, GIGABYTE, cache_folder, hold, make_room, mark_used
from dino_kd.data.dataset import ImageDataset, Subset
from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.data.images import BrokenImage, decode_image
from dino_kd.distributed import on_main
from dino_kd.errors import ConfigError, UserError
from dino_kd.files import bytes_in_words, disk_error, sync, write_json

_FORMAT = 1  # raise it when the same images would be packed in another way
_LARGEST_SIDE = 64  # pixels; up to here decoding and its Python calls cost more than the crops
_SAMPLE = 64  # images that are read to choose the form and to foretell size and time
_NEWS = 30.0  # seconds between two sentences while packing
_ABANDONED = 2 * 24 * 3600.0  # seconds after which an unfinished folder is deleted
_DATA, _OFFSETS = "images.bin", "offsets.npy"

Say = Callable[[str], object]


class PackedImages:
    """The same images as `source`, read from one file. Its spec, labels and names are the source's.

    Args:
        source: What was packed; still asked for paths and labels, never for pixels.
        entry: The folder that `pack` made from it.
    """

    def __init__(self, source: ImageDataset, entry: Path) -> None:
        self.source = source
        self.entry = entry
        self.spec, self.labels, self.class_names = source.spec, source.labels, source.class_names
        self._open()

    def _open(self) -> None:
        about = json.loads((self.entry / ABOUT).read_text(encoding="utf-8"))
        self._fingerprint: str = about["images"]
        self._channels: int = about["channels"]
        self._broken: dict[int, str] = {int(i): reason for i, reason in about["broken"]}
        self._pixels: np.ndarray | None = None
        self._lock = hold(self.entry)  # others that make room leave it alone
        if about["shape"] is not None:
            shape = (len(self), *about["shape"])
            mapped = np.memmap(self.entry / _DATA, np.uint8, "r", shape=shape)
            self._pixels = mapped.view(np.ndarray)  # indexed faster than the subclass
            self._is_broken = np.zeros(len(self), dtype=bool)
            self._is_broken[list(self._broken)] = True
        else:
            self._offsets = np.load(self.entry / _OFFSETS)
            self._file = (self.entry / _DATA).open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:  # open files and maps stay behind
        return {"source": self.source, "entry": self.entry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["entry"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        if index in self._broken:
            raise BrokenImage(self.path(index), self._broken[index])
        if self._pixels is not None:
            return np.array(self._pixels[index])
        begin, end = self._offsets[index : index + 2].tolist()
        # Not a memory map: a page that a slow disk has yet to bring would stop every thread.
        data = os.pread(self._file.fileno(), end - begin, begin)
        try:
            return decode_image(data, self._channels)
        except BrokenImage as error:
            raise BrokenImage(self.path(index), error.reason) from error

    def read_block(self, indices: np.ndarray) -> np.ndarray | None:
        """The images int64 [n] as uint8 [n, H, W, C]; None unless kept as pixels and all whole."""
        if self._pixels is None or self._is_broken[indices].any():
            return None
        return self._pixels[indices]

    def path(self, index: int) -> str:
        """Where image `index` lay when it was packed."""
        return self.source.path(index)

    def fingerprint(self) -> str:
        """The source's: the images are the same."""
        return self._fingerprint


def packed(
    dataset: ImageDataset,
    setting: str,
    *,
    limit_gb: float,
    say: Say,
    where: str = "data.pack",
) -> ImageDataset:
    """`dataset` read from its pack, which is made first where there is none; as it is when "off".

    An entry belongs to the exact images: a file that is added, replaced or touched makes another
    one. Every process of a job calls this; the main one packs. A machine of the job that does not
    see the folder reads the files themselves.

    Args:
        dataset: of any kind; of a subset, the whole is packed.
        setting: "off", "auto" (``~/.cache/dino_kd/packed``) or a folder.
        limit_gb: of that folder; the entries whose last use is longest ago are deleted first.
        say: Receives sentences about size and time.
        where: The setting, for messages.

    Raises:
        ConfigError: the folder is a file, or this system cannot read files by offset.
        UserError: too little room on the disk or within the limit.
    """
    folder = pack_folder(setting, where)
    if folder is None:
        return dataset
    if type(dataset) is Subset:
        whole = packed(dataset.dataset, setting, limit_gb=limit_gb, say=say, where=where)
        return dataset if whole is dataset.dataset else Subset(whole, dataset.indices)
    entry = on_main(
        functools.partial(_find_or_make, dataset, folder, limit_gb * GIGABYTE, say, where)
    )
    if entry is None or not (entry / ABOUT).is_file():
        return dataset
    return PackedImages(dataset, entry)


def pack_folder(setting: str, where: str = "data.pack") -> Path | None:
    """The folder of packs that the setting means; None for off. Raises ConfigError for a file."""
    try:
        folder = cache_folder(setting, "packed")
    except ConfigError:
        raise ConfigError(f"{where}: {setting} is a file; give a folder, auto or off") from None
    if folder is not None and not hasattr(os, "pread"):
        raise ConfigError(f"{where}: this system cannot read files by offset; set {where}=off")
    return folder


def _find_or_make(
    dataset: ImageDataset, folder: Path, limit: float, say: Say, where: str
) -> Path | None:
    """The folder of the packed images; None when packing would gain nothing."""
    fingerprint = dataset.fingerprint()
    entry = folder / text_fingerprint("packed", _FORMAT, fingerprint)[:32]
    if (entry / ABOUT).is_file():
        say(f"{where}: reading {dataset.spec} from {entry}")
        mark_used(entry)
        return entry
    shape, seconds = _probe(dataset)
    if shape is None and not hasattr(dataset, "encoded"):
        say(f"{where}: {dataset.spec} is neither small nor made of files; it is read as it is")
        return None
    size = len(dataset) * int(np.prod(shape)) if shape else _bytes_of_files(dataset)
    _check_room(dataset, folder, size, limit, where)
    about = {"format": _FORMAT, "images": fingerprint, "channels": _channels(dataset, shape)}
    try:
        for form in [shape, None] if shape and hasattr(dataset, "encoded") else [shape]:
            say(
                f"{where}: packing {len(dataset):,} images of {dataset.spec} as "
                f"{'pixels' if form else 'files'} into {entry}: {bytes_in_words(size)}, about "
                f"{seconds * len(dataset):,.0f} s, once"
            )
            begin = time.perf_counter()
            if _make(dataset, entry, form, about, _news(say, where)):
                say(f"{where}: packed in {time.perf_counter() - begin:,.0f} s")
                make_room(folder, limit, keep=entry)
                return entry
    except OSError as error:
        raise disk_error(entry, error, where) from error
    say(f"{where}: the images of {dataset.spec} differ in size; it is read as it is")
    return None


def _probe(dataset: ImageDataset) -> tuple[tuple[int, ...] | None, float]:
    """The shape [H, W, C] that a sample of the images shares, if it is small; seconds per image."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE).astype(int)).tolist()
    shapes = set()
    begin = time.perf_counter()
    for number, index in enumerate(chosen):
        if number == 1:  # the first read loads decoders
            begin = time.perf_counter()
        try:
            shapes.add(dataset.read(index).shape)
        except BrokenImage:
            continue
    seconds = (time.perf_counter() - begin) / len(chosen)
    shape = shapes.pop() if len(shapes) == 1 else None
    return (shape if shape and max(shape[:2]) <= _LARGEST_SIDE else None), seconds


def _channels(dataset: ImageDataset, shape: tuple[int, ...] | None) -> int:
    return shape[2] if shape else int(dataset.channels)  # type: ignore[attr-defined]


def _bytes_of_files(dataset: ImageDataset) -> int:
    total = 0
    for index in range(len(dataset)):
        try:
            total += dataset.encoded_size(index)  # type: ignore[attr-defined]
        except OSError:
            continue  # counted as broken when its turn comes
    return total


def _check_room(dataset: ImageDataset, folder: Path, size: int, limit: float, where: str) -> None:
    if size > limit:
        raise UserError(
            f"{where}: {dataset.spec} takes {bytes_in_words(size)}, more than {where}_limit="
            f"{limit / GIGABYTE:g} GB; raise {where}_limit to {-(-size // GIGABYTE)}, or set "
            f"{where}=off"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error, where) from error
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{where}: the disk of {folder} has {bytes_in_words(free)} left, {dataset.spec} needs "
            f"{bytes_in_words(size)}; free some space, choose another folder, or set {where}=off"
        )


def _make(
    dataset: ImageDataset,
    entry: Path,
    shape: tuple[int, ...] | None,
    about: dict[str, Any],
    tell: Callable[[int, int], object],
) -> bool:
    """Write the entry under another name and rename it; False when a size differs from `shape`."""
    _delete_abandoned(entry.parent)
    temporary = entry.with_name(f".{entry.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_json(temporary / ABOUT, {"unfinished": True})
    lock = hold(temporary)  # else another run that makes room could take it away
    try:
        broken: list[tuple[int, str]] = []
        ends = [0]
        with (temporary / _DATA).open("wb") as file:
            for index, data in enumerate(_contents(dataset, shape, broken)):
                if data is None:
                    return False
                file.write(data)
                ends.append(ends[-1] + len(data))
                tell(index + 1, len(dataset))
        if shape is None:
            np.save(temporary / _OFFSETS, np.array(ends, dtype=np.int64))
            sync(temporary / _OFFSETS)
        sync(temporary / _DATA)
        write_json(temporary / ABOUT, {**about, "shape": shape, "broken": broken})
        try:
            temporary.rename(entry)
        except OSError:
            if not (entry / ABOUT).is_file():  # else another run has just packed the same
                raise
        sync(entry.parent)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            lock.close()


def _contents(
    dataset: ImageDataset, shape: tuple[int, ...] | None, broken: list[tuple[int, str]]
) -> Iterator[bytes | None]:
    """What is stored of each image: its pixels, or its file when `shape` is None.

    A broken image is added to `broken`; pixels give black in its place. None: of another shape.
    """
    for index in range(len(dataset)):
        try:
            if shape is None:
                yield dataset.encoded(index)  # type: ignore[attr-defined]
                continue
            image = dataset.read(index)
            yield image.tobytes() if image.shape == shape else None
        except BrokenImage as error:
            broken.append((index, error.reason))
            yield b"" if shape is None else bytes(int(np.prod(shape)))


def _delete_abandoned(folder: Path) -> None:
    """Delete what a killed run left unfinished."""
    for leftover in folder.glob(".*.tmp-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError:  # gone in the meantime
            continue


def _news(say: Say, where: str) -> Callable[[int, int], None]:
    """A function of (images done, images in all) that says how far packing is, now and then."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _NEWS:
            last = time.monotonic()
            say(f"{where}: {done:,} of {total:,} images packed")

    return tell
