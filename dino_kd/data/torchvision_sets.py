"""Data sets that torchvision reads, in torchvision's own file layouts.

torchvision verifies the checksum of the official files before it opens them, and downloads only
when it is told to.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_kd.data.fingerprint import files_fingerprint
from dino_kd.data.images import BrokenImage, decode_image, picture_to_array
from dino_kd.errors import DataError, unknown_name


@dataclass(frozen=True)
class _Entry:
    """How one torchvision class names its splits and keeps its labels."""

    splits: tuple[str, ...]  # the first is the default; () when the set has none
    labels: str  # the attribute that holds them; "" for a set without class labels
    needs: str = ""  # what must lie in PATH, for messages


_TRAIN_TEST = ("train", "test")
_TRAIN_VAL_TEST = ("train", "val", "test")
TORCHVISION_SETS: dict[str, _Entry] = {
    "CIFAR10": _Entry(_TRAIN_TEST, "targets", "cifar-10-batches-py"),
    "CIFAR100": _Entry(_TRAIN_TEST, "targets", "cifar-100-python"),
    "STL10": _Entry(("train", "test", "unlabeled", "train+unlabeled"), "labels", "stl10_binary"),
    "SVHN": _Entry(("train", "test", "extra"), "labels", "train_32x32.mat"),
    "MNIST": _Entry(_TRAIN_TEST, "targets", "MNIST/raw"),
    "FashionMNIST": _Entry(_TRAIN_TEST, "targets", "FashionMNIST/raw"),
    "KMNIST": _Entry(_TRAIN_TEST, "targets", "KMNIST/raw"),
    "USPS": _Entry(_TRAIN_TEST, "targets", "usps.bz2"),
    "Food101": _Entry(_TRAIN_TEST, "_labels", "food-101"),
    "Flowers102": _Entry(_TRAIN_VAL_TEST, "_labels", "flowers-102"),
    "OxfordIIITPet": _Entry(("trainval", "test"), "_labels", "oxford-iiit-pet"),
    "DTD": _Entry(_TRAIN_VAL_TEST, "_labels", "dtd"),
    "GTSRB": _Entry(_TRAIN_TEST, "_samples", "gtsrb"),
    "FGVCAircraft": _Entry(("trainval", "train", "val", "test"), "_labels", "fgvc-aircraft-2013b"),
    "StanfordCars": _Entry(_TRAIN_TEST, "_samples", "stanford_cars"),
    "SUN397": _Entry((), "_labels", "SUN397"),
    "EuroSAT": _Entry((), "targets", "eurosat"),
    "Caltech101": _Entry((), "y", "caltech101"),
    "Caltech256": _Entry((), "y", "caltech256"),
    "CelebA": _Entry(("train", "valid", "test", "all"), "", "celeba"),
    "Country211": _Entry(("train", "valid", "test"), "targets", "country211"),
    "RenderedSST2": _Entry(_TRAIN_VAL_TEST, "_samples", "rendered-sst2"),
    "Imagenette": _Entry(("train", "val"), "_samples", "imagenette2"),
    "Places365": _Entry(("train-standard", "train-challenge", "val"), "targets", ""),
    "FER2013": _Entry(_TRAIN_TEST, "_samples", "fer2013"),
    "ImageNet": _Entry(("train", "val"), "targets", "ILSVRC2012_devkit_t12.tar.gz"),
}


class TorchvisionImages:
    """One split of a torchvision data set.

    Sets that read picture files hand over the path, so that every file is decoded by the rule
    of `dino_kd.data.images`; sets stored as arrays stay in memory as torchvision keeps them.

    Raises:
        DataError: the files are missing or damaged, or the download failed.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        split: str = "",
        *,
        channels: int = 3,
        download: bool = False,
        spec: str = "",
        where: str = "data.train",
    ) -> None:
        self.spec = spec or f"torchvision:{name}:{root}" + (f":{split}" if split else "")
        self.channels = channels
        self._identity = (name, split, channels)
        self._set = _open(name, Path(root).expanduser(), split, download, where)
        labels = _labels_of(self._set, TORCHVISION_SETS[name].labels)
        self.labels = None if labels is None or labels.min(initial=0) < 0 else labels
        self.class_names = None if self.labels is None else _names_of(self._set, self.labels)

    def __len__(self) -> int:
        return len(self._set)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage."""
        try:
            image = self._set[index][0]
            if isinstance(image, (str, os.PathLike)):
                return decode_image(image, self.channels)
            return picture_to_array(image, self.channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BrokenImage(self.path(index), str(error)) from error

    def path(self, index: int) -> str:
        """The data set and the number of the image in it."""
        return f"{self.spec}[{index}]"

    def fingerprint(self) -> str:
        """Name, split, channels, and every file in the set's folder."""
        folder = Path(self._set.root)
        needed = folder / TORCHVISION_SETS[self._identity[0]].needs
        files = sorted(needed.rglob("*")) if needed.is_dir() else [needed]
        return files_fingerprint(map(str, files), "torchvision", *self._identity, len(self))


