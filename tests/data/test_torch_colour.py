"""Batched colour changes against Pillow's functions, crop by crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from dino_kd.data import torch_colour


def every_colour() -> torch.Tensor:
    """Two crops that hold 2 x 4,096 random colours, greys and the pure colours among them."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    levels[0, :, :4] = np.arange(256).reshape(1, 4, 64)  # greys
    levels[1, :, :2] = np.where(levels[1, :, :2] > 127, 255, 0)  # corners of the cube
    levels[1, 0, 4:8] = 0
    return torch.from_numpy(levels).float()


def pictures(crops: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(crop.byte().permute(1, 2, 0).numpy()) for crop in crops]


def difference(crops: torch.Tensor, expected: list[Image.Image]) -> np.ndarray:
    theirs = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in expected])
    return np.abs(crops.numpy() - theirs)


@pytest.mark.parametrize(
    ("change", "enhancer"),
    [
        (torch_colour.brightness, ImageEnhance.Brightness),
        (torch_colour.contrast, ImageEnhance.Contrast),
        (torch_colour.saturation, ImageEnhance.Color),
    ],
)
def test_blends_are_pillows_up_to_a_level(change, enhancer) -> None:  # type: ignore[no-untyped-def]
    crops, factors = every_colour(), [0.6, 1.37]
    expected = [
        enhancer(picture).enhance(factor)
        for picture, factor in zip(pictures(crops), factors, strict=True)
    ]
    change(torch.tensor(factors), crops)
    error = difference(crops, expected)
    assert error.max() <= 1
    assert (error > 0).mean() < 0.002


@pytest.mark.parametrize("steps", [(0, 1), (25, 231), (128, 255)])
def test_hue_is_pillows_up_to_a_step_of_the_circle(steps: tuple[int, int]) -> None:
    """A step of 1/255 of the circle moves a band by 6 levels at most."""
    crops = every_colour()
    same = list(range(256))
    expected = [
        picture.convert("HSV").point([(v + step) % 256 for v in same] + same + same).convert("RGB")
        for picture, step in zip(pictures(crops), steps, strict=True)
    ]
    torch_colour.hue(torch.tensor(steps, dtype=torch.float32), crops)
    error = difference(crops, expected)
    assert error.max() <= 6
    assert (error > 0).mean() < 0.01


def test_grey_and_solarize_are_exact() -> None:
    crops = every_colour()
    expected = [picture.convert("L").convert("RGB") for picture in pictures(crops)]
    torch_colour.grayscale(crops)
    assert difference(crops, expected).max() == 0
    for threshold in (0, 1, 128, 255):
        crops = every_colour()
        table = [v if v < threshold else 255 - v for v in range(256)]
        expected = [picture.point(table * 3) for picture in pictures(crops)]
        torch_colour.solarize(threshold, crops)
        assert difference(crops, expected).max() == 0


@pytest.mark.parametrize("sigmas", [(0.1, 1.3), (1.53, 1.97), (0.53, 1.9), (2.57, 7.03)])
def test_blur_is_pillows_up_to_rounding(sigmas: tuple[float, float]) -> None:
    """Odd sigmas: with round ones many sums end in exactly one half, and either level is right."""
    crops = every_colour()
    expected = [
        picture.filter(ImageFilter.GaussianBlur(sigma))
        for picture, sigma in zip(pictures(crops), sigmas, strict=True)
    ]
    torch_colour.blur(crops, np.array(sigmas))
    error = difference(crops, expected)
    assert error.max() <= 2
    assert (error > 0).mean() < 0.01


def test_each_crop_keeps_its_own_order() -> None:
    """Two crops with the opposite order of the same changes, and one without any."""
    crops = every_colour()[:1].repeat(3, 1, 1, 1)
    factors = np.array([[1.4, 0.6, 1.2, 20.0]] * 3)
    first = crops[:1].clone()
    second = first.clone()
    amounts = torch.tensor(factors[:1], dtype=torch.float32)
    torch_colour.brightness(amounts[:, 0], first)
    torch_colour.contrast(amounts[:, 1], first)
    torch_colour.contrast(amounts[:, 1], second)
    torch_colour.brightness(amounts[:, 0], second)
    torch_colour.jitter(crops, np.array([[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]]), factors)
    assert torch.equal(crops[0], first[0])
    assert torch.equal(crops[1], second[0])
    assert torch.equal(crops[2], every_colour()[0])
    assert not torch.equal(first, second)
