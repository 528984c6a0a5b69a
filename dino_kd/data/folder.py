"""Images from a folder, at any depth, or from a text file that lists their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dino_kd.data.fingerprint import files_fingerprint
from dino_kd.data.images import ARRAY_EXTENSION, EXTENSIONS, BrokenImage, decode_image, read_bytes
from dino_kd.errors import DataError

_SKIPPED_FOLDERS = ("__MACOSX",)
_LIST_SAMPLE = 200  # listed files looked up before a run starts


class PackedPaths:
    """Many paths as one block of bytes and offsets: no Python object per image.

    Forked workers then share the pages; a list of a million str would be copied into each
    of them as its reference counts are touched.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._block = b"".join(encoded)
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), ends])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return os.fsdecode(self._block[self._offsets[index] : self._offsets[index + 1]])


class FolderImages:
    """Every image below `root`, sorted by path.

    Labels: when each image lies in a sub-folder, the first level of folders is the class and
    sorted names give the indices; otherwise the set is unlabelled. Links to files and folders
    are followed, and each folder is read once, so loops end. Names that start with a dot
    are skipped. `.npy` arrays count as images when `channels` is not 1 or 3, or when the folder
    holds no pictures.

    Raises:
        DataError: the folder is missing, empty, unreadable, or holds no images.
    """

    def __init__(
        self, root: str | Path, *, channels: int = 3, spec: str = "", where: str = "data.train"
    ) -> None:
        self.root = os.fspath(root)
        self.channels = channels
        self.spec = spec or f"folder:{self.root}"
        files = _walk(self.root, where)
        chosen = _choose(files, channels)
        if not chosen:
            raise DataError(f"{where}: {_nothing_found(self.root, files)}")
        chosen.sort()
        self.labels, self.class_names = _labels_of(chosen)
        self._paths = PackedPaths(chosen)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        return decode_image(self.path(index), self.channels)

    def encoded(self, index: int) -> bytes:
        """The file of image `index` as it is. Raises BrokenImage."""
        return read_file(self.path(index))

    def encoded_size(self, index: int) -> int:
        """Bytes of that file. Raises OSError."""
        return os.stat(self.path(index)).st_size  # noqa: PTH116 - once per image: fast

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self.root, self._paths[index])  # noqa: PTH118 - once per image: fast

    def fingerprint(self) -> str:
        """Path, size and time of change of every file, and the channels."""
        paths = (self.path(index) for index in range(len(self)))
        return files_fingerprint(paths, "files", self.channels)


class ListedImages:
    """The images named in a text file: one path a line, relative ones relative to the file.

    Empty lines and lines that start with ``#`` are skipped. The order is the file's; the set is
    unlabelled.

    Raises:
        DataError: the file is no text, names nothing, or none of the files it names exists.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(
        self, listing: str | Path, *, channels: int = 3, spec: str = "", where: str = "data.train"
    ) -> None:
        self.listing = os.fspath(listing)
        self.channels = channels
        self.spec = spec or f"folder:{self.listing}"
        self._folder = str(Path(listing).absolute().parent)
        lines = _read_lines(Path(listing), where)
        if not lines:
            raise DataError(f"{where}: {self.listing} names no images; write one path per line.")
        self._paths = PackedPaths(lines)
        sample = range(0, len(lines), -(-len(lines) // _LIST_SAMPLE))
        if not any(Path(self.path(index)).is_file() for index in sample):
            raise DataError(
                f"{where}: none of the files that {self.listing} names exists; the first is "
                f"{self.path(0)}. Relative paths count from the folder of the list."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        return decode_image(self.path(index), self.channels)

    def encoded(self, index: int) -> bytes:
        """The file of image `index` as it is. Raises BrokenImage."""
        return read_file(self.path(index))

    def encoded_size(self, index: int) -> int:
        """Bytes of that file. Raises OSError."""
        return os.stat(self.path(index)).st_size  # noqa: PTH116 - once per image: fast

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self._folder, self._paths[index])  # noqa: PTH118 - as above

    def fingerprint(self) -> str:
        """Path, size and time of change of every file, and the channels."""
        paths = (self.path(index) for index in range(len(self)))
        return files_fingerprint(paths, "files", self.channels)


def read_file(path: str) -> bytes:
    """The bytes of an image's file. Raises BrokenImage."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise BrokenImage(path, "the file does not exist") from None
    except OSError as error:
        raise BrokenImage(path, (error.strerror or str(error)).lower()) from error