def split_names(name: str) -> tuple[str, ...]:
    """The splits of a torchvision set, default first; empty when it has none."""
    return TORCHVISION_SETS[name].splits


def set_name(name: str, where: str) -> str:
    """The exact name of a torchvision set, any case. Raises ConfigError with near matches."""
    exact = {known.lower(): known for known in TORCHVISION_SETS}
    if name.lower() not in exact:
        raise unknown_name("torchvision data set", name, TORCHVISION_SETS, where)
    return exact[name.lower()]


def _open(name: str, root: Path, split: str, download: bool, where: str) -> Any:
    from torchvision import datasets  # a second to import: only when such a set is asked for

    entry = TORCHVISION_SETS[name]
    if entry.needs and root.name == entry.needs and root.is_dir():
        root = root.parent  # the inner folder was given
    if not download and not root.is_dir():
        raise DataError(f"{where}: {root} does not exist. {_how_to_get(name, entry)}")
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "train" in parameters:
        options["train"] = split == "train"
    elif split:
        options["split"] = split
    if "download" in parameters:
        options["download"] = download
    if "loader" in parameters:
        options["loader"] = str  # the path itself
    try:
        images = kind(os.fspath(root), **options)
    except (RuntimeError, OSError, ValueError, EOFError, ModuleNotFoundError) as error:
        raise DataError(_why_not(name, entry, root, split, download, where, error)) from error
    if hasattr(images, "loader"):  # ImageNet never takes it as an argument
        images.loader = str
    return images


def _why_not(
    name: str,
    entry: _Entry,
    root: Path,
    split: str,
    download: bool,
    where: str,
    error: Exception,
) -> str:
    if download:
        return f"{where}: torchvision could not download {name} to {root}: {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"{where}: reading {name} needs another package: {error}."
    for folder in (root / (split or "train"), root / "train", root):
        if folder.is_dir() and not (root / entry.needs).exists() and _has_class_folders(folder):
            return (
                f"{where}: {root} does not hold torchvision's {name} files, but {folder} has "
                f"folders of images. Use 'folder:{folder}' instead."
            )
    found = (
        "it is there but damaged or incomplete" if (root / entry.needs).exists() else "not found"
    )
    return (
        f"{where}: cannot read {name} ({split or 'all'}) in {root} "
        f"({found}; torchvision says: {error}). {_how_to_get(name, entry)}"
    )


def _how_to_get(name: str, entry: _Entry) -> str:
    holds = f"a folder that holds {entry.needs}" if entry.needs else "torchvision's layout"
    return (
        f"{name} is read from {holds}; set download=true (data.download for pretraining) to "
        "let torchvision fetch it, where the set can be downloaded."
    )


def _has_class_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _labels_of(dataset: Any, attribute: str) -> np.ndarray | None:
    values = getattr(dataset, attribute, None) if attribute else None
    if values is None:
        return None
    if len(values) and isinstance(values[0], tuple):  # pairs of file and label
        values = [pair[1] for pair in values]
    if any(value is None for value in values):
        return None
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _names_of(dataset: Any, labels: np.ndarray) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not names:
        return [str(index) for index in range(int(labels.max(initial=-1)) + 1)]
    return [name if isinstance(name, str) else ", ".join(name) for name in names]
