"""Images without files, for the tests of the loader, and what makes its batches equal."""

from __future__ import annotations

import numpy as np
import torch

from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import CropBatch


class Memory:
    """Images in memory, of various sizes; those in `broken` cannot be read."""

    spec, labels, class_names = "memory", None, None

    def __init__(self, count: int, broken: tuple[int, ...] = (), channels: int = 3) -> None:
        rng = np.random.default_rng(0)
        self.images = [
            rng.integers(0, 256, (9 + i % 4, 12 - i % 3, channels), dtype=np.uint8)
            for i in range(count)
        ]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise BrokenImage(self.path(index), "cut")
        return self.images[index]

    def path(self, index: int) -> str:
        return f"memory[{index}]"


def assert_same(ours: list[CropBatch], theirs: list[CropBatch]) -> None:
    """The same batches bit for bit, with the same images broken."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.crops.global_crops, b.crops.global_crops)
        assert torch.equal(a.crops.local_crops, b.crops.local_crops)
        assert [str(x) for x in a.broken] == [str(x) for x in b.broken]
