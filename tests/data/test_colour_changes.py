"""Colour changes of many crops at once, in bytes and in tensors, against Pillow crop by crop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from dino_kd.data import byte_colour, torch_colour
from dino_kd.data.colour_steps import box_widths, colour_steps
from dino_kd.data.multicrop import COLOUR_CHANGES, CropPolicy, sample_batch


@dataclasses.dataclass(frozen=True)
class BackEnd:
    """One implementation, and how far from Pillow's its results on random colours may be.

    Shares of bands that are a level off for blends and hue, a mean squared error for blur
    (neighbours that have nothing to do with each other are the worst case of a rounded weight).
    """

    name: str
    blended: float
    turned: float
    blurred: float

    def change(
        self, name: str, crops: np.ndarray, *amounts: object, constants: tuple[int, ...] = ()
    ) -> np.ndarray:
        """The changed crops; the given ones stay."""
        numbers = [np.asarray(amount, dtype=np.float32) for amount in amounts]
        if self.name == "bytes":
            made = crops.copy()
            byte_colour.CHANGES[name](*constants, *numbers, made)
            return made
        tensor = torch.from_numpy(crops).float()
        torch_colour.CHANGES[name](*constants, *map(torch.from_numpy, numbers), tensor)
        assert torch.equal(tensor, tensor.byte().float()), "no whole levels"
        return tensor.byte().numpy()


TENSORS = BackEnd("tensors", blended=0.002, turned=0.01, blurred=0.01)
BYTES = BackEnd("bytes", blended=0.12, turned=0.25, blurred=1.6)


@pytest.fixture(params=[BYTES, TENSORS], ids=lambda each: each.name)
def back_end(request: pytest.FixtureRequest) -> BackEnd:
    return request.param


def every_colour() -> np.ndarray:
    """Two crops that hold 2 x 4,096 random colours, greys and the pure colours among them."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    levels[0, :, :4] = np.arange(256).reshape(1, 4, 64)  # greys
    levels[1, :, :2] = np.where(levels[1, :, :2] > 127, 255, 0)  # corners of the cube
    levels[1, 0, 4:8] = 0
    return levels


def pictures(crops: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(crop.transpose(1, 2, 0).copy()) for crop in crops]


def difference(crops: np.ndarray, expected: list[Image.Image]) -> np.ndarray:
    theirs = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in expected])
    return np.abs(crops.astype(int) - theirs)


@pytest.mark.parametrize("factors", [(0.6, 1.37), (0.0, 2.5), (1.001, 0.93)])
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_blends_are_pillows_up_to_a_level(back_end, name, enhancer, factors) -> None:  # type: ignore[no-untyped-def]
    crops = every_colour()
    expected = [
        enhancer(picture).enhance(factor)
        for picture, factor in zip(pictures(crops), factors, strict=True)
    ]
    error = difference(back_end.change(name, crops, factors), expected)
    assert error.max() <= (1 if max(factors) < 2 else 2)
    assert (error > 0).mean() < back_end.blended


def test_contrast_of_a_very_large_crop() -> None:
    """Its grey levels sum to more than 32 bits hold."""
    crops = np.full((1, 3, 3000, 3000), 240, np.uint8)
    crops[..., ::2] = 250
    made = BYTES.change("contrast", crops, [0.5])
    assert sorted(np.unique(made)) == [242, 247]


def test_a_factor_beyond_all_sense_still_cuts_off(back_end: BackEnd) -> None:
    """A blend by 1000: black stays, and what is bright enough is white."""
    crops = np.zeros((1, 3, 2, 4), np.uint8)
    crops[0, :, 0] = 200
    made = back_end.change("brightness", crops, [1000.0])
    assert (made[0, :, 0] == 255).all()
    assert (made[0, :, 1] == 0).all()


@pytest.mark.parametrize("steps", [(0, 1), (25, 231), (128, 255)])
def test_hue_is_pillows_up_to_a_step_of_the_circle(
    back_end: BackEnd, steps: tuple[int, int]
) -> None:
    """A step of 1/255 of the circle moves a band by 6 levels at most."""
    crops = every_colour()
    same = list(range(256))
    expected = [
        picture.convert("HSV").point([(v + step) % 256 for v in same] + same + same).convert("RGB")
        for picture, step in zip(pictures(crops), steps, strict=True)
    ]
    error = difference(back_end.change("hue", crops, steps), expected)
    assert error.max() <= 6
    assert (error > 1).mean() < 0.01
    assert (error > 0).mean() < back_end.turned


