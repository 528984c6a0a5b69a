"""Views that keep the whole image, against Pillow's own resizing and DINO's frame sizes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dino_kd.data.whole_views import FitWithin, Stretch, frame_size

PIXELS = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)


def pillow(size, filter_=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(PIXELS).resize((size[1], size[0]), filter_))


def test_longer_side_shrinks_and_the_remainder_is_cut_right_and_below():
    found = FitWithin(45, 8)(PIXELS)
    assert found.shape == (3, 24, 40)  # 30 x 45
    assert np.array_equal(found, pillow((30, 45))[:24, :40].transpose(2, 0, 1))


def test_small_images_are_not_enlarged():
    assert np.array_equal(FitWithin(500)(PIXELS), PIXELS.transpose(2, 0, 1))
    assert FitWithin(45, 32)(PIXELS).shape == (3, 32, 32)  # one patch at the least


def test_stretch_gives_the_size_for_any_channels():
    found = Stretch((40, 20), "bilinear")(PIXELS)
    expected = pillow((40, 20), Image.Resampling.BILINEAR).transpose(2, 0, 1)
    assert np.array_equal(found, expected)
    two = Stretch((40, 20), "bilinear")(PIXELS[:, :, :2])
    assert np.array_equal(two, expected[:2])


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((480, 854), 8, (480, 832)),  # DINO's sizes of DAVIS: down to a multiple of 64
        ((480, 854), 16, (480, 832)),
        ((480, 910), None, (480, 896)),
        ((854, 480), 16, (832, 480)),
        ((480, 854), 14, (476, 840)),  # 64 is no multiple of 14: whole patches
        ((20, 30), 16, (480, 704)),
    ],
)
def test_frame_sizes(size, patch, expected):
    assert frame_size(*size, 480, patch) == expected


def test_small_frames_keep_a_patch():
    assert frame_size(10, 15, 16, 8) == (16, 24)
    assert frame_size(10, 15, 3, 8) == (8, 8)