def open_folder(
    path: str | Path, *, channels: int = 3, spec: str = "", where: str = "data.train"
) -> FolderImages | ListedImages:
    """The images of a folder or of a list file, whichever `path` is. Raises DataError."""
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderImages(path, channels=channels, spec=spec, where=where)
    if not path.exists():
        raise DataError(f"{where}: {path} does not exist.{_nearest_parent(path)}")
    if path.suffix.lower() in EXTENSIONS | {ARRAY_EXTENSION}:
        raise DataError(f"{where}: {path} is one image; give its folder, or a text file of paths.")
    if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".xz", ".7z", ".rar"):
        other = f", or read it as webdataset:{path}" if path.suffix.lower() == ".tar" else ""
        raise DataError(f"{where}: {path} is an archive; unpack it and give the folder{other}.")
    return ListedImages(path, channels=channels, spec=spec, where=where)


def _walk(root: str, where: str) -> list[str]:
    """Paths of all files below `root`, relative to it. Real folders come before linked ones."""
    seen: set[tuple[int, int]] = set()
    files: list[str] = []
    pending: list[str] = [""]
    linked: list[str] = []
    while pending or linked:
        if not pending:
            linked.sort(reverse=True)
            pending.append(linked.pop())
        prefix = pending.pop()
        try:
            folder = os.path.join(root, prefix)  # noqa: PTH118 - os.scandir's strings: fast
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in _SKIPPED_FOLDERS:
                        continue
                    if _is_folder(entry):
                        (linked if entry.is_symlink() else pending).append(f"{prefix}{entry.name}/")
                    else:  # dangling links too: they are listed as broken rather than lost
                        files.append(f"{prefix}{entry.name}")
        except OSError as error:
            raise DataError(f"{where}: cannot list {folder}: {error.strerror}.") from error
    return files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - 5 times faster than pathlib


def _choose(files: list[str], channels: int) -> list[str]:
    pictures = [path for path in files if _extension(path) in EXTENSIONS]
    if channels in (1, 3) and pictures:
        return pictures
    return pictures + [path for path in files if _extension(path) == ARRAY_EXTENSION]


def _labels_of(paths: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    if not all("/" in path for path in paths):
        return None, None
    first = [path.partition("/")[0] for path in paths]
    names = sorted(set(first))
    index = {name: position for position, name in enumerate(names)}
    return np.array([index[name] for name in first], dtype=np.int64), names


def _nothing_found(root: str, files: list[str]) -> str:
    if not files:
        return f"{root} is an empty folder; there are no files in it at any depth."
    counts = Counter(_extension(path) or "no extension" for path in files).most_common(5)
    found = ", ".join(f"{count} x {extension}" for extension, count in counts)
    accepted = " ".join(sorted(EXTENSIONS))
    return (
        f"no images in {root}. Found: {found}. Read are: {accepted}, and {ARRAY_EXTENSION} arrays."
    )


def _read_lines(listing: Path, where: str) -> list[str]:
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{where}: {listing} is neither a folder nor a text file (UTF-8) that lists images."
        ) from None
    except OSError as error:
        raise DataError(f"{where}: cannot read {listing}: {error.strerror}.") from error
    lines = (line.strip() for line in text.split("\n"))
    return [
        os.path.expanduser(line)  # noqa: PTH111
        for line in lines
        if line and not line.startswith("#")
    ]


def _nearest_parent(path: Path) -> str:
    """A sentence that says how much of a missing path exists."""
    for parent in path.absolute().parents:
        if parent.is_dir():
            return f" The part that exists is {parent}." if parent != Path(parent.anchor) else ""
    return ""
