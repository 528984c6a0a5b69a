"""From a dataset spec string, such as ``folder:/data`` or ``cifar10:/data:test``, to images."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from dino_kd.data.dataset import GreyImages, ImageDataset, Subset, require_labels, subset
from dino_kd.data.folder import FolderImages, ListedImages, open_folder
from dino_kd.data.shards import ShardImages
from dino_kd.data.torchvision_sets import TorchvisionImages, set_name, split_names
from dino_kd.distributed import on_main
from dino_kd.errors import ConfigError, DataError, did_you_mean, unknown_name

SPEC_FORMS = {
    "folder": "folder:PATH (or just PATH; a folder, or a text file of paths)",
    "cifar10": "cifar10:PATH[:train|test]",
    "cifar100": "cifar100:PATH[:train|test]",
    "stl10": "stl10:PATH[:train|test|unlabeled|train+unlabeled]",
    "imagenet": "imagenet:PATH[:train|val]",
    "torchvision": "torchvision:NAME:PATH[:SPLIT]",
    "webdataset": "webdataset:PATTERN (tar files: /data/{000..099}.tar, '/data/*.tar', a folder)",
    "synthetic": "synthetic:NAME[:train|test[:SIZE]]",
}
_SHORT_NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}


def make_dataset(
    spec: str, *, channels: int = 3, download: bool = False, where: str = "data.train"
) -> ImageDataset:
    """The images that `spec` names, decoded to uint8 [H, W, `channels`] when read.

    `where` is the setting that holds the spec; messages begin with it. Nothing is downloaded
    unless `download` is set, and then only sets that torchvision can fetch.

    Raises:
        ConfigError: the spec cannot be understood; the message lists what is accepted.
        DataError: the files are missing, empty, or not what the spec says.
    """
    spec = spec.strip()
    if not spec:
        raise ConfigError(f"{where}: the data set is empty; accepted: {_accepted()}.")
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in SPEC_FORMS:
        return _open_path(spec, channels, where)
    if not rest:
        raise ConfigError(f"{where}: {spec!r} lacks its second part; write {SPEC_FORMS[scheme]}.")
    if scheme == "folder":
        return open_folder(rest, channels=channels, spec=spec, where=where)
    if scheme == "webdataset":
        return ShardImages(rest, channels=channels, spec=spec, where=where)
    if scheme == "synthetic":
        return _open_synthetic(rest, channels, where)
    if scheme == "imagenet":
        return _open_imagenet(rest, channels, spec, where)
    if scheme == "torchvision":
        name, _, rest = rest.partition(":")
        name = set_name(name, where)
        if not rest:
            raise ConfigError(f"{where}: {spec!r} lacks the path; write {SPEC_FORMS[scheme]}.")
    else:
        name = _SHORT_NAMES[scheme]
    path, split = _path_and_split(rest, split_names(name), where)
    open_set = functools.partial(
        TorchvisionImages, name, path, split, channels=channels, spec=spec, where=where
    )
    if download:
        on_main(lambda: bool(open_set(download=True)))  # one process fetches, the others wait
    return open_set(download=False)


def _accepted() -> str:
    return ", ".join(SPEC_FORMS.values())


def _open_path(spec: str, channels: int, where: str) -> ImageDataset:
    """A spec without a known scheme: a path, or a mistake."""
    if Path(spec).expanduser().exists():
        return open_folder(spec, channels=channels, spec=spec, where=where)
    scheme, colon, _ = spec.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][\w+-]*", scheme):
        hint = did_you_mean(scheme.lower(), SPEC_FORMS)
        raise ConfigError(
            f"{where}: unknown data set {scheme!r} in {spec!r}{hint or '.'} Accepted: "
            f"{_accepted()}. For a path that contains ':' write folder:PATH."
        )
    if spec in SPEC_FORMS:
        raise ConfigError(f"{where}: {spec!r} lacks its second part; write {SPEC_FORMS[spec]}.")
    return open_folder(spec, channels=channels, spec=spec, where=where)  # says what is missing


def _open_synthetic(rest: str, channels: int, where: str) -> ImageDataset:
    from dino_kd.data import synthetic

    if channels not in (1, 3):
        raise ConfigError(
            f"{where}: synthetic:{rest} has 3 channels (or 1, grey); {channels} are asked for."
        )
    dataset: ImageDataset = synthetic.make_synthetic(rest)
    return GreyImages(dataset) if channels == 1 else dataset


def _open_imagenet(rest: str, channels: int, spec: str, where: str) -> ImageDataset:
    path, split = _path_and_split(rest, ("train", "val"), where)
    root = Path(path).expanduser()
    folder = root / split
    if root.is_dir() and not folder.is_dir():
        raise DataError(
            f"{where}: {root} has no folder {split!r}. imagenet:PATH expects "
            f"PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG; for any other "
            f"folder of images use 'folder:{root}'."
        )
    return open_folder(folder, channels=channels, spec=spec, where=where)


def _path_and_split(rest: str, splits: tuple[str, ...], where: str) -> tuple[str, str]:
    """``PATH[:SPLIT]`` apart; the first of `splits` is the default. Paths may contain ':'."""
    default = splits[0] if splits else ""
    path, colon, split = rest.rpartition(":")
    if not colon:
        return rest, default
    if split in splits:
        if not path:
            raise ConfigError(f"{where}: {rest!r} has a split but no path; write PATH:{split}.")
        return path, split
    if "/" in split or Path(rest).expanduser().exists():
        return rest, default
    if not splits:
        raise ConfigError(f"{where}: this data set has no splits, got {split!r}; write PATH alone.")
    raise unknown_name("split", split, splits, where)


__all__ = [
    "SPEC_FORMS", "FolderImages", "ImageDataset", "ListedImages", "ShardImages", "Subset",
    "TorchvisionImages", "make_dataset", "require_labels", "subset",
]  # fmt: skip
