"""Augmented views of images as a data set of their own, for metrics that compare views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dino_kd.data.dataset import ImageDataset, Subset
from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.data.multicrop import CropPolicy, crop_rng, render_crops, sample_crops


class ViewedImages(Subset):
    """`num_views` global crops of each of the images `indices` of another data set.

    Entry ``i * num_views + v`` is view v of the i-th image. Views come in pairs, as DINO's two
    global crops do: pair p of an image is drawn from (seed, p, image) alone, so that more views, or
    more images, change none of the others.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: Sequence[int] | np.ndarray,
        policy: CropPolicy,
        *,
        num_views: int,
        seed: int,
    ) -> None:
        super().__init__(dataset, np.repeat(np.asarray(indices, dtype=np.int64), num_views))
        self.policy = replace(policy, num_global_crops=2, num_local_crops=0)
        self.num_views = num_views
        self.seed = seed
        # What was made last: neighbouring entries share an image, and mostly a pair.
        self._image: tuple[int, np.ndarray] | None = None
        self._pair: tuple[int, int, list[np.ndarray]] | None = None

    def read(self, index: int) -> np.ndarray:
        """One view as uint8 [H, W, C]. Raises BrokenImage."""
        source, (pair, member) = int(self.indices[index]), divmod(index % self.num_views, 2)
        if self._pair is None or self._pair[:2] != (source, pair):
            if self._image is None or self._image[0] != source:
                self._image = source, self.dataset.read(source)
            height, width = self._image[1].shape[:2]
            params = sample_crops(self.policy, height, width, crop_rng(self.seed, pair, source))
            self._pair = source, pair, render_crops(self._image[1], params)
        return np.ascontiguousarray(self._pair[2][member].transpose(1, 2, 0))

    def read_block(self, indices: np.ndarray) -> None:
        """Views are made one by one."""

    def fingerprint(self) -> str:
        """The images', and everything that shapes the views."""
        return text_fingerprint(
            "views", super().fingerprint(), self.policy, self.num_views, self.seed
        )
