"""Each colour mode against hand-computed values; orientation against the EXIF table."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_kd.data.images import BrokenImage, decode_image


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def pixel(picture: Image.Image, channels: int = 3, kind: str = "PNG", **options: Any) -> list[int]:
    return decode_image(encode(picture, kind, **options), channels)[0, 0].tolist()


def one(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (3, 2), value)


def test_rgb_passes_unchanged() -> None:
    """A lossless file gives back the array it was made from."""
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = decode_image(encode(Image.fromarray(array)), 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
    [
        (one("L", 77), "PNG", [77, 77, 77]),
        (one("1", 1), "PNG", [255, 255, 255]),
        (one("LA", (100, 0)), "PNG", [255, 255, 255]),
        (one("LA", (100, 255)), "PNG", [100, 100, 100]),
        (one("RGBA", (200, 0, 100, 0)), "PNG", [255, 255, 255]),
        (one("RGBA", (200, 0, 100, 255)), "PNG", [200, 0, 100]),
        # 0.2 of the colour, 0.8 of white: 200*.2+204=244, 0+204=204, 100*.2+204=224
        (one("RGBA", (200, 0, 100, 51)), "PNG", [244, 204, 224]),
        # naive inverse: 255 * (1 - C)(1 - K) with K = 0
        (one("CMYK", (255, 0, 55, 0)), "TIFF", [0, 255, 200]),
        (one("YCbCr", (120, 128, 128)), "TIFF", [120, 120, 120]),
        (one("LAB", (255, 128, 128)), "TIFF", [255, 255, 255]),
        (one("I;16", 0xABCD), "PNG", [0xAB] * 3),
        (one("I;16", 255), "TIFF", [0] * 3),
        (one("I", 0x1234), "TIFF", [0x12] * 3),
        (one("I", 70000), "TIFF", [255] * 3),
        (one("I", -5), "TIFF", [0] * 3),
        (one("F", 0.5), "TIFF", [128] * 3),
        (one("F", 1.0), "TIFF", [255] * 3),
        (one("F", 99.6), "TIFF", [100] * 3),
        (one("F", 1000.0), "TIFF", [255] * 3),
        (one("F", -3.0), "TIFF", [0] * 3),
        (one("F", float("nan")), "TIFF", [0] * 3),
    ],
)
def test_every_mode_becomes_rgb(picture: Image.Image, kind: str, expected: list[int]) -> None:
    """Hand-computed values of the rule in decode_image's docstring."""
    found = pixel(picture, kind=kind)
    tolerance = 1 if picture.mode == "LAB" else 0  # a colour-management library computes this one
    assert np.abs(np.array(found) - expected).max() <= tolerance


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    """A PNG written by hand: one pixel of 16-bit RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFEDC)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row))
    assert decode_image(data + chunk(b"IEND", b""), 3)[0, 0].tolist() == [0x12, 0x80, 0xFE]


def test_hsv_and_premultiplied_modes_are_converted() -> None:
    """Modes that no file format keeps: red in HSV, half-covered red stored premultiplied."""
    from dino_kd.data.images import picture_to_array

    assert picture_to_array(one("HSV", (0, 255, 255)), 3)[0, 0].tolist() == [255, 0, 0]
    assert picture_to_array(one("RGBa", (51, 0, 0, 51)), 3)[0, 0].tolist() == [255, 204, 204]
    assert picture_to_array(one("La", (51, 51)), 3)[0, 0].tolist() == [255, 255, 255]


def test_palette_gives_its_colours_and_transparent_entries_give_white() -> None:
    """Two palette entries, the second one transparent."""
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    plain = decode_image(encode(picture), 3)
    assert plain[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    for transparency in (1, bytes([255, 0])):
        seen = decode_image(encode(picture, transparency=transparency), 3)
        assert seen[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_colour_key_transparency_becomes_white() -> None:
    """PNG's tRNS chunk for RGB and grey pictures."""
    assert pixel(one("RGB", (1, 2, 3)), transparency=(1, 2, 3)) == [255, 255, 255]
    assert pixel(one("L", 9), channels=1, transparency=9) == [255]


