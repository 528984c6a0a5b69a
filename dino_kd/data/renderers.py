"""The back-ends that cut and colour crops, behind one interface.

Drawing the parameters (`sample_batch`) and rendering them are apart: every back-end renders the
same crops, and differs from the Pillow one, the reference, by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dino_kd.data.multicrop import BatchParams, render_crops, sample_batch
from dino_kd.errors import ConfigError

__all__ = [
    "RENDERERS",
    "BatchParams",
    "PillowRenderer",
    "Renderer",
    "make_renderer",
    "sample_batch",
]

RENDERERS = ("auto", "native", "torch", "pillow")


class Renderer(Protocol):
    """Renders the crops of some images into the buffers of a batch.

    Attributes:
        name: "native", "torch" or "pillow"; what "auto" came to.
        releases_gil: Whether threads of one process render side by side.
    """

    name: str
    releases_gil: bool

    def render(
        self,
        images: Sequence[np.ndarray],
        params: BatchParams,
        globals_out: np.ndarray,
        locals_out: np.ndarray,
        slots: Sequence[int],
    ) -> None:
        """Write image i, by row i of `params`, into place ``slots[i]`` of the batch.

        Args:
            images: uint8 [H, W, C] each, of any size, C as the buffers'.
            params: One row per image.
            globals_out: uint8 [G, B, C, h, w], contiguous.
            locals_out: uint8 [L, B, C, h, w], contiguous; L may be 0.
            slots: Places 0..B-1, one per image, all different.
        """


class PillowRenderer:
    """The reference: Pillow, one operation after the other. Any number of channels."""

    name = "pillow"
    releases_gil = False  # most operations do; the calls between them do not

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
            for number, crop in enumerate(render_crops(image, params.crops_of(row))):
                place = number - len(globals_out)
                if place < 0:
                    globals_out[number, slot] = crop
                else:
                    locals_out[place, slot] = crop


def make_renderer(name: str = "auto") -> Renderer:
    """The back-end of that name; auto: the fastest that works here.

    Raises ConfigError for an unknown name, or for one that cannot work on this machine.
    """
    if name not in RENDERERS:
        raise ConfigError(f"no renderer {name!r}; accepted are {', '.join(RENDERERS)}")
    return PillowRenderer()
