"""Plain JPEG files, decoded by simplejpeg where it is installed: several times faster when small.

It carries the library that Pillow carries (libjpeg-turbo), without the checks that Pillow does in
Python. So all that needs Pillow's judgement is left to Pillow: `images.decode_image`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

_START = b"\xff\xd8"
_BASELINE, _SCAN = 0xC0, 0xDA
# Tables, restart interval, JFIF, colour profile, Photoshop, Adobe, comment: nothing that changes
# pixels. APP1 may hold an orientation.
_HARMLESS = frozenset((0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xED, 0xEE, 0xFE))
_SEVERAL_PICTURES = (0xE2, b"MPF\0")


def decode_plain_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """A baseline JPEG of 8 bits, grey or with three bands: uint8 [H, W, `channels`].

    None for all else, and for files with anything unusual: turned by EXIF, CMYK, progressive,
    truncated, damaged, too large. Those are Pillow's to accept or refuse.
    """
    if simplejpeg is None:
        return None
    bands = _plain_bands(data)
    if bands == 0 or channels not in (1, 3) or bands > channels:
        return None
    try:
        # strict: a warning of the library is an error
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", strict=True)
    except Exception:  # Pillow finds the words
        return None


def _plain_bands(data: bytes) -> int:
    """1 or 3 when all segments before the picture's data are as they mostly are; else 0."""
    if not data.startswith(_START):
        return 0
    place, bands = 2, 0
    while place + 12 < len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if kind == _SCAN:
            return bands
        if kind == _BASELINE and not bands:
            bands = _frame(data[place + 4 : place + 2 + length])
            if not bands:
                return 0
        elif kind not in _HARMLESS or (kind, data[place + 4 : place + 8]) == _SEVERAL_PICTURES:
            return 0
        place += 2 + length
    return 0


def _frame(segment: bytes) -> int:
    """Bands of a frame that may be decoded: 8 bits, 1 or 3 bands, not suspiciously large."""
    if len(segment) < 6:
        return 0
    precision, bands = segment[0], segment[5]
    pixels = (segment[1] << 8 | segment[2]) * (segment[3] << 8 | segment[4])
    fits = 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels)
    return bands if precision == 8 and bands in (1, 3) and fits else 0
