"""Drawing against torchvision's RandomResizedCrop; rendering against torchvision on PIL."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode

from dino_kd.data.multicrop import (
    CropParams,
    CropPolicy,
    Crops,
    crop_rng,
    render_crops,
    sample_crops,
    stream,
    supervised_policy,
)
from dino_kd.schema import CropSettings

FROZEN = [0.18728837046588753, 0.3778779212717954]
SMALL = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=6)
PLAIN = CropParams(
    box=(3, 5, 20, 24), size=(16, 12), interpolation="bicubic", horizontal_flip=False,
    vertical_flip=False, jitter_order=(), brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0,
    grayscale=False, blur_sigma=0.0, solarize_threshold=None,
)  # fmt: skip


def noise(height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    """A smooth random picture, so that blur and resizing have something to work on."""
    coarse = np.random.default_rng(1).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def test_policy_has_exactly_the_settings() -> None:
    settings = set(CropSettings.model_fields) - {"preset"}
    fields = {field.name for field in dataclasses.fields(CropPolicy)}
    assert fields - {"num_global_crops"} == settings  # DINO always has two
    for name, value in CropSettings().model_dump(exclude={"preset"}).items():
        found = getattr(CropPolicy(), name)
        assert found == ((value, value) if name.endswith("_size") else value), name


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(375, 500), (64, 48)])
def test_boxes_are_distributed_as_torchvisions(
    scale: tuple[float, float], size: tuple[int, int]
) -> None:
    """Two-sample KS tests of area, aspect and place against RandomResizedCrop.get_params."""
    count = 3000
    torch.manual_seed(0)
    picture = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(count)]
    )
    policy = CropPolicy(global_scale=scale, num_local_crops=0)
    ours = np.array(
        [
            crop.box
            for index in range(count // 2)
            for crop in sample_crops(policy, *size, crop_rng(0, 0, index))
        ]
    )
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert stats.ks_2samp(measure(theirs), measure(ours)).pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "expected"), [((4, 400), (0, 197, 4, 5)), ((400, 4), (197, 0, 5, 4))]
)
def test_extreme_shapes_fall_back_to_the_central_box(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """torchvision's fallback: the whole short side, the long side by the nearest ratio."""
    policy = CropPolicy(global_scale=(0.9, 1.0), num_local_crops=0)
    boxes = {crop.box for crop in sample_crops(policy, *size, crop_rng(0, 0, 0))}
    torch.manual_seed(0)
    theirs = tuple(RandomResizedCrop.get_params(torch.empty(3, *size), (0.9, 1.0), (3 / 4, 4 / 3)))
    assert boxes == {expected} == {theirs}


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 2), (7, 5)])
def test_boxes_stay_inside_tiny_images(size: tuple[int, int]) -> None:
    for index in range(50):
        for crop in sample_crops(SMALL, *size, crop_rng(3, 0, index)):
            top, left, height, width = crop.box
            assert 0 <= top < top + height <= size[0]
            assert 0 <= left < left + width <= size[1]


def test_frequencies_and_ranges_follow_the_policy() -> None:
    """2,000 images: every probability within 4 standard errors, every number in its range."""
    crops = [sample_crops(CropPolicy(), 224, 224, crop_rng(5, 1, i)) for i in range(2000)]
    for kind, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)):
        group = [crop for image in crops for crop in (image[2:] if kind == 2 else [image[kind]])]

        def share(values: list[bool], expected: float) -> None:
            error = np.sqrt(max(expected * (1 - expected), 0) / len(values))
            assert abs(np.mean(values) - expected) <= 4 * error

        share([crop.horizontal_flip for crop in group], 0.5)
        share([crop.vertical_flip for crop in group], 0.0)
        share([bool(crop.jitter_order) for crop in group], 0.8)
        share([crop.grayscale for crop in group], 0.2)
        share([crop.blur_sigma > 0 for crop in group], blur)
        share([crop.solarize_threshold is not None for crop in group], solarize)
        for name, low, high in (
            ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2),
            ("hue", -0.1, 0.1), ("blur_sigma", 0.1, 2.0),
        ):  # fmt: skip
            values = np.array([getattr(crop, name) for crop in group])
            values = values[values != 0]
            uniform = stats.uniform(low, high - low)
            assert stats.kstest(values, uniform.cdf).pvalue > 0.001, name
    orders = {crop.jitter_order for image in crops for crop in image}
    assert len(orders) == 24 + 1  # every order of four, and none
    assert {crop.size for crop in crops[0][:2]} == {(224, 224)}
    assert {crop.size for crop in crops[0][2:]} == {(96, 96)}


def test_draws_depend_on_seed_epoch_and_image_only() -> None:
    base = sample_crops(SMALL, 32, 32, crop_rng(1, 2, 3))
    assert sample_crops(SMALL, 32, 32, crop_rng(1, 2, 3)) == base
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert sample_crops(SMALL, 32, 32, crop_rng(*other)) != base
    assert stream(1, 7).random() != stream(2, 7).random()
    assert crop_rng(2**64 + 5, 0, 0).random() == crop_rng(5, 0, 0).random()