def test_adobe_cmyk_jpeg_is_not_inverted() -> None:
    """PIL writes the Adobe marker and inverted values; a light picture must stay light."""
    found = pixel(one("CMYK", (0, 0, 0, 20)), kind="JPEG", quality=100)
    assert np.abs(np.array(found) - 235).max() <= 3


def test_grey_is_luma() -> None:
    """0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2"""
    assert pixel(one("RGB", (200, 100, 50)), channels=1) == [124]
    assert pixel(one("L", 61), channels=1) == [61]
    assert pixel(one("I;16", 0x3FFF), channels=1) == [0x3F]


def test_animation_gives_its_first_frame() -> None:
    """A GIF and a WebP of a dark, then a bright frame."""
    frames = [one("RGB", (10, 10, 10)), one("RGB", (250, 250, 250))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data, 3)[0, 0].tolist() == [10, 10, 10]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    """The stored array is made from the upright one by the EXIF table, in numpy."""
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[:8, :8], upright[8:, :8] = 250, 120  # all four corners differ enough to tell
    upright[:8, 16:] = 60
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],  # the top row is the right side of the picture
        7: upright[::-1, ::-1].T,
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    decoded = decode_image(encode(picture, kind, exif=exif, **options), 1)[..., 0]
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= 3


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(
        one("RGB", (9, 9, 9)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"z" * 9
    )
    assert decode_image(data, 3).shape == (2, 3, 3)


def test_other_channel_counts_take_matching_bands_as_they_are() -> None:
    assert pixel(one("RGBA", (1, 2, 3, 4)), channels=4) == [1, 2, 3, 4]
    assert pixel(one("CMYK", (1, 2, 3, 4)), channels=4, kind="TIFF") == [1, 2, 3, 4]
    assert pixel(one("LA", (7, 8)), channels=2) == [7, 8]
    with pytest.raises(BrokenImage, match=r"has 3 channels \(RGB\), 5 are asked for"):
        pixel(one("RGB", (1, 2, 3)), channels=5)


def test_npy_arrays(tmp_path: Path) -> None:
    """uint8 as it is, uint16 >> 8, [H, W] for one channel; anything else is refused by name."""
    array = np.arange(2 * 3 * 6, dtype=np.uint8).reshape(2, 3, 6)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.npy", 6), array)
    np.save(tmp_path / "b.npy", array.astype(np.uint16) * 256 + 255)
    np.testing.assert_array_equal(decode_image(str(tmp_path / "b.npy"), 6), array)
    np.save(tmp_path / "c.npy", array[..., 0])
    assert decode_image(tmp_path / "c.npy", 1).shape == (2, 3, 1)
    np.save(tmp_path / "d.npy", array.astype(np.float32))
    with pytest.raises(BrokenImage, match="float32, accepted are uint8 and uint16"):
        decode_image(tmp_path / "d.npy", 6)
    with pytest.raises(BrokenImage, match=r"\[height, width, 3\] is asked for"):
        decode_image(tmp_path / "a.npy", 3)
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenImage):
        decode_image(tmp_path / "e.npy", 3)


def test_broken_files_name_path_and_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), "JPEG")
    cases = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut.png": (encode(Image.fromarray(noise))[:2000], "."),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"hello", "not an image"),
        "cut.npy": (b"\x93NUMPY\x01", "."),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenImage, match=reason) as caught:
            decode_image(tmp_path / name, 3)
        assert caught.value.path == str(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(BrokenImage, match="does not exist"):
        decode_image(tmp_path / "missing.jpg", 3)
    with pytest.raises(BrokenImage):
        decode_image(tmp_path, 3)


def test_bomb_warning_passes_and_bomb_error_is_a_broken_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PIL warns above its limit and refuses above twice the limit."""
    data = encode(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, 3).shape == (10, 10, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(BrokenImage, match="too large"):
        decode_image(data, 3)


def test_broken_image_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(BrokenImage("a.jpg", "cut")))
    assert (again.path, again.reason) == ("a.jpg", "cut")
