"""The fast JPEG decoder against Pillow: the same pixels, the same refusals, or no answer."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_kd.data import images, jpeg
from dino_kd.data.images import BrokenImage, decode_image
from dino_kd.data.jpeg import decode_plain_jpeg

pytest.importorskip("simplejpeg")


def picture(height: int = 41, width: int = 53) -> Image.Image:
    """Smooth colours with some noise."""
    coarse = np.random.default_rng(height).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(1).integers(0, 30, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(data: bytes, channels: int) -> np.ndarray | str:
    """What `decode_image` gives without the fast decoder: pixels, or the refusal."""
    return outcome(data, channels, lambda *_: None)


def outcome(data: bytes, channels: int, decoder: Any = decode_plain_jpeg) -> np.ndarray | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "decode_plain_jpeg", decoder)
        try:
            return decode_image(data, channels)
        except BrokenImage as error:
            return str(error)


def assert_same(ours: np.ndarray | str, theirs: np.ndarray | str) -> None:
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
    else:
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(32, 32), (41, 53), (1, 1), (8, 200)])
@pytest.mark.parametrize(
    "options",
    [{"quality": 95}, {"quality": 30}, {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2},
     {"optimize": True}, {"keep_rgb": True}, {"dpi": (72, 72)}, {"comment": b"a" * 300},
     {"icc_profile": b"p" * 500}, {"restart_marker_rows": 1}],
    ids=str,
)  # fmt: skip
def test_plain_files_give_pillows_pixels(size: tuple[int, int], options: dict[str, Any]) -> None:
    data = encode(picture(*size), **options)
    fast = decode_plain_jpeg(data, 3)
    assert fast is not None
    assert fast.shape == (*size, 3)
    assert_same(fast, by_pillow(data, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_files(channels: int) -> None:
    data = encode(picture().convert("L"))
    fast = decode_plain_jpeg(data, channels)
    assert fast is not None
    assert_same(fast, by_pillow(data, channels))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("data", "channels"),
    [
        (encode(picture(), progressive=True), 3),
        (encode(picture(), exif=exif(6)), 3),
        (encode(picture(), exif=exif(1)), 3),
        (encode(picture(), xmp=b"<tiff:Orientation>6</tiff:Orientation>"), 3),
        (encode(picture().convert("CMYK")), 3),
        (encode(picture().convert("CMYK")), 4),
        (encode(picture()), 1),  # luma is Pillow's
        (encode(picture()), 4),
        (encode(picture()).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), 3),
        (b"", 3),
        (b"\xff\xd8", 3),
        (b"\xff\xd8\xff\xe0", 3),
        (b"\x89PNG" + bytes(40), 3),
    ],
)
def test_anything_else_is_left_to_pillow(data: bytes, channels: int) -> None:
    assert decode_plain_jpeg(data, channels) is None
    assert_same(outcome(data, channels), by_pillow(data, channels))


def test_a_file_of_several_pictures_is_left_to_pillow() -> None:
    file = io.BytesIO()
    picture().save(file, "MPO", save_all=True, append_images=[picture(20, 20)])
    assert decode_plain_jpeg(file.getvalue(), 3) is None
    assert_same(outcome(file.getvalue(), 3), by_pillow(file.getvalue(), 3))


def test_truncated_files_are_refused_as_ever() -> None:
    """Cut anywhere, the last byte alone included."""
    data = encode(picture(24, 24))
    for length in range(2, len(data), 7):
        assert decode_plain_jpeg(data[:length], 3) is None
        assert_same(outcome(data[:length], 3), by_pillow(data[:length], 3))
    for length in range(len(data) - 9, len(data)):
        assert_same(outcome(data[:length], 3), by_pillow(data[:length], 3))
    assert isinstance(outcome(data[: len(data) // 2], 3), str)


def test_damaged_files_are_accepted_or_refused_as_ever() -> None:
    """1,500 times one to twenty wrong bytes: the same pixels, or the same refusal."""
    rng = np.random.default_rng(0)
    data = encode(picture(24, 24))
    answered = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.choice([1, 1, 3, 20])):
            damaged[place] = rng.integers(256)
        answered += decode_plain_jpeg(bytes(damaged), 3) is not None
        assert_same(outcome(bytes(damaged), 3), by_pillow(bytes(damaged), 3))
    assert answered > 100  # the comparison has been one


def test_large_pictures_meet_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    assert decode_plain_jpeg(data, 3) is None
    with pytest.raises(BrokenImage, match="too large"):
        decode_image(data, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_plain_jpeg(data, 3) is not None


def test_without_the_library_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    data = encode(picture())
    assert decode_plain_jpeg(data, 3) is None
    assert decode_image(data, 3).shape == (41, 53, 3)
