"""A few decoded images in memory as a data set: one file, or frames of a video."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dino_kd.data.fingerprint import text_fingerprint


class HeldImages:
    """Unlabelled images uint8 [H, W, C] with a name each; sizes may differ."""

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(self, images: Sequence[np.ndarray], paths: Sequence[str], spec: str) -> None:
        assert len(images) == len(paths)
        self.images = list(images)
        self.paths = list(paths)
        self.spec = spec

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]."""
        return self.images[index]

    def path(self, index: int) -> str:
        """The name of image `index`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """A hash of all pixels."""
        hashes = [
            f"{image.shape} {hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()}"
            for image in self.images
        ]
        return text_fingerprint("held", *hashes)
