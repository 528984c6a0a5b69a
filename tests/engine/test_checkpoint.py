"""Checkpoints survive damage, full disks and stale leftovers."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch

from dino_kd.engine import checkpoint as module
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from dino_kd.errors import CheckpointError, UserError


def state(step):
    return {"step": step, "weights": torch.full((10_000,), float(step)), "nested": {"a": [1, "b"]}}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path, 7, state(7), keep=2)
    loaded, folder, warnings = load_checkpoint(tmp_path)
    assert folder.name == "step_00000007"
    assert warnings == []
    assert torch.equal(loaded["weights"], state(7)["weights"])
    assert loaded["nested"] == {"a": [1, "b"]}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 20):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000020", "step_00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000020"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no_checksum", "empty_folder"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    newest = tmp_path / "step_00000002"
    data = (newest / "state.pt").read_bytes()
    if damage == "truncate":
        (newest / "state.pt").write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        (newest / "state.pt").write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    elif damage == "no_checksum":
        (newest / "checksum.json").unlink()
    else:
        for file in newest.iterdir():
            file.unlink()
    loaded, _, warnings = load_checkpoint(tmp_path)
    assert loaded["step"] == 1
    assert len(warnings) == 1
    assert "step_00000002" in warnings[0]


def test_saving_after_a_fallback_keeps_the_good_ones(tmp_path):
    """A damaged newer checkpoint must not push the good ones out."""
    for step in (20, 30):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    (tmp_path / "step_00000030" / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 25, state(25), keep=1)
    assert load_checkpoint(tmp_path)[0]["step"] == 25
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000025"]


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    (tmp_path / "step_00000001" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step_00000001"):
        load_checkpoint(tmp_path)


def test_nothing_saved_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_newer_format_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {**state(1), "format": 99}, keep=1)
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(tmp_path)


class _FullDisk(io.FileIO):
    """A file on a disk with room for 4 kB."""

    def write(self, data):
        if self.tell() + len(data) > 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_survives(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    real_open = Path.open

    def full(self, mode="r", *args, **kwargs):
        wants_state = self.name == "state.pt" and "w" in mode
        return _FullDisk(self, "w") if wants_state else real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        save_checkpoint(tmp_path, 2, state(2), keep=1)
    monkeypatch.undo()
    assert caught.value.exit_code == 2
    assert load_checkpoint(tmp_path)[0]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_nothing_is_unpickled(tmp_path):
    """A file that would run code on unpickling is refused by torch's weights-only reader."""

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    folder = save_checkpoint(tmp_path, 1, state(1), keep=1)
    torch.save({"format": 1, "evil": Evil()}, folder / "state.pt")
    digest = module.hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "checksum.json").write_text(json.dumps({"sha256": {"state.pt": digest}}))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        load_checkpoint(tmp_path)
