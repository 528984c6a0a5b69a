"""Every back-end against the Pillow reference; the batch's draws against the single image's."""

from __future__ import annotations

import numpy as np
import pytest

from dino_kd.data.multicrop import CropPolicy, crop_rng, render_crops, sample_crops
from dino_kd.data.renderers import PillowRenderer, make_renderer, sample_batch
from dino_kd.errors import ConfigError

SMALL = CropPolicy(global_size=(12, 10), local_size=(6, 8), num_local_crops=3)
SIZES = [(40, 50), (33, 17), (1, 1), (4, 400), (64, 64)]


@pytest.mark.parametrize("policy", [CropPolicy(), SMALL, CropPolicy(num_global_crops=1)])
def test_a_batch_draws_what_each_image_draws_alone(policy: CropPolicy) -> None:
    """Equal to the last bit, whichever images share the batch."""
    sizes = SIZES * 20
    indices = [7 * i for i in range(len(sizes))]
    params = sample_batch(policy, sizes, 5, 3, indices)
    assert len(params) == len(sizes)
    for row, (size, index) in enumerate(zip(sizes, indices, strict=True)):
        assert params.crops_of(row) == sample_crops(policy, *size, crop_rng(5, 3, index))


def test_pillow_fills_the_slots_it_is_told() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    params = sample_batch(SMALL, SIZES, 1, 0, range(5))
    large = np.zeros((2, 6, 3, 12, 10), np.uint8)
    little = np.zeros((3, 6, 3, 6, 8), np.uint8)
    slots = [3, 0, 5, 1, 4]
    PillowRenderer().render(images, params, large, little, slots)
    for row, slot in enumerate(slots):
        crops = render_crops(images[row], params.crops_of(row))
        np.testing.assert_array_equal(large[:, slot], crops[:2])
        np.testing.assert_array_equal(little[:, slot], crops[2:])
    assert not large[:, 2].any()
    assert not little[:, 2].any()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no renderer 'nativ'.*auto, native, torch, pillow"):
        make_renderer("nativ")
