"""Write files so that a crash, a kill or a full disk never destroys what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dino_kd.errors import UserError

if typing.TYPE_CHECKING:
    from torch import Tensor


def write_atomic(
    path: str | Path, write: Callable[[Path], None], *, setting: str = "run_dir"
) -> None:
    """Call ``write(temporary_path)``, sync it, and rename it onto `path`.

    Raises UserError in plain words when the disk is full, naming the `setting` that chose the
    folder; the old file is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(path, error, setting) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text`, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    setting: str = "run_dir",
) -> None:
    """Replace `path` by a safetensors file, atomically; `metadata` is text beside the tensors.

    Serialised in memory first: the library's own writer hides the reason of a failed write.
    """
    from safetensors.torch import save

    about = {"format": "pt", **(metadata or {})}
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, about)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write, setting=setting)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed writes left in `folder`."""
    for leftover in folder.glob(".*.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: Path, error: OSError, setting: str = "run_dir") -> UserError:
    """The sentence for a failed write."""
    reasons = {
        errno.ENOSPC: f"the disk is full; free some space or choose another {setting}",
        errno.EDQUOT: f"your disk quota is used up; free some space or choose another {setting}",
        errno.EACCES: f"you may not write there; choose another {setting}",
        errno.EROFS: f"the file system is read-only; choose another {setting}",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {path}: {reason}. What was saved before is untouched.")


def bytes_in_words(count: float) -> str:
    """A number of bytes for people: "3.2 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
