"""A small grey copy and a hash of every image: what finding duplicates needs of the pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import image_batches
from dino_kd.distributed import all_gather_objects, all_gather_rows, rank, world_size

SIDE = 32  # pixels
_HASH = 32  # bytes of SHA-256
_AREA = 8  # bytes of the picture's area in pixels


@dataclass
class Thumbnails:
    """Of N readable images, complete on every process.

    Attributes:
        grey: uint8 ``[N, 32, 32]``; the whole picture, squeezed into a square.
        hashes: uint8 ``[N, 32]``, SHA-256 of shape and decoded pixels.
        areas: int64 ``[N]``, height * width in pixels.
        indices: int64 ``[N]``, positions in the data set.
        broken: the others.
    """

    grey: Tensor
    hashes: Tensor
    areas: Tensor
    indices: Tensor
    broken: list[BrokenImage]


def make_thumbnails(
    dataset: ImageDataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    on_batch: Callable[[int], object] | None = None,
) -> Thumbnails:
    """Read every image once; under torchrun each process takes a contiguous share.

    1056 bytes an image. `on_batch` is told the number of images after every batch.
    """
    share = np.array_split(np.arange(len(dataset)), world_size())[rank()]
    broken: list[BrokenImage] = []
    records = [torch.zeros(0, _AREA + _HASH + SIDE * SIDE, dtype=torch.uint8)]
    kept = [torch.zeros(0, dtype=torch.int64)]
    for batch, positions in image_batches(
        dataset,
        share,
        _record,
        batch_size=batch_size,
        num_workers=num_workers,
        on_broken=broken.append,
    ):
        records.append(batch)
        kept.append(positions)
        if on_batch is not None:
            on_batch(len(positions))
    rows = all_gather_rows(torch.cat(records))
    areas, hashes, grey = rows.split([_AREA, _HASH, SIDE * SIDE], dim=1)
    return Thumbnails(
        grey.reshape(-1, SIDE, SIDE),
        hashes.contiguous(),
        areas.contiguous().view(torch.int64).reshape(-1),
        all_gather_rows(torch.cat(kept)),
        all_gather_objects(broken),
    )


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, C]`` to the grey uint8 ``[32, 32]``: luma of RGB, else the mean of bands."""
    if image.shape[2] == 3:
        picture = Image.fromarray(image).convert("L")
    else:
        picture = Image.fromarray(np.rint(image.mean(axis=2)).astype(np.uint8))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _record(image: np.ndarray) -> np.ndarray:
    """Area, hash and thumbnail in one row of bytes, which is what a loader can carry."""
    height, width = image.shape[:2]
    digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
    area = np.array([height * width], dtype=np.int64).view(np.uint8)
    return np.concatenate(
        [area, np.frombuffer(digest, dtype=np.uint8), thumbnail(image).reshape(-1)]
    )
