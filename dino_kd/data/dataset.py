"""What a data set is to the rest of the library: images by index, perhaps with labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.data.images import BrokenImage, picture_to_array
from dino_kd.errors import DataError


class ImageDataset(Protocol):
    """Decoded images by index. Cheap to share with forked processes, and can be pickled."""

    @property
    def spec(self) -> str:
        """The spec string it was made from, for messages."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class indices int64 [N]; none when the set is unlabelled."""

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class index; none when the set is unlabelled."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises BrokenImage when it cannot be read.

        A set to train on is read by several threads at once.
        """

    def path(self, index: int) -> str:
        """Where image `index` lies, for people."""

    def fingerprint(self) -> str:
        """A hash that changes when an image, its order or its decoding changes; not for labels."""


class Subset:
    """The images `indices` of another data set, in that order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        size = len(dataset)
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= size):
            raise IndexError(f"subset of {dataset.spec}: an index is outside 0..{size - 1}")
        self.spec = f"{dataset.spec} ({len(self.indices)} of {size} images)"
        self.labels = None if dataset.labels is None else dataset.labels[self.indices]
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        """Image `index` of the subset as uint8 [H, W, C]. Raises BrokenImage."""
        return self.dataset.read(int(self.indices[index]))

    def read_block(self, indices: np.ndarray) -> np.ndarray | None:
        """Images uint8 [n, H, W, C] at once, from a set that can; else None."""
        read_block = getattr(self.dataset, "read_block", None)
        return None if read_block is None else read_block(self.indices[indices])

    def path(self, index: int) -> str:
        """Where image `index` of the subset lies."""
        return self.dataset.path(int(self.indices[index]))

    def fingerprint(self) -> str:
        """The whole set's, and which images were chosen."""
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()
        return text_fingerprint("subset", self.dataset.fingerprint(), chosen)


class GreyImages:
    """An RGB data set seen in one channel: ITU-R 601 luma."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.spec = dataset.spec
        self.labels = dataset.labels
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, 1]. Raises BrokenImage."""
        return picture_to_array(Image.fromarray(self.dataset.read(index)), 1)

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return self.dataset.path(index)

    def fingerprint(self) -> str:
        """The colour set's, marked as grey."""
        return text_fingerprint("grey", self.dataset.fingerprint())


def subset(dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> Subset:
    """The images `indices` of `dataset`, in that order. Raises IndexError outside 0..N-1."""
    return Subset(dataset, indices)


def require_labels(dataset: ImageDataset, where: str) -> None:
    """Raise DataError, naming the setting `where`, unless `dataset` has two classes or more."""
    if dataset.labels is None or dataset.class_names is None:
        raise DataError(
            f"{where}: {dataset.spec} has no labels, and they are needed here. Put the images of "
            "each class into a folder of its own (FOLDER/cat/1.jpg, FOLDER/dog/2.jpg, no image "
            "directly in FOLDER), or use a labelled set such as cifar10:PATH."
        )
    if len(dataset.class_names) < 2:
        raise DataError(
            f"{where}: {dataset.spec} has a single class, {dataset.class_names[0]!r}. Labels come "
            "from the first level of sub-folders: point one level deeper, or add the other classes."
        )


def labels_as(dataset: ImageDataset, class_names: Sequence[str], where: str) -> np.ndarray:
    """Labels of `dataset` int64 [N] as indices into `class_names`, matched by name.

    Two folders sort their own classes, so a class that one of them lacks shifts the rest.

    Raises:
        DataError: no labels, or a class that is not among `class_names`.
    """
    require_labels(dataset, where)
    assert dataset.labels is not None
    assert dataset.class_names is not None
    position = {name: index for index, name in enumerate(class_names)}
    missing = [name for name in dataset.class_names if name not in position]
    if missing:
        raise DataError(
            f"{where}: {dataset.spec} has classes that the training images lack: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. "
            f"Known: {', '.join(list(class_names)[:10])}{' ...' if len(class_names) > 10 else ''}."
        )
    table = np.array([position[name] for name in dataset.class_names], dtype=np.int64)
    return table[dataset.labels]


def notes_on_shared_images(train: ImageDataset, test: ImageDataset) -> list[str]:
    """The sentence about images that are in both sets, if any."""
    both = len(
        {test.path(i) for i in range(len(test))} & {train.path(i) for i in range(len(train))}
    )
    if not both:
        return []
    return [f"{both} of {len(test)} test images are also in train: the score flatters"]


__all__ = [
    "BrokenImage", "GreyImages", "ImageDataset", "Subset", "labels_as", "notes_on_shared_images",
    "require_labels", "subset",
]  # fmt: skip
