"""Crops without a compiler: torch resizes, Pillow does the rest.

torch's antialiased filter on bytes is Pillow's, five times faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from dino_kd.data.multicrop import BatchParams, CropParams, colour_crop


class TorchRenderer:
    """Resizes by `torch.nn.functional.interpolate`. RGB only."""

    name = "torch"
    releases_gil = False  # most operations do; the many calls between them do not

    def render(
        self,
        images: Sequence[np.ndarray],
        params: BatchParams,
        globals_out: np.ndarray,
        locals_out: np.ndarray,
        slots: Sequence[int],
    ) -> None:
        """See `Renderer.render`."""
        for row, (image, slot) in enumerate(zip(images, slots, strict=True)):
            for number, crop in enumerate(params.crops_of(row)):
                place = number - len(globals_out)
                made = _resized(image, crop)
                if crop.changes_colour:
                    made = np.asarray(colour_crop(Image.fromarray(made), crop))
                group, place = (globals_out, number) if place < 0 else (locals_out, place)
                group[place, slot] = made.transpose(2, 0, 1)


def _resized(image: np.ndarray, crop: CropParams) -> np.ndarray:
    """Cut, resize and flip: uint8 [h, w, 3]."""
    top, left, height, width = crop.box
    cut = image[top : top + height, left : left + width]
    if not cut.flags.writeable or min(cut.strides) < 0:  # torch takes neither
        cut = cut.copy()
    box = torch.from_numpy(cut)
    # As a view with the channels last: the copy that `contiguous` makes would cost half the gain.
    made = F.interpolate(
        box.permute(2, 0, 1)[None], crop.size, mode=crop.interpolation, antialias=True
    )[0].permute(1, 2, 0).numpy()  # fmt: skip
    if crop.horizontal_flip:
        made = made[:, ::-1]
    return made[::-1] if crop.vertical_flip else made
