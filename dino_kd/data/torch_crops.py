"""Crops without a compiler: torch resizes one by one, and many are coloured together.

torch's antialiased filter on bytes is Pillow's, five times faster. Colours are `byte_colour`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from dino_kd.data import byte_colour
from dino_kd.data.colour_steps import colour_steps
from dino_kd.data.multicrop import BatchParams

_TOGETHER = 2**20  # numbers coloured in one go: they should stay in the processor's cache


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
        places = np.asarray(slots, dtype=np.int64)
        for group, begin in ((globals_out, 0), (locals_out, len(globals_out))):
            if not group.size:
                continue
            if not group.flags.c_contiguous:  # the view that is coloured would be a copy
                raise ValueError(f"buffers are contiguous, this one has strides {group.strides}")
            columns = range(begin, begin + len(group))
            for row, image in enumerate(images):
                for column in columns:
                    group[column - begin, places[row]] = _resized(
                        image, params, row, column, group.shape[3:]
                    )
            _colour(group, params, columns, places)


def _resized(
    image: np.ndarray, params: BatchParams, row: int, column: int, size: tuple[int, ...]
) -> np.ndarray:
    """One crop cut, resized and flipped: uint8 [3, h, w]."""
    top, left, height, width = params.boxes[row, column].tolist()
    cut = image[top : top + height, left : left + width]
    if not cut.flags.writeable or min(cut.strides) < 0:  # torch takes neither
        cut = cut.copy()
    # As a view with the channels last: the copy that `contiguous` makes would cost half the gain.
    bands = torch.from_numpy(cut).permute(2, 0, 1)[None]
    filter_ = params.policy.interpolation
    made: np.ndarray = F.interpolate(bands, size, mode=filter_, antialias=True)[0].numpy()
    if params.horizontal_flip[row, column]:
        made = made[:, :, ::-1]
    return made[:, ::-1] if params.vertical_flip[row, column] else made


def _colour(group: np.ndarray, params: BatchParams, columns: range, places: np.ndarray) -> None:
    """Change the crops of `columns` in place, as many together as the cache holds."""
    chosen = slice(columns.start, columns.stop)
    rest = params.grayscale | (params.blur_sigma > 0) | params.solarize
    changed = (params.colour_changes().any(-1) | rest)[:, chosen]
    rows, numbers = np.nonzero(changed)
    flat = group.reshape(-1, group[0, 0].size)  # a view; numpy copies whole rows fast
    together = max(1, _TOGETHER // group[0, 0].size)
    for begin in range(0, len(rows), together):
        row, number = rows[begin : begin + together], numbers[begin : begin + together]
        at = number * group.shape[1] + places[row]
        for step in colour_steps(params, (row, number + columns.start)):
            some = flat[at[step.crops]].reshape(-1, *group.shape[2:])
            byte_colour.CHANGES[step.change](*step.constants, *step.amounts, some)
            flat[at[step.crops]] = some.reshape(len(some), -1)