def test_grey_is_pillows(back_end: BackEnd) -> None:
    """Eight bits of a share put a saturated colour on the other side of a half now and then."""
    crops = every_colour()
    expected = [picture.convert("L").convert("RGB") for picture in pictures(crops)]
    error = difference(back_end.change("grayscale", crops), expected)
    if back_end is TENSORS:
        assert error.max() == 0
    assert error.max() <= 1
    assert (error > 0).mean() < 0.2
    assert error[0, :, :4].max() == 0, "a grey changed"


def test_solarize_is_exact(back_end: BackEnd) -> None:
    crops = every_colour()
    for threshold in (0, 1, 128, 255):
        table = [v if v < threshold else 255 - v for v in range(256)]
        expected = [picture.point(table * 3) for picture in pictures(crops)]
        made = back_end.change("solarize", crops, constants=(threshold,))
        assert difference(made, expected).max() == 0


@pytest.mark.parametrize("sigma", [0.1, 0.53, 1.3, 1.53, 1.97, 2.57, 7.03, 40.3])
def test_blur_is_pillows_up_to_rounding(back_end: BackEnd, sigma: float) -> None:
    """Odd sigmas: with round ones many sums end in exactly one half, and either level is right.

    Edges are in it, and crops that are smaller than the filter.
    """
    for crops in (every_colour(), every_colour()[:, :, :5, :2].copy()):
        expected = [p.filter(ImageFilter.GaussianBlur(sigma)) for p in pictures(crops)]
        ((whole, _, inner, outer),) = box_widths(np.array([sigma] * 2))
        made = back_end.change("box_blur", crops, inner, outer, constants=(whole,))
        error = difference(made, expected)
        assert error.max() <= 4
        assert np.square(error).mean() < back_end.blurred
        if crops.size > 1000:
            theirs = np.mean([np.asarray(picture).mean() for picture in expected])
            assert abs(made.mean() - theirs) < 0.05, "darker or brighter"


def test_a_crop_is_changed_as_it_would_be_alone(back_end: BackEnd) -> None:
    """Bits and kernels are chosen for each crop, whoever shares its batch."""
    crops = np.concatenate([every_colour(), every_colour()[:, ::-1]])
    factors = np.array([0.1, 1.003, 1.4, 0.97])
    sigmas = np.array([0.1, 1.4, 0.8, 0.3])
    ((whole, _, inner, outer),) = box_widths(sigmas)
    assert whole == 0
    for name, amounts, constants in (
        ("brightness", (factors,), ()),
        ("contrast", (factors,), ()),
        ("saturation", (factors,), ()),
        ("hue", (np.array([3, 250, 100, 0]),), ()),
        ("box_blur", (inner, outer), (0,)),
    ):
        together = back_end.change(name, crops, *amounts, constants=constants)
        for row in range(4):
            one = slice(row, row + 1)
            alone = back_end.change(
                name, crops[one].copy(), *(a[one] for a in amounts), constants=constants
            )
            np.testing.assert_array_equal(together[one], alone)


def test_steps_keep_the_order_of_each_crop() -> None:
    """Whatever is done to a crop, read from the steps, is what the parameters say, in order."""
    policy = CropPolicy(global_size=(8, 8), num_local_crops=3, local_size=(8, 8))
    params = sample_batch(policy, [(20, 20)] * 9, 4, 0, range(9))
    rows, numbers = (each.ravel() for each in np.indices((9, 5)))
    done: list[list[tuple[str, float]]] = [[] for _ in rows]
    for step in colour_steps(params, (rows, numbers)):
        assert len(np.unique(step.crops)) == len(step.crops)
        for place, crop in enumerate(step.crops.tolist()):
            done[crop].append((step.change, step.amounts[0][place] if step.amounts else 0.0))
    for crop, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        expected = params.crops_of(row)[number]
        names = [name for name, _ in done[crop] if name in COLOUR_CHANGES]
        assert tuple(names) == expected.jitter_order
        if names:
            amounts = dict(done[crop])
            for name in ("brightness", "contrast", "saturation"):
                assert amounts[name] == getattr(expected, name)
            assert amounts["hue"] == int(expected.hue * 255) % 256
        rest = [name for name, _ in done[crop][len(names) :]]
        wanted = ["grayscale"] * expected.grayscale + ["box_blur"] * (expected.blur_sigma > 0)
        assert rest == wanted + ["solarize"] * (expected.solarize_threshold is not None)
