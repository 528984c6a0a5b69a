"""A packed data set is its source, image by image, whatever happens while it is made."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.cache_entries import ABOUT, GIGABYTE
from dino_kd.data import packed as packed_module
from dino_kd.data.dataset import ImageDataset, subset
from dino_kd.data.folder import FolderImages, ListedImages
from dino_kd.data.held import HeldImages
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.packed import PackedImages, packed
from dino_kd.errors import ConfigError, UserError

SMALL = CropPolicy(global_size=(8, 8), local_size=(4, 4), num_local_crops=2)


@pytest.fixture
def said() -> list[str]:
    return []


def folder_of(root: Path, sizes: list[tuple[int, int]], suffix: str = ".png") -> FolderImages:
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        path = root / f"class{number % 2}" / f"{number:02}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return FolderImages(root)


def pack(dataset: ImageDataset, where: Path, said: list[str], limit: float = 1.0) -> ImageDataset:
    return packed(dataset, str(where), limit_gb=limit, say=said.append)


def assert_same_images(ours: ImageDataset, theirs: ImageDataset) -> None:
    assert len(ours) == len(theirs) > 0
    assert ours.spec == theirs.spec
    assert ours.class_names == theirs.class_names
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert ours.fingerprint() == theirs.fingerprint()
    for index in range(len(theirs)):
        assert ours.path(index) == theirs.path(index)
        try:
            expected = theirs.read(index)
        except BrokenImage as error:
            with pytest.raises(BrokenImage, match=re.escape(str(error))):
                ours.read(index)
        else:
            np.testing.assert_array_equal(ours.read(index), expected)


def never(*_: object) -> None:
    raise AssertionError("the source was read")


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_small_images_of_one_size_become_pixels(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "images", [(12, 16)] * 9)
    pixels = [source.read(index) for index in range(9)]
    ours = pack(source, tmp_path / "packs", said)
    assert_same_images(ours, source)
    assert isinstance(ours, PackedImages)
    assert (ours.entry / "images.bin").stat().st_size == 9 * 12 * 16 * 3
    block = ours.read_block(np.array([4, 0, 4]))
    np.testing.assert_array_equal(block, [pixels[4], pixels[0], pixels[4]])
    assert all(word in said[0] for word in ("packing 9 images", "as pixels", "5.18 kB", " s, once"))
    for name in ("read", "encoded"):
        monkeypatch.setattr(FolderImages, name, never)
    again = pack(FolderImages(source.root), tmp_path / "packs", said)
    assert "reading" in said[-1]
    np.testing.assert_array_equal(again.read(3), pixels[3])


@pytest.mark.parametrize("sizes", [[(80, 70)] * 5, [(9, 9), (12, 9), (9, 9), (8, 8)]])
def test_other_images_are_kept_as_their_files(
    tmp_path: Path, said: list[str], sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "images", sizes, ".jpg")
    ours = pack(source, tmp_path / "packs", said)
    assert_same_images(ours, source)
    assert isinstance(ours, PackedImages)
    assert ours.read_block(np.array([0, 1])) is None
    files = b"".join(Path(source.path(index)).read_bytes() for index in range(len(source)))
    assert (ours.entry / "images.bin").read_bytes() == files
    assert "as files" in said[0]
    expected = source.read(2)
    for name in ("read", "encoded"):
        monkeypatch.setattr(FolderImages, name, never)
    np.testing.assert_array_equal(ours.read(2), expected)


def test_a_size_that_the_sample_did_not_show_makes_files_of_them(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_SAMPLE", 2)  # the first and the last
    source = folder_of(tmp_path / "images", [(9, 9), (9, 9), (9, 10)])
    ours = pack(source, tmp_path / "packs", said)
    assert_same_images(ours, source)
    assert len(entries(tmp_path / "packs")) == 1
    assert ["pixels" in said[0], "files" in said[1]] == [True, True]


@pytest.mark.parametrize("side", [16, 80])
def test_broken_images_stay_broken_and_are_replaced_as_before(
    tmp_path: Path, said: list[str], side: int
) -> None:
    source = folder_of(tmp_path / "images", [(side, side)] * 12)
    Path(source.path(3)).write_bytes(b"no image")
    ours = pack(source, tmp_path / "packs", said)
    assert_same_images(ours, source)
    made = [
        list(
            crop_batches(
                data, SMALL, batch_size=6, seed=1, start_step=0, total_steps=4,
                num_workers=workers, workers="threads",
            )
        )
        for data, workers in ((ours, 2), (source, 0))
    ]  # fmt: skip
    assert any(batch.broken for batch in made[0])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.crops.global_crops, b.crops.global_crops)
        assert torch.equal(a.crops.local_crops, b.crops.local_crops)
        assert list(map(str, a.broken)) == list(map(str, b.broken))


def test_a_listed_file_that_is_missing_stays_missing(tmp_path: Path, said: list[str]) -> None:
    folder_of(tmp_path / "images", [(80, 80)] * 3)
    (tmp_path / "list.txt").write_text("images/class0/00.png\ngone.png\nimages/class1/01.png\n")
    source = ListedImages(tmp_path / "list.txt")
    assert_same_images(pack(source, tmp_path / "packs", said), source)


def test_a_changed_file_makes_another_pack(tmp_path: Path, said: list[str]) -> None:
    source = folder_of(tmp_path / "images", [(8, 8)] * 4)
    pack(source, tmp_path / "packs", said)
    Image.new("RGB", (8, 8), "red").save(source.path(2))
    os.utime(source.path(2), ns=(1, 1))
    ours = pack(source, tmp_path / "packs", said)
    assert ours.read(2).tolist() == [[[255, 0, 0]] * 8] * 8
    assert len(entries(tmp_path / "packs")) == 2


def test_a_subset_packs_the_whole_and_reads_its_part(tmp_path: Path, said: list[str]) -> None:
    source = folder_of(tmp_path / "images", [(8, 8)] * 6)
    part = subset(source, [5, 1, 2])
    ours = pack(part, tmp_path / "packs", said)
    assert_same_images(ours, part)
    block = ours.read_block(np.array([0, 2]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(block, [source.read(5), source.read(2)])


def test_large_images_without_files_are_read_as_they_are(tmp_path: Path, said: list[str]) -> None:
    source = HeldImages([np.zeros((99, 99, 3), np.uint8)], ["a"], "held")
    assert pack(source, tmp_path / "packs", said) is source
    assert "read as it is" in said[-1]
    small = HeldImages([np.full((9, 9, 3), i, np.uint8) for i in range(4)], list("abcd"), "held")
    assert_same_images(pack(small, tmp_path / "packs", said), small)


def test_off_packs_nothing(tmp_path: Path, said: list[str]) -> None:
    source = folder_of(tmp_path / "images", [(8, 8)] * 2)
    assert packed(source, "off", limit_gb=1, say=said.append) is source
    assert not said


@pytest.mark.parametrize("side", [16, 80])
def test_it_can_be_sent_to_another_process(tmp_path: Path, said: list[str], side: int) -> None:
    source = folder_of(tmp_path / "images", [(side, side)] * 4)
    ours = pack(source, tmp_path / "packs", said)
    sent = pickle.dumps(ours)
    assert len(sent) < 2000  # not the pixels
    assert_same_images(pickle.loads(sent), source)


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "images", [(16, 16)] * 4)
    with pytest.raises(UserError, match=r"takes 3.07 kB, more than data.pack_limit=1e-06 GB"):
        pack(source, tmp_path / "packs", said, limit=1e-6)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 100 B left.*needs 3.07 kB.*data.pack=off"):
        pack(source, tmp_path / "packs", said)
    assert entries(tmp_path / "packs") == []
    with pytest.raises(ConfigError, match=r"data.pack: .* is a file"):
        pack(source, Path(source.path(0)), said)


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "images", [(16, 16)] * 4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed_module, "sync", full)
        with pytest.raises(UserError, match=r"the disk is full.*choose another data.pack"):
            pack(source, tmp_path / "packs", said)
    assert entries(tmp_path / "packs") == []
    assert_same_images(pack(source, tmp_path / "packs", said), source)


def test_the_pack_not_used_for_longest_makes_room(tmp_path: Path, said: list[str]) -> None:
    packs = tmp_path / "packs"
    limit = 9000 / GIGABYTE  # two packs of 3072 bytes and their descriptions
    for name in "abc":
        source = folder_of(tmp_path / name, [(16, 16)] * 4)
        ours = pack(source, packs, said, limit)
        assert isinstance(ours, PackedImages)
        if ours._lock is not None:  # nobody uses it any more
            ours._lock.close()
        os.utime(ours.entry / ABOUT, ns=(time.time_ns() - 10**9, ours.entry.stat().st_mtime_ns))
        os.utime(ours.entry / ABOUT, (ord(name), ord(name)))
    kept = [json.loads((entry / ABOUT).read_text())["images"] for entry in entries(packs)]
    assert FolderImages(tmp_path / "a").fingerprint() not in kept
    assert FolderImages(tmp_path / "c").fingerprint() in kept


def test_what_a_killed_run_left_is_deleted_when_it_is_old(tmp_path: Path, said: list[str]) -> None:
    for name, age in ((".old.tmp-1", 3 * 24 * 3600), (".new.tmp-2", 0)):
        (tmp_path / "packs" / name).mkdir(parents=True)
        os.utime(tmp_path / "packs" / name, (time.time() - age, time.time() - age))
    pack(folder_of(tmp_path / "images", [(16, 16)] * 4), tmp_path / "packs", said)
    names = [entry.name for entry in entries(tmp_path / "packs")]
    assert ".old.tmp-1" not in names
    assert ".new.tmp-2" in names


@pytest.mark.dist
def test_two_runs_that_pack_at_once_end_with_one_whole_pack(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "images", [(16, 16)] * 50)
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=pack, args=(source, tmp_path / "packs", [])) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(entries(tmp_path / "packs")) == 1
    assert_same_images(pack(source, tmp_path / "packs", []), source)
