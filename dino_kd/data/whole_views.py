"""Views that keep the whole image, for retrieval and video: nothing is cut away but a remainder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Stretch:
    """Resize to exactly `size` (height, width) in pixels; the aspect ratio is not kept."""

    size: tuple[int, int]
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] to uint8 [C, h, w]."""
        return _resize(image, self.size, self.interpolation).transpose(2, 0, 1)


@dataclass(frozen=True)
class FitWithin:
    """Shrink until the longer side is `side` pixels; smaller images stay as they are.

    The aspect ratio is kept. The rows below and the columns right of the last whole `multiple` are
    cut off; an image with a side shorter than `multiple` is stretched to it.
    """

    side: int
    multiple: int = 1
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] to uint8 [C, h, w]."""
        scale = min(1.0, self.side / max(image.shape[:2]))
        height, width = (max(self.multiple, round(n * scale)) for n in image.shape[:2])
        resized = _resize(image, (height, width), self.interpolation)
        height, width = (n - n % self.multiple for n in (height, width))
        return np.ascontiguousarray(resized[:height, :width]).transpose(2, 0, 1)


def frame_size(height: int, width: int, short_side: int, patch: int | None) -> tuple[int, int]:
    """(height, width) in pixels that a video's frames are resized to.

    The shorter side becomes the multiple of the patch next to `short_side`. The longer one keeps
    the aspect ratio, rounded down to a multiple of 64 where the patch divides 64 (and for networks
    without patches), else of the patch: what DINO's evaluation does with 480 px.
    """
    patch = patch or 1
    short = max(patch, round(short_side / patch) * patch)
    scaled = short * max(height, width) / min(height, width)
    step = 64 if 64 % patch == 0 and scaled >= 64 else patch
    long = max(step, int(scaled // step) * step)
    return (short, long) if height <= width else (long, short)


def _resize(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 [H, W, C] to uint8 [h, w, C], antialiased."""
    if image.shape[:2] == size:
        return image
    resample = Image.Resampling[interpolation.upper()]

    def resize(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))

    if image.shape[2] == 3:
        return resize(image)
    bands = [resize(np.ascontiguousarray(image[:, :, c])) for c in range(image.shape[2])]
    return np.stack(bands, axis=2)
