"""Official file layouts, written here with few images, read through torchvision's own loaders."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from dino_kd.data.specs import make_dataset
from dino_kd.data.torchvision_sets import TORCHVISION_SETS
from dino_kd.errors import DataError


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """CIFAR-10's pickles with 4 images each; torchvision checks the checksums of these instead."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    base = tmp_path / "cifar-10-batches-py"
    sums = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {"data": pixels[number].reshape(4, -1), "labels": [number, 1, 2, 3]}
        sums.append([name, write(base / name, pickle.dumps(batch))])
    names = {"label_names": ["plane", "car", "bird", "cat", "deer", "dog"]}
    md5 = write(base / "batches.meta", pickle.dumps(names))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5})
    return tmp_path, pixels


def test_cifar10_batches(cifar: tuple[Path, np.ndarray]) -> None:
    root, pixels = cifar
    train = make_dataset(f"cifar10:{root}")
    test = make_dataset(f"cifar10:{root}:test")
    assert (len(train), len(test)) == (20, 4)
    np.testing.assert_array_equal(train.read(5), pixels[1, 1].transpose(1, 2, 0))
    np.testing.assert_array_equal(test.read(0), pixels[5, 0].transpose(1, 2, 0))
    assert train.labels is not None
    assert train.labels.tolist()[:8] == [0, 1, 2, 3, 1, 1, 2, 3]
    assert train.class_names == ["plane", "car", "bird", "cat", "deer", "dog"]
    assert test.path(0) == f"cifar10:{root}:test[0]"
    assert make_dataset(f"cifar10:{root}", channels=1).read(0).shape == (32, 32, 1)
    assert len(make_dataset(f"cifar10:{root}/cifar-10-batches-py:test")) == 4
    assert len(make_dataset(f"torchvision:cifar10:{root}:test")) == 4
    assert len(pickle.loads(pickle.dumps(train))) == 20


def test_damaged_batches_are_named(cifar: tuple[Path, np.ndarray]) -> None:
    root, _ = cifar
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"cannot read CIFAR10 .*damaged or incomplete"):
        make_dataset(f"cifar10:{root}:test")


def test_cifar10_as_class_folders_points_to_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "cat" / "1.png")
    with pytest.raises(DataError, match=f"Use 'folder:{tmp_path}/test' instead"):
        make_dataset(f"cifar10:{tmp_path}:test")


def test_missing_sets_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without download=True no loader is told to download; the message says how to ask."""
    asked = []
    monkeypatch.setattr(datasets.CIFAR100, "download", lambda self: asked.append(1))
    with pytest.raises(DataError, match=r"does not exist.*download=true"):
        make_dataset(f"cifar100:{tmp_path}/none")
    with pytest.raises(DataError, match=r"not found.*holds cifar-100-python"):
        make_dataset(f"cifar100:{tmp_path}")
    assert asked == []
    with pytest.raises(DataError, match="could not download"):
        make_dataset(f"cifar100:{tmp_path}", download=True)
    assert asked == [1]


def test_stl10_binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STL-10 stores columns first; class numbers start at 1; unlabelled splits have no labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    base = tmp_path / "stl10_binary"
    stored = pixels.transpose(0, 1, 3, 2).tobytes()
    files = {
        "train_X.bin": stored,
        "train_y.bin": bytes([1, 2, 3, 10]),
        "unlabeled_X.bin": stored,
        "test_X.bin": stored[: len(stored) // 2],
        "test_y.bin": bytes([5, 6]),
        "class_names.txt": b"\n".join(b"class%d" % i for i in range(10)),
        "fold_indices.txt": b"0\n",
    }
    sums = {name: write(base / name, data) for name, data in files.items()}
    for attribute, names in (
        ("train_list", ["train_X.bin", "train_y.bin", "unlabeled_X.bin"]),
        ("test_list", ["test_X.bin", "test_y.bin"]),
    ):
        monkeypatch.setattr(datasets.STL10, attribute, [[name, sums[name]] for name in names])
    train = make_dataset(f"stl10:{tmp_path}")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 9]
    np.testing.assert_array_equal(train.read(3), pixels[3].transpose(1, 2, 0))
    assert len(make_dataset(f"stl10:{tmp_path}:test")) == 2
    both = make_dataset(f"stl10:{tmp_path}:train+unlabeled")
    assert (len(both), both.labels) == (8, None)
    assert make_dataset(f"stl10:{tmp_path}:unlabeled").labels is None


def test_sets_of_picture_files_use_the_library_decoder(tmp_path: Path) -> None:
    """EuroSAT is class folders: transparency must become white, a cut file a broken image."""
    folder = tmp_path / "eurosat" / "2750"
    for name in ("Forest", "River"):
        (folder / name).mkdir(parents=True)
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(folder / name / "1.png")
    dataset = make_dataset(f"torchvision:EuroSAT:{tmp_path}")
    assert dataset.class_names == ["Forest", "River"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.read(0)[0, 0].tolist() == [255, 255, 255]


def test_imagenet_uses_the_library_decoder_too(tmp_path: Path) -> None:
    """It has no argument for it in any version."""
    wnids = {"n01440764": ("tench",), "n01530575": ("brambling", "finch")}
    torch.save((wnids, ["n01440764"]), tmp_path / "meta.bin")
    for wnid in wnids:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "train" / wnid / "1.png")
    dataset = make_dataset(f"torchvision:ImageNet:{tmp_path}:train")
    assert dataset.read(1)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", sorted(TORCHVISION_SETS))
def test_the_table_fits_torchvision(name: str) -> None:
    """Each class exists, takes the split as the table says, and fills the label attribute."""
    kind, entry = getattr(datasets, name), TORCHVISION_SETS[name]
    parameters = inspect.signature(kind).parameters
    assert bool(entry.splits) == bool({"train", "split"} & set(parameters))
    if "train" in parameters:
        assert entry.splits == ("train", "test")
    bases = [base for base in kind.__mro__ if base.__module__.startswith("torchvision")]
    source = "".join(inspect.getsource(base) for base in bases)
    assert f"self.{entry.labels}" in source
