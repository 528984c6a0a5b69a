"""Tar files read by offset are what Python's tarfile says they are."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_kd.data import shards as shards_module
from dino_kd.data.images import BrokenImage
from dino_kd.data.packed import PackedImages, packed
from dino_kd.data.shards import ShardImages, expand
from dino_kd.data.specs import make_dataset
from dino_kd.errors import ConfigError, DataError, UserError

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino_kd" / "shards"


def picture(seed: int, kind: str = "PNG", side: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Members, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return path


def three(root: Path) -> str:
    """Shards of 4, 1 and 2 images with labels 0..6 in .cls."""
    number = 0
    for shard, count in enumerate((4, 1, 2)):
        members: Members = []
        for _ in range(count):
            members += [
                (f"{number:04}.cls", str(number).encode()),
                (f"{number:04}.png", picture(number)),
            ]
            number += 1
        write_tar(root / f"{shard:03}.tar", members)
    return f"{root}/{{000..002}}.tar"


def test_images_come_in_the_order_of_the_files_and_their_members(tmp_path: Path) -> None:
    data = make_dataset(f"webdataset:{three(tmp_path)}")
    assert len(data) == 7
    assert data.labels.tolist() == list(range(7))
    assert data.class_names == [str(number) for number in range(7)]
    for index in (6, 0, 4, 3):
        expected = np.asarray(Image.open(io.BytesIO(picture(index))))
        np.testing.assert_array_equal(data.read(index), expected)
    assert data.path(4) == f"{tmp_path}/001.tar/0004.png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_flavour_of_tar_and_long_names(tmp_path: Path, form: int) -> None:
    name = "/".join(["train", "a" * 90, "0001.jpg"]) if form == tarfile.USTAR_FORMAT else "b" * 300
    name = name if name.endswith(".jpg") else f"{name}/0001.JPG"
    write_tar(tmp_path / "x.tar", [("readme.txt", b"x"), (name, picture(1, "JPEG"))], form)
    data = ShardImages(f"{tmp_path}/x.tar")
    assert len(data) == 1
    assert data.labels is None
    expected = np.asarray(Image.open(io.BytesIO(picture(1, "JPEG"))))
    np.testing.assert_array_equal(data.read(0), expected)


def test_a_sample_has_one_image_and_hidden_files_none(tmp_path: Path) -> None:
    members = [
        ("a.seg.png", picture(0)), ("a.jpg", picture(1, "JPEG")), ("._a.jpg", b"mac"),
        ("b.txt", b"no image"), ("c.png", picture(2)),
    ]  # fmt: skip
    data = ShardImages(str(write_tar(tmp_path / "x.tar", members)))
    assert [Path(data.path(i)).name for i in range(len(data))] == ["a.seg.png", "c.png"]


@pytest.mark.parametrize(
    ("texts", "labels", "names"),
    [
        (['{"cls": 2}', '{"label": 0}'], [2, 0], ["0", "1", "2"]),
        (['{"label": "dog"}', '{"label": "cat"}'], [1, 0], ["cat", "dog"]),
        (['{"cls": 2}', '{"width": 3}'], None, None),
        (['{"cls": 2}', '{"cls": "cat"}'], None, None),
        (['{"cls": true}', '{"cls": false}'], None, None),
        (["[1]", "broken {"], None, None),
    ],
)
def test_labels_from_json(
    tmp_path: Path, texts: list[str], labels: list[int] | None, names: list[str] | None
) -> None:
    members: Members = []
    for number, text in enumerate(texts):
        members += [(f"{number}.png", picture(number)), (f"{number}.json", text.encode())]
    data = ShardImages(str(write_tar(tmp_path / "x.tar", members)))
    assert (None if data.labels is None else data.labels.tolist()) == labels
    assert data.class_names == names


def test_the_walk_is_done_once_and_again_after_a_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = three(tmp_path)
    first = ShardImages(pattern)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_make", lambda *_: pytest.fail("walked again"))
        again = ShardImages(pattern)
    before = first.fingerprint()
    assert again.fingerprint() == before
    np.testing.assert_array_equal(again.labels, first.labels)
    np.testing.assert_array_equal(again.read(5), first.read(5))
    write_tar(tmp_path / "001.tar", [("new.png", picture(9)), ("new2.png", picture(8))])
    os.utime(tmp_path / "001.tar", ns=(1, 1))
    changed = ShardImages(pattern)
    assert len(changed) == 8
    assert changed.labels is None
    assert changed.fingerprint() != before


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_or_unwritable_index_is_made_anew(
    tmp_path: Path, cache: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = three(tmp_path)
    ShardImages(pattern)
    next(cache.iterdir()).write_bytes(damage)
    assert len(ShardImages(pattern)) == 7

    def refuse(*_: object, **__: object) -> None:
        raise UserError("read-only")

    next(cache.iterdir()).unlink()
    monkeypatch.setattr(shards_module, "write_atomic", refuse)
    assert len(ShardImages(pattern)) == 7


def test_broken_members_are_named(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [("a.jpg", b"no image"), ("b.png", picture(1))])
    data = ShardImages(str(file))
    with pytest.raises(BrokenImage, match=r"x.tar/a.jpg: not an image of a known format"):
        data.read(0)
    file.unlink()
    with pytest.raises(BrokenImage, match=r"x.tar/b.png: no such file"):
        data.read(1)


def test_patterns(tmp_path: Path) -> None:
    three(tmp_path)
    names = [f"{tmp_path}/{number:03}.tar" for number in range(3)]
    assert expand(f"{tmp_path}/{{000..002}}.tar") == names
    assert expand(f"{tmp_path}/{{0..0}}0{{1..2}}.tar") == names[1:]
    assert expand(f"{tmp_path}/*.tar") == names
    assert expand(f"{tmp_path}/") == names
    assert expand(names[1]) == [names[1]]


@pytest.mark.parametrize(
    ("pattern", "kind", "expected"),
    [
        ("{000..004}.tar", DataError, r"2 of 5 tar files do not exist; the first is .*003\.tar"),
        (
            "*.tarr",
            ConfigError,
            r"train: .* matches no file; write webdataset:/data/\{000\.\.099\}",
        ),
        ("x.tar.gz", DataError, "is compressed; unpack it to .tar"),
        ("text.tar", DataError, "cannot be read as a tar file"),
        ("cut.tar", DataError, "cut.tar cannot be read as a tar file: unexpected end of data"),
        ("none.tar", DataError, "no images in 1 tar files"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path, pattern: str, kind: type[Exception], expected: str
) -> None:
    three(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    (tmp_path / "text.tar").write_bytes(b"x" * 2000)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:2500])
    write_tar(tmp_path / "none.tar", [("a.txt", b"x")])
    with pytest.raises(kind, match=expected):
        make_dataset(f"webdataset:{tmp_path}/{pattern}", where="train")


def test_shards_can_be_packed(tmp_path: Path) -> None:
    data = ShardImages(three(tmp_path))
    ours = packed(data, str(tmp_path / "packs"), limit_gb=1, say=lambda _: None)
    assert isinstance(ours, PackedImages)
    assert ours.read_block(np.arange(7)).shape == (7, 20, 23, 3)
    np.testing.assert_array_equal(ours.read(5), data.read(5))
