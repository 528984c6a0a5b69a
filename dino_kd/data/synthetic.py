"""Generated, labelled images with object masks: something to learn from without a download.

`synthetic:textures`: a smooth random blob on a background of smooth low-contrast noise. The class
is the blob's texture, and nothing else tells it: place, size, shape, rotation, phase, scale,
polarity, contrast, brightness and tint are drawn for each image. Every image is computed when it
is read, from (name, split, index) alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dino_kd.errors import ConfigError, unknown_name

SIDE = 32  # pixels
DEFAULT_SIZES = {"train": 8000, "test": 2000}  # images

_TURN = 2 * np.pi
_LABEL_STREAM = 2**62  # beyond every image's index
_MOST_IMAGES = 10_000_000

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Blob(NamedTuple):
    """The object of one image, all [H, W]: soft edge 0..1, its mask, and its texture's zones."""

    alpha: np.ndarray
    mask: np.ndarray


class SyntheticImages:
    """One split of a generated data set.

    Attributes:
        spec: ``synthetic:NAME:SPLIT:SIZE``.
        labels: int64 [N]; every class equally often, in random order. A longer split begins with
            the images of a shorter one.
        class_names: one name for each texture.
    """

    def __init__(self, name: str, split: str, num_images: int) -> None:
        self.spec = f"synthetic:{name}:{split}:{num_images}"
        self.class_names = list(TEXTURES)
        self._key = (zlib.crc32(name.encode()), list(DEFAULT_SIZES).index(split))
        self.labels = self._draw_labels(num_images)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [32, 32, 3]. Draws from a generator of its own."""
        return self._render(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """Where the object of image `index` is: bool [32, 32]."""
        return self._render(index)[1]
