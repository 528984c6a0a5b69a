"""Entries of a cache on disk: one folder each, the least recently used deleted first.

An entry is dated by its ``identity.json``, which is touched at every use. While a process uses an
entry it holds a shared lock on that file, and others do not delete it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO

from dino_kd.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no flock; there nothing is locked
    fcntl = None  # type: ignore[assignment]

ABOUT = "identity.json"
GIGABYTE = 10**9


def cache_folder(setting: str, kind: str) -> Path | None:
    """The folder that a setting `cache` means: off: None; auto: ``~/.cache/dino_kd/KIND``.

    Raises ConfigError when it is a file.
    """
    if setting == "off":
        return None
    if setting == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(home).expanduser() / "dino_kd" / kind
    else:
        folder = Path(setting).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cache: {folder} is a file; give a folder, or cache=off")
    return folder


def mark_used(entry: Path) -> None:
    """Date the entry now."""
    try:
        os.utime(entry / ABOUT)
    except OSError:  # a folder that is only readable still serves
        return


def hold(entry: Path) -> BinaryIO | None:
    """Keep others from deleting the entry until the result is closed; None where locks fail."""
    if fcntl is None:
        return None
    try:
        file = (entry / ABOUT).open("rb")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a network disk without locks
        file.close()
        return None
    return file


def make_room(folder: Path, limit: float, keep: Path, reserve: float = 0) -> None:
    """Delete the entries whose last use is longest ago until the rest fits.

    Args:
        folder: holds one folder for each entry.
        limit: bytes of all entries together.
        keep: never deleted; nor is an entry that another process holds.
        reserve: bytes that `keep` is going to need, when it needs more than it has.
    """
    used = sorted((_last_use(entry), entry) for entry in folder.iterdir() if entry.is_dir())
    sizes = {entry: size(entry) for _, entry in used}
    total = sum(sizes.values()) + max(0, reserve - sizes.get(keep, 0))
    for _, entry in used:
        if total <= limit:
            return
        if entry != keep and not _is_held(entry):
            total -= sizes[entry]
            shutil.rmtree(entry, ignore_errors=True)


def size(entry: Path) -> int:
    """Bytes of its files."""
    total = 0
    for file in entry.glob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # another process has just deleted it
            continue
    return total


def _is_held(entry: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with (entry / ABOUT).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_use(entry: Path) -> float:
    try:
        return (entry / ABOUT).stat().st_mtime
    except OSError:
        return 0.0
