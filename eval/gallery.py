"""The nearest neighbours of a few shown images in a gallery, by cosine of their features."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from dino_kd import knn
from dino_kd.data.dataset import ImageDataset
from dino_kd.features import FeatureBank


class Neighbour(NamedTuple):
    """A gallery image: its position in the dataset, and its cosine with the shown image."""

    position: int
    similarity: float


def nearest(
    queries: FeatureBank, shown: ImageDataset, bank: FeatureBank, gallery: ImageDataset, k: int
) -> dict[int, list[Neighbour]]:
    """For each position in `shown` its `k` nearest, most similar first.

    An image is never its own neighbour: a gallery image of the same file is left out (links are
    followed; copies are other files). Fewer than `k` only when the gallery holds no more.
    """
    take = k + 1
    while True:
        take = min(take, len(bank.features))
        similarity, rows = knn.search(queries.features, bank.features, take)
        found = {
            int(position): _others(shown.path(int(position)), gallery, bank, near, row)[:k]
            for position, near, row in zip(queries.indices, similarity, rows, strict=True)
        }
        if take == len(bank.features) or all(len(others) == k for others in found.values()):
            return found
        take *= 2  # the same file stands in the gallery several times


def _others(
    own: str, gallery: ImageDataset, bank: FeatureBank, similarity: Tensor, rows: Tensor
) -> list[Neighbour]:
    own = os.path.realpath(own)
    found = [
        Neighbour(int(bank.indices[row]), float(near))
        for near, row in zip(similarity, rows, strict=True)
    ]
    return [near for near in found if os.path.realpath(gallery.path(near.position)) != own]
