"""Batches of decoded images whose crops are drawn but not rendered yet, for the device to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dino_kd.data.images import BrokenImage
from dino_kd.data.multicrop import BatchParams
from dino_kd.errors import ConfigError

Shape = tuple[int, ...]
Size = tuple[int, int]
Allocate = Callable[[Shape, Shape], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class DecodedBatch:
    """B images as they were decoded, and what was drawn for their crops.

    Attributes:
        pixels: uint8 [P, 3], the rows of all images one behind the other.
        sizes: int64 [B, 2], heights and widths.
        params: one row per image.
        indices, broken: as in `CropBatch`.
    """

    pixels: torch.Tensor
    sizes: np.ndarray
    params: BatchParams
    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    broken: list[BrokenImage] = field(default_factory=list)

    def pin_memory(self) -> DecodedBatch:
        """The same batch with its pixels in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())


def check_channels(channels: int) -> None:
    """Raise ConfigError for images that are not rendered on the device."""
    if channels != 3:
        raise ConfigError(
            f"data.renderer=device renders RGB images, not images of {channels} channels; use "
            "data.renderer=auto"
        )


def in_new_memory(globals_: Shape, locals_: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Two uint8 tensors of these shapes, contents undefined."""
    return torch.empty(globals_, dtype=torch.uint8), torch.empty(locals_, dtype=torch.uint8)


def packed_pixels(images: Sequence[np.ndarray], allocate: Allocate = in_new_memory) -> torch.Tensor:
    """Images uint8 [H, W, 3] of any sizes as one tensor [P, 3] in memory of `allocate`."""
    counts = [image.shape[0] * image.shape[1] for image in images]
    pixels, _ = allocate((sum(counts), 3), (0,))
    rows, begin = pixels.numpy(), 0
    for image, count in zip(images, counts, strict=True):
        rows[begin : begin + count].reshape(image.shape)[...] = image
        begin += count
    return pixels


class Gathering:
    """Keeps the images of a batch until all have been read, then packs them into one tensor.

    Any thread may bring images; the one that brings the last of them packs.
    """

    def __init__(
        self,
        count: int,
        draw: Callable[[int, Sequence[Size] | np.ndarray], BatchParams],
        allocate: Allocate,
    ) -> None:
        self._images: list[np.ndarray | None] = [None] * count
        self._missing, self._lock = count, threading.Lock()
        self._allocate, self._draw = allocate, draw
        self._made: DecodedBatch | None = None

    def add(self, images: Sequence[np.ndarray] | np.ndarray, begin: int) -> None:
        """Take the images uint8 [H, W, 3] of the places from `begin` on. Raises ConfigError."""
        check_channels(images[0].shape[2])
        with self._lock:
            self._images[begin : begin + len(images)] = list(images)
            self._missing -= len(images)
            is_last = not self._missing
        if is_last:
            self._pack()

    def _pack(self) -> None:
        images = [image for image in self._images if image is not None]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        pixels = packed_pixels(images, self._allocate)
        params = self._draw(0, sizes)
        self._made = DecodedBatch(pixels, np.array(sizes, dtype=np.int64), params)
        self._images.clear()

    def batch(self, indices: torch.Tensor, broken: list[BrokenImage]) -> DecodedBatch:
        """The batch; only once every place is filled."""
        assert self._made is not None
        return replace(self._made, indices=indices, broken=broken)
