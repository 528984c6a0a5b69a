"""Folders and list files that the tests write themselves, against what they put there."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_kd.data.dataset import labels_as, require_labels, subset
from dino_kd.data.folder import FolderImages, ListedImages, PackedPaths
from dino_kd.data.specs import make_dataset
from dino_kd.errors import ConfigError, DataError


def put(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level,) * 3).save(path)
    return path


def names(dataset: FolderImages | ListedImages, root: Path) -> list[str]:
    return [str(Path(dataset.path(i)).relative_to(root)) for i in range(len(dataset))]


def test_class_folders_give_labels_by_sorted_name(tmp_path: Path) -> None:
    for name, level in (("b/2.png", 2), ("a/1.PNG", 1), ("b/deep/er/3.jpeg", 3), ("c/4.bmp", 4)):
        put(tmp_path / name, level)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    dataset = FolderImages(tmp_path)
    assert names(dataset, tmp_path) == ["a/1.PNG", "b/2.png", "b/deep/er/3.jpeg", "c/4.bmp"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert dataset.class_names == ["a", "b", "c"]
    assert dataset.read(3).shape == (3, 4, 3)
    assert dataset.read(3)[0, 0].tolist() == [4, 4, 4]


@pytest.mark.parametrize("files", [("1.png", "2.png"), ("1.png", "a/2.png")])
def test_flat_and_mixed_folders_are_unlabelled(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        put(tmp_path / name)
    dataset = FolderImages(tmp_path)
    assert len(dataset) == 2
    assert dataset.labels is None
    assert dataset.class_names is None
    with pytest.raises(DataError, match=r"monitor\.train: .* has no labels"):
        require_labels(dataset, "monitor.train")


def test_a_single_class_cannot_be_scored(tmp_path: Path) -> None:
    put(tmp_path / "only" / "1.png")
    with pytest.raises(DataError, match="single class, 'only'"):
        require_labels(FolderImages(tmp_path), "train")


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    """Real folders win over links to them; each folder is read once."""
    root, store = tmp_path / "root", tmp_path / "store"
    put(root / "a" / "1.png")
    put(store / "2.png")
    put(tmp_path / "file.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "0_again").symlink_to(root / "a")
    (root / "b").symlink_to(store)
    (root / "a" / "linked.png").symlink_to(tmp_path / "file.png")
    (root / "a" / "dangling.png").symlink_to(tmp_path / "gone.png")
    dataset = FolderImages(root)
    assert names(dataset, root) == ["a/1.png", "a/dangling.png", "a/linked.png", "b/2.png"]
    assert dataset.read(3).shape == (3, 4, 3)


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    for name in ("._1.png", ".cache/2.png", "__MACOSX/3.png"):
        put(tmp_path / name)
    assert names(FolderImages(tmp_path), tmp_path) == ["1.png"]


def test_npy_counts_where_pictures_cannot_serve(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    np.save(tmp_path / "2.npy", np.zeros((4, 4, 6), np.uint8))
    assert names(FolderImages(tmp_path), tmp_path) == ["1.png"]
    assert len(FolderImages(tmp_path, channels=6)) == 2
    (tmp_path / "1.png").unlink()
    assert names(FolderImages(tmp_path), tmp_path) == ["2.npy"]


def test_list_file(tmp_path: Path) -> None:
    """Order kept; comments, blank lines and a byte-order mark skipped; relative to the file."""
    first, second = put(tmp_path / "x" / "b é.png", 5), put(tmp_path / "a.png", 6)
    listing = tmp_path / "x" / "list.txt"
    listing.write_text(f"\ufeff# mine\n\nb é.png\r\n  {second}\n", encoding="utf-8")
    dataset = make_dataset(str(listing))
    assert [dataset.path(i) for i in range(len(dataset))] == [str(first), str(second)]
    assert dataset.labels is None
    assert [dataset.read(i)[0, 0, 0] for i in range(2)] == [5, 6]


def test_bad_list_files_say_what_is_wrong(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("# nothing\n")
    with pytest.raises(DataError, match="names no images"):
        make_dataset(str(listing))
    listing.write_text("nowhere.png\n")
    with pytest.raises(DataError, match=r"none of the files .* exists; the first is"):
        make_dataset(str(listing))
    listing.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="neither a folder nor a text file"):
        make_dataset(str(listing))


def test_bad_paths_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train: .*/no/such does not exist.*exists is"):
        make_dataset(str(tmp_path / "no" / "such"))
    with pytest.raises(DataError, match="is an empty folder"):
        make_dataset(f"folder:{tmp_path}")
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "README").touch()
    with pytest.raises(DataError, match=r"no images in .*2 x \.txt, 1 x no extension.*\.jpg"):
        make_dataset(str(tmp_path))
    with pytest.raises(DataError, match="is one image"):
        make_dataset(str(put(tmp_path / "1.png")))
    (tmp_path / "d.tar").touch()
    with pytest.raises(DataError, match="unpack it"):
        make_dataset(str(tmp_path / "d.tar"))


def test_paths_with_colons(tmp_path: Path) -> None:
    put(tmp_path / "a:b" / "1.png")
    assert len(make_dataset(f"folder:{tmp_path}/a:b")) == 1
    assert len(make_dataset(f"{tmp_path}/a:b")) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("cifr10:/data", "unknown data set 'cifr10'.*did you mean 'cifar10'"),
        ("wds:x.tar", r"unknown data set 'wds'.*folder:PATH.*synthetic:NAME"),
        ("cifar10", r"write cifar10:PATH\[:train\|test\]"),
        ("stl10:", "write stl10:PATH"),
        ("cifar10:/data:tset", "unknown split 'tset'; did you mean 'test'"),
        ("imagenet:/data:test", "unknown split 'test'"),
        ("torchvision:MNITS:/data", "unknown torchvision data set 'MNITS'; did you mean 'MNIST'"),
        ("torchvision:mnist", "lacks the path"),
    ],
)
def test_mistaken_specs_name_the_setting_and_what_is_accepted(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)knn.train: .*{message}"):
        make_dataset(spec, where="knn.train")


def test_imagenet_layout(tmp_path: Path) -> None:
    for name in ("train/n01/a.JPEG", "train/n02/b.JPEG", "val/n02/c.JPEG"):
        put(tmp_path / name)
    train = make_dataset(f"imagenet:{tmp_path}")
    val = make_dataset(f"imagenet:{tmp_path}:val")
    assert (len(train), train.class_names) == (2, ["n01", "n02"])
    assert (len(val), val.class_names) == (1, ["n02"])
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match=r"has no folder 'train'.*folder:"):
        make_dataset(f"imagenet:{tmp_path / 'flat'}")


def test_labels_match_by_name_when_a_class_is_missing(tmp_path: Path) -> None:
    for name in ("test/b/1.png", "test/c/2.png"):
        put(tmp_path / name)
    test = FolderImages(tmp_path / "test")
    assert labels_as(test, ["a", "b", "c"], "test").tolist() == [1, 2]
    with pytest.raises(DataError, match="classes that the training images lack: c"):
        labels_as(test, ["a", "b"], "test")


def test_subset_keeps_order_labels_and_paths(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        put(tmp_path / name, int(name[2]))
    part = subset(FolderImages(tmp_path), [2, 0])
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert part.class_names == ["a", "b"]
    assert part.read(0)[0, 0, 0] == 3
    assert part.path(1).endswith("a/1.png")
    assert "2 of 3" in part.spec
    with pytest.raises(IndexError):
        subset(part, [2])


def test_packed_paths_give_back_any_name() -> None:
    """Names that are no valid UTF-8 included (they arrive as surrogates)."""
    paths = ["a.png", "", "ü/漢字.png", "bad\udcff.png"]
    packed = pickle.loads(pickle.dumps(PackedPaths(paths)))
    assert [packed[i] for i in range(len(packed))] == paths
    with pytest.raises(IndexError):
        packed[4]


def test_synthetic_specs_reach_their_own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """make_synthetic gets the rest of the spec; one channel is luma; other counts are refused."""
    synthetic = pytest.importorskip("dino_kd.data.synthetic")

    class Fake:
        spec, labels, class_names = "synthetic:x", None, None

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> np.ndarray:
            return np.full((2, 2, 3), (200, 100, 50), dtype=np.uint8)

        def path(self, index: int) -> str:
            return "synthetic:x[0]"

    asked = []
    monkeypatch.setattr(synthetic, "make_synthetic", lambda rest: asked.append(rest) or Fake())
    assert make_dataset("synthetic:x:test:7").read(0).shape == (2, 2, 3)
    assert make_dataset("synthetic:x", channels=1).read(0)[0, 0].tolist() == [124]
    assert asked == ["x:test:7", "x"]
    with pytest.raises(ConfigError, match="4 are asked for"):
        make_dataset("synthetic:x", channels=4)