def test_draws_are_the_same_on_every_version() -> None:
    """Frozen numbers: a change would alter every run's data."""
    assert crop_rng(0, 0, 0).random(2).tolist() == pytest.approx(FROZEN, abs=1e-15)


def test_more_local_crops_do_not_move_the_others() -> None:
    more = dataclasses.replace(SMALL, num_local_crops=8)
    few = sample_crops(SMALL, 32, 32, crop_rng(0, 0, 0))
    assert sample_crops(more, 32, 32, crop_rng(0, 0, 0))[:8] == few


def changed(**changes: object) -> CropParams:
    return dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]


def oracle(picture: Image.Image, crop: CropParams) -> np.ndarray:
    """The published recipe out of torchvision's functions on a PIL picture."""
    mode = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
    picture = F.resized_crop(picture, *crop.box, list(crop.size), mode[crop.interpolation])
    if crop.horizontal_flip:
        picture = F.horizontal_flip(picture)
    if crop.vertical_flip:
        picture = F.vertical_flip(picture)
    for change in crop.jitter_order:
        adjust = getattr(F, f"adjust_{change}")
        picture = adjust(picture, getattr(crop, change))
    if crop.grayscale:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    if crop.blur_sigma:
        picture = picture.filter(ImageFilter.GaussianBlur(radius=crop.blur_sigma))
    if crop.solarize_threshold is not None:
        picture = F.solarize(picture, crop.solarize_threshold)
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "crop",
    [
        PLAIN,
        changed(interpolation="bilinear"),
        changed(horizontal_flip=True),
        changed(vertical_flip=True),
        changed(jitter_order=("hue", "contrast", "brightness", "saturation"), brightness=1.3,
                contrast=0.7, saturation=1.2, hue=0.08),
        changed(jitter_order=("saturation", "brightness", "hue", "contrast"), brightness=0.6,
                contrast=1.4, saturation=0.8, hue=-0.1),
        changed(grayscale=True),
        changed(blur_sigma=1.7),
        changed(solarize_threshold=128),
        changed(grayscale=True, blur_sigma=0.4, solarize_threshold=90, horizontal_flip=True),
    ],
)  # fmt: skip
def test_rendering_equals_torchvision(crop: CropParams) -> None:
    """Bit for bit, each operation alone and composed."""
    image = noise()
    (ours,) = render_crops(image, [crop])
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, oracle(Image.fromarray(image), crop))


def test_sampled_crops_render_as_torchvision_does() -> None:
    """Whole recipe, 30 images with 8 crops, bit for bit."""
    image = noise()
    for index in range(30):
        params = sample_crops(SMALL, 40, 50, crop_rng(0, 0, index))
        for ours, crop in zip(render_crops(image, params), params, strict=True):
            np.testing.assert_array_equal(ours, oracle(Image.fromarray(image), crop))


def test_non_rgb_leaves_out_what_needs_colour() -> None:
    """Grey: hue, saturation, grayscale and solarize change nothing."""
    image = noise(channels=1)
    coloured = changed(
        jitter_order=("hue", "saturation"), hue=0.1, saturation=1.2, grayscale=True,
        solarize_threshold=10,
    )  # fmt: skip
    np.testing.assert_array_equal(render_crops(image, [coloured]), render_crops(image, [PLAIN]))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_many_bands_are_rendered_one_by_one(channels: int) -> None:
    image = noise(channels=channels)
    params = sample_crops(SMALL, 40, 50, crop_rng(0, 0, 1))
    together = render_crops(image, params)
    for band in range(channels):
        for whole, alone in zip(
            together, render_crops(image[:, :, band : band + 1], params), strict=True
        ):
            np.testing.assert_array_equal(whole[band], alone[0])


def test_crops_split_along_images() -> None:
    crops = Crops(
        torch.arange(24, dtype=torch.uint8).view(2, 4, 1, 1, 3), torch.zeros(0, 4, 1, 1, 1)
    )
    parts = crops.chunk(2)
    assert [part.batch_size for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.global_crops for part in parts], 1), crops.global_crops)
    assert parts[1].local_crops.shape == (0, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="4 images cannot be split into 3"):
        crops.chunk(3)


def test_supervised_crops_are_the_first_global_crop_without_colour():
    """One crop and a flip; the same draws as the first of two global crops."""
    policy = supervised_policy((16, 24), scale=(0.2, 0.9))
    two = dataclasses.replace(policy, num_global_crops=2)
    for index in range(20):
        (crop,) = sample_crops(policy, 40, 50, crop_rng(0, 0, index))
        assert crop == sample_crops(two, 40, 50, crop_rng(0, 0, index))[0]
        assert crop.size == (16, 24)
        assert (crop.jitter_order, crop.grayscale, crop.blur_sigma) == ((), False, 0.0)
        assert crop.solarize_threshold is None
        assert 0.15 < crop.box[2] * crop.box[3] / (40 * 50) < 0.95
