"""The back-ends that cut and colour crops, behind one interface.

Drawing the parameters (`sample_batch`) and rendering them are apart: every back-end renders the
same crops, and differs from the Pillow one, the reference, by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from dino_kd.data.compiler import CannotCompileError
from dino_kd.data.device_crops import DeviceRenderer
from dino_kd.data.multicrop import BatchParams, render_crops, sample_batch
from dino_kd.data.native import NativeRenderer
from dino_kd.data.torch_crops import TorchRenderer
from dino_kd.errors import ConfigError, unknown_name

__all__ = [
    "RENDERERS",
    "BatchParams",
    "DeviceRenderer",
    "PillowRenderer",
    "Renderer",
    "make_renderer",
    "sample_batch",
]

RENDERERS = ("auto", "native", "torch", "pillow", "device")


class Renderer(Protocol):
    """Renders the crops of some images into the buffers of a batch.

    Attributes:
        name: "native", "torch", "pillow" or "device"; what "auto" came to.
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


class RgbRenderer:
    """A back-end for three channels; Pillow renders all other images."""

    def __init__(self, rgb: Renderer) -> None:
        self.rgb, self.other = rgb, PillowRenderer()
        self.name, self.releases_gil = rgb.name, rgb.releases_gil

    def render(
        self,
        images: Sequence[np.ndarray],
        params: BatchParams,
        globals_out: np.ndarray,
        locals_out: np.ndarray,
        slots: Sequence[int],
    ) -> None:
        """See `Renderer.render`."""
        is_rgb = globals_out.shape[2] == 3
        (self.rgb if is_rgb else self.other).render(images, params, globals_out, locals_out, slots)


def describe_renderer(renderer: Renderer) -> str:
    """Its name and, for pixels that depend on it, its device: "native", "device NVIDIA H200"."""
    if not isinstance(renderer, DeviceRenderer):
        return renderer.name
    device = renderer.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{renderer.name} {kind}"


def make_renderer(
    name: str = "auto",
    note: Callable[[str], None] | None = None,
    device: torch.device | str = "cpu",
    *,
    compiled: bool = False,
) -> Renderer:
    """The back-end of that name.

    Args:
        name: One of `RENDERERS`; auto: native where it compiles (seconds, the first time on a
            machine), else torch; never device, whose speed nobody has measured on a GPU.
        note: Is told, in a sentence, why auto did not come to native, or device will be slow.
        device: Where the renderer called device renders.
        compiled: Whether it fuses colour changes by torch.compile.

    Raises:
        ConfigError: an unknown name, or native, asked for by name, does not compile here.
    """
    if name not in RENDERERS:
        raise unknown_name("renderer", name, RENDERERS, "data.renderer")
    if name == "pillow":
        return PillowRenderer()
    if name == "device":
        if torch.device(device).type == "mps":
            raise ConfigError(
                "data.renderer=device does not work on MPS, which has no float64; use "
                "data.renderer=auto"
            )
        if note is not None and torch.device(device).type == "cpu":
            note("data.renderer=device is meant for GPUs; on a CPU auto is many times as fast")
        return DeviceRenderer(device, compiled=compiled)
    if name != "torch":
        try:
            return RgbRenderer(NativeRenderer())
        except CannotCompileError as error:
            if name == "native":
                raise ConfigError(
                    f"data.renderer=native does not work here: {error}. Install g++ or clang++ "
                    "(or name one in the environment variable CXX), or use data.renderer=auto"
                ) from None
            if note is not None:
                note(f"crops are rendered by torch, the native renderer is not usable: {error}")
    return RgbRenderer(TorchRenderer())
