"""Tells two states of a data set apart without reading its images: what cached features hang on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable


def text_fingerprint(*parts: object) -> str:
    """SHA-256 (hex) over the texts of `parts`, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def files_fingerprint(paths: Iterable[str], *parts: object) -> str:
    """SHA-256 (hex) over `parts` and the path, size and time of change of every file.

    A file that is replaced changes it; about 3 microseconds a file. Missing files count as such.
    """
    digest = hashlib.sha256(text_fingerprint(*parts).encode())
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - once per image: fast
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(os.fsencode(path) + f"\0{state}\n".encode())
    return digest.hexdigest()
