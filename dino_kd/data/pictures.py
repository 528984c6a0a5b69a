"""Contact sheets, so that a person can judge crops and attention maps by eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_kd.data.multicrop import Crops
from dino_kd.files import write_atomic

_SHOWN_SIDE = 112  # crops smaller than this are enlarged by a whole number, pixel by pixel
_GAP = 8
_TEXT_HEIGHT = 22
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


def save_crop_picture(crops: Crops, path: str | Path, max_images: int = 8) -> None:
    """Write a PNG: one row per image, its global crops and then its local ones, labelled.

    Global and local crops are enlarged alike. Three channels are shown as RGB, one or two as
    grey (the first band), more by their first three bands. Raises UserError when the disk is full.
    """
    groups = [("global", crops.global_crops), ("local", crops.local_crops)]
    columns = [
        (f"{name} {number + 1}", list(group[number, :max_images].cpu().numpy()))
        for name, group in groups
        for number in range(len(group))
    ]
    save_contact_sheet(columns, path)


def save_contact_sheet(
    columns: Sequence[tuple[str, Sequence[np.ndarray]]], path: str | Path, *, row: str = "image"
) -> None:
    """Write a PNG of labelled columns, one row per image.

    Args:
        columns: a title and one picture uint8 ``[C, h, w]`` for every row; sizes may differ
            between columns. All are enlarged by the same whole number when they are small.
        path: where to.
        row: what a row is called; its number follows.

    Raises:
        UserError: the disk is full.
    """
    rows = len(columns[0][1])
    factor = max(1, round(_SHOWN_SIDE / max(max(p[0].shape[-2:]) for _, p in columns)))
    font = _font()
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = int(ruler.textlength(f"{row} {rows}", font)) + 2 * _GAP
    widths = [
        max(pixels[0].shape[-1] * factor, int(ruler.textlength(name, font)))
        for name, pixels in columns
    ]
    row_height = max(pixels[0].shape[-2] for _, pixels in columns) * factor + _GAP
    size = (margin + sum(widths) + _GAP * len(widths), _TEXT_HEIGHT + _GAP + rows * row_height)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    left = margin
    for (name, pixels), width in zip(columns, widths, strict=True):
        draw.text((left, _GAP // 2), name, _INK, font)
        for number in range(rows):
            top = _TEXT_HEIGHT + _GAP // 2 + number * row_height
            sheet.paste(_picture(pixels[number], factor), (left, top))
        left += width + _GAP
    for number in range(rows):
        top = _TEXT_HEIGHT + _GAP // 2 + number * row_height
        draw.text((_GAP, top), f"{row} {number + 1}", _INK, font)
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def tile(image: np.ndarray | None, side: int) -> np.ndarray:
    """An image uint8 ``[H, W, C]`` inside a white square: uint8 ``[3, side, side]``.

    Larger images are shrunk, smaller ones enlarged by a whole number, pixel by pixel; None gives
    the empty square.
    """
    square = Image.new("RGB", (side, side), _BACKGROUND)
    if image is not None:
        shown = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
        picture = Image.fromarray(np.ascontiguousarray(shown))
        picture = _enlarged(picture, max(1, side // max(picture.size)))
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square).transpose(2, 0, 1)


def _picture(pixels: np.ndarray, factor: int) -> Image.Image:
    """One crop uint8 [C, h, w] as an RGB picture, each pixel `factor` wide."""
    shown = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    return _enlarged(Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0))), factor)


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size=14)
    except (ImportError, TypeError):  # PIL without FreeType, or before 10.1: its fixed small font
        return ImageFont.load_default()
