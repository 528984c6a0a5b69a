"""What do the crops of one image cost, and where does the time go?

python benchmarks/multicrop.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
from timing import compare

from dino_kd.data.multicrop import CropPolicy, crop_rng, render_crops, sample_crops


def crops(image: np.ndarray, policy: CropPolicy, count: int) -> None:
    """All crops of `count` images."""
    for index in range(count):
        params = sample_crops(policy, *image.shape[:2], crop_rng(0, 0, index))
        render_crops(image, params)


def main() -> None:
    """Photo-sized and 32 px images, published recipe and its parts."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (400, 465, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    published = CropPolicy()
    tiny = CropPolicy(
        global_size=(32, 32), local_size=(16, 16), num_local_crops=6, blur=(0.0, 0.0, 0.0)
    )
    plain = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}
    for title, image, policy, count in (
        ("20 photos of 465 x 400, 2 x 224 + 8 x 96", photo, published, 20),
        ("200 images of 32 px, 2 x 32 + 6 x 16", small, tiny, 200),
    ):
        geometry = CropPolicy(**{**policy.__dict__, **plain})
        compare(
            title,
            {
                "all of the recipe": partial(crops, image, policy, count),
                "crop, resize, flip only": partial(crops, image, geometry, count),
            },
            rounds=3,
        )


if __name__ == "__main__":
    main()
