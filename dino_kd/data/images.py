"""Turn any picture file into an 8-bit array [H, W, C] by one stated rule, for every data set.

The rule in full is the docstring of `decode_image`; docs/data.md repeats it for users.
"""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image

from dino_kd.data.jpeg import decode_plain_jpeg
from dino_kd.data.quiet import pillow_warnings_ignored

EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga",
))  # fmt: skip
ARRAY_EXTENSION = ".npy"
_NPY_MAGIC = b"\x93NUMPY"
_ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF orientation -> the turn that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(Exception):  # noqa: N818 - reads as what it is
    """An image that cannot be read; data sets skip it, count it and list it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both as args, so that it survives pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(source: bytes | str | os.PathLike[str], channels: int) -> np.ndarray:
    """Decode a file, or the bytes of one, to uint8 [H, W, `channels`].

    * The first frame of an animation or a multi-page file; EXIF orientation applied.
    * 16-bit levels lose their low byte (v >> 8). 32-bit integers are read as 16-bit levels
      (clipped to 0..65535, then >> 8). Floats are read as 0..1, or as 0..255 when the picture
      holds a value above 1; they are rounded and clipped, and NaN becomes 0.
    * 3 channels: grey is repeated; transparency (alpha, palette or colour-key) is laid over
      white; palettes, CMYK (Adobe's inverted JPEGs too), YCbCr, LAB and HSV are converted;
      colour profiles are not applied.
    * 1 channel: as for 3, then ITU-R 601 luma (0.299 R + 0.587 G + 0.114 B).
    * Other counts: a `.npy` array or a picture with exactly that many bands (4: RGBA, CMYK;
      2: LA), bands as they are.
    * `.npy` arrays, for every count: [H, W, channels], or [H, W] for one channel; uint8, or
      uint16 >> 8.

    Raises:
        BrokenImage: not readable: missing, truncated, not an image, too large
            (decompression bomb), or of another channel count.
    """
    name = "image" if isinstance(source, bytes) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes) else read_bytes(source)
        if data.startswith(_NPY_MAGIC):
            return _array_file(data, channels)
        plain = decode_plain_jpeg(data, channels)
        if plain is not None:
            return plain
        # A damaged EXIF block or a large picture only warns.
        with pillow_warnings_ignored(), Image.open(io.BytesIO(data)) as picture:
            return picture_to_array(picture, channels)
    except FileNotFoundError:
        raise BrokenImage(name, "the file does not exist") from None
    except Image.UnidentifiedImageError:
        reason = "the file is empty" if not data else "not an image of a known format"
        raise BrokenImage(name, reason) from None
    except Exception as error:  # on damaged bytes the decoders raise nearly any type
        raise BrokenImage(name, _reason(error)) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file. Half the time of `Path.read_bytes`, which is a third of a small image's."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.read()


def picture_to_array(picture: Image.Image, channels: int) -> np.ndarray:
    """A PIL picture as uint8 [H, W, `channels`], by the rule of `decode_image`.

    Raises whatever PIL raises for damaged files, and ValueError for another channel count.
    """
    picture.load()
    picture = _upright(picture)
    if channels == 3:
        return np.asarray(_to_rgb(picture))
    if channels == 1:
        grey = picture if picture.mode == "L" and not _is_transparent(picture) else None
        return np.asarray(grey or _to_rgb(picture).convert("L"))[..., None]
    bands = len(picture.getbands())
    if bands != channels:
        raise ValueError(f"has {bands} channels ({picture.mode}), {channels} are asked for")
    return np.asarray(picture)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels: keep them as stored
        return picture
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _is_transparent(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_eight_bit(np.asarray(picture))).convert("RGB")
    if _is_transparent(picture):
        if picture.mode == "La":  # PIL knows no direct way from premultiplied grey to RGBA
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bit(levels: np.ndarray) -> np.ndarray:
    """Grey levels of any type as uint8, by the rule of `decode_image`."""
    if levels.dtype.kind == "f":
        levels = np.nan_to_num(levels, nan=0.0, posinf=np.inf, neginf=0.0)
        scale = 255.0 if levels.max() <= 1 else 1.0
        return np.rint(np.clip(levels * scale, 0, 255)).astype(np.uint8)
    return (np.clip(levels, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _array_file(data: bytes, channels: int) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}, [height, width, {channels}] is asked for")
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"holds {array.dtype}, accepted are uint8 and uint16")
    eight_bit = array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)
    return np.ascontiguousarray(eight_bit)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to be opened safely ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
