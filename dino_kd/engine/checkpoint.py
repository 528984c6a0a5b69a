"""Full training state on disk: atomic, checksummed, the last few kept.

``checkpoints/step_00001000/state.pt`` (a dict of tensors and plain values, read with
``weights_only=True``) and ``checksum.json`` beside it. A folder appears under its final name only
when it is complete and synced.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dino_kd.errors import CheckpointError
from dino_kd.files import disk_error, sync

FORMAT = 1  # bump with a named migration when the layout of the state changes


class _HashingWriter:
    """Passes bytes on to a file, hashes them, and remembers the first failed write.

    torch turns an OSError of its output into a RuntimeError without the reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.hash.update(data)
        return count

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of `step` and remove all but the newest `keep`.

    Args:
        folder: ``run_dir/checkpoints``.
        step: optimiser steps done.
        state: nested dicts and lists of tensors, numbers and strings.
        keep: checkpoints to keep, this one included.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digest = _write_state(temporary / "state.pt", {"format": FORMAT, **state})
        checksum = {"format": FORMAT, "step": step, "sha256": {"state.pt": digest}}
        (temporary / "checksum.json").write_text(json.dumps(checksum) + "\n", encoding="utf-8")
        sync(temporary / "checksum.json")
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after a resume
        temporary.rename(final)
        sync(folder)
    except OSError as error:
        raise disk_error(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Newer ones are damaged, or this run would have resumed from them: they may not outlive it.
    for other in list_checkpoints(folder):
        if _step_of(other) > step:
            shutil.rmtree(other, ignore_errors=True)
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_state(path: Path, state: dict[str, Any]) -> str:
    """Write and sync one file; returns its SHA-256."""
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, writer)  # type: ignore[arg-type]
        except (OSError, RuntimeError):
            if writer.error is not None:
                raise writer.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
        return writer.hash.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The newest undamaged checkpoint: (state on the CPU, its folder, warnings about damaged ones).

    Raises:
        CheckpointError: there is none, or none can be read.
    """
    candidates = list_checkpoints(folder)
    if not candidates:
        raise CheckpointError(f"no checkpoint in {folder}; nothing was saved there yet")
    warnings: list[str] = []
    for candidate in candidates:
        try:
            return read_checkpoint(candidate), candidate, warnings
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to the one before it")
    damaged = "\n".join(warnings).replace("; falling back to the one before it", "")
    raise CheckpointError(f"no readable checkpoint in {folder}:\n{damaged}")


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read one checkpoint folder after comparing its checksum. Raises CheckpointError."""
    try:
        expected = json.loads((checkpoint / "checksum.json").read_text())["sha256"]["state.pt"]
        with (checkpoint / "state.pt").open("rb") as file:
            found = _sha256(file)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete ({error})") from None
    if found != expected:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged (its checksum does not match)")
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read safely ({reason})") from None
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {checkpoint} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


def _sha256(file: BinaryIO) -> str:
    """Hex digest, read in pieces (`hashlib.file_digest` needs Python 3.11)."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
