"""Crops by a C++ kernel that is compiled here, at first use: all crops of many images in one call.

`crops.cpp` is shipped as text. The call releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from dino_kd.data.compiler import CannotCompileError, compiled
from dino_kd.data.multicrop import BatchParams, CropPolicy, render_crops, sample_batch

_IMAGE = np.dtype([("pixels", "u8"), ("height", "i8"), ("width", "i8"), ("slot", "i8")])
_CROP = np.dtype(
    [
        ("box", "i4", 4),
        ("flip_horizontal", "i4"),
        ("flip_vertical", "i4"),
        ("changes", "i4", 4),
        ("brightness", "f4"),
        ("contrast", "f4"),
        ("saturation", "f4"),
        ("hue", "i4"),
        ("grayscale", "i4"),
        ("sigma", "f4"),
        ("solarize", "i4"),
    ]
)


class NativeRenderer:
    """The compiled kernel. RGB only.

    Raises CannotCompileError when it cannot be compiled, loaded, or renders other crops.
    """

    name = "native"
    releases_gil = True

    def __init__(self) -> None:
        try:
            self._kernel = ctypes.CDLL(str(compiled("crops.cpp"))).render
        except OSError as error:  # a disk without permission to run code
            raise CannotCompileError(f"the library cannot be loaded ({error})") from None
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._kernel.argtypes = [pointer, count, pointer, pointer, pointer, pointer]
        self._kernel.restype = ctypes.c_int
        _compare_with_pillow(self)

    def __reduce__(self) -> tuple[type[NativeRenderer], tuple[()]]:
        return NativeRenderer, ()  # a loaded library cannot be pickled; worker processes load it

    def render(
        self,
        images: Sequence[np.ndarray],
        params: BatchParams,
        globals_out: np.ndarray,
        locals_out: np.ndarray,
        slots: Sequence[int],
    ) -> None:
        """See `Renderer.render`. Raises ValueError for a box or slot that lies outside."""
        pixels = [np.ascontiguousarray(image) for image in images]
        table = np.zeros(len(pixels), _IMAGE)
        for name, column in (
            ("pixels", [image.__array_interface__["data"][0] for image in pixels]),
            ("height", [image.shape[0] for image in pixels]),
            ("width", [image.shape[1] for image in pixels]),
            ("slot", slots),
        ):
            table[name] = column
        crops, recipe = _crop_table(params), _recipe(params, globals_out, locals_out)
        code = self._kernel(
            table.ctypes.data, len(pixels), crops.ctypes.data, recipe.ctypes.data,
            globals_out.ctypes.data, locals_out.ctypes.data,
        )  # fmt: skip
        if code == 1:
            raise MemoryError("no memory for the crops of an image")
        if code == 2:
            raise ValueError("a box lies outside its image, or a slot outside the batch")


def _crop_table(params: BatchParams) -> np.ndarray:
    crops = np.zeros(params.boxes.shape[:2], _CROP)
    crops["box"] = params.boxes
    crops["flip_horizontal"] = params.horizontal_flip
    crops["flip_vertical"] = params.vertical_flip
    crops["changes"] = params.colour_changes()  # the kernel has the same numbers
    for name in ("brightness", "contrast", "saturation", "grayscale", "solarize"):
        crops[name] = getattr(params, name)
    crops["hue"] = params.hue_steps()
    crops["sigma"] = params.blur_sigma
    return crops


def _recipe(params: BatchParams, globals_out: np.ndarray, locals_out: np.ndarray) -> np.ndarray:
    for buffer in (globals_out, locals_out):
        if buffer.dtype != np.uint8 or not buffer.flags.c_contiguous or buffer.shape[2] != 3:
            raise ValueError(f"buffers are contiguous uint8 [n, B, 3, h, w], not {buffer.shape}")
    policy = params.policy
    return np.array(
        [
            len(globals_out), len(locals_out), globals_out.shape[1],
            *globals_out.shape[3:], *locals_out.shape[3:],
            policy.interpolation == "bicubic", policy.solarize_threshold,
        ],
        dtype=np.int64,
    )  # fmt: skip


def _compare_with_pillow(renderer: NativeRenderer) -> None:
    """A millisecond against compilers that nobody has tried: crops of a small picture agree."""
    policy = CropPolicy(global_size=(24, 20), local_size=(12, 12), num_local_crops=4)
    down, across = np.mgrid[0:40, 0:36]
    picture = np.stack([3 * down, 7 * across, 255 - 4 * down - across], axis=2).astype(np.uint8)
    params = sample_batch(policy, [picture.shape[:2]], 0, 0, [0])
    globals_out, locals_out = (
        np.zeros((2, 1, 3, 24, 20), np.uint8),
        np.zeros((4, 1, 3, 12, 12), np.uint8),
    )
    renderer.render([picture], params, globals_out, locals_out, [0])
    ours = [*globals_out[:, 0], *locals_out[:, 0]]
    for mine, reference in zip(ours, render_crops(picture, params.crops_of(0)), strict=True):
        if np.square(mine.astype(np.float64) - reference).mean() > 4:
            raise CannotCompileError("its crops differ from Pillow's; the compiler may be at fault")
